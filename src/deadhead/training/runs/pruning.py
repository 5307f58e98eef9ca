"""The steps of pruning a model: choose units, cut, compensate, and recover by learning from the dense model.

The cut and compensated model is kept while it recovers, which may take hours: a resumed phase continues from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deadhead.checkpoints import checkpoint
from deadhead.compensation.record import Compensation, FittedLayer
from deadhead.cutting import cut as cut_heads
from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json
from deadhead.layouts import find_layout
from deadhead.measure.evaluation import Evaluation
from deadhead.plans.plan import HeadPlan
from deadhead.training.phases.choosing import latency_in
from deadhead.training.phases.compensating import Compensating, calibration_of, dense_copy
from deadhead.training.phases.defaults import recovery
from deadhead.training.phases.phase import PhaseRun, choose_units, train
from deadhead.training.processes import on_main
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.forecast import Part, forecast, require_estimated
from deadhead.training.runs.inputs import Text, teacher_of
from deadhead.training.runs.options import Options

# Beside the checkpoints: the model after cut and compensation, what was found by then, and the recovery's checkpoints.
CUT, RECOVERY = "cut", "recovery"
_FOUND = "found.json"


@dataclass(frozen=True, kw_only=True)
class Known:
    """Results that were found before a phase that is one of several, and are not computed again.

    Args:
        plan: the plan that a ranking chose.
        before: the model's results on the validation text; None without one.
    """

    plan: HeadPlan
    before: Evaluation | None


def prune_in_place(
    model: PreTrainedModel,
    text: Text,
    recipe: PruneRecipe,
    run: PhaseRun,
    options: Options,
    *,
    work: Path,
    cut: bool,
    measured: Callable[[str], Evaluation | None],
    plan: HeadPlan | None = None,
) -> dict[str, Any]:
    """Prune a model as a recipe says, in place.

    Args:
        model: a model without gates.
        text: the text to choose, compensate and recover by.
        recipe: a recipe with a criterion.
        run: arguments of a phase with gates.
        options: give the steps of the recovery, and the teacher.
        work: folder for what a resumed phase needs.
        cut: False leaves the gates on.
        measured: measures the model on the validation text, given a name for the progress, and returns the result.
        plan: the plan that a ranking chose before, if it is known.

    Returns:
        The fields of `Pruned` that `Trained` lacks: plan, gates, budget, compensation, and the unrecovered result.
    """
    recovers = cut and options.recover > 0
    is_resumed = recovers and (work / CUT).is_dir()
    if options.max_memory is not None:
        require_estimated(model)
    if options.announce is not None and model.can_generate():
        on_main(partial(_announce, options.announce, model, recipe, options.recover, cut=cut, is_resumed=is_resumed))
    if is_resumed:
        dense = copy.deepcopy(model)
        found = _restore(model, work / CUT)
    else:
        latency = on_main(lambda: latency_in(work, model, recipe, run.progress))
        batches = calibration_of(model, text.train, recipe, seed=options.seed) if cut else []
        # The dense model is the teacher, if that is its own.
        teacher = run.teacher if options.teacher is None else None
        # Nobody else has use for a copy.
        before = (teacher or dense_copy(model, recipe)) if batches or recovers else model
        gates, budget = choose_units(model, text.train, recipe, replace(run, latency=latency), plan)
        plan = gates.plan()
        found = {"plan": plan, "gates": gates, "budget": budget}
        if not cut:
            return found
        cut_heads(model, plan)
        found |= {"plan": find_layout(model).recorded_plan(model) or plan, "gates": None, "compensation": None}
        if batches:
            compensating = Compensating(before, batches, f"text {text.sha256[:12]}")
            found["compensation"] = compensating.of(model, run.progress, consume=not recovers)
        if not recovers:
            return found
        # It may share with the cut model what was not cut, and must not learn.
        dense = copy.deepcopy(before)
        del before
        if options.out is not None:
            on_main(lambda: _keep(model, work / CUT, found))
    found["unrecovered"] = on_main(lambda: measured("evaluating the cut"))
    _recover(model, dense, text, recovery(recipe, options.recover, model), run, options, work / RECOVERY)
    return found


def _announce(
    announce: Callable[[Sequence[Part]], None],
    model: PreTrainedModel,
    recipe: PruneRecipe,
    recover: int,
    *,
    cut: bool,
    is_resumed: bool,
) -> None:
    parts = forecast(model, recipe, recover=recover, cut=cut)
    # What was done is not done again.
    announce(parts[-1:] if is_resumed else parts)


def _recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    text: Text,
    recipe: PhaseRecipe,
    run: PhaseRun,
    options: Options,
    folder: Path,
) -> None:
    """Train a pruned model in place, on the dense model's distribution unless another teacher is named."""
    teacher = teacher_of(options.teacher, dense, model, recipe)
    train(model, text.train, recipe, replace(run, folder=folder, phase="recover", teacher=teacher))


def _keep(model: PreTrainedModel, folder: Path, found: dict[str, Any]) -> None:
    """Save the cut and compensated model."""
    compensation: Compensation | None = found["compensation"]
    noted = {
        "plan": found["plan"].to_dict(),
        "budget": found["budget"],
        "compensation": None if compensation is None else asdict(compensation),
    }
    write_json(folder.with_name(_FOUND), noted)
    # The folder comes last, whole or not at all.
    checkpoint.save(model, folder)


def _restore(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """Restore a model in place from what `_keep` saved; return the results that were saved with it."""
    noted = read_json(folder.with_name(_FOUND), what="list of what a cut left")
    plan = HeadPlan.from_dict(noted["plan"])
    compensation = None
    if (kept := noted["compensation"]) is not None:
        layers = tuple(FittedLayer(**layer) for layer in kept["layers"])
        compensation = Compensation(**{**kept, "layers": layers})
    saved = checkpoint.load(folder)
    cut_heads(model, plan)
    model.load_state_dict(saved.state_dict())
    if hasattr(saved.config, "compensation"):
        model.config.compensation = saved.config.compensation
    return {"plan": plan, "gates": None, "budget": noted["budget"], "compensation": compensation}
