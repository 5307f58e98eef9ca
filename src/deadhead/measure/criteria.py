"""One-shot criteria: a score for every head from one look at a trained model, without training anything.

What people would use instead of learned gates; behind the same head plan, cut and fine-tuning:

- magnitude: L2 norm of all of the head's weights,
- taylor: E_x |∂L(x) / ∂ξ_h|, where ξ_h = 1 multiplies the head's output (Michel, Levy, Neubig 2019, arXiv 1905.10650,
  equation 2; without their normalisation by layer, which `ranking="layer"` makes irrelevant); of a block of persistent
  vectors ξ multiplies e^score,
- output-difference: ‖W_O^h a_h‖ / ‖Σ W_O a‖, by how much the layer's output changes without the head; not for blocks of
  persistent vectors, of which no layer's output is a sum,
- random: as a floor for all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.attaching import block_size, gates_of, output_differences, unwrapped
from deadhead.errors import InputError
from deadhead.layouts import Layout, Site, find_layout
from deadhead.measure.losses import SegmentLoss
from deadhead.modes import evaluating
from deadhead.plans.kinds import ONE_SHOT, OneShot
from deadhead.plans.plan import Unit
from deadhead.plans.scores import HeadScores

# Those that look at text.
READS_TEXT: tuple[OneShot, ...] = ("taylor", "output-difference")

Batches = Iterable[Mapping[str, Tensor]]


def score_heads(
    model: PreTrainedModel,
    criterion: OneShot,
    batches: Batches = (),
    *,
    unit: Unit | None = None,
    blocks: bool | int = False,
    seed: int = 0,
) -> HeadScores:
    """Score every head of a model by a one-shot criterion, and blocks if asked.

    Args:
        model: without gates, or with all of them open; not changed.
        criterion: which.
        batches: what "taylor" and "output-difference" look at: dictionaries with `input_ids` (B, T), and for a model
            with segment memory `labels` (B, T) and `is_first` (B,), in the order of the text.
        unit: "head" or "kv_group" (a key/value head with its query heads); None takes the groups where there are any.
        blocks: whether blocks are scored too, or their size.
        seed: of "random".

    Returns:
        The scores; `.plan(sparsity)` drops the lowest.

    Raises:
        UnsupportedModel: there is no head that could be pruned.
        InputError: the criterion needs text and got none, is not one of persistent vectors, a gate is closed, or an
            argument is not allowed.
    """
    model = unwrapped(model)
    gates = gates_of(model)
    if gates is not None and not all(bool(gate.is_open.all()) for _, gate in gates):
        raise InputError("One-shot criteria score a model with all heads open, but some of its gates are closed.")
    layout = find_layout(model)
    unit = layout.choose_unit(model, unit, what="heads are cut by")
    size = block_size(layout, model, blocks)
    sites = layout.all_sites(model, unit, size)
    there = [site for site in sites if site.units]
    found: list[Tensor] = []
    if criterion not in ONE_SHOT:
        raise InputError(f"The criterion must be one of {', '.join(ONE_SHOT)}, but it is {criterion!r}.")
    if criterion == "output-difference" and any(site.output_path is None for site in there):
        raise InputError(
            "Blocks of persistent vectors have no output difference, as a layer's output is no sum over them; use "
            "'taylor' or 'magnitude', or leave blocks out."
        )
    if criterion == "magnitude":
        found = [_magnitude(layout, site) for site in there]
    elif criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        found = [torch.rand(len(site.units), generator=generator) for site in there]
    elif there:
        found = (_taylor if criterion == "taylor" else _differences)(model, there, batches)
    return HeadScores(
        scores={site.key: scores for site, scores in zip(there, found, strict=True)},
        heads={site.key: site.units for site in sites},
        total={site.key: site.total for site in sites},
        unit=unit,
        block_size=size,
    )


def _magnitude(layout: Layout, site: Site) -> Tensor:
    """Return the norm of all numbers that would go with each head, (H,)."""
    squares = []
    for head in site.units:
        parts = layout.selections(site, (head,))
        rows = [
            site.module.get_parameter(p.path).detach().index_select(p.dim, p.index.to(_device(site))) for p in parts
        ]
        squares.append(sum(float(values.float().square().sum()) for values in rows))
    return torch.tensor(squares).sqrt()


def _device(site: Site) -> torch.device:
    return next(site.module.parameters()).device


class _HeadMask:
    """Multiplies the heads of every row of a batch by numbers of its own, to be derived by."""

    def __init__(self, site: Site) -> None:
        self.shape = (-1, len(site.units), site.unit_dim)
        self.mask_BH: Tensor | None = None
        self.rows = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        self.mask_BH = torch.ones(self.rows, self.shape[1], device=hidden.device, requires_grad=True)
        # Some models hand their output projection all tokens of all rows in one dimension.
        heads_BTHE = hidden.reshape(self.rows, *self.shape)
        masked = heads_BTHE * self.mask_BH[:, None, :, None].to(hidden.dtype)
        return (masked.reshape(hidden.shape), *rest)


class _GateMask(nn.Module):
    """The same for blocks whose module reads their gate itself, in whose place it stands."""

    # What an attention module asks of a gate that learns.
    idle = ()

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.num_units = len(site.units)
        self.device = _device(site)
        self.mask_BH: Tensor | None = None
        self.rows = 0

    def forward(self) -> tuple[Tensor, None]:
        self.mask_BH = torch.ones(self.rows, self.num_units, device=self.device, requires_grad=True)
        return self.mask_BH, None


_Mask = _HeadMask | _GateMask


@contextmanager
def _masked(sites: list[Site]) -> Iterator[list[_Mask]]:
    """Put a mask on every site for a while."""
    masks: list[_Mask] = [_HeadMask(site) if site.output_path is not None else _GateMask(site) for site in sites]
    with ExitStack() as exits:
        for site, mask in zip(sites, masks, strict=True):
            if isinstance(mask, _HeadMask):
                exits.callback(site.output.register_forward_pre_hook(mask).remove)
            else:
                exits.enter_context(_in_place_of_gate(site, mask))
        yield masks


@contextmanager
def _in_place_of_gate(site: Site, mask: _GateMask) -> Iterator[None]:
    gate = getattr(site.module, site.gate_name, None)
    site.module.add_module(site.gate_name, mask)
    try:
        yield
    finally:
        delattr(site.module, site.gate_name)
        if gate is not None:
            site.module.add_module(site.gate_name, gate)


def _taylor(model: PreTrainedModel, sites: list[Site], batches: Batches) -> list[Tensor]:
    """Return the mean over rows of |∂L / ∂ξ_h|, L the mean loss of the row's tokens."""
    found = [torch.zeros(len(site.units)) for site in sites]
    rows = 0

    def look(loss: Tensor, count: int, masks: list[_Mask]) -> None:
        # The loss is a mean over the rows, so each row's own derivative is so many times as large.
        derivatives = torch.autograd.grad(loss * count, [mask.mask_BH for mask in masks if mask.mask_BH is not None])
        for scores, derivative_BH in zip(found, derivatives, strict=True):
            scores += derivative_BH.abs().sum(0).float().cpu()

    with torch.enable_grad(), _masked(sites) as masks:
        for loss, count in _losses(model, batches, before=lambda count: _set_rows(masks, count)):
            look(loss, count, masks)
            rows += count
    return [scores / rows for scores in found]


