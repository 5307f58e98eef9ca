"""Ranking of units by a one-shot criterion or by learned sizes, for one budget or for several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel

from deadhead.attaching import gates_of
from deadhead.criteria.scoring import score_heads
from deadhead.criteria.sizes import SizesCourse
from deadhead.data import TokenStream
from deadhead.data.shares import ALONE, Shares
from deadhead.errors import InputError
from deadhead.measure.latency import Latency
from deadhead.modes import best_device, flushing_denormals, moved
from deadhead.plans.blocks import Blocks
from deadhead.plans.kinds import READS_TEXT, STANDARDISED, OneShot
from deadhead.plans.plan import HeadPlan
from deadhead.plans.scores import HeadScores
from deadhead.training.phases.choosing import asked_blocks, budget_costs, plan_of_scores
from deadhead.training.phases.defaults import batches_of
from deadhead.training.processes import Progress, counted, on_main, together
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PruneRecipe


def rank(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int = 0,
    first_segment: int = 0,
    latency: Latency | None = None,
    progress: Progress = lambda *_: None,
) -> HeadPlan:
    """Choose the units that stay by a one-shot criterion or by learned sizes; the model is not changed.

    If the budget is not a share of heads, the units with the lowest score for their cost are removed. For scores that
    compare only within a layer, the units with the lowest scores are removed until the budget is met.

    Args:
        model: a model without gates.
        text: the text; criteria that read text, and sizes, read `recipe.steps` batches of it.
        recipe: a recipe with such a criterion and a budget.
        seed: seed of the choice of batches (for a model without segment memory), and of "random".
        first_segment: where in the text to begin, for a model with segment memory.
        latency: latency of this model on this machine, for a recipe with a speedup; None measures it.
        progress: called with how much of the text is read.

    Raises:
        InputError: the criterion trains gates, the budget cannot be reached, or the text is too short.
    """
    values = [] if recipe.budget is None else [recipe.budget.value]
    where: dict[str, Any] = {"seed": seed, "first_segment": first_segment, "latency": latency, "progress": progress}
    return next(rank_each(model, text, recipe, values, **where))


def rank_each(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    values: Sequence[float],
    *,
    after: HeadPlan | None = None,
    seed: int = 0,
    first_segment: int = 0,
    latency: Latency | None = None,
    progress: Progress = lambda *_: None,
) -> Iterator[HeadPlan]:
    """Yield what `rank` chooses for each of several values of a recipe's budget, from one pass over the text.

    Sizes start from those of the previous value, and take half as many steps.

    Args:
        model: a model without gates.
        text: the text to score units on, or to learn sizes from.
        recipe: a recipe with such a criterion, and a budget whose own value does not matter.
        values: values of the budget, each stricter than the one before.
        after: the plan of the value before the first; None if there is none.
        seed: as for `rank`.
        first_segment: as for `rank`.
        latency: as for `rank`.
        progress: called with how much of the text is read, and with the steps for each value.

    Raises:
        InputError: as `rank` does.
    """
    if not recipe.is_ranked:
        raise InputError(
            f"The criterion {recipe.criterion} trains gates; use deadhead.training.train with gates attached."
        )
    assert recipe.budget is not None, "a recipe without budget ranks nothing"
    kind = recipe.budget.kind
    recipes = [changed(recipe, **{kind: f"{value:.0f}B" if kind == "memory" else value}) for value in values]
    if recipe.criterion == "sizes":
        yield from _each_by_sizes(
            model, text, recipes, after, seed=seed, first_segment=first_segment, latency=latency, progress=progress
        )
        return
    scores = score(model, text, recipe, seed=seed, first_segment=first_segment, progress=progress)
    for asked in recipes:
        yield _plan(model, scores, asked, latency)


def _plan(model: PreTrainedModel, scores: HeadScores, recipe: PruneRecipe, latency: Latency | None) -> HeadPlan:
    return plan_of_scores(model, for_cost(model, scores, recipe, latency=latency), recipe, latency=latency)[0]


def _each_by_sizes(
    model: PreTrainedModel,
    text: TokenStream,
    recipes: Sequence[PruneRecipe],
    after: HeadPlan | None,
    *,
    seed: int,
    first_segment: int,
    latency: Latency | None,
    progress: Progress,
) -> Iterator[HeadPlan]:
    """Yield what learned sizes choose for several values of a budget that is not a share of heads."""
    first = recipes[0]
    # A budget that cannot be reached is told of before any text is read.
    found = [each for each in (budget_costs(model, asked, latency=latency) for asked in recipes) if each is not None]
    batches = islice(batches_of(model, text, first, seed=seed, first_segment=first_segment), first.steps)
    moved(model, best_device())
    todo = [first.steps if after is None else later(first.steps), *[later(first.steps)] * (len(recipes) - 1)]

    def reading(done: int, count: int) -> None:
        progress("learning sizes", done, count + todo[0], {})

    def learning(name: str, before: int, steps: int, done: int, lost: float) -> None:
        progress(name, before + done, before + steps, {"divergence": lost})

    with flushing_denormals():
        blocks = asked_blocks(first, model)
        course = SizesCourse(model, batches, found[0][1], unit=first.unit, blocks=blocks, progress=reading)
    name, before = "learning sizes", course.batches
    for asked, (budget, _), steps in zip(recipes, found, todo, strict=True):
        start = None if after is None else {key: float(len(units)) for key, units in after.units.items()}
        with flushing_denormals():
            report = partial(learning, name, before, steps)
            learned = course.learn(budget.share, steps, start=start, progress=report)
        after = plan_of_scores(model, learned.scores, asked, latency=latency)[0]
        yield after
        name, before = "learning sizes for the next budget", 0


def later(steps: int) -> int:
    """Return the number of steps for sizes that start close to where they will end."""
    return -(-steps // 2)


def for_cost(
    model: PreTrainedModel, scores: HeadScores, recipe: PruneRecipe, *, latency: Latency | None = None
) -> HeadScores:
    """Return a criterion's scores divided by the units' costs, if a recipe's budget says what units cost.

    Scores that are only an order stay unchanged, and so do all scores for a share of heads.
    """
    found = budget_costs(model, recipe, latency=latency)
    return scores if found is None or _look(recipe)[0] in STANDARDISED else scores.over(found[1])


def _look(recipe: PruneRecipe) -> tuple[OneShot, int]:
    """Return the criterion that ranks units or initialises gates for a recipe, and how many batches it reads."""
    if recipe.is_ranked:
        return cast(OneShot, recipe.criterion), recipe.steps
    return cast(OneShot, recipe.start_from), recipe.start_batches


def _told(
    batches: Iterable[dict[str, Tensor]], count: int, report: Callable[[int, int], None]
) -> Iterator[dict[str, Tensor]]:
    """Yield batches, and report how many are done whenever the next one is requested."""
    for done, batch in enumerate(batches):
        report(done, count)
        yield batch
    report(count, count)


def score(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int,
    first_segment: int,
    progress: Progress,
    shares: Shares = ALONE,
) -> HeadScores:
    """Score heads by the recipe's one-shot criterion, or by the one that initialises gates.

    If several processes score the same model together, each reads its share of the text.
    """
    criterion, count = _look(recipe)
    batches: Iterable[dict[str, Tensor]] = ()
    if criterion in READS_TEXT:
        batches = islice(batches_of(model, text, recipe, seed=seed, first_segment=first_segment), count)
        batches = _told(batches, count, counted(progress, "scoring units"))
    moved(model, best_device())
    gates = gates_of(model)
    with flushing_denormals():
        unit = recipe.unit if gates is None else gates.unit
        blocks: bool | int | Blocks = asked_blocks(recipe, model)
        if gates is not None:
            blocks = gates.choices.has_blocks and {key.layer: found for key, found in gates.choices.hidden.items()}
        return score_heads(model, criterion, batches, unit=unit, blocks=blocks, seed=seed, shares=shares)


def score_together(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int,
    first_segment: int,
    progress: Progress,
) -> HeadScores:
    """Score heads as `score` does, in all processes that train together; all of them call this.

    Each process reads its share of the text. With a model with segment memory, which reads each batch after the one
    before it, only the main process reads.
    """
    where: dict[str, Any] = {"seed": seed, "first_segment": first_segment, "progress": progress}
    if _look(recipe)[0] in READS_TEXT and not hasattr(model.config, "memory_length"):
        return together(lambda shares: score(model, text, recipe, **where, shares=shares))
    return on_main(lambda: score(model, text, recipe, **where))


def rank_together(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int,
    first_segment: int,
    latency: Latency | None,
    progress: Progress,
) -> HeadPlan:
    """Choose the units that stay as `rank` does, in all processes that train together; all of them call this.

    Scores are those of `score_together`; only the main process learns sizes.
    """
    where: dict[str, Any] = {"seed": seed, "first_segment": first_segment, "progress": progress}
    if recipe.criterion == "sizes":
        return on_main(lambda: rank(model, text, recipe, latency=latency, **where))
    scores = score_together(model, text, recipe, **where)
    return on_main(lambda: _plan(model, scores, recipe, latency))
