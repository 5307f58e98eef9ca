"""What gates open: plans of places and of units, and what a plan says of each block."""

from __future__ import annotations

import pytest

from deadhead.errors import InputError
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import UnitPlan

HEADS, HIDDEN, GONE = UnitKey("head", 0), UnitKey("block", 0), UnitKey("block", 1)
# A cut took heads 1 and 2, unit 3 of layer 0, and all of layer 1.
CHOICES = Choices(
    unit="head",
    members={HEADS: [(0,), (3,)], HIDDEN: [(4, 0), (2, 1)], GONE: []},
    total={HEADS: 4, HIDDEN: 5, GONE: 5},
)


def plan(kept: dict[int, list[int]]) -> HeadPlan:
    return HeadPlan(kept={0: [0, 3]}, total={0: 4}, hidden_units=UnitPlan(kept=kept, total={0: 5, 1: 5}))


def test_what_is_not_named_stays_of_what_there_is() -> None:
    everything = plan({0: [0, 1, 2, 4], 1: []})
    assert CHOICES.plan({}) == CHOICES.plan_of({}) == everything
    assert CHOICES.plan({HIDDEN: [1]}) == CHOICES.plan_of({HIDDEN: [1, 2]}) == plan({0: [1, 2], 1: []})
    assert CHOICES.kept_units(HeadPlan(kept={0: [3]}, total={0: 4})) == {HEADS: (3,), HIDDEN: (0, 1, 2, 4), GONE: ()}


def test_which_choices_a_plan_keeps() -> None:
    kept = CHOICES.kept(plan({0: [1, 2], 1: []}))
    assert {key: values.tolist() for key, values in kept.items()} == {
        HEADS: [True, True],
        HIDDEN: [False, True],
        GONE: [],
    }
    part = plan({0: [1, 2, 4], 1: []})
    assert not CHOICES.fits(part)
    with pytest.raises(InputError, match="keeps some hidden units of a block of layer 0 and not the others"):
        CHOICES.kept(part)
    with pytest.raises(InputError, match="keeps hidden unit 3 of layer 0, but that hidden unit was cut before"):
        CHOICES.fits(plan({0: [1, 2, 3], 1: []}))
