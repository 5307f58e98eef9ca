"""Criteria that need no text: the size of a unit's weights, and chance.

Dimensions: H units of a site.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deadhead.layouts import Site


def magnitudes(sites: Sequence[Site]) -> list[Tensor]:
    """Return the sum of squares of all weights that would go with each unit, (H,), for each site."""
    return [_magnitude(site) for site in sites]


def _magnitude(site: Site) -> Tensor:
    squares: dict[tuple[str, int], Tensor] = {}
    found = []
    for unit in site.units:
        total = 0.0
        for part in site.selections((unit,)):
            # Summed once for all units: of single hidden units there are thousands.
            place = (part.path, part.dim)
            if place not in squares:
                weight = site.module.get_parameter(part.path).detach().cpu().float()
                squares[place] = weight.square().movedim(part.dim, 0).reshape(weight.shape[part.dim], -1).sum(1)
            total += float(squares[place][part.index.cpu()].sum())
        found.append(total)
    return torch.tensor(found)


def random(sites: Sequence[Site], seed: int) -> list[Tensor]:
    """Return random numbers between 0 and 1, determined by the seed, (H,), for each site."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(len(site.units), generator=generator) for site in sites]
