"""One layer of the cut and the dense model side by side: what the projections in it read, and what they should give.

Dimensions: B rows, T tokens, R = B · T, N inputs of a projection, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.compensation.calibration import Calibration
from deadhead.compensation.moments import Moments
from deadhead.compensation.streams import Stream, first, is_near
from deadhead.compensation.sublayers import Sublayer, dense_in_place
from deadhead.models.pruned.structure import OutputBias

_TINY = 1e-30


@dataclass(frozen=True)
class Passed:
    """What the dense model did in one layer.

    Args:
        order: its sublayers, as they were run.
        residuals: for each of them and each batch the residual stream behind it, (B, T, D); None where the layer's
            output is not its input and its projections' outputs added up.
    """

    order: list[Sublayer]
    residuals: list[list[Tensor]] | None


def pass_dense(stream: Stream, index: int, sublayers: Sequence[Sublayer]) -> Passed:
    """Run a layer of the dense model on all batches, so that its stream goes on to the next; look at its sublayers."""
    order: list[Sublayer] = []
    states: list[Tensor | None] = []
    residuals: list[list[Tensor]] | None = None if stream.is_whole else [[] for _ in sublayers]
    layer = stream.layers[index]
    for batch, (args, kwargs) in enumerate(stream.inputs(index)):
        before = stream.states[batch]
        run: list[tuple[Sublayer, Tensor]] = []
        with ExitStack() as hooks:
            for sublayer in sublayers:
                output = stream.model.get_submodule(sublayer.path)
                hooks.enter_context(output.register_forward_hook(_noting(run, sublayer)))
            state = first(layer(*args, **kwargs))
        order = order or [sublayer for sublayer, _ in run]
        states.append(state)
        if residuals is None:
            if stream.is_whole:
                break
            continue
        assert before is not None
        behind = [h.to(state.dtype) for h in _sums(before, [value for _, value in run])][1:]
        if (
            [each for each, _ in run] != order
            or len(run) != len(sublayers)
            or not (len(run) and is_near(behind[-1], state))
        ):
            residuals = None
            continue
        for kept, value in zip(residuals, [*behind[:-1], state], strict=True):
            kept.append(value)
    stream.states = states if not stream.is_whole else stream.states
    return Passed([*dict.fromkeys(order)], residuals)


def _noting(run: list[tuple[Sublayer, Tensor]], sublayer: Sublayer) -> Callable[..., None]:
    return lambda module, args, output: run.append((sublayer, output))


def _sums(hidden: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return hidden states, and what they are after each of some outputs is added; at least in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = [output.to(wide).reshape(hidden.shape) for output in outputs if output.numel() == hidden.numel()]
    return [*accumulate(parts, initial=hidden.to(wide))]


def gather(
    stream: Stream,
    index: int,
    passed: Passed,
    place: int,
    dense: nn.Module,
    calibration: Calibration,
) -> tuple[Moments, Moments] | None:
    """Return the moments of one projection of a layer of the cut model, of the text to fit to and of what is held out.

    The first target is what the dense sublayer makes of the same input. Where the layer adds up what its sublayers
    give, the second is what the dense model's residual stream has behind it, but for what the cut model's has before.
    A token counts 1 / ‖h‖², h that dense residual: a norm follows, so only a relative error matters. Elsewhere it
    counts by what the sublayer gives. None is returned where the projection was not run.
    """
    sublayer = passed.order[place]
    earlier = [stream.model.get_submodule(each.path) for each in passed.order[:place]]
    output = stream.model.get_submodule(sublayer.path)
    found: list[Moments] = []
    wanted = passed.residuals
    dense_outputs = _captured(stream, index, dense, sublayer)
    for batch, (args, kwargs) in enumerate(stream.inputs(index)):
        x_RN, before = _features(stream, index, args, kwargs, output, earlier)
        y = next(dense_outputs)
        if x_RN is None or y is None or len(x_RN) != len(y):
            return None
        targets = [y]
        if wanted is None:
            square_R = y.to(torch.promote_types(y.dtype, torch.float32)).square().sum(-1)
            square_R = square_R + square_R.mean()
        else:
            hidden, after = stream.states[batch], wanted[place][batch]
            assert hidden is not None
            after = after.to(torch.promote_types(after.dtype, torch.float32))
            targets.append((after - _sums(hidden, before)[-1]).flatten(0, -2))
            square_R = after.square().sum(-1).flatten()
        if not found:
            for _ in range(2):
                found.append(
                    Moments(
                        0 if isinstance(output, OutputBias) else x_RN.shape[1],
                        y.shape[1],
                        len(targets),
                        has_bias=getattr(output, "bias", None) is not None,
                        device=y.device,
                    )
                )
        x_RN = x_RN[:, : found[0].inputs]
        weight_R = _is_text(calibration.batches[batch], square_R) / square_R.clamp(min=_TINY)
        found[calibration.is_held[batch]].add(x_RN, targets, weight_R)
    return found[0], found[1]


def _is_text(batch: Mapping[str, Tensor], like_R: Tensor) -> Tensor:
    """Return 0 for tokens that are padding, 1 for others."""
    mask = batch.get("attention_mask")
    return torch.ones_like(like_R) if mask is None or mask.numel() != len(like_R) else mask.flatten().to(like_R)


class _Enough(Exception):
    """Ends the run of a layer of which no more is needed."""


def _run(stream: Stream, index: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    with suppress(_Enough):
        stream.layers[index](*args, **kwargs)


def _features(
    stream: Stream,
    index: int,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    output: nn.Module,
    earlier: Sequence[nn.Module],
) -> tuple[Tensor | None, list[Tensor]]:
    """Run a layer up to a projection; return what that reads (R, N), and what those before it gave."""
    read: list[Tensor] = []
    given: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        read.append(inputs[0].flatten(0, -2))
        # A whole stack may not bear to be left in the middle.
        if not stream.is_whole:
            raise _Enough

    with ExitStack() as hooks:
        hooks.enter_context(output.register_forward_pre_hook(note))
        for module in earlier:
            hooks.enter_context(module.register_forward_hook(lambda _, inputs, result: given.append(result)))
        _run(stream, index, args, kwargs)
    return (torch.cat(read) if read else None), given


def _captured(stream: Stream, index: int, dense: nn.Module, sublayer: Sublayer) -> Iterator[Tensor | None]:
    """Yield what the dense sublayer gives for each batch of the cut model's stream, (R, D)."""
    for args, kwargs in stream.inputs(index):
        made: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Any, ...], result: Tensor, made: list[Tensor] = made) -> None:
            made.append(result.flatten(0, -2))
            if not stream.is_whole:
                raise _Enough

        with dense_in_place(stream.model, dense, sublayer) as output, output.register_forward_hook(note):
            _run(stream, index, args, kwargs)
        yield torch.cat(made) if made else None
