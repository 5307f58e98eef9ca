"""Follow a growing metrics.jsonl in little memory, however long the run is."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.training.callbacks.metrics import parsed_line

# The most moments of the gates that are kept; beyond that every other one is dropped.
_MOST_FRAMES = 512
_LONGEST_LINE = 1 << 26


class Frames:
    """Rows of numbers at growing steps, at most `most` plus the newest: beyond that, every other row is dropped."""

    def __init__(self, most: int = _MOST_FRAMES) -> None:
        self.most = most
        # Pairs of a step and its row: every so many of those that came, and the newest.
        self.kept: list[tuple[int, Any]] = []
        self._stride = 1
        self._seen = 0

    def add(self, step: int, row: Any) -> None:
        """Add the newest row."""
        if self._seen and (self._seen - 1) % self._stride:
            self.kept.pop()  # it was there as the newest only
        self.kept.append((step, row))
        if self._seen % self._stride == 0 and len(self.kept) > self.most:
            self.kept = [*self.kept[:-1:2], self.kept[-1]]
            self._stride *= 2
        self._seen += 1


class PhaseMetrics:
    """The logs of a phase: scalars by name, and the gates' open probability and output difference by layer."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.scalars: dict[str, list[float | None]] = {}
        self.open_probability = Frames()
        self.difference: dict[str, list[float]] = {}

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of the log."""
        step = line["step"]
        self.steps.append(step)
        numbers = {
            name: float(value)
            for name, value in line.items()
            if name not in ("phase", "step") and (type(value) is float or (type(value) is int and abs(value) < 2**63))
        }
        for name in {**self.scalars, **numbers}:
            self.scalars.setdefault(name, [None] * (len(self.steps) - 1)).append(numbers.get(name))
        if "open_probability" in line:
            self.open_probability.add(step, line["open_probability"])
        self.difference.update(line.get("output_difference", {}))


class MetricsFollower:
    """Reads the lines added to a metrics.jsonl since the last read; the file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.phases: dict[str, PhaseMetrics] = {}
        self._offset = 0
        self._identity: tuple[int, int] | None = None

    def update(self) -> bool:
        """Read new lines; return whether there are any.

        A replaced file is read from its beginning: a resumed run replaces it to drop the steps that it repeats.
        """
        changed = False
        with suppress(OSError), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity, self._offset, self.phases = identity, 0, {}
            file.seek(self._offset)
            while line := file.readline(_LONGEST_LINE):
                if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
                    break  # it is being written
                self._offset += len(line)
                # None of ours is longer, nor is what was being written when a run was killed a line of ours.
                if (values := parsed_line(line)) is not None:
                    self.phases.setdefault(values["phase"], PhaseMetrics()).add(values)
                    changed = True
        return changed


def thin(steps: list[int], values: list[float | None], most: int = 1500) -> tuple[list[int], list[float | None]]:
    """Return at most about `most` points of a curve that draw the same picture: the extremes of each stretch.

    Steps without a logged value (None) are left out.
    """
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    if len(known) > most:
        height = np.array([value for _, value in known])
        height = np.where(np.isfinite(height), height, np.inf)
        kept = {0, len(known) - 1}
        for stretch in np.array_split(np.arange(len(known)), most // 2):
            kept |= {int(stretch[height[stretch].argmin()]), int(stretch[height[stretch].argmax()])}
        known = [known[place] for place in sorted(kept)]
    return [step for step, _ in known], [value for _, value in known]
