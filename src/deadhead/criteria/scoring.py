"""Score every unit of a model by a one-shot criterion.

These are the usual alternatives to learned gates. Head plan, cut and fine-tuning are the same for both:

- magnitude: the sum of squares of all of the unit's weights,
- taylor: E_x |∂L(x) / ∂ξ_h|, where ξ_h = 1 multiplies the unit's output (Michel, Levy, Neubig 2019, arXiv 1905.10650,
  equation 2; without their normalisation by layer, which `ranking="layer"` makes irrelevant); of a persistent vector ξ
  multiplies e^score,
- output-difference: ‖W_O^h a_h‖² / ‖Σ W_O a‖², how much the layer's output changes without the unit,
- wanda, flap: how large the unit's activations are, and how much they vary (`activations.py`),
- second-order, reconstruction: what the loss, or the layer's output, loses if other units make up for the unit
  (`second_order.py`),
- influence: how far the unit's whole sublayer turns the residual stream (`influence.py`),
- random: a floor for all others.

The score of a block of hidden units is that of its units together, by `taylor` with one ξ for all of them, so that
heads and blocks compare by what is lost for their cost. If scores are only an order (`STANDARDISED`), it is their mean.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from deadhead.attaching import choices_of, gates_of, has_blocks, unwrapped
from deadhead.criteria import activations, weights
from deadhead.criteria.influence import influence
from deadhead.criteria.reading import Reading, WholeReading
from deadhead.criteria.second_order import second_order
from deadhead.criteria.taylor import taylor
from deadhead.data.shares import ALONE, Shares
from deadhead.errors import InputError, typed_but
from deadhead.layouts import Site, find_layout
from deadhead.measure.losses import Batches
from deadhead.plans.blocks import Blocks
from deadhead.plans.kinds import ONE_SHOT, READS_TEXT, STANDARDISED, OneShot
from deadhead.plans.plan import Unit, UnitKey
from deadhead.plans.scores import HeadScores

_log = logging.getLogger(__name__)

# Criteria that need no output projection.
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
    shares: Shares = ALONE,
) -> HeadScores:
    """Score every head of a model by a one-shot criterion, and blocks of hidden units if `blocks` is set.

    Hidden units are scored one by one and ordered by their scores; a block is a run of neighbours in that order.

    Args:
        model: without gates, or with all gates open. It is not changed.
        criterion: the criterion.
        batches: text for the criteria that need it: dictionaries with `input_ids` (B, T). For a model with segment
            memory also `labels` (B, T) and `is_first` (B,), in the order of the text; for other models perhaps `scored`
            (B, T), if not every token counts.
        unit: "head" or "kv_group" (a key/value head with its query heads). None chooses "kv_group" if the model has
            such groups.
        blocks: True scores hidden units too; a number sets the units of a block; a mapping lists the units of each
            block by layer.
        seed: seed of the criterion "random".
        shares: which of the batches this process reads, if several processes score the same model together.

    Returns:
        The scores; `.plan(sparsity)` drops the units with the lowest.

    Raises:
        UnsupportedModel: no head can be pruned, or the criterion cannot follow the model's residual stream.
        InputError: the criterion needs text and got none, or cannot score persistent vectors; a gate is closed; or an
            argument is not allowed.
    """
    model = unwrapped(model)
    gates = gates_of(model)
    if gates is not None and not all(bool(gate.is_open.all()) for _, gate in gates):
        raise InputError("One-shot criteria score a model with all heads open, but some of its gates are closed.")
    scoring = Scoring(model, criterion, unit=unit, blocks=blocks)
    reading = WholeReading(model, batches, shares) if scoring.sites and criterion in READS_TEXT else None
    _log.info("scoring units of %d modules by %s", len(scoring.sites), criterion)
    return scoring.scores(scoring.of_units(scoring.sites, reading, seed))


class Scoring:
    """Scores a model's units, and combines their scores to those of heads and blocks.

    Arguments and errors are those of `score_heads`.
    """

    def __init__(
        self, model: PreTrainedModel, criterion: OneShot, *, unit: Unit | None, blocks: bool | int | Blocks
    ) -> None:
        layout = find_layout(model)
        unit = layout.choose_unit(model, unit, what="heads are cut by")
        sites = layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks))
        # The sites that have units.
        self.sites = [site for site in sites if site.units]
        # Units one by one. Blocks that do not fit are refused before any text is read.
        self._choices, self._asked = choices_of(sites, unit, 1), choices_of(sites, unit, blocks)
        self.criterion, self._blocks = criterion, blocks
        if criterion not in ONE_SHOT:
            raise InputError(f"The criterion must be one of {', '.join(ONE_SHOT)}, but it is {criterion!r}.")
        if criterion not in _OF_ANY_UNIT and any(site.output_path is None for site in self.sites):
            raise InputError(
                f"Persistent vectors have no score by {criterion!r}, because a layer's output is not a sum over them; "
                "use 'taylor' or 'magnitude', or leave blocks out."
            )

    def of_units(self, sites: Sequence[Site], reading: Reading | None, seed: int) -> dict[UnitKey, Tensor]:
        """Return, for each site, the score of each unit, (H,), or of each row of text and unit, (R, H), on the CPU.

        Score all sites at once for "random" to be reproducible. Criteria that do not need text need no reading.
        """
        found = _scores(self.criterion, sites, reading, seed) if sites else []
        return {site.key: values for site, values in zip(sites, found, strict=True)}

    def scores(self, found: Mapping[UnitKey, Tensor]) -> HeadScores:
        """Return the scores of heads and blocks, given the scores of all units."""
        scores = HeadScores(scores={key: _total(values) for key, values in found.items()}, choices=self._choices)

        def together(key: UnitKey, owner_F: Tensor) -> Tensor:
            single = found[key]
            sums = single.new_zeros(*single.shape[:-1], int(owner_F.max()) + 1).index_add(-1, owner_F, single)
            return sums / owner_F.bincount() if self.criterion in STANDARDISED else _total(sums)

        if isinstance(self._blocks, Mapping):
            return scores.bundled(self._asked.hidden, together)
        return scores.in_blocks(self._blocks, together)


def _total(scores: Tensor) -> Tensor:
    """Return scores, (H,); those of rows with a sign, (R, H), are added up without it."""
    return scores.abs().sum(0) if scores.dim() == 2 else scores


def _scores(criterion: OneShot, sites: Sequence[Site], reading: Reading | None, seed: int) -> list[Tensor]:
    if criterion == "magnitude":
        return weights.magnitudes(sites)
    if criterion == "random":
        return weights.random(sites, seed)
    assert reading is not None, "other criteria look at text"
    if criterion == "second-order" or criterion == "reconstruction":
        return second_order(reading, sites, with_gradients=criterion == "second-order")
    by_reading = {
        "taylor": taylor,
        "output-difference": activations.output_differences,
        "wanda": activations.wanda,
        "flap": activations.flap,
        "influence": influence,
    }
    return by_reading[criterion](reading, sites)
