"""Several budgets in one call: a model is pruned to each, from one pass over the text, and each result is measured."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deadhead.checkpoints import checkpoint
from deadhead.disk.files import write_json
from deadhead.disk.places import checked_path
from deadhead.disk.reading import read_object
from deadhead.errors import InputError, typed
from deadhead.gates.budget import Budget
from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.measure.evaluation import Evaluation, evaluate
from deadhead.measure.positions import max_positions
from deadhead.measure.timing import bench
from deadhead.modes import best_device, moved, on_device
from deadhead.plans.kinds import BUDGET_KINDS, BudgetKind
from deadhead.plans.plan import HeadPlan
from deadhead.training.phases.choosing import latency_in
from deadhead.training.phases.ranking import rank_each
from deadhead.training.processes import count, counted, told
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.beginning import announcing_once, begin
from deadhead.training.runs.forecast import forecast
from deadhead.training.runs.inputs import Data
from deadhead.training.runs.options import Options
from deadhead.training.runs.pruning import Known
from deadhead.training.runs.replying import Replying
from deadhead.training.runs.results import Pruned
from deadhead.training.runs.single import SETTINGS_FILE, divided, keep_settings, run_single

SWEEP_FILE = "sweep.json"
_PLANS, _WORK = "plans.json", "work"
# The work that is timed, and how often.
_ROWS, _LENGTH, _REPEATS = 4, 128, 7
_MOST_LOSS = 1e6
# Budgets of which several values make a picture: all but bytes.
SWEPT: tuple[BudgetKind, ...] = tuple(kind for kind in BUDGET_KINDS if kind != "memory")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The result of pruning a model to several budgets.

    Args:
        kind: kind of the budgets.
        of: which parameters the shares of "params" refer to.
        dense: cost and quality of the dense model: `heads`, `hidden_units`, `parameters`, `flops_per_token` and, with
            a validation text, `perplexity` and `bits_per_byte`; with replies also `replies`, as
            `deadhead.measure.replies.Replies.values` describes.
        points: the same for each pruned model, the largest first, with the values `asked` for and `reached`, the `path`
            of its checkpoint, its `speedup` on a batch of text (both models in turn), its `loss` (the share by which
            its perplexity is above the dense model's) and, after a recovery, its `unrecovered_perplexity`.
        max_loss: the loss that is tolerated, as a share; None if none was given.
        picked: the value asked for the smallest point within `max_loss`; None if there is none.
    """

    kind: BudgetKind
    of: str
    dense: dict[str, Any]
    points: tuple[dict[str, Any], ...]
    max_loss: float | None = None
    picked: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what was found as plain JSON values."""
        return {**asdict(self), "points": [*self.points]}


@typed
def sweep(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PruneRecipe | None = None,
    max_loss: float | None = None,
    replies: bool = False,
    **settings: Any,
) -> Sweep:
    """Prune a model to several budgets, each as `deadhead.prune` does, and measure each result.

        found = deadhead.sweep("gpt2", "my.txt", params=[0.9, 0.8, 0.7], max_loss=0.05, out="smaller")
        found.points[0]["perplexity"], found.picked

    One pass over the text serves all budgets; learned sizes of layers' parts continue from one budget to the next. Each
    pruned model is a checkpoint in `out`, such as `out/params-0.8`, and `out/sweep.json` holds the returned result.

    Args:
        model: as for `prune`, but not changed.
        data: as for `prune`.
        recipe: values of settings that are not given as arguments; None: the defaults.
        max_loss: the share by which the perplexity of the picked model may be above the dense model's; the smallest
            such model is picked.
        replies: also have every model reply to 50 prompts, and compare it with the dense one on the dense one's replies
            (`deadhead.measure.replies`); the replies are kept in `out/replies.json`. A finished sweep may be resumed to
            add them.
        settings: as for `prune`, with a list of values for one budget; `out` is required.

    Raises:
        InputError: an argument cannot be used, such as a criterion that trains gates.
        UnsupportedModel: the model has no heads that could be cut.
        DivergenceError: a recovery diverged.
    """
    given: dict[BudgetKind, Any] = {kind: settings.pop(kind) for kind in SWEPT if kind in settings}
    if len(given) != 1:
        raise InputError(
            f"One budget with several values was expected ({', '.join(SWEPT)}), as in params=[0.9, 0.8], but "
            f"{' and '.join(given) + ' were' if given else 'none was'} given; give one."
        )
    ((kind, values),) = given.items()
    ordered = _ordered(kind, values)
    asked, options = divided(recipe, PruneRecipe, {**settings, kind: ordered[0]})
    return run_sweep(asked, ordered, model, data, options, max_loss=max_loss, replies=replies)


def _ordered(kind: BudgetKind, values: Any) -> list[float]:
    """Return a budget's values, the one that leaves the most first."""
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    if not is_list or not values or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise InputError(f"A sweep's {kind} must be a list of numbers, as in [0.9, 0.8], but got {values!r}.")
    return sorted(map(float, set(values)), reverse=kind not in ("sparsity", "speedup"))


