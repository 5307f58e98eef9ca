"""One layer of the cut and the dense model side by side: the inputs of its projections, and their targets.

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
from deadhead.compensation.moments import HeldRows, Moments
from deadhead.compensation.streams import Stream, first, is_near
from deadhead.compensation.sublayers import Sublayer, dense_in_place
from deadhead.data.shares import ALONE, Shares
from deadhead.models.pruned.structure import OutputBias

_TINY = 1e-30


@dataclass(frozen=True)
class Passed:
    """What the dense model computed in one layer.

    Args:
        order: its sublayers, in the order in which they ran.
        residuals: for each sublayer and batch, the residual stream after it, (B, T, D); None if the layer's output is
            not the sum of its input and its projections' outputs.
    """

    order: list[Sublayer]
    residuals: list[list[Tensor]] | None


def pass_dense(stream: Stream, index: int, sublayers: Sequence[Sublayer], shares: Shares = ALONE) -> Passed:
    """Run a layer of the dense model on all batches, which moves its stream to the next layer; observe its sublayers.

    If several processes have `shares` of the text, all of them get the same result.
    """
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
    residuals = None if shares.any(residuals is None) else residuals
    return Passed(shares.agreed([*dict.fromkeys(order)]), residuals)


def _noting(run: list[tuple[Sublayer, Tensor]], sublayer: Sublayer) -> Callable[..., None]:
    return lambda module, args, output: run.append((sublayer, output))


def _sums(hidden: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return hidden states, and the states after each of some outputs is added; in at least float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    parts = [output.to(wide).reshape(hidden.shape) for output in outputs if output.numel() == hidden.numel()]
    return [*accumulate(parts, initial=hidden.to(wide))]


class CutLayer:
    """A layer of the cut model, whose projections are fitted in order, each on the outputs of those before it.

    Args:
        stream: the cut model's stream before the layer.
        index: index of the layer.
        passed: what the dense model computed in the layer.
        dense: the dense model.
        calibration: the text.
    """

    def __init__(self, stream: Stream, index: int, passed: Passed, dense: nn.Module, calibration: Calibration) -> None:
        self._stream, self._index, self._passed = stream, index, passed
        self._dense, self._calibration = dense, calibration
        # The inputs of the projections so far, (R, N) for each batch, if the layer adds up their outputs.
        self._read: list[tuple[nn.Module, list[Tensor]]] = []

    def moments(self, place: int) -> tuple[Moments, Moments | HeldRows] | None:
        """Return the moments of one projection, on the text to fit to and on held-out text.

        The first target is the dense sublayer's output for the same input. If the layer adds up its sublayers'
        outputs, there is a second target: the dense model's residual stream after the sublayer minus the cut model's
        before it. Tokens are then weighted by 1 / ‖h‖², with h that dense residual: a norm follows, so only relative
        errors matter. In other layers they are weighted by the sublayer's output. Tokens of all processes that share
        the text count.

        Args:
            place: place of the projection's sublayer in the order in which they run; those before it are done.

        Returns:
            The moments, or None if the projection did not run.
        """
        found = self._own_moments(place)
        shares = self._calibration.shares
        if shares.any(found is None) or found is None:
            return None
        for each in found:
            each.add_others(shares)
        return found

    def _own_moments(self, place: int) -> tuple[Moments, Moments | HeldRows] | None:
        """Return the moments of the tokens that this process reads."""
        sublayer = self._passed.order[place]
        output = self._stream.model.get_submodule(sublayer.path)
        has_bias = getattr(output, "bias", None) is not None
        residuals = self._passed.residuals
        fitted, held = None, None
        read: list[Tensor] = []
        for batch, seen in enumerate(self._seen(sublayer, output)):
            if seen is None:
                return None
            x_RN, y_RD = seen
            targets = [y_RD]
            if residuals is None:
                square_R = y_RD.to(torch.promote_types(y_RD.dtype, torch.float32)).square().sum(-1)
                square_R = square_R + square_R.mean()
            else:
                after = residuals[place][batch]
                after = after.to(torch.promote_types(after.dtype, torch.float32))
                targets.append((after - self._behind(batch)).flatten(0, -2))
                square_R = after.square().sum(-1).flatten()
                read.append(x_RN)
            if fitted is None or held is None:
                sizes = x_RN.shape[1], y_RD.shape[1], len(targets)
                fitted = Moments(*sizes, has_bias=has_bias, device=y_RD.device)
                is_few = self._calibration.held_tokens < x_RN.shape[1] and y_RD.device.type != "mps"
                held = HeldRows(has_bias=has_bias) if is_few else Moments(*sizes, has_bias=has_bias, device=y_RD.device)
                # All held-out rows may be in other processes.
                held.add(x_RN[:0], [target_RD[:0] for target_RD in targets], square_R[:0])
            weight_R = _is_text(self._calibration.batches[batch], square_R) / square_R.clamp(min=_TINY)
            (held if self._calibration.is_held[batch] else fitted).add(x_RN, targets, weight_R)
        if read:
            self._read.append((output, read))
        assert fitted is not None and held is not None, "each process has a batch"
        return fitted, held

    def advance(self) -> None:
        """Move the cut model's stream to the next layer, with the outputs of the fitted projections."""
        stream = self._stream
        if self._passed.residuals is None or not self._is_sum():
            stream.advance(self._index)
            return
        stream.states = [
            None if hidden is None else self._behind(batch).to(hidden.dtype)
            for batch, hidden in enumerate(stream.states)
        ]

    def _behind(self, batch: int) -> Tensor:
        """Return a batch's residual stream after the sublayers that are done, (B, T, D), in at least float32."""
        hidden = self._stream.states[batch]
        assert hidden is not None
        return _sums(hidden, [output(read[batch]) for output, read in self._read])[-1]

    def _is_sum(self) -> bool:
        """Return whether the layer's output, on the first batch, is the sum of input and projections' outputs."""
        args, kwargs = next(self._stream.inputs(self._index))
        state = first(self._stream.layers[self._index](*args, **kwargs))
        return is_near(self._behind(0).to(state.dtype), state)

    def _seen(self, sublayer: Sublayer, output: nn.Module) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yield, for each batch, a projection's inputs, (R, N), and the dense sublayer's outputs for them, (R, D).

        A sublayer with fewer units computes the same numbers for the units that it has. So one run of the dense
        sublayer gives both. This is checked on the first batch, because the model may have learned since it was cut.
        """
        columns = None if sublayer.columns is None else torch.tensor(sublayer.columns, dtype=torch.long)
        for batch, (args, kwargs) in enumerate(self._stream.inputs(self._index)):
            with dense_in_place(self._stream.model, self._dense, sublayer) as dense_output:
                dense_x, y_RD = self._run(args, kwargs, dense_output)
            if dense_x is None or y_RD is None:
                yield None
                return
            x_RN = None if columns is None else dense_x[:, columns.to(dense_x.device)]
            if x_RN is None or not batch:
                own, _ = self._run(args, kwargs, output)
                if own is None or len(own) != len(y_RD):
                    yield None
                    return
                own = own[:, :0] if isinstance(output, OutputBias) else own
                if x_RN is None or x_RN.shape != own.shape or not is_near(x_RN, own):
                    x_RN, columns = own, None
            yield x_RN, y_RD

    def _run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], output: nn.Module
    ) -> tuple[Tensor | None, Tensor | None]:
        """Run the layer up to a projection; return the projection's inputs, (R, N), and outputs, (R, D)."""
        read: list[Tensor] = []
        given: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> None:
            read.append(inputs[0].flatten(0, -2))
            given.append(result.flatten(0, -2))
            # A whole stack may not tolerate being left in the middle.
            if not self._stream.is_whole:
                raise _Enough

        with output.register_forward_hook(note), suppress(_Enough):
            self._stream.layers[self._index](*args, **kwargs)
        return (torch.cat(read), torch.cat(given)) if read else (None, None)


class _Enough(Exception):
    """Ends the run of a layer once nothing more is needed of it."""


def _is_text(batch: Mapping[str, Tensor], like_R: Tensor) -> Tensor:
    """Return 0 for padding, 1 for other tokens."""
    mask = batch.get("attention_mask")
    return torch.ones_like(like_R) if mask is None or mask.numel() != len(like_R) else mask.flatten().to(like_R)
