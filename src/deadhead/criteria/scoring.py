"""Score every unit of a model by a one-shot criterion.

What people would use instead of learned gates; behind the same head plan, cut and fine-tuning:

- magnitude: the sum of squares of all of the unit's weights,
- taylor: E_x |∂L(x) / ∂ξ_h|, where ξ_h = 1 multiplies the unit's output (Michel, Levy, Neubig 2019, arXiv 1905.10650,
  equation 2; without their normalisation by layer, which `ranking="layer"` makes irrelevant); of a persistent vector ξ
  multiplies e^score,
- output-difference: ‖W_O^h a_h‖² / ‖Σ W_O a‖², by how much the layer's output changes without the unit,
- wanda, flap: how large its activations are, how much they vary (`activations.py`),
- second-order, reconstruction: what the loss, or the layer's output, loses if other units make up for it
  (`second_order.py`),
- influence: how far its whole sublayer turns the residual stream (`influence.py`),
- random: as a floor for all others.

A block of hidden units scores what its units score together, by `taylor` with one ξ for all of them, so that heads and
blocks compare by what is lost for what they cost. Where scores are an order alone (`STANDARDISED`), it is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from deadhead.attaching import choices_of, gates_of, has_blocks, unwrapped
from deadhead.criteria import activations, weights
from deadhead.criteria.influence import influence
from deadhead.criteria.reading import Batches
from deadhead.criteria.second_order import second_order
from deadhead.criteria.taylor import taylor
from deadhead.errors import InputError, typed_but
from deadhead.layouts import Site, find_layout
from deadhead.plans.blocks import Blocks
from deadhead.plans.kinds import ONE_SHOT, STANDARDISED, OneShot
from deadhead.plans.plan import Unit, UnitKey
from deadhead.plans.scores import HeadScores

# Those that need no output projection to look at.
_OF_ANY_UNIT = ("magnitude", "taylor", "random")


@typed_but("model", "criterion", "batches", "unit")
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
        batches: what criteria that look at text read: dictionaries with `input_ids` (B, T); for a model with segment
            memory `labels` (B, T) and `is_first` (B,), in the order of the text, for others `scored` (B, T), where not
            every token counts.
        unit: "head" or "kv_group" (a key/value head with its query heads); None takes the groups where there are any.
        blocks: whether hidden units are scored too, or how many make a block, or by layer the units of each block.
        seed: of "random".

    Returns:
        The scores; `.plan(sparsity)` drops the lowest.

    Raises:
        UnsupportedModel: there is no head that could be pruned, or the criterion cannot follow the model's stream.
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
    # Units one by one; blocks that do not fit are told of before any text is read.
    choices, asked = choices_of(sites, unit, 1), choices_of(sites, unit, blocks)
    if criterion not in ONE_SHOT:
        raise InputError(f"The criterion must be one of {', '.join(ONE_SHOT)}, but it is {criterion!r}.")
    if criterion not in _OF_ANY_UNIT and any(site.output_path is None for site in there):
        raise InputError(
            f"Persistent vectors have no score by {criterion!r}, as a layer's output is no sum over them; "
            "use 'taylor' or 'magnitude', or leave blocks out."
        )
    found = _scores(model, criterion, there, batches, seed) if there else []
    by_row = {site.key: values for site, values in zip(there, found, strict=True) if values.dim() == 2}
    values = {site.key: _total(values) for site, values in zip(there, found, strict=True)}
    scores = HeadScores(scores=values, choices=choices)

    def together(key: UnitKey, owner_F: Tensor) -> Tensor:
        single = by_row.get(key, values[key])
        sums = single.new_zeros(*single.shape[:-1], int(owner_F.max()) + 1).index_add(-1, owner_F, single)
        return sums / owner_F.bincount() if criterion in STANDARDISED else _total(sums)

    if isinstance(blocks, Mapping):
        return scores.bundled(asked.hidden, together)
    return scores.in_blocks(blocks, together)


def _total(scores: Tensor) -> Tensor:
    """Return scores, (H,), or what they are of rows with a sign, (R, H)."""
    return scores.abs().sum(0) if scores.dim() == 2 else scores


def _scores(model: PreTrainedModel, criterion: OneShot, sites: list[Site], batches: Batches, seed: int) -> list[Tensor]:
    """Return for each site a score of each of its units, (H,), or of each row too, (R, H), on the CPU."""
    if criterion == "magnitude":
        return weights.magnitudes(sites)
    if criterion == "random":
        return weights.random(sites, seed)
    if criterion == "second-order" or criterion == "reconstruction":
        return second_order(model, sites, batches, with_gradients=criterion == "second-order")
    reading = {
        "taylor": taylor,
        "output-difference": activations.output_differences,
        "wanda": activations.wanda,
        "flap": activations.flap,
        "influence": influence,
    }
    return reading[criterion](model, sites, batches)
