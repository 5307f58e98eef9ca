"""The replies of a sweep's models to prompts: kept in its folder, and compared with those of the dense model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.disk.files import write_json
from deadhead.disk.reading import read_object
from deadhead.errors import InputError
from deadhead.measure.evaluation import require_known
from deadhead.measure.replies import Reply, replies_of, reply_likeness, require_replies, write_replies
from deadhead.training.processes import Progress, counted

_FILE, _DENSE = "replies.json", "dense"


def kept_replies(out: Path) -> dict[str, tuple[Reply, ...]]:
    """Return the models' replies from a sweep's folder by model name, the dense one first; empty if there are none.

    Raises:
        InputError: the file is not such a list.
    """
    path = out / _FILE
    if not path.exists():
        return {}
    found = read_object(path, what="list of models' replies")
    try:
        return TypeAdapter(dict[str, tuple[Reply, ...]]).validate_python(found)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"A list of models' replies was expected in {path}, but its {place} is not; delete it, then they are "
            "written again."
        ) from None


class Replying:
    """Has models reply to prompts, and compares them with the dense model.

    Args:
        out: folder of the sweep.
        dense: the model that the others are made from.
        tokenizer: the tokenizer of all models.
        progress: called with the progress.

    Raises:
        InputError: there is no tokenizer, or the dense model cannot reply or be compared.
        UnsupportedModel: the dense model does not predict the next token.
    """

    def __init__(
        self, out: Path, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress
    ) -> None:
        if tokenizer is None:
            raise InputError(
                "Replies to prompts need the model's tokenizer, but none is known; save the model with one, or leave "
                "replies out."
            )
        require_replies(dense, tokenizer)
        self._path, self._dense, self._tokenizer, self._progress = out / _FILE, dense, tokenizer, progress
        self._kept = kept_replies(out)

    def has(self, name: str) -> bool:
        """Return whether a model's replies are kept."""
        return name in self._kept

    def of_dense(self) -> dict[str, Any]:
        """Return the measurements of the dense model's replies; the replies are written once."""
        return replies_of(self._expected()).values

    def of(self, name: str, model: PreTrainedModel) -> dict[str, Any]:
        """Return the measurements of a pruned model's replies."""
        written = self._write(name, model)
        report = counted(self._progress, f"{name}: comparing replies")
        return replies_of(written, reply_likeness(model, self._dense, self._expected(), progress=report)).values

    def _expected(self) -> tuple[Reply, ...]:
        if kept := self._kept.get(_DENSE):
            require_known(self._dense, max(max(*each.prompt, *each.tokens) for each in kept), of="reply")
            return kept
        return self._write(_DENSE, self._dense)

    def _write(self, name: str, model: PreTrainedModel) -> tuple[Reply, ...]:
        written = write_replies(model, self._tokenizer, progress=counted(self._progress, f"{name}: replies"))
        # The dense model's stand first, those of the others in the order of the sweep.
        self._kept[name] = written
        write_json(self._path, {each: [asdict(reply) for reply in replies] for each, replies in self._kept.items()})
        return written
