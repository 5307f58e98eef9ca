"""Cut models whose layers have different numbers of heads, some of them none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach, detach
from deadhead.cutting import cut
from deadhead.plans.plan import Unit


def uneven_model(
    model_type: str,
    emptied: Sequence[int] = (),
    *,
    emptied_feed_forwards: Sequence[int] = (),
    unit: Unit | None = None,
    most: int = 8,
    seed: int = 7,
) -> Any:
    """Return a tiny random model whose layers keep fewer heads or groups one after another, at most so many.

    Layers without heads, and without hidden units, are given by their place, from the end if negative.
    """
    model: Any = tiny_model(model_type, seed=seed)
    gates = attach(model, unit=unit, blocks=bool(emptied_feed_forwards))
    detach(model)
    units = gates.choices.units
    heads = [key for key in units if key.kind == "head"]
    hidden = [key for key in units if key.kind != "head"]
    kept: dict[Any, Sequence[int]] = {key: tuple(units[key]) for key in hidden}
    for place, key in enumerate(heads):
        here = tuple(units[key])
        kept[key] = here[: max(1, min(most, len(here) - 1 - place))]
    for keys, places in ((heads, emptied), (hidden, emptied_feed_forwards)):
        kept |= {keys[place]: () for place in places}
    return cut(model, gates.choices.plan_of(kept)).eval()
