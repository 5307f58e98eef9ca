"""The first-order criterion: how fast the loss changes as a unit is scaled.

Dimensions: B batch, R rows of all batches, T tokens, H units of a site, E width of a unit in the output projection's
input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.criteria.reading import Reading
from deadhead.layouts import Site


class _Mask(nn.Module):
    """Multiplies the units of every row of a batch by numbers of that row, for derivatives with respect to them.

    It is a hook on the output projection. If the module reads its gate itself, it takes the gate's place.
    """

    # What an attention module asks of a gate that learns; here each unit has its own.
    idle = ()

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.rows = 0
        self.mask_BH = torch.empty(0)
        self.register_buffer("owner", torch.arange(len(site.units)), persistent=False)

    def forward(self) -> tuple[Tensor, None]:
        device = next(self.site.module.parameters()).device
        self.mask_BH = torch.ones(self.rows, len(self.site.units), device=device, requires_grad=True)
        return self.mask_BH, None

    def multiply(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        mask_BH, _ = self()
        # Some models hand their output projection all tokens of all rows in one dimension.
        heads_BTHE = hidden.reshape(self.rows, -1, len(self.site.units), self.site.unit_dim)
        masked = heads_BTHE * mask_BH[:, None, :, None].to(hidden.device, hidden.dtype)
        return (masked.reshape(hidden.shape), *rest)

    @contextmanager
    def put_on(self) -> Iterator[None]:
        if self.site.output_path is not None:
            with self.site.output.register_forward_pre_hook(self.multiply):
                yield
            return
        modules = self.site.module._modules
        before = dict(modules)
        modules[self.site.gate_name] = self
        try:
            yield
        finally:
            modules.clear()
            modules.update(before)


def taylor(reading: Reading, sites: Sequence[Site]) -> list[Tensor]:
    """Return ∂L / ∂ξ_h of every row, (R, H), for each site, where L is the mean loss of the row's tokens.

    Rows are weighted by their share of the tokens that count. The score of a unit is the sum of absolute values over
    rows. The score of several units takes the absolute values of their sum, because they may make up for each other.
    """
    found: list[list[Tensor]] = [[] for _ in sites]
    masks = [_Mask(site) for site in sites]
    total = 0

    def begin(inputs: Mapping[str, Tensor]) -> None:
        for mask in masks:
            mask.rows = len(inputs["input_ids"])
            # In evaluation, in which the model is, gates count as decided.
            mask.train()

    with torch.enable_grad(), ExitStack() as exits:
        for mask in masks:
            exits.enter_context(mask.put_on())
        for made, inputs in reading.over(begin):
            # Nothing tells of a row's first token.
            weight = int(inputs["scored"][:, 1:].sum()) if "scored" in inputs else len(inputs["input_ids"])
            # The loss is a mean over the rows, so each row's own derivative is so many times as large.
            derivatives = reading.gradients(made, [mask.mask_BH for mask in masks], weight)
            for rows, derivative_BH in zip(found, derivatives, strict=True):
                rows.append(derivative_BH.float().cpu())
            total += weight
    counted = torch.tensor(total)
    reading.shares.total(counted)
    # A process may have had none.
    empty = [torch.empty(0, len(site.units)) for site in sites]
    joined = [reading.shares.joined(torch.cat([none, *rows])) for none, rows in zip(empty, found, strict=True)]
    return [rows / counted for rows in joined]
