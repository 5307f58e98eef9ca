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
    shares: Shares = ALONE,
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
        shares: which of the batches this process reads, where several score the same model together.

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
    scoring = Scoring(model, criterion, unit=unit, blocks=blocks)
    reading = WholeReading(model, batches, shares) if scoring.sites and criterion in READS_TEXT else None
    _log.info("scoring units of %d modules by %s", len(scoring.sites), criterion)
    return scoring.scores(scoring.of_units(scoring.sites, reading, seed))


class Scoring:
    """What is scored of a model, and how what each unit scores becomes the scores of what goes or stays together.

    Args: as for `score_heads`, which also says what is raised.
    """

    def __init__(
        self, model: PreTrainedModel, criterion: OneShot, *, unit: Unit | None, blocks: bool | int | Blocks
    ) -> None:
        layout = find_layout(model)
        unit = layout.choose_unit(model, unit, what="heads are cut by")
        sites = layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks))
        # Those that have units.
        self.sites = [site for site in sites if site.units]
        # Units one by one; blocks that do not fit are told of before any text is read.
        self._choices, self._asked = choices_of(sites, unit, 1), choices_of(sites, unit, blocks)
        self.criterion, self._blocks = criterion, blocks
        if criterion not in ONE_SHOT:
            raise InputError(f"The criterion must be one of {', '.join(ONE_SHOT)}, but it is {criterion!r}.")
        if criterion not in _OF_ANY_UNIT and any(site.output_path is None for site in self.sites):
            raise InputError(
                f"Persistent vectors have no score by {criterion!r}, as a layer's output is no sum over them; "
                "use 'taylor' or 'magnitude', or leave blocks out."
            )

    def of_units(self, sites: Sequence[Site], reading: Reading | None, seed: int) -> dict[UnitKey, Tensor]:
        """Return for some sites a score of each unit, (H,), or of each row of the text too, (R, H), on the CPU.

        "random" is only the same if all sites are scored at once. Criteria that look at no text need no reading.
        """
        found = _scores(self.criterion, sites, reading, seed) if sites else []
        return {site.key: values for site, values in zip(sites, found, strict=True)}

    def scores(self, found: Mapping[UnitKey, Tensor]) -> HeadScores:
        """Return the scores of heads and blocks, given those of all units."""
        scores = HeadScores(scores={key: _total(values) for key, values in found.items()}, choices=self._choices)

        def together(key: UnitKey, owner_F: Tensor) -> Tensor:
            single = found[key]
            sums = single.new_zeros(*single.shape[:-1], int(owner_F.max()) + 1).index_add(-1, owner_F, single)
            return sums / owner_F.bincount() if self.criterion in STANDARDISED else _total(sums)

        if isinstance(self._blocks, Mapping):
            return scores.bundled(self._asked.hidden, together)
        return scores.in_blocks(self._blocks, together)


def _total(scores: Tensor) -> Tensor:
    """Return scores, (H,), or what they are of rows with a sign, (R, H)."""
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
