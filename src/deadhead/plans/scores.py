"""Scores of heads and hidden units, and the head plan that drops those with the lowest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deadhead.errors import InputError, typed
from deadhead.plans.blocks import LARGEST_SORTED, choose_block_size, owners, sorted_blocks
from deadhead.plans.choices import Choices
from deadhead.plans.kinds import Ranking
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_costs import UnitCosts


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """The score of each head of a model, and of each block of hidden units, by any criterion; the lowest go."""

    scores: Mapping[UnitKey, Tensor]  # a number for each choice, (H,), on the CPU. −∞: it must go
    choices: Choices
    output_scale: bool = False  # what the plan is to say of it; False for scores that were taken without gates

    @typed
    def plan(self, sparsity: float, *, ranking: Ranking = "global") -> HeadPlan:
        """Return the plan that drops a share of the present heads: those with the lowest scores.

        If blocks have scores, the same share of them goes too.

        Args:
            sparsity: the share, in [0, 1]. Heads that must go (a score of −∞) count, and go even if they are more.
            ranking: "global" compares the heads of all layers; "layer" drops the same share of each.

        Raises:
            InputError: the sparsity is out of range, or a score is not a number.
        """
        if not 0 <= sparsity <= 1:
            raise InputError(f"The sparsity must lie between 0 and 1, but it is {sparsity}.")
        self._require_numbers()
        keys = [key for key, count in self.choices.counts.items() if count]
        kinds = [[key for key in keys if key.kind == kind] for kind in ("head", "block")]
        groups = kinds if ranking == "global" else [[key] for key in keys]
        kept: dict[UnitKey, Sequence[int]] = {}
        for group in filter(None, groups):
            values = torch.cat([self.scores[key].flatten() for key in group])
            stays = values > -math.inf
            stays[values.argsort(stable=True)[: round(sparsity * len(values))]] = False
            for key, part in zip(group, stays.split([self.choices.counts[key] for key in group]), strict=True):
                kept[key] = part.nonzero().flatten().tolist()
        return self.choices.plan(kept, output_scale=self.output_scale)

    def bundled(
        self, blocks: Mapping[UnitKey, Sequence[Sequence[int]]], together: Callable[[UnitKey, Tensor], Tensor]
    ) -> HeadScores:
        """Return scores for blocks of hidden units in place of single units; heads keep their scores.

        Args:
            blocks: the units of each block, by key.
            together: given a key and the index of each unit's block, (F,), returns the blocks' scores, (H,).
        """
        members, scores = dict(self.choices.members), dict(self.scores)
        for key, found in blocks.items():
            if found:
                owner = owners([unit for (unit,) in self.choices.members[key]], found)
                members[key], scores[key] = found, together(key, owner)
        return replace(self, scores=scores, choices=replace(self.choices, members=members))

    def in_blocks(self, asked: bool | int, together: Callable[[UnitKey, Tensor], Tensor]) -> HeadScores:
        """Return scores for blocks of hidden units with like scores, if there are hidden units.

        See `sorted_blocks` and `bundled`; a bool leaves the size to `choose_block_size`, which raises.
        """
        units = {key: self.choices.units[key] for key in self.scores if key.kind == "block"}
        if not units:
            return self
        size = None if isinstance(asked, bool) else asked
        size = choose_block_size(map(len, units.values()), size, largest=LARGEST_SORTED)
        return self.bundled({key: sorted_blocks(units[key], self.scores[key], size) for key in units}, together)

    def over(self, costs: UnitCosts) -> HeadScores:
        """Return these scores, which must mean something as numbers, divided by the cost of each choice."""
        slopes = costs.slopes({key: len(units) for key, units in self.choices.units.items()})
        prices = {key: self.choices.sizes[key] * slope for key, slope in slopes.items()}
        mean = sum(float(price_H.mean()) for price_H in prices.values() if len(price_H)) / max(len(prices), 1)
        scores = {
            # A choice without cost is worth keeping, whatever its score.
            key: (values / (prices[key] / mean)).to(values.dtype) if slopes.get(key, 0.0) > 0 else values
            for key, values in self.scores.items()
        }
        return replace(self, scores=scores)

    def within(self, costs: UnitCosts, limit: float) -> HeadPlan:
        """Return the plan that drops the choices with the lowest scores until the rest costs at most `limit`.

        Choices that still fit then come back, the highest scores first, so that the budget is used up. If no plan is
        within the limit, everything that has a cost goes.

        Raises:
            InputError: a score is not a number.
        """
        self._require_numbers()
        left = {key: len(units) for key, units in self.choices.units.items()}
        kept = {key: set(range(count)) for key, count in self.choices.counts.items()}
        spent = costs.of(left)
        gone: list[tuple[float, UnitKey, int]] = []
        keys = [key for key in costs.tables if self.choices.counts[key]]
        scores = torch.cat([self.scores[key].flatten() for key in keys]) if keys else torch.empty(0)
        every = [(key, place) for key in keys for place in range(self.choices.counts[key])]
        sizes = {key: [len(block) for block in self.choices.members[key]] for key in keys}
        for index in scores.argsort(stable=True).tolist():
            score, (key, place) = float(scores[index]), every[index]
            if spent <= limit and score > -math.inf:
                break
            price = costs.saved(key, left[key], sizes[key][place])
            if score > -math.inf and price <= 0:
                continue
            spent -= price
            left[key] -= sizes[key][place]
            kept[key].discard(place)
            gone.append((score, key, place))
        for score, key, place in reversed(gone):
            price = costs.saved(key, left[key] + sizes[key][place], sizes[key][place])
            if score > -math.inf and spent + price <= limit:
                spent += price
                left[key] += sizes[key][place]
                kept[key].add(place)
        return self.choices.plan({key: sorted(places) for key, places in kept.items()}, output_scale=self.output_scale)

    def _require_numbers(self) -> None:
        if any(bool(values.isnan().any()) for values in self.scores.values()):
            raise InputError("Some heads have a score that is not a number, so they cannot be ranked.")
