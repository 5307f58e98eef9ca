"""Learned sizes: learn by gradients how many units each sublayer keeps, while the kept units make up for the others.

The units of a sublayer are sorted in the order in which they are best removed (`second_order.py`, "reconstruction"),
and its output projection is a function of the number that is left (`nested.py`). So the whole model is a function of
one size s for each sublayer. With c(s) the cost of a size, gradient descent solves

    min KL(dense ‖ model(s))   such that   Σ c(s) = budget:

a sublayer that gives more for its cost than the others grows, and one that gives less shrinks. A ranking, in contrast,
adds up the errors of single sublayers, and does not see what later sublayers make of them.

The function is only a model: afterwards the original model is cut, and compensated in a separate step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.attaching import choices_of, has_blocks
from deadhead.criteria.nested import NestedSublayer, resized
from deadhead.criteria.reading import WholeReading, predicting
from deadhead.criteria.second_order import measured, slopes
from deadhead.errors import InputError
from deadhead.layouts import find_layout
from deadhead.layouts.refusals import require_gradients
from deadhead.measure.divergence import divergence
from deadhead.measure.last_states import LastStates
from deadhead.measure.losses import Batches, SegmentLoss, SegmentOutputs
from deadhead.modes import evaluating, frozen, uncompiled
from deadhead.plans.plan import Unit, UnitKey
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_costs import UnitCosts

# How far a sublayer's share moves in the first step if it gives twice what others do for its cost; and in the last.
_RATE, _LAST_RATE = 0.08, 0.008
# Of the running mean of what sublayers give.
_SMOOTHING = 0.8
# Steps, of all, before those whose sizes are averaged.
_BEFORE_AVERAGE = 0.6
_HALVINGS = 50


@dataclass(frozen=True, kw_only=True)
class LearnedSizes:
    """The result of learning sizes.

    Args:
        scores: how far each choice lies inside its sublayer's size, in choices: from 1 on it is wholly inside.
        divergences: KL(dense ‖ model) at each step, in nats per token.
    """

    scores: HeadScores
    divergences: tuple[float, ...]


class SizesCourse:
    """The data that sizes are learned from: the inputs of each projection, and the model's outputs on a text.

    They are gathered once; sizes for several budgets can then be learned, one after the other.

    Args:
        model: a language model without gates; it is not changed.
        batches: text, as `score_heads` takes it. Projections' inputs are gathered on all batches, and each step learns
            from one batch.
        costs: what units cost; keys without a cost are left as they are.
        unit: "head" or "kv_group". None chooses "kv_group" if the model has such groups.
        blocks: True removes hidden units too; a number sets how many go at a time.
        progress: called with the number of batches read, and of all batches.

    Raises:
        UnsupportedModel: the criterion cannot follow the model's residual stream.
        InputError: there is no text, the softmax is adaptive, or persistent vectors would have to go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Batches,
        costs: UnitCosts,
        *,
        unit: Unit | None = None,
        blocks: bool | int = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        require_gradients(model, "A model")
        layout = find_layout(model)
        unit = layout.choose_unit(model, unit, what="heads are cut by")
        found = layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks))
        sites = [site for site in found if site.units]
        if any(site.output_path is None for site in sites):
            raise InputError(
                "Persistent vectors have no sizes to learn, because a layer's output is not a sum over them; use "
                "criterion 'gates' or 'taylor', or leave blocks out."
            )
        # Blocks that do not fit are refused before any text is read.
        choices_of(found, unit, blocks)
        self._model, self._costs = model, costs
        self._batches = list(batches)
        self._dense: list[Tensor] = []

        def note(outputs: SegmentOutputs) -> None:
            self._dense.append(_kept(outputs.read))
            progress(len(self._dense), len(self._batches))

        moments = measured(WholeReading(model, self._batches), sites, with_gradients=False, note=note)
        values = {site.key: slopes(site, each) for site, each in zip(sites, moments, strict=True)}

        def together(key: UnitKey, owner_F: Tensor) -> Tensor:
            return values[key].new_zeros(int(owner_F.max()) + 1).index_add(0, owner_F, values[key])

        self._scores = HeadScores(scores=values, choices=choices_of(found, unit, 1)).in_blocks(blocks, together)
        self._nested: dict[UnitKey, NestedSublayer] = {}
        for site, each in zip(sites, moments, strict=True):
            if site.key in costs.tables:
                mean_nn = each.inputs_nn.div_(max(each.count, 1))
                self._nested[site.key] = NestedSublayer(site, mean_nn, _ascending(self._scores, site.key))
            # Together they are as large as most of the model.
            each.inputs_nn = each.inputs_nn.new_empty(0)

    @property
    def batches(self) -> int:
        """How many batches were read."""
        return len(self._batches)

    def learn(
        self,
        share: float,
        steps: int,
        *,
        start: Mapping[UnitKey, float] | None = None,
        progress: Callable[[int, float], None] = lambda done, divergence: None,
    ) -> LearnedSizes:
        """Learn how much of each sublayer to keep, so that the model costs a share of the dense model.

        Args:
            share: the share of the dense cost, in (0, 1].
            steps: steps of the descent; batches are repeated if they are fewer.
            start: sizes to begin with, in units, such as those of a larger share; None begins with those of a ranking.
            progress: called with the number of steps done, and KL(dense ‖ model) in nats per token.
        """
        limit, model, nested = share * self._costs.total, self._model, self._nested
        if start is None:
            kept = self._scores.over(self._costs).within(self._costs, limit).units
            start = {key: float(len(kept[key])) for key in nested}
        descent = _Descent(self._costs, limit, start, {key: each.units for key, each in nested.items()}, steps)
        losses = SegmentLoss(model)
        losses.try_out()
        divergences = []
        for step, (index, batch) in enumerate(islice(cycle(enumerate(self._batches)), steps), 1):
            if not index:
                # The text begins anew.
                losses.memory = None
            lost, gradients = _gradients(losses, model, nested, descent.sizes, batch, self._dense[index])
            descent.step(gradients)
            divergences.append(lost)
            progress(step, lost)
        # What costs nothing stays.
        margins = {key: torch.full((len(of_key),), math.inf) for key, of_key in self._scores.scores.items()}
        margins |= {key: _margins(self._scores.scores[key], each, descent.found[key]) for key, each in nested.items()}
        return LearnedSizes(scores=replace(self._scores, scores=margins), divergences=tuple(divergences))


