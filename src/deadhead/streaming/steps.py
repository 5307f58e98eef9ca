"""The results of a pass over a model's layers, kept layer by layer, so that a stopped pass resumes to the same end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deadhead.errors import InputError, first_line

Streams = Mapping[str, Sequence[Tensor]]
"""Hidden states of each batch, by the name of the stream."""


class Steps:
    """The steps of one pass in a folder: the results of each step, and the hidden states before the next.

    Args:
        folder: the folder; it is created if it does not exist.
        keeps_states: whether the states before every step are kept, rather than only those before the next step.
    """

    def __init__(self, folder: Path, *, keeps_states: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._keeps_states = folder, keeps_states

    @property
    def done(self) -> int:
        """Number of steps that are done."""
        count = 0
        while self._found(count).exists():
            count += 1
        return count

    def states(self, step: int) -> dict[str, list[Tensor]]:
        """Return the hidden states before a step."""
        streams: dict[str, list[Tensor]] = {}
        with _opened(self._states(step)) as file:
            for name in sorted(file.keys()):
                streams.setdefault(name.partition(".")[0], []).append(file.get_tensor(name))
        return streams

    def found(self, step: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the results of a step: tensors, and metadata about them."""
        with _opened(self._found(step)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118

    def path(self, step: int) -> Path:
        """Return the file of a step's results."""
        return self._found(step)

    def keep(self, step: int, found: Mapping[str, Tensor], words: Mapping[str, str], states: Streams) -> None:
        """Keep a step's results and the states after it; the step counts as done only after this."""
        named = {f"{name}.{place:06}": state for name, each in states.items() for place, state in enumerate(each)}
        _save(self._states(step + 1), named, {})
        _save(self._found(step), found, words)
        if not self._keeps_states:
            self._states(step).unlink(missing_ok=True)

    def _found(self, step: int) -> Path:
        return self.folder / f"layer-{step:05}.safetensors"

    def _states(self, step: int) -> Path:
        return self.folder / f"states-{step:05}.safetensors"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a kept file; raise InputError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}, which a stopped pruning left, is damaged ({first_line(error)}); delete {path.parents[1]} and "
            "start again."
        ) from error


def _save(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
    """Write a file completely or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, metadata=dict(words))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
