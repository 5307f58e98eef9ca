"""Second-order removal: what a sublayer's output loses with its units, if the units that stay make up for them.

For a sublayer y = W x, a token's loss changes by about ½ (gᵀ δy)², g = ∂L/∂y. With C, the second moments of x, and G,
those of g, as independent of each other, units R cost

    ½ tr(W_Rᵀ G W_R (C⁻¹_RR)⁻¹),    and then    W ← W − W_R (C⁻¹_RR)⁻¹ C⁻¹_R:,
                                              C⁻¹ ← C⁻¹ − C⁻¹_:R (C⁻¹_RR)⁻¹ C⁻¹_R:

(Optimal Brain Surgeon, Hassibi and Stork 1993; for units, as in ZipLM, Kurtic et al. 2023, arXiv 2302.04089, equations
3 and 4). The W that is left solves least squares. Where we differ: a token weighs 1/‖h‖² in C and ‖h‖² in G, h the
residual stream behind the sublayer. A norm follows it, so only relative errors count, and a few tokens with massive
activations do not decide all.

The cheapest units go first, one after the other, until none is left. A unit's score is the slope, at its removal, of
the lower convex hull of the loss so far: scores ascend in the order of removal and are comparable between sublayers.

Dimensions: B batch, T tokens, R units or columns that go, S those that stay, H units of a site, E width of a unit in
the output projection's input, n = H·E, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deadhead.criteria.reading import Reading, predicting
from deadhead.criteria.streams import Passage, watched
from deadhead.layouts import Site, head_columns
from deadhead.modes import free_memory
from deadhead.plans.plan import UnitKey

# Of the mean square of an activation, so that few tokens do not determine many weights.
RIDGE = 0.01
# Single units go so many at a time, of all there are.
_STEPS = 96
# Of a matrix's diagonal, what sums in float64 may be off by.
_ROUNDING = 1e-10
# Of the memory that is free, what the moments of a pass over the text may take.
_SHARE = 0.25


@dataclass
class Moments:
    """Sums over the positions that count, of one site."""

    inputs_nn: Tensor  # Σ x xᵀ / ‖h‖²
    gradients_DD: Tensor | None  # Σ g gᵀ ‖h‖², g of the sum of all tokens' losses; None stands for the identity
    count: int = 0


def second_order(
    reading: Reading,
    sites: Sequence[Site],
    *,
    with_gradients: bool,
    most_bytes: int | None = None,
) -> list[Tensor]:
    """Return, for each site, the slopes of its units' costs in the order in which they are best removed, (H,).

    Args:
        reading: the text; it is read once for as many sites as fit into memory.
        sites: sites with output projections.
        with_gradients: whether outputs are weighted by the gradients of the loss, in nats per token; otherwise all
            outputs count the same, relative to the stream.
        most_bytes: the most memory for the moments of one pass, the same in all processes that share the text; None is
            a quarter of the free memory.
    """
    found: list[Tensor] = []
    most = _most_bytes(reading) if most_bytes is None else most_bytes
    shares = reading.shares
    for group in _groups(sites, with_gradients, most):
        moments = measured(reading, group, with_gradients=with_gradients)
        own = [torch.zeros(len(site.units), dtype=torch.float64) for site in group]
        for place in range(shares.index, len(group), shares.count):
            own[place] = slopes(group[place], moments[place])
        # Each was found by one process.
        shares.total(*own)
        found += own
    return found


def _most_bytes(reading: Reading) -> float:
    """Return the bytes that the moments of one pass may take, the same in all processes."""
    device, shares = reading.model.device, reading.shares
    least = float(shares.joined(torch.tensor([free_memory(device)])).min())
    # Processes on the CPU have one memory.
    return _SHARE * least / (shares.count if device.type == "cpu" else 1)


def _groups(sites: Sequence[Site], with_gradients: bool, most: float) -> Iterator[list[Site]]:
    group: list[Site] = []
    taken = 0
    for site in sites:
        width, inner = head_columns(site.output).shape
        size = 4 * (inner**2 + width**2 * with_gradients)
        if group and taken + size > most:
            yield group
            group, taken = [], 0
        group.append(site)
        taken += size
    if group:
        yield group


def measured(
    reading: Reading, sites: Sequence[Site], *, with_gradients: bool, note: Callable[[Any], None] = lambda made: None
) -> list[Moments]:
    """Return the moments of some sites, from one pass over a text, forward and, with gradients, backward.

    `note` is called with the outputs of each batch that this process reads.
    """
    found: dict[UnitKey, Moments] = {}
    for site in sites:
        width, inner = head_columns(site.output).shape
        device = head_columns(site.output).device
        curvature = torch.zeros(width, width, device=device) if with_gradients else None
        found[site.key] = Moments(torch.zeros(inner, inner, device=device), curvature)
    counts_BT = torch.empty(0)
    lengths: dict[UnitKey, Tensor] = {}  # ‖h‖ of the positions that count, 0 elsewhere, (B, T)
    outputs: dict[UnitKey, Tensor] = {}

    def begin(inputs: Mapping[str, Tensor]) -> None:
        nonlocal counts_BT
        counts_BT = predicting(reading.model, inputs)

    @torch.no_grad()
    def visit(passage: Passage) -> None:
        moments, inputs = found[passage.site.key], passage.inputs
        length_BT = passage.after.float().norm(dim=-1)
        counts = counts_BT.to(length_BT.device) & (length_BT != 0)
        rows = inputs[counts].float() / length_BT[counts][:, None]
        moments.inputs_nn.addmm_(rows.T, rows)
        moments.count += len(rows)
        lengths[passage.site.key] = length_BT * counts

    def keep(site: Site, output: Tensor) -> None:
        # A frozen model computes no gradients from its own parameters.
        outputs[site.key] = output if output.requires_grad else output.requires_grad_()

    hooks = [
        site.output.register_forward_hook(lambda module, args, output, site=site: keep(site, output))
        for site in (sites if with_gradients else ())
    ]
    try:
        with torch.set_grad_enabled(with_gradients), watched(reading.model, sites, visit):
            for made, _ in reading.over(begin):
                note(made)
                if not with_gradients:
                    continue
                gradients = reading.gradients(made, [outputs[site.key] for site in sites], int(counts_BT.sum()))
                for site, gradient in zip(sites, gradients, strict=True):
                    length_BT = lengths[site.key]
                    rows = (gradient.reshape(*length_BT.shape, -1).float() * length_BT[..., None]).flatten(0, 1)
                    curvature = found[site.key].gradients_DD
                    assert curvature is not None
                    curvature.addmm_(rows.T, rows)
    finally:
        for hook in hooks:
            hook.remove()
    for moments in found.values():
        count = torch.tensor(moments.count)
        reading.shares.total(count, moments.inputs_nn, *[m for m in [moments.gradients_DD] if m is not None])
        moments.count = int(count)
    return [found[site.key] for site in sites]


def slopes(site: Site, moments: Moments, *, ridge: float = RIDGE) -> Tensor:
    """Return the score of each unit of a site, (H,), float64 on the CPU: ascending in the order of removal."""
    weight, inputs_nn = exact(head_columns(site.output).detach()), exact(moments.inputs_nn)
    gradients_DD = None if moments.gradients_DD is None else exact(moments.gradients_DD)
    if not all(bool(part.isfinite().all()) for part in (weight, inputs_nn, gradients_DD) if part is not None):
        # Whoever ranks by these says so.
        return torch.full((len(site.units),), torch.nan, dtype=torch.float64)
    count = max(moments.count, 1)
    if gradients_DD is not None:
        # ½ tr(Wᵀ G W …) is a sum of squares of G^½ W / √2, which is updated as W is.
        values, vectors = torch.linalg.eigh(gradients_DD / count)
        weight = (values.clamp(min=0) / 2).sqrt()[:, None] * (vectors.T @ weight)
    # Nothing else here is as large: what is no longer needed goes.
    inputs_nn = inputs_nn / count
    order, costs = removal(weight, inputs_nn, site.unit_dim, ridge=ridge)
    hull = _convex(costs)
    # Within a straight piece of the hull too, units go in their order.
    hull *= 1 + 1e-9 * torch.arange(len(hull), dtype=hull.dtype)
    return torch.empty_like(hull).scatter(0, order, hull)


def exact(values: Tensor) -> Tensor:
    """Return numbers in float64, on the CPU if their device has no float64, such as Apple's GPUs."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def removal(
    weight_Dn: Tensor, inputs_nn: Tensor, width: int, *, ridge: float, steps: int = _STEPS
) -> tuple[Tensor, Tensor]:
    """Remove units of `width` columns, the cheapest first, until none is left; the units that stay make up for them.

    Args:
        weight_Dn: W; errors are squared errors of its outputs.
        inputs_nn: C, the second moments of its inputs.
        width: columns of a unit.
        ridge: what is added to C's diagonal, as a share of each of its entries.
        steps: number of rounds in which all units go; within a round, units do not make up for each other.

    Returns:
        The units in the order of removal, (H,), and what each added to the error, (H,), both on the CPU.
    """
    # In units of each feature's own size, a feature that is always 0 weighs nothing.
    sizes_n = inputs_nn.diagonal().clamp(min=0).sqrt()
    weight_Dn = weight_Dn * sizes_n
    scale_n = torch.where(sizes_n > 0, 1 / sizes_n, 0)
    inverse_nn = scale_n[:, None] * inputs_nn
    inverse_nn *= scale_n
    inverse_nn.diagonal()[:] = 1 + ridge
    inverse_nn = torch.linalg.cholesky(inverse_nn)
    inverse_nn = torch.cholesky_inverse(inverse_nn)
    left = torch.arange(len(sizes_n) // width, device=weight_Dn.device)
    at_once = max(1, -(-len(left) // steps))
    order, costs = [], []
    while len(left):
        alone_H = _alone(weight_Dn, inverse_nn, width)
        units = alone_H.argsort(stable=True)
        going, staying = units[:at_once], units[at_once:].sort().values
        gone_R, stay_S = _columns(going, width), _columns(staying, width)
        block_RR = inverse_nn[gone_R[:, None], gone_R]
        across_SR = inverse_nn[stay_S[:, None], gone_R]
        lost_DR = weight_Dn[:, gone_R]
        # (C⁻¹_RR)⁻¹ W_Rᵀ
        solved_RD = solve(block_RR, lost_DR.T)
        together = (lost_DR.T * solved_RD).sum()
        shares = alone_H[going] / alone_H[going].sum() if alone_H[going].sum() > 0 else 0 * alone_H[going]
        order.append(left[going])
        costs.append(together * shares)
        weight_Dn = weight_Dn[:, stay_S] - (across_SR @ solved_RD).T
        inverse_nn = inverse_nn[stay_S[:, None], stay_S]
        inverse_nn -= across_SR @ solve(block_RR, across_SR.T)
        left = left[staying]
    return torch.cat(order).cpu(), torch.cat(costs).cpu()


def _alone(weight_Dn: Tensor, inverse_nn: Tensor, width: int) -> Tensor:
    """Return the cost of each unit if it went next, tr(W_R (C⁻¹_RR)⁻¹ W_Rᵀ), (H,)."""
    if width == 1:
        return weight_Dn.square().sum(0) / inverse_nn.diagonal()
    units_HED = weight_Dn.T.unflatten(0, (-1, width))
    blocks_HEE = inverse_nn.unflatten(0, (-1, width)).unflatten(-1, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return (units_HED * solve(blocks_HEE, units_HED)).sum((1, 2))


def solve(positive: Tensor, right: Tensor) -> Tensor:
    """Return the solution of positive definite systems, (..., n, n) and (..., n, m).

    By Cholesky's factors: those of LU, in float64 and by several threads, have failed in MKL.
    """
    return torch.cholesky_solve(right, cholesky(positive))


def cholesky(positive: Tensor) -> Tensor:
    """Return the lower factors of positive definite matrices, (..., n, n), float64."""
    factor, failed = torch.linalg.cholesky_ex(positive)
    if bool(failed.any()):
        # Rounding took away what is smaller than it.
        size = positive.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
        eye = torch.eye(positive.shape[-1], dtype=positive.dtype, device=positive.device)
        factor = torch.linalg.cholesky(positive + _ROUNDING * size * eye)
    return factor


def _columns(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _convex(increments: Tensor) -> Tensor:
    """Return the slopes of the greatest convex function below the sums of some increments: none is below the last."""
    pieces: list[tuple[float, int]] = []
    for value in increments.tolist():
        total, count = value, 1
        while pieces and pieces[-1][0] * count >= total * pieces[-1][1]:
            before, length = pieces.pop()
            total, count = total + before, count + length
        pieces.append((total, count))
    values = torch.tensor([total / count for total, count in pieces], dtype=torch.float64)
    return values.repeat_interleave(torch.tensor([count for _, count in pieces]))
