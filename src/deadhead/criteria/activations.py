"""Criteria on the inputs of output projections: how large a unit's activations are, and how much they vary.

Dimensions: R positions that count, H units of a site, E width of a unit in the output projection's input, n = H·E,
D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.attaching import output_squares
from deadhead.criteria.reading import Reading, predicting
from deadhead.data.shares import Shares
from deadhead.gates.head_gate import relative_difference
from deadhead.layouts import Site, head_columns


@torch.no_grad()
def output_differences(reading: Reading, sites: Sequence[Site]) -> list[Tensor]:
    """Return the mean over batches of d_h², (H,), for each site."""
    found = [torch.zeros(len(site.units)) for site in sites]
    count = torch.zeros((), dtype=torch.int64)

    def measure(scores: Tensor, site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        heads_RHE = args[0].reshape(-1, len(site.units), site.unit_dim)
        scores.add_(relative_difference(*output_squares(module, heads_RHE)).square().cpu())

    with ExitStack() as exits:
        for scores, site in zip(found, sites, strict=True):
            exits.enter_context(site.output.register_forward_pre_hook(partial(measure, scores, site)))
        count += sum(1 for _ in reading.over())
    reading.shares.total(count, *found)
    return [scores / count for scores in found]


def wanda(reading: Reading, sites: Sequence[Site]) -> list[Tensor]:
    """Return Σ_j ‖W_O,j‖₁ ‖x_j‖₂ over a unit's columns j, divided by the site's mean, (H,), for each site.

    This is Wanda (Sun, Liu, Bair, Kolter 2023, arXiv 2306.11695, equation 1) for whole columns. Wanda compares only
    weights of one output; dividing by the mean makes sites comparable.
    """
    found = []
    for site, moments in zip(sites, _moments(reading, sites), strict=True):
        lengths_n = moments.squares.sqrt() * _columns(site).abs().sum(0)
        scores_H = _by_unit(site, lengths_n)
        found.append(scores_H / scores_H.mean().clamp(min=torch.finfo(torch.float64).tiny))
    return found


def flap(reading: Reading, sites: Sequence[Site]) -> list[Tensor]:
    """Return Var(x_j) ‖W_O,j‖², standardised over a site's columns j and averaged over a unit's, (H,), for each site.

    This is FLAP (An, Zhao, Yu, Tang, Wang 2024, arXiv 2312.11983, equations 5 and 6), except that its authors take the
    mean over a head's columns first. Among few units one is always far below the mean, so too many would go in models
    with few groups.

    The constant part of an activation could be moved into a bias, as the authors do. Here it is not: most models have
    no bias, and least squares after the cut do more.
    """
    found = []
    for site, moments in zip(sites, _moments(reading, sites), strict=True):
        scores_n = moments.variance * _columns(site).square().sum(0)
        deviation = scores_n.std(correction=0)
        # Equals are as good as the mean.
        scores_n = (scores_n - scores_n.mean()) / deviation if deviation > 0 else torch.zeros_like(scores_n)
        found.append(_by_unit(site, scores_n) / site.unit_dim)
    return found


def _columns(site: Site) -> Tensor:
    return head_columns(site.output).detach().cpu().double()


def _by_unit(site: Site, values_n: Tensor) -> Tensor:
    return values_n.unflatten(0, (len(site.units), site.unit_dim)).sum(1)


class _Moments:
    """Mean and spread of each input feature over the positions that count; all (n,), float64 on the CPU."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.spread = torch.zeros(width, dtype=torch.float64)  # Σ (x − mean)²

    def add(self, rows_Rn: Tensor) -> None:
        """Add rows, batch by batch, so that no difference of large sums is taken."""
        if count := len(rows_Rn):
            variance, mean = (part.cpu().double() for part in torch.var_mean(rows_Rn.float(), 0, correction=0))
            self._merge(count, mean, variance * count)

    def _merge(self, count: int, mean: Tensor, spread: Tensor) -> None:
        away, total = mean - self.mean, self.count + count
        self.spread += spread + away.square() * self.count * count / total
        self.mean += away * count / total
        self.count = total

    def of_all(self, shares: Shares) -> _Moments:
        """Return the moments of the rows of all processes."""
        if shares.count == 1:
            return self
        found = _Moments(len(self.mean))
        parts = torch.cat([self.mean.new_tensor([self.count]), self.mean, self.spread])
        for part in shares.joined(parts[None]):
            count, mean, spread = part.tensor_split([1, 1 + len(self.mean)])
            if count:
                found._merge(int(count), mean, spread)
        return found

    @property
    def variance(self) -> Tensor:
        return self.spread / max(self.count, 1)

    @property
    def squares(self) -> Tensor:
        """Σ x²."""
        return self.spread + self.count * self.mean.square()


@torch.no_grad()
def _moments(reading: Reading, sites: Sequence[Site]) -> list[_Moments]:
    found = [_Moments(len(site.units) * site.unit_dim) for site in sites]
    counts = torch.empty(0)

    def begin(inputs: Mapping[str, Tensor]) -> None:
        nonlocal counts
        counts = predicting(reading.model, inputs).flatten()

    def measure(moments: _Moments, module: nn.Module, args: tuple[Any, ...]) -> None:
        moments.add(args[0].flatten(0, -2)[counts.to(args[0].device)])

    with ExitStack() as exits:
        for site, moments in zip(sites, found, strict=True):
            exits.enter_context(site.output.register_forward_pre_hook(partial(measure, moments)))
        for _ in reading.over(begin):
            pass
    return [moments.of_all(reading.shares) for moments in found]
