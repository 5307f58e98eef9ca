"""Greedy replies for many rows at once: padded on the left if that changes nothing for a model, else by length.

Dimensions: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria


class Told(StoppingCriteria):
    """A stopping criterion that never stops, and only reports the number of new tokens."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell, self._steps = tell, 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """Report after each new token of all rows."""
        self._steps += 1
        self._tell(self._steps)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Writer:
    """Writes greedy replies with a model.

    Args:
        model: a language model.
        ends: tokens that end a reply.
        pad: the token that pads shorter prompts on the left.
    """

    def __init__(self, model: PreTrainedModel, ends: Sequence[int], pad: int) -> None:
        self._model: Any = model
        self._ends, self._pad = list(ends), pad
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters

    def is_indifferent_to_padding(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Return whether padding changes nothing for the model, by a trial with the two shortest lengths."""
        lengths = sorted({len(prompt) for prompt in prompts})
        if not self._takes_mask or len(lengths) < 2:
            return False
        two = [next(prompt for prompt in prompts if len(prompt) == length) for length in lengths[:2]]
        try:
            found, alone = self._logits(two), [self._logits([prompt])[0] for prompt in two]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a model's own code fails in many ways, and may still take rows of one length
            return False
        tolerance = max(1e-4, 4 * torch.finfo(self._model.dtype).eps)
        return all(
            bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
            for ours, theirs in zip(found, alone, strict=True)
        )

    def write(self, prompts: Sequence[Sequence[int]], room: int, told: Told) -> list[tuple[int, ...]]:
        """Return a reply of at most `room` tokens to each prompt, with the token that ends it if there is one."""
        width = max(map(len, prompts))
        ends = {"eos_token_id": self._ends} if self._ends else {}
        rows: list[list[int]] = self._run(prompts, room, stopping_criteria=[told], **ends)[:, width:].tolist()
        stops = [next((at + 1 for at, token in enumerate(row) if token in self._ends), len(row)) for row in rows]
        return [tuple(row[:stop]) for row, stop in zip(rows, stops, strict=True)]

    def _logits(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return the logits (B, 2, V) of the first two new tokens; the second is computed with a cache."""
        output = self._run(prompts, 2, return_dict_in_generate=True, output_logits=True)
        return torch.stack(output.logits, dim=1).float()

    def _run(self, prompts: Sequence[Sequence[int]], room: int, **how: Any) -> Any:
        width = max(map(len, prompts))
        ids_BT = torch.full((len(prompts), width), self._pad, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        device = self._model.device
        mask = {"attention_mask": mask_BT.to(device)} if self._takes_mask else {}
        fixed = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": self._pad}
        return self._model.generate(ids_BT.to(device), max_new_tokens=room, **mask, **fixed, **how)


def ends_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a reply: those in the model's settings, and the tokenizer's end of a text."""
    own = getattr(model.generation_config, "eos_token_id", None)
    several = own if isinstance(own, list | tuple) else [own]
    return sorted({int(end) for end in (*several, tokenizer.eos_token_id) if end is not None})


def groups_of(
    lengths: Sequence[int], rooms: Sequence[int], most: int, batch_size: int, *, padded: bool
) -> Iterator[list[int]]:
    """Yield the prompts that run together: they have the same room, and without padding the same length."""

    def together(index: int) -> tuple[int, int]:
        # Where room is short, it depends on the length.
        return (0, 0) if padded and rooms[index] == most else (lengths[index], rooms[index])

    order = sorted(range(len(lengths)), key=lambda index: (together(index), lengths[index]))
    for _, group in groupby(order, key=together):
        members = list(group)
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]
