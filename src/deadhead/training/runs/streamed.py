"""Prune a checkpoint that need not fit into memory: scored, compensated and cut layer by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.compensation.record import Compensation
from deadhead.criteria.scoring import Scoring
from deadhead.disk.files import no_space_is_input_error
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, typed_but
from deadhead.modes import flushing_denormals
from deadhead.plans.kinds import FAST, ONE_SHOT, READS_TEXT
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.cutting import CheckpointCut, write_cut
from deadhead.streaming.layer_check import NotStreamable
from deadhead.streaming.layer_fits import fit_layers
from deadhead.streaming.layer_scores import score_layers
from deadhead.streaming.prepare import prepare
from deadhead.streaming.stored_model import StoredModel, open_stored
from deadhead.training.phases.choosing import asked_blocks, budget_costs, plan_of_scores, true_share
from deadhead.training.phases.compensating import calibration_of
from deadhead.training.phases.defaults import batches_of, segments
from deadhead.training.phases.ranking import for_cost
from deadhead.training.processes import Progress, count, counted
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.inputs import (
    NO_TEXT,
    Data,
    Text,
    is_without_text,
    known_tokenizer,
    read_data,
    require_trainable,
    require_ungated,
)
from deadhead.training.runs.options import Options
from deadhead.training.runs.self_text import is_self
from deadhead.training.runs.single import check_places, divided, keep_settings

_PLAN_FILE, _LOCK_FILE = "plan.json", "lock"
# Of `Options`, what there is no use for: nothing is trained, measured or moved.
_NOT_STREAMED = {
    "teacher": "nothing is learned from a teacher",
    "recover": "nothing is trained",
    "report_to": "nothing is trained",
    "device": "layers are run on the CPU",
    "dtype": "weights stay as they were saved",
    "evaluation_tokens": "the model is not measured",
}


@dataclass(frozen=True, kw_only=True)
class PrunedCheckpoint:
    """What pruning a checkpoint did.

    Args:
        plan: which units stay.
        budget: its `kind`, what was `asked` for and what was `reached`.
        cut: what the model costs before and after, and the bytes that were read and written.
        compensation: what was fitted after the cut; None where nothing was tried.
    """

    plan: HeadPlan
    budget: dict[str, Any]
    cut: CheckpointCut
    compensation: Compensation | None

    def to_dict(self) -> dict[str, Any]:
        """Return what was done as plain JSON values."""
        after = self.cut.after
        found: dict[str, Any] = {
            "heads": after.heads,
            "parameters": after.parameters,
            "flops_per_token": after.flops_per_token,
            "streamed": True,
            "budget": self.budget,
        }
        if self.plan.hidden_units is not None:
            found["hidden_units"] = self.plan.hidden_units.counts
        return found if self.compensation is None else {**found, "compensation": self.compensation.to_dict()}


@typed_but("data")
def prune_checkpoint(
    source: str | Path,
    data: Data | None = None,
    *,
    out: str | Path,
    recipe: PruneRecipe | None = None,
    **settings: Any,
) -> PrunedCheckpoint:
    """Prune a checkpoint by a one-shot criterion with one layer of it in memory at a time.

        deadhead.prune_checkpoint("Llama-3.1-8B", "my.txt", out="small", params=0.8, criterion="flap")

    All of the text goes through one layer before the next is read, so that each weight is read once for the scores, and
    once more, of the dense and of the cut model, for compensation. The same units go as by `deadhead.prune`, and the
    weights are the same but for rounding. What is done is kept layer by layer in `OUT.work` until all is.

    Args:
        source: a checkpoint folder of a language model, one of those that `cut_checkpoint` cuts shard by shard.
        data: as for `prune`, but not "self".
        out: the new folder; a checkpoint of ours that is there already is replaced as a whole.
        recipe: settings that are not given by themselves; None: the defaults. Without a criterion units are ranked by
            "reconstruction".
        settings: fields of `PruneRecipe` and, of `Options`, `tokenizer`, `seed`, `resume` and `progress`.

    Raises:
        InputError: something given cannot be used, the checkpoint is damaged or can only be pruned in memory, or there
            is nothing to resume, or something that was not asked for.
        UnsupportedModel: the model has no heads that could be cut.
        CutError: the cut model computes something else; what was done is kept.
    """
    asked, options = divided(recipe, PruneRecipe, {**settings, "out": out})
    return run_streamed(checked_path(source), data, asked, options)


def run_streamed(source: Path, data: Data | None, recipe: PruneRecipe, options: Options) -> PrunedCheckpoint:
    """Do what `prune_checkpoint` does."""
    recipe = _checked(source, data, recipe, options)
    out = checked_path(Path(str(options.out))).resolve()
    work = checked_path(out.with_name(out.name + ".work"))
    check_places(out, work, source, resume=options.resume)
    require_ungated(source)
    try:
        opened = open_stored(source)
        fresh = not work.exists()
        with no_space_is_input_error(out):
            work.mkdir(parents=True, exist_ok=True)
            try:
                return _locked(opened, source, data, recipe, options, out, work)
            except BaseException as error:
                # Of what was refused before anything was done nothing is left.
                if fresh and not any(work.glob("*/layer-*")) and not isinstance(error, KeyboardInterrupt):
                    shutil.rmtree(work, ignore_errors=True)
                raise
    except NotStreamable as error:
        raise InputError(
            f"{source} cannot be pruned layer by layer, as {error}; prune it in memory, without stream (--stream)."
        ) from error


def _checked(source: Path, data: Data | None, recipe: PruneRecipe, options: Options) -> PruneRecipe:
    """Return the recipe with a criterion; refuse what goes with training or with a model in memory alone."""
    recipe = changed(recipe, criterion=FAST) if recipe.criterion is None else recipe
    if recipe.criterion not in ONE_SHOT:
        raise InputError(
            f"The criterion {recipe.criterion} learns on the model as a whole; layer by layer units are ranked by one "
            f"of {', '.join(ONE_SHOT)}."
        )
    if recipe.budget is not None and recipe.budget.kind == "speedup":
        raise InputError("A speedup is measured on the model as a whole; layer by layer ask for params or flops.")
    defaults = Options()
    for name, why in _NOT_STREAMED.items():
        if getattr(options, name) != getattr(defaults, name):
            raise InputError(f"{name} is for pruning in memory, as layer by layer {why}; leave it out.")
    if is_self(data):
        raise InputError("The text that a model writes itself needs it in memory; name a text with data (--data).")
    if count() > 1:
        raise InputError("Layer by layer one process prunes, but several were started; start one.")
    return recipe


def _locked(
    opened: StoredModel,
    source: Path,
    data: Data | None,
    recipe: PruneRecipe,
    options: Options,
    out: Path,
    work: Path,
) -> PrunedCheckpoint:
    try:
        lock = FileLock(work / _LOCK_FILE).acquire(timeout=0)
    except (OSError, NotImplementedError):
        raise InputError(f"Another process is pruning into {work}; let it finish, or stop it.") from None
    with lock:
        pruned = _run(opened, source, data, recipe, options, out, work)
    shutil.rmtree(work, ignore_errors=True)
    return pruned


def _run(
    opened: StoredModel,
    source: Path,
    data: Data | None,
    recipe: PruneRecipe,
    options: Options,
    out: Path,
    work: Path,
) -> PrunedCheckpoint:
    model = opened.without_weights()
    require_trainable(model, recipe)
    budget_costs(model, recipe)
    tell: Progress = options.progress or (lambda *_: None)
    text = _text(model, source, data, recipe, options, work, tell)
    keep_settings(work, _settings(opened, source, recipe, options, text))

    def progress(name: str, done: int, total: int) -> None:
        tell(name, done, total, {})

    calibration = calibration_of(model, text.train, recipe, seed=options.seed)
    plan = _plan(opened, model, text, recipe, options, work, progress)
    assert recipe.budget is not None
    reached = {**recipe.budget.words, "reached": recipe.budget.reached(true_share(model, recipe, plan))}
    planned = prepare(opened, plan)
    planned.check_one()
    compensation = None
    if calibration:
        dense, cut = opened.resident(opened.without_weights()), planned.resident(opened)
        with flushing_denormals():
            compensation, files = fit_layers(dense, cut, calibration, work, progress=progress)
        planned = planned.fitted(files, opened.names)
        if compensation.kept:
            model_config: Any = planned.model.config
            model_config.compensation = compensation.to_dict() | {"text": f"text {text.sha256[:12]}"}
        del dense, cut
    done = write_cut(planned, source, out, work / "cut", resume=options.resume, progress=progress)
    return PrunedCheckpoint(plan=planned.plan, budget=reached, cut=done, compensation=compensation)


def _text(
    model: PreTrainedModel,
    source: Path,
    data: Data | None,
    recipe: PruneRecipe,
    options: Options,
    work: Path,
    progress: Progress,
) -> Text:
    """Return the text, none where units are ranked without one and none was given."""
    tokenizer_of = options.tokenizer or source
    if is_without_text(model, data, recipe):
        return Text(NO_TEXT, None, "", known_tokenizer(tokenizer_of))
    text = read_data(
        data,
        work,
        model_type=model.config.model_type,
        tokenizer_of=tokenizer_of,
        progress=counted(progress, "reading text, kB"),
    )
    # A text that is too short is told before anything is done.
    segments(model, text.train, recipe, rows=recipe.batch_size)
    return text


def _settings(opened: StoredModel, source: Path, recipe: PruneRecipe, options: Options, text: Text) -> dict[str, Any]:
    """Return what a pruning that is resumed must have been begun with."""
    stats = {name: (source / name).stat() for name in (*opened.stored.files, "config.json")}
    return {
        "phase": "prune layer by layer",
        "recipe": recipe.model_dump(),
        "seed": options.seed,
        "sha256": text.sha256,
        "source": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
    }


def _plan(
    opened: StoredModel,
    model: PreTrainedModel,
    text: Text,
    recipe: PruneRecipe,
    options: Options,
    work: Path,
    progress: Callable[[str, int, int], None],
) -> HeadPlan:
    """Return the plan, kept from before or chosen now."""
    path = work / _PLAN_FILE
    if path.exists():
        return HeadPlan.from_json(path)
    batches: list[dict[str, Tensor]] = []
    if recipe.criterion in READS_TEXT:
        batches = [*islice(batches_of(model, text.train, recipe, seed=options.seed), recipe.steps)]
    dense = opened.resident(opened.without_weights())
    asked: Any = recipe.criterion
    scoring = Scoring(dense.model, asked, unit=recipe.unit, blocks=asked_blocks(recipe, dense.model))
    with flushing_denormals():
        scores = score_layers(dense, scoring, batches, work, seed=options.seed, progress=progress)
    plan, _ = plan_of_scores(model, for_cost(model, scores, recipe), recipe)
    plan.to_json(path)
    return plan