def run_sweep(
    recipe: PruneRecipe,
    values: Sequence[float],
    model: PreTrainedModel | str | Path,
    data: Data | None,
    options: Options,
    *,
    max_loss: float | None = None,
    replies: bool = False,
) -> Sweep:
    """Prune a model to several values of a recipe's budget, the one that leaves the most first; see `sweep`."""
    assert recipe.budget is not None
    if max_loss is not None and not 0 <= max_loss < _MOST_LOSS:
        raise InputError(f"max_loss must be a share of at least 0, such as 0.05, but got {max_loss}.")
    if recipe.criterion in ("gates", "topk"):
        raise InputError(
            f"A sweep ranks units, or learns sizes, for all budgets at once, but {recipe.criterion} trains for one "
            "budget; choose another criterion, or prune once for each budget."
        )
    if count() > 1:
        raise InputError("A sweep runs in one process, but several were started; start it without a launcher.")
    if options.out is None:
        raise InputError("A folder for the sweep's models was expected, but none was given; name one with out (--out).")
    # Values out of range are told of before anything is loaded.
    recipes = [changed(recipe, **{recipe.budget.kind: value}) for value in values]
    out = checked_path(options.out).resolve()
    is_fresh = not out.exists()
    _require_place(out, model, resume=options.resume)
    device = None if options.device is None else checkpoint.named_device(options.device)
    try:
        with on_device(device):
            return _Sweeping(out, recipes, model, data, options, replies=replies).run(max_loss)
    except BaseException:
        if is_fresh and not (out / _PLANS).exists():
            shutil.rmtree(out, ignore_errors=True)
        raise


def _require_place(out: Path, model: PreTrainedModel | str | Path, *, resume: bool) -> None:
    if isinstance(model, str | Path) and Path(model).resolve() == out:
        raise InputError(
            f"The sweep must not overwrite the model it is made from, {model}; choose another out (--out)."
        )
    if resume and not (out / SETTINGS_FILE).is_file():
        raise InputError(f"There is nothing to resume: {out} holds no stopped sweep.")
    if not resume and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists already; continue with resume (--resume), or choose another folder (--out).")


