"""One-shot criteria: a score for every head from one look at a trained model, without training anything.

What people would use instead of learned gates; behind the same head plan, cut and fine-tuning:

- magnitude: L2 norm of all of the head's weights,
- taylor: E_x |∂L(x) / ∂ξ_h|, where ξ_h = 1 multiplies the head's output (Michel, Levy, Neubig 2019, arXiv 1905.10650,
  equation 2; without their normalisation by layer, which `ranking="layer"` makes irrelevant); of a persistent vector ξ
  multiplies e^score,
- output-difference: ‖W_O^h a_h‖ / ‖Σ W_O a‖, by how much the layer's output changes without the head; not for
  persistent vectors, of which no layer's output is a sum,
- random: as a floor for all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.attaching import choices_of, gates_of, has_blocks, output_squares, unwrapped
from deadhead.errors import InputError
from deadhead.gates.head_gate import relative_difference
from deadhead.layouts import Site, find_layout
from deadhead.measure.losses import SegmentLoss, SegmentOutputs, require_language_model
from deadhead.modes import evaluating
from deadhead.plans.blocks import LARGEST_SORTED, Blocks, choose_block_size
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
    blocks: bool | int | Blocks = False,
    seed: int = 0,
) -> HeadScores:
    """Score every head of a model by a one-shot criterion, and blocks of hidden units if asked.

    Hidden units are scored one by one and ordered by their scores; a block is so many neighbours in that order.

    Args:
        model: without gates, or with all of them open; not changed.
        criterion: which.
        batches: what "taylor" and "output-difference" look at: dictionaries with `input_ids` (B, T); for a model
            with segment memory `labels` (B, T) and `is_first` (B,), in the order of the text, for others `scored`
            (B, T), where not every token counts.
        unit: "head" or "kv_group" (a key/value head with its query heads); None takes the groups where there are any.
        blocks: whether hidden units are scored too, or how many make a block, or by layer the units of each block.
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
    sites = layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks))
    there = [site for site in sites if site.units]
    if criterion not in ONE_SHOT:
        raise InputError(f"The criterion must be one of {', '.join(ONE_SHOT)}, but it is {criterion!r}.")
    if criterion == "output-difference" and any(site.output_path is None for site in there):
        raise InputError(
            "Persistent vectors have no output difference, as a layer's output is no sum over them; use "
            "'taylor' or 'magnitude', or leave blocks out."
        )
    if criterion == "magnitude":
        found = [_magnitude(site) for site in there]
    elif criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        found = [torch.rand(len(site.units), generator=generator) for site in there]
    else:
        found = (_taylor if criterion == "taylor" else _differences)(model, there, batches) if there else []
    scores = HeadScores(
        scores={site.key: scores for site, scores in zip(there, found, strict=True)},
        # Units one by one.
        choices=choices_of(sites, unit, bool(blocks) and 1),
    )
    if isinstance(blocks, Mapping):
        return scores.bundled(choices_of(sites, unit, blocks).hidden)
    widths = [len(site.units) for site in there if site.is_hidden]
    asked = None if isinstance(blocks, bool) else blocks
    return scores.in_blocks(choose_block_size(widths, asked, largest=LARGEST_SORTED)) if widths else scores


def _magnitude(site: Site) -> Tensor:
    """Return the norm of all numbers that would go with each head, (H,)."""
    squares = []
    for head in site.units:
        parts = site.selections((head,))
        weights = [site.module.get_parameter(part.path).detach() for part in parts]
        rows = [w.index_select(part.dim, part.index.to(w.device)) for w, part in zip(weights, parts, strict=True)]
        squares.append(sum(float(values.float().square().sum()) for values in rows))
    return torch.tensor(squares).sqrt()


class _Mask(nn.Module):
    """Multiplies the units of every row of a batch by numbers of its own, to be derived by.

    It hooks on to the output projection. Where the module reads its gate itself, it stands in the gate's place.
    """

    # What an attention module asks of a gate that learns: here each unit has its own.
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


def _taylor(model: PreTrainedModel, sites: list[Site], batches: Batches) -> list[Tensor]:
    """Return the mean over rows of |∂L / ∂ξ_h|, L the mean loss of the row's tokens; weighted by those that count."""
    found = [torch.zeros(len(site.units)) for site in sites]
    masks = [_Mask(site) for site in sites]
    losses, total = _tried(model), 0
    with torch.enable_grad(), ExitStack() as exits:
        for mask in masks:
            exits.enter_context(mask.put_on())
        for batch, weight in _read(model, losses, batches, masks):
            # The loss is a mean over the rows, so each row's own derivative is so many times as large.
            derivatives = torch.autograd.grad(batch.loss * weight, [mask.mask_BH for mask in masks])
            for scores, derivative_BH in zip(found, derivatives, strict=True):
                scores += derivative_BH.abs().sum(0).float().cpu()
            total += weight
    return [scores / total for scores in found]


def _differences(model: PreTrainedModel, sites: list[Site], batches: Batches) -> list[Tensor]:
    """Return the root of the mean over batches of d_h²."""
    found = [torch.zeros(len(site.units)) for site in sites]
    losses = _tried(model)

    def measure(scores: Tensor, site: Site, module: nn.Module, args: tuple[Any, ...]) -> None:
        heads_RHE = args[0].reshape(-1, len(site.units), site.unit_dim)
        scores.add_(relative_difference(*output_squares(module, heads_RHE)).square().cpu())

    with torch.no_grad(), ExitStack() as exits:
        for scores, site in zip(found, sites, strict=True):
            exits.enter_context(site.output.register_forward_pre_hook(partial(measure, scores, site)))
        count = sum(1 for _ in _read(model, losses, batches))
    return [(scores / count).sqrt() for scores in found]


def _tried(model: PreTrainedModel) -> SegmentLoss:
    """Return what reads batches, tried on a model that nothing hooks on to yet."""
    require_language_model(model, "A criterion that looks at text")
    losses = SegmentLoss(model)
    losses.try_out()
    return losses


def _read(
    model: PreTrainedModel, losses: SegmentLoss, batches: Batches, masks: Iterable[_Mask] = ()
) -> Iterator[tuple[SegmentOutputs, int]]:
    """Yield what the model makes of each batch, in evaluation mode, and its weight: its rows, or tokens that count."""
    rows = 0
    with evaluating(model):
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            rows = len(inputs["input_ids"])
            for mask in masks:
                mask.rows = rows
                # In evaluation, in which the model is, gates count as decided.
                mask.train()
            # Nothing tells of a row's first token.
            weight = int(inputs["scored"][:, 1:].sum()) if "scored" in inputs else rows
            yield losses(model, inputs), weight
    if not rows:
        raise InputError("This criterion looks at text, but no batch was given.")
