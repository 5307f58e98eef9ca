"""Follow a metrics.jsonl while it grows, in memory that stays small however long the run is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.training.callbacks.metrics import parsed_line

# Of the gates so many moments are kept at most; beyond that every other one is dropped.
_MOST_FRAMES = 512
_CHUNK = 1 << 24
_LONGEST_LINE = 1 << 26


class Frames:
    """Rows of numbers at growing steps, thinned by dropping every other one when they become too many.

    Args:
        most: rows kept at most; the newest is always among them.
    """

    def __init__(self, most: int = _MOST_FRAMES) -> None:
        self.most = most
        # Every so many of those that came, and the newest beside them.
        self._even: list[tuple[int, Any]] = []
        self._newest: list[tuple[int, Any]] = []
        self._stride = 1
        self._seen = 0

    def add(self, step: int, row: Any) -> None:
        """Add the newest row."""
        self._newest = [(step, row)]
        if self._seen % self._stride == 0:
            self._even += self._newest
            if len(self._even) > self.most:
                self._even = self._even[::2]
                self._stride *= 2
        self._seen += 1

    @property
    def steps(self) -> list[int]:
        """The steps of the rows that are kept."""
        return [step for step, _ in self._kept()]

    @property
    def rows(self) -> list[Any]:
        """The rows that are kept."""
        return [row for _, row in self._kept()]

    def _kept(self) -> list[tuple[int, Any]]:
        return self._even if self._even[-1:] == self._newest else [*self._even, *self._newest]


class PhaseMetrics:
    """What a phase has logged: scalars by name, and of its gates, by layer, open probability and output difference."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scalars: dict[str, list[float | None]] = {}
        self.open_probability = Frames()
        self.difference: dict[str, list[float]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Take in one line."""
        step = line["step"]
        for name, value in line.items():
            if name not in ("phase", "step") and (type(value) is float or (type(value) is int and abs(value) < 2**63)):
                self.scalars.setdefault(name, [None] * len(self.steps)).append(float(value))
        self.steps.append(step)
        for values in self.scalars.values():
            if len(values) < len(self.steps):
                values.append(None)
        if "open_probability" in line:
            self.open_probability.add(step, line["open_probability"])
        self.difference.update(line.get("output_difference", {}))


class MetricsFollower:
    """Reads what has been added to a metrics.jsonl since the last time.

    Args:
        path: the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, PhaseMetrics] = {}
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def update(self) -> bool:
        """Read on; return whether anything is new.

        A file that was replaced, as by a resumed run, which drops what it will do again, is read from its beginning.
        """
        try:
            file = self.path.open("rb")
        except OSError:
            return False
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity, self._offset, self.phases = identity, 0, {}
            file.seek(self._offset)
            changed = False
            rest = b""
            while chunk := file.read(_CHUNK):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._offset += len(line) + 1
                    changed |= self._take(line)
                if len(rest) > _LONGEST_LINE:
                    # None of ours; what follows of it is no line either.
                    self._offset += len(rest)
                    rest = b""
        return changed

    def _take(self, line: bytes) -> bool:
        values = parsed_line(line)
        if values is None:
            return False  # the line that was being written when the run was killed, or none of ours
        self.phases.setdefault(values["phase"], PhaseMetrics()).add(values)
        return True


def thin(steps: list[int], values: list[float | None], most: int = 1500) -> tuple[list[int], list[float | None]]:
    """Return at most about `most` points of a curve that draw the same picture: of each stretch its lowest and highest.

    Args:
        steps: where.
        values: what; None where nothing was logged, which is left out.
        most: how many points.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if len(known) <= most:
        return [step for step, _ in known], [value for _, value in known]
    height = np.array([value for _, value in known])
    height = np.where(np.isfinite(height), height, np.inf)
    kept = {0, len(known) - 1}
    for stretch in np.array_split(np.arange(len(known)), most // 2):
        kept |= {int(stretch[height[stretch].argmin()]), int(stretch[height[stretch].argmax()])}
    chosen = sorted(kept)
    return [known[place][0] for place in chosen], [known[place][1] for place in chosen]
