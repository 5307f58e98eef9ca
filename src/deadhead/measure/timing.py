"""How fast models are on this machine: medians of interleaved repetitions, so that noise affects all models alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from deadhead.errors import InputError, typed_but
from deadhead.layouts.inputs import made_inputs, made_tokens, positions_read, run, runner
from deadhead.layouts.refusals import require_model, require_weights
from deadhead.measure.losses import SegmentLoss, require_language_model
from deadhead.measure.positions import require_positions
from deadhead.modes import evaluating

Workload = Literal["prefill", "decode", "train"]
WORKLOADS: tuple[Workload, ...] = ("prefill", "decode", "train")
NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one workload on one model.

    Args:
        workload: "prefill" (a forward pass over batch × length tokens), "decode" (one token at a time for each text,
            after a context of `length` tokens that is not timed) or "train" (forward and backward pass over
            batch × length tokens).
        seconds: median time of one repetition.
        tokens_per_second: tokens of the workload over `seconds`; for images and sounds, patches and frames.
    """

    workload: Workload
    seconds: float
    tokens_per_second: float


@typed_but("models")
def bench(
    models: Mapping[str, PreTrainedModel],
    *,
    workload: Workload = "prefill",
    batch_size: int = 8,
    length: int = 128,
    new_tokens: int = NEW_TOKENS,
    repeats: int = 10,
) -> dict[str, Timing]:
    """Time a workload on several models, one repetition of each in turn.

    Args:
        models: models by name; the first is the one that others are compared with. Models of images or sound are timed
            on random inputs of the size in their configuration, whatever `length` is.
        workload: "prefill", "decode" or "train" (see `Timing`).
        batch_size: B, texts (or images, or sounds) at once.
        length: T, tokens of each text.
        new_tokens: tokens that "decode" adds to each text.
        repeats: repetitions that count; one before them does not.

    Returns:
        The time of each model, by name.

    Raises:
        InputError: a number is below 1, the workload is unknown, there is no model, or a model has no weights or too
            few positions.
        UnsupportedModel: "decode" or "train" was requested for a model that does not predict the next token, or a
            model does not run on inputs that deadhead can make up.
    """
    given: Any = models
    if not isinstance(given, Mapping) or not given:
        got = "none" if isinstance(given, Mapping) else f"an object of type {type(given).__name__}"
        raise InputError(f"A benchmark's models must be given by name, as in {{'dense': model}}, but got {got}.")
    for model in models.values():
        require_model(model)
        require_weights(model, "A benchmark")
        require_timed(model, workload, length, new_tokens)
    sizes = {"batch size": batch_size, "length": length, "new tokens": new_tokens, "repeats": repeats}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"A benchmark's {name} must be at least 1, but it is {value}.")
    if workload not in WORKLOADS:
        raise InputError(f"A benchmark's workload must be one of {', '.join(WORKLOADS)}, but it is {workload!r}.")
    runs, tokens = {}, {}
    for name, model in models.items():
        runs[name] = _run(model, batch_size, length, workload, new_tokens)
        tokens[name] = batch_size * (new_tokens if workload == "decode" else positions_read(model, length))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repeats + 1):
        for name, (prepare, repeat) in runs.items():
            prepared = prepare()
            begin = time.perf_counter()
            repeat(prepared)
            if models[name].device.type == "cuda":
                torch.cuda.synchronize()
            if repetition:
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        name: Timing(workload=workload, seconds=median, tokens_per_second=tokens[name] / median)
        for name, median in medians.items()
    }


def require_timed(model: PreTrainedModel, workload: Workload, length: int, new_tokens: int = NEW_TOKENS) -> None:
    """Check that a model can run a workload, and has positions for its texts; its weights are not needed."""
    if workload != "prefill":
        require_language_model(model, f"The workload {workload}")
    require_positions(model, length + (new_tokens if workload == "decode" else 0), of=f"A text of the {workload}")


def _run(
    model: PreTrainedModel, batch_size: int, length: int, workload: Workload, new_tokens: int
) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Return an untimed preparation, and the repetition, which takes what the preparation returns.

    Of models that do not predict the next token only the part with the layers runs, as in the check of a cut.
    """
    network: nn.Module = model
    if model.can_generate():
        ids = made_tokens(model, batch_size, length + 1)
        inputs: dict[str, Any] = {"input_ids": ids[:, :-1], "use_cache": True}
    else:
        network = runner(model)
        inputs = dict(made_inputs(network, batch_size, length))

    def read() -> Any:
        with evaluating(model), torch.inference_mode():
            return model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values

    def prefill(_: Any) -> None:
        with evaluating(model), torch.inference_mode():
            run(network, inputs)

    def decode(cache: Any) -> None:
        with evaluating(model), torch.inference_mode():
            for _ in range(new_tokens):
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)

    losses = SegmentLoss(model)

    def train(_: Any) -> None:
        # `evaluating` restores the modes that it found.
        with evaluating(model):
            model.train()
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            begins = torch.ones(batch_size, dtype=torch.bool)
            loss = losses(model, {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "is_first": begins}).loss
            # Gradients are returned rather than stored, so that those of the caller stay as they are.
            torch.autograd.grad(loss, parameters, allow_unused=True)

    if workload == "decode":
        return read, decode
    return lambda: None, prefill if workload == "prefill" else train


def efficiency(dense_seconds: float, pruned_seconds: float, dense_flops: float, pruned_flops: float) -> float:
    """Return measured speedup ÷ the speedup that the removed FLOPs allow; 1.0 means that all of it was gained."""
    return (dense_seconds / pruned_seconds) / (dense_flops / pruned_flops)