class _Sweeping:
    """A sweep in its folder.

    Args:
        out: the folder.
        recipes: one recipe for each budget, the one that leaves the most first.
        model: the model to prune.
        data: the text.
        options: options of the phases; see `sweep`.
        replies: whether models reply to prompts.
    """

    def __init__(
        self,
        out: Path,
        recipes: Sequence[PruneRecipe],
        model: PreTrainedModel | str | Path,
        data: Data | None,
        options: Options,
        *,
        replies: bool,
    ) -> None:
        self._out, self._options, self._progress = out, options, told(options.progress)
        budgets = len(recipes)
        options = announcing_once(options)
        where = (options, out / _WORK, self._progress)
        self._dense, self._text, first = begin("prune", model, data, *where, recipes[0], cut=True, budgets=budgets)
        assert isinstance(first, PruneRecipe)
        self._replies = Replying(out, self._dense, self._text.tokenizer, self._progress) if replies else None
        # Gates, which a phase takes where sizes cannot be learned, learn for one budget.
        criterion = "taylor" if first.criterion == "gates" else first.criterion
        self._recipes = [changed(recipe, criterion=criterion) for recipe in recipes]
        named = type(model).__name__ if isinstance(model, PreTrainedModel) else str(model)
        settings = {"model": named, "seed": options.seed, "recover": options.recover, "sha256": self._text.sha256}
        keep_settings(out, {**settings, "recipes": [recipe.model_dump() for recipe in self._recipes]})
        if options.announce is not None and self._dense.can_generate():
            options.announce(forecast(self._dense, self._recipes[0], recover=options.recover, budgets=budgets))

    def run(self, max_loss: float | None) -> Sweep:
        """Choose, prune and measure the points that are missing; pick one."""
        plans, path = self._choose(), self._out / SWEEP_FILE
        points, dense, before = [], {}, None
        if path.exists():
            kept = read_object(path, what="list of a sweep's points")
            points, dense = list(kept["points"]), kept["dense"]
        if len(points) < len(plans):
            before = self._evaluated()
            dense = _values(model_cost(self._dense), before)
        for recipe, plan in [*zip(self._recipes, plans, strict=True)][len(points) :]:
            points.append(self._pruned(recipe, Known(plan=plan, before=before)))
            write_json(path, self._sweep(points, dense, None).to_dict())
        if self._replies is not None:
            moved(self._dense, best_device())
            dense["replies"] = self._replies.of_dense()
            for point in points:
                if "replies" not in point or not self._replies.has(point["path"]):
                    model = checkpoint.load(self._out / point["path"]).to(self._dense.device)  # type: ignore[arg-type]
                    point["replies"] = self._replies.of(point["path"], model)
                    write_json(path, self._sweep(points, dense, None).to_dict())
        found = self._sweep(points, dense, max_loss)
        write_json(path, found.to_dict())
        shutil.rmtree(self._out / _WORK, ignore_errors=True)
        return found

    def _sweep(self, points: Sequence[dict[str, Any]], dense: dict[str, Any], max_loss: float | None) -> Sweep:
        budget = _budget(self._recipes[0])
        most = -1.0 if max_loss is None else max_loss
        within = [point["asked"] for point in points if point.get("loss", math.inf) <= most]
        picked = within[-1] if within else None
        return Sweep(
            kind=budget.kind, of=budget.of, dense=dense, points=tuple(points), max_loss=max_loss, picked=picked
        )

    def _choose(self) -> list[HeadPlan]:
        """Return a plan for each budget; each plan is kept as soon as it is found."""
        path = self._out / _PLANS
        kept = read_object(path, what="list of a sweep's plans")["plans"] if path.exists() else []
        plans = [HeadPlan.from_dict(plan) for plan in kept]
        missing = self._recipes[len(plans) :]
        if not missing:
            return plans
        found = rank_each(
            self._dense,
            self._text.train,
            missing[0],
            [_budget(recipe).value for recipe in missing],
            after=plans[-1] if plans else None,
            seed=self._options.seed,
            latency=latency_in(self._out, self._dense, missing[0], self._progress),
            progress=self._progress,
        )
        for plan in found:
            plans.append(plan)
            write_json(path, {"plans": [each.to_dict() for each in plans]})
        return plans

    def _evaluated(self) -> Evaluation | None:
        """Measure the dense model on the validation text."""
        if self._text.valid is None or not self._dense.can_generate():
            return None
        moved(self._dense, best_device())
        report = counted(self._progress, "evaluating the dense model")
        return evaluate(self._dense, self._text.valid, limit=self._options.evaluation_tokens, progress=report)

    def _pruned(self, recipe: PruneRecipe, known: Known) -> dict[str, Any]:
        """Prune a copy of the model by a plan, save it, and return its measurements."""
        budget = _budget(recipe)
        name = f"{budget.kind}-{budget.value:g}"
        place = self._out / name

        def progress(what: str, *of: Any) -> None:
            self._progress(f"{name}: {what}", *of)

        options = replace(
            self._options,
            out=place,
            resume=place.with_name(f"{name}.work").exists(),
            tokenizer=self._text.tokenizer,
            progress=progress,
            announce=None,
            device=None,
            dtype=None,
        )
        found = run_single("prune", recipe, copy.deepcopy(self._dense), self._text, options, known=known)
        assert isinstance(found, Pruned)
        values = {"asked": budget.value, "reached": (found.budget or {}).get("reached"), "path": name}
        after = None if found.measured is None else found.measured.after
        values |= _values(found.costs.after, after)
        if after is not None and known.before is not None:
            values["loss"] = after.perplexity / known.before.perplexity - 1
        if found.unrecovered is not None:
            values["unrecovered_perplexity"] = found.unrecovered.perplexity
        length = min(_LENGTH, max_positions(self._dense) or _LENGTH)
        models = {"dense": self._dense, "pruned": found.model}
        timings = bench(models, batch_size=_ROWS, length=length, repeats=_REPEATS)
        return values | {"speedup": timings["dense"].seconds / timings["pruned"].seconds}


def _budget(recipe: PruneRecipe) -> Budget:
    assert recipe.budget is not None, "run_sweep asks for one"
    return recipe.budget


def _values(cost: Cost, measured: Evaluation | None) -> dict[str, Any]:
    """Return the cost and the quality of a model, as plain JSON values."""
    values = {name: getattr(cost, name) for name in ("heads", "hidden_units", "parameters", "flops_per_token")}
    names = () if measured is None else ("perplexity", "bits_per_byte")
    return values | {name: getattr(measured, name) for name in names}