def _set_rows(masks: list[_Mask], rows: int) -> None:
    for mask in masks:
        mask.rows = rows
        if isinstance(mask, _GateMask):
            # In evaluation, in which the model is, gates count as decided.
            mask.train()


def _differences(model: PreTrainedModel, sites: list[Site], batches: Batches) -> list[Tensor]:
    """Return the root of the mean over batches of d_h²."""
    found = [torch.zeros(len(site.units)) for site in sites]

    def hook(scores: Tensor, site: Site) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Any, ...]) -> None:
            heads_RHE = args[0].reshape(-1, len(site.units), site.unit_dim)
            scores.add_(output_differences(module, heads_RHE).square().cpu())

        return measure

    hooks = [s.output.register_forward_pre_hook(hook(scores, s)) for scores, s in zip(found, sites, strict=True)]
    count = 0
    try:
        with torch.no_grad():
            for _ in _losses(model, batches):
                count += 1
    finally:
        for handle in hooks:
            handle.remove()
    return [(scores / count).sqrt() for scores in found]


def _losses(
    model: PreTrainedModel, batches: Batches, before: Callable[[int], None] = lambda rows: None
) -> Iterable[tuple[Tensor, int]]:
    """Yield the loss of each batch, in evaluation mode, and its rows."""
    segment_loss = SegmentLoss(model)
    empty = True
    with evaluating(model):
        for batch in batches:
            empty = False
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            before(len(inputs["input_ids"]))
            yield segment_loss(model, inputs).loss, len(inputs["input_ids"])
    if empty:
        raise InputError("This criterion looks at text, but no batch was given.")