def _kept(read: LastStates) -> Tensor:
    """Return what is kept of the dense model's states, or of its logits, in half precision: the text may be long."""
    if read.is_adaptive:
        raise InputError(
            "Sizes are learned from whole distributions, which an adaptive softmax does not compute; use criterion "
            "'gates' or 'reconstruction'."
        )
    return read.states_BTD.detach().to(torch.float16 if read.output_layer is None else torch.bfloat16)


def _ascending(scores: HeadScores, key: UnitKey) -> list[Sequence[int]]:
    """Return the units of each choice, the one with the lowest score first."""
    return [scores.choices.members[key][place] for place in scores.scores[key].argsort(stable=True).tolist()]


def _margins(scores_H: Tensor, sublayer: NestedSublayer, size: float) -> Tensor:
    """Return by how much of itself, and of those that go before, each choice lies inside of a size, (H,)."""
    counts = torch.tensor(sublayer.counts, dtype=torch.float64)
    # The last to go is the first inside.
    inside = (size - counts[:-1]) / counts.diff()
    return torch.empty_like(inside).scatter(0, scores_H.argsort(stable=True), inside.flip(0))


def _gradients(
    losses: SegmentLoss,
    model: PreTrainedModel,
    nested: Mapping[UnitKey, NestedSublayer],
    sizes: Mapping[UnitKey, float],
    batch: Mapping[str, Tensor],
    dense_BTD: Tensor,
) -> tuple[float, dict[UnitKey, float]]:
    """Return KL(dense ‖ model), in nats a token, at some sizes, and its gradient by each of them."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    counts_BT = predicting(model, inputs)
    leaves = [torch.tensor(sizes[key], dtype=torch.float64, requires_grad=True) for key in nested]
    with frozen(model), evaluating(model), uncompiled(), torch.enable_grad(), resized([*nested.values()], leaves):
        outputs = losses(model, inputs)

        def lost(states_ND: Tensor, dense_ND: Tensor) -> Tensor:
            with torch.no_grad():
                expected_NV = outputs.read.logits(dense_ND)
            return divergence(outputs.read.logits(states_ND), expected_NV)[None]

        dense_BTD = dense_BTD.to(outputs.read.states_BTD)
        total = outputs.read.sums(lost, counts_BT, dense_BTD)[0] / counts_BT.sum()
        found = torch.autograd.grad(total, leaves)
    return float(total.detach()), dict(zip(nested, map(float, found), strict=True))


class _Descent:
    """Moves sizes along what each sublayer gives for its cost, at a cost that stays.

    Args:
        costs: of units.
        limit: what all may cost.
        sizes: where to begin, in units.
        units: that each sublayer has.
        steps: that will be made.
    """

    def __init__(
        self, costs: UnitCosts, limit: float, sizes: Mapping[UnitKey, float], units: Mapping[UnitKey, int], steps: int
    ) -> None:
        self._costs, self._limit, self._steps = costs, limit, steps
        self._keys, self._units_K = [*units], torch.tensor([float(n) for n in units.values()], dtype=torch.float64)
        self._sizes_K = self._within(torch.tensor([sizes[key] for key in self._keys], dtype=torch.float64))
        self._gains_K = torch.zeros_like(self._sizes_K)
        self._sums_K, self._summed, self._step = torch.zeros_like(self._sizes_K), 0, 0

    @property
    def sizes(self) -> dict[UnitKey, float]:
        """Where it is now, in units."""
        return dict(zip(self._keys, self._sizes_K.tolist(), strict=True))

    @property
    def found(self) -> dict[UnitKey, float]:
        """The mean of the last sizes."""
        mean_K = self._sums_K / self._summed if self._summed else self._sizes_K
        return dict(zip(self._keys, mean_K.tolist(), strict=True))

    def step(self, gradients: Mapping[UnitKey, float]) -> None:
        """Make a step, given the loss's gradient by each size; one that is not finite moves nothing."""
        prices = self._costs.slopes(self._counts(self._sizes_K))
        gains_K = torch.tensor(
            [-gradients[key] / prices[key] if prices[key] > 0 else 0.0 for key in self._keys], dtype=torch.float64
        )
        self._step += 1
        if bool(gains_K.isfinite().all()):
            self._gains_K = _SMOOTHING * self._gains_K + (1 - _SMOOTHING) * gains_K
        # Those at an end would be the only ones that count if they gave much more than they could.
        share_K = self._sizes_K / self._units_K
        inner_K = (share_K > 1e-3) & (share_K < 1 - 1e-3)
        typical = self._gains_K[inner_K if bool(inner_K.any()) else slice(None)]
        mean = float(typical.mean()) if float(typical.mean()) > 0 else float(typical.abs().mean())
        if mean > 0:
            falling = (1 + math.cos(math.pi * (self._step - 1) / self._steps)) / 2
            rate = _LAST_RATE + (_RATE - _LAST_RATE) * falling
            moves_K = rate * (self._gains_K / mean - 1).clamp(-2, 2)
            self._sizes_K = self._within(self._sizes_K + moves_K * self._units_K)
        if self._step > _BEFORE_AVERAGE * self._steps:
            self._sums_K, self._summed = self._sums_K + self._sizes_K, self._summed + 1

    def _within(self, sizes_K: Tensor) -> Tensor:
        """Return sizes moved by one share of all sublayers, so that they cost as much as they may."""

        def moved(shift: float) -> Tensor:
            return torch.minimum((sizes_K + shift * self._units_K).clamp(min=0), self._units_K)

        low, high = -2.0, 2.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._costs.of(self._counts(moved(middle))) > self._limit else (middle, high)
        return moved(low)

    def _counts(self, sizes_K: Tensor) -> dict[UnitKey, float]:
        """Return sizes by key, of those that have lost all of their units before too."""
        return {**dict.fromkeys(self._costs.tables, 0.0), **dict(zip(self._keys, sizes_K.tolist(), strict=True))}
