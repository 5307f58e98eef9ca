"""Options of a single phase, besides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.errors import InputError, require_fields
from deadhead.plans.memory_sizes import in_bytes
from deadhead.training.processes import Progress
from deadhead.training.runs.forecast import Part


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a single phase, besides its recipe.

    Args:
        tokenizer: the model's tokenizer, if it is not saved with the model.
        teacher: the model to distil from with `distill`; None: in `deadhead.prune`, the model itself as it is now.
        recover: steps of training after a cut by `deadhead.prune`, in which the model learns from the dense one.
        seed: seed of dropout, gate noise, LoRA adapters and initial weights.
        out: folder of the checkpoint to write; None writes none.
        resume: continue from the last checkpoint in `OUT.work`.
        progress: called with the name of the current work, how much is done, how much there is in total, and the last
            numbers.
        announce: called before `deadhead.prune` starts, with the parts of its work and how long each may take.
        report_to: trackers that transformers knows, such as "wandb".
        device: device to run on, such as "cpu"; None: the accelerator, if any.
        dtype: dtype to load a model's weights in, such as "bfloat16"; None: the one they were saved in.
        evaluation_tokens: tokens of the validation text to measure on; None: all.
        max_memory: the most memory that `deadhead.prune` may take, in bytes or as "24GiB"; if the estimate for one of
            its parts is higher, it is refused before it starts. None: no limit.

    Raises:
        InputError: the seed, or a number of steps or tokens, is out of range.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    teacher: PreTrainedModel | str | Path | None = None
    recover: int = 0
    seed: int = 0
    out: str | Path | None = None
    resume: bool = False
    progress: Progress | None = None
    announce: Callable[[Sequence[Part]], None] | None = None
    report_to: Sequence[str] = ()
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    evaluation_tokens: int | None = None
    max_memory: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", (self.report_to,))
        require_fields(self)
        if self.max_memory is not None:
            try:
                object.__setattr__(self, "max_memory", in_bytes(f"{self.max_memory}"))
            except ValueError as error:
                raise InputError(f"max_memory: {error}, but {self.max_memory!r} was given.") from None
        for name, least in (("recover", 0), ("seed", 0), ("evaluation_tokens", 2)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (is_whole and least <= value < 2**31) and not (value is None and name == "evaluation_tokens"):
                raise InputError(
                    f"{name} must be a whole number of at least {least} and below 2^31, but got {value!r}."
                )
