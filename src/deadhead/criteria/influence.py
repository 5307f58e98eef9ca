"""The influence of whole sublayers: how far each turns the residual stream.

Dimensions: B batch, T tokens, H units of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from deadhead.criteria.reading import Reading, predicting
from deadhead.criteria.streams import Passage, watched
from deadhead.layouts import Site


@torch.no_grad()
def influence(reading: Reading, sites: Sequence[Site]) -> list[Tensor]:
    """Return the mean of 1 − cos(h before, h after), divided among a site's units, (H,), for each site.

    This is block influence (Men et al. 2024, arXiv 2403.03853, equation 1), but of attention and feed-forward parts
    rather than layers. All units of a site have the same score, so a site goes as a whole before the next begins.
    """
    totals = {site.key: torch.zeros((), dtype=torch.float64) for site in sites}
    tokens = torch.zeros((), dtype=torch.int64)
    counts_BT = torch.empty(0)

    def begin(inputs: Mapping[str, Tensor]) -> None:
        nonlocal counts_BT
        counts_BT = predicting(reading.model, inputs)
        tokens.add_(int(counts_BT.sum()))

    def visit(passage: Passage) -> None:
        # 1 − cos as ½ ‖â − b̂‖², which is exact for small angles too.
        before, after = (normalize(stream.float(), dim=-1) for stream in (passage.before, passage.after))
        turned_BT = (after - before).square().sum(-1) / 2
        totals[passage.site.key] += float(turned_BT[counts_BT.to(turned_BT.device)].sum())

    with watched(reading.model, sites, visit):
        for _ in reading.over(begin):
            pass
    reading.shares.total(tokens, *totals.values())
    return [(totals[site.key] / tokens.clamp(min=1) / len(site.units)).expand(len(site.units)) for site in sites]
