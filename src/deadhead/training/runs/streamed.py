"""Prune a checkpoint that need not fit into memory: score, compensate and cut it layer by layer."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.compensation.record import Compensation
from deadhead.criteria.scoring import Scoring
from deadhead.disk.files import no_space_is_input_error
from deadhead.disk.places import checked_path, empty_parents_gone
from deadhead.errors import InputError, typed
from deadhead.modes import flushing_denormals
from deadhead.plans.kinds import FAST, ONE_SHOT, READS_TEXT
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.cutting import CheckpointCut, write_cut
from deadhead.streaming.layer_check import NotStreamable
from deadhead.streaming.layer_fits import fit_layers
from deadhead.streaming.layer_scores import score_layers
from deadhead.streaming.prepare import prepare
from deadhead.streaming.stored_model import StoredModel, open_stored
from deadhead.training.phases.choosing import asked_blocks, budget_costs, plan_of_scores, reached, true_share
from deadhead.training.phases.compensating import calibration_of
from deadhead.training.phases.defaults import batches_of, segments
from deadhead.training.phases.ranking import for_cost
from deadhead.training.processes import count
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.beginning import announcing_once
from deadhead.training.runs.forecast import forecast
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

_log = logging.getLogger(__name__)

_PLAN_FILE, _LOCK_FILE = "plan.json", "lock"
# Of `Options`, what there is no use for: nothing is trained, measured or moved.
_NOT_STREAMED = {
    "teacher": "nothing is learned from a teacher",
    "recover": "nothing is trained",
    "report_to": "nothing is trained",
    "device": "layers run on the CPU",
    "dtype": "weights stay as they were saved",
    "evaluation_tokens": "the model is not measured",
}


@dataclass(frozen=True, kw_only=True)
class PrunedCheckpoint:
    """The result of pruning a checkpoint.

    Args:
        plan: the units that stay.
        budget: its `kind`, and the values `asked` for and `reached`.
        cut: the costs of the model before and after, and the bytes that were read and written.
        compensation: what was fitted after the cut; None if nothing was tried.
    """

    plan: HeadPlan
    budget: dict[str, Any]
    cut: CheckpointCut
    compensation: Compensation | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
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


@typed
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

    The whole text goes through one layer before the next layer is read, so each weight is read once for the scores, and
    for compensation once more from the dense and from the cut model. `deadhead.prune` removes the same units, and the
    weights are the same except for rounding. Finished layers are kept in `OUT.work` until all layers are done.

    Args:
        source: a checkpoint folder of a language model that `cut_checkpoint` can cut shard by shard.
        data: as for `prune`, but not "self".
        out: the new folder; if it holds a checkpoint that deadhead wrote, that is replaced as a whole.
        recipe: values of settings that are not given as arguments; None: the defaults. Without a criterion, units are
            ranked by "reconstruction".
        settings: fields of `PruneRecipe` and, of `Options`, `tokenizer`, `seed`, `resume`, `progress`, `announce`
            and `max_memory`.

    Raises:
        InputError: an argument cannot be used, the checkpoint is damaged or can only be pruned in memory, `resume` is
            set but there is nothing to resume, or there is work to resume but `resume` is not set.
        UnsupportedModel: the model has no heads that could be cut.
        CutError: the cut model computes something else; finished work is kept.
    """
    asked, options = divided(recipe, PruneRecipe, {**settings, "out": out})
    return run_streamed(checked_path(source), data, asked, options)


def run_streamed(source: Path, data: Data | None, recipe: PruneRecipe, options: Options) -> PrunedCheckpoint:
    """Prune a checkpoint as `prune_checkpoint` describes, given a recipe and options."""
    recipe, options = streamable(data, recipe, options), announcing_once(options)
    out = checked_path(Path(str(options.out))).resolve()
    work = checked_path(out.with_name(out.name + ".work"))
    check_places(out, work, source, resume=options.resume)
    require_ungated(source)
    try:
        opened = open_stored(source)
        with no_space_is_input_error(out), empty_parents_gone(work), _work_folder(work):
            done = _Pruning(opened=opened, source=source, recipe=recipe, options=options, out=out, work=work).run(data)
    except NotStreamable as error:
        raise InputError(
            f"{source} cannot be pruned layer by layer, because {error}; prune it in memory, without stream (--stream)."
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    return done


@contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    """Lock a work folder for this process; remove it if the block is refused before any work was done."""
    fresh = not work.exists()
    with no_space_is_input_error(work):
        work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / _LOCK_FILE).acquire(timeout=0)
    except (OSError, NotImplementedError):
        raise InputError(f"Another process is pruning into {work}; let it finish, or stop it.") from None
    with lock:
        try:
            yield
        except BaseException as error:
            if fresh and not any(work.glob("*/layer-*")) and not isinstance(error, KeyboardInterrupt):
                shutil.rmtree(work, ignore_errors=True)
            raise


def streamable(data: Data | None, recipe: PruneRecipe, options: Options) -> PruneRecipe:
    """Return the recipe with a criterion; refuse settings that need training or a model in memory."""
    recipe = changed(recipe, criterion=FAST) if recipe.criterion is None else recipe
    if recipe.criterion not in ONE_SHOT:
        raise InputError(
            f"The criterion {recipe.criterion} needs the whole model in memory; layer by layer, choose one of "
            f"{', '.join(ONE_SHOT)}."
        )
    if recipe.budget is not None and recipe.budget.kind == "speedup":
        raise InputError("A speedup is measured on the whole model in memory; layer by layer, ask for params or flops.")
    defaults = Options()
    for name, why in _NOT_STREAMED.items():
        if getattr(options, name) != getattr(defaults, name):
            raise InputError(f"{name} is for pruning in memory, because layer by layer {why}; leave it out.")
    if is_self(data):
        raise InputError(
            "To write its own text a model must be in memory, but here it is read layer by layer; name a text with "
            "data (--data)."
        )
    if count() > 1:
        raise InputError("Pruning layer by layer takes one process, but several were started; start one.")
    return recipe


@dataclass(frozen=True, kw_only=True)
class _Pruning:
    """One pruning of an opened checkpoint, by a recipe with a criterion, into a folder."""

    opened: StoredModel
    source: Path
    recipe: PruneRecipe
    options: Options
    out: Path
    work: Path

    def run(self, data: Data | None) -> PrunedCheckpoint:
        """Choose units, compensate and cut, or continue doing so."""
        recipe, seed = self.recipe, self.options.seed
        model = self.opened.without_weights()
        require_trainable(model, recipe)
        # A budget that cannot be reached, and a text that is too short, are told before anything is done.
        budget_costs(model, recipe)
        text = self._text(model, data)
        settings = self._settings(text)
        keep_settings(self.work, settings)
        if self.options.announce is not None:
            self.options.announce(forecast(model, recipe, streamed=True))
        _log.info("pruning %s layer by layer begins: %d parameters", self.source, model.num_parameters())
        calibration = calibration_of(model, text.train, recipe, seed=seed)
        plan = self._plan(model, text)
        planned = prepare(self.opened, plan)
        planned.check_one()
        compensation = None
        if calibration:
            dense, cut = self.opened.resident(self.opened.without_weights()), planned.resident(self.opened)
            compensation, files = fit_layers(dense, cut, calibration, self.work, progress=self._tell)
            planned = planned.fitted(files, self.opened.names)
            if compensation.kept:
                config: Any = planned.model.config
                config.compensation = compensation.to_dict() | {"text": f"text {text.sha256[:12]}"}
        if self._settings(text) != settings:
            raise InputError(f"The weights in {self.source} were changed during the pruning; prune them again.")
        where = self.source, self.out, self.work / "cut"
        how: dict[str, Any] = {"tokenizer": text.tokenizer, "resume": self.options.resume, "progress": self._tell}
        done = write_cut(planned, *where, **how)
        _log.info("pruned %s layer by layer to %s", self.source, self.out)
        assert recipe.budget is not None, "a ranking has one"
        budget = {**recipe.budget.words, "reached": reached(model, recipe, true_share(model, recipe, plan))}
        return PrunedCheckpoint(plan=planned.plan, budget=budget, cut=done, compensation=compensation)

    def _tell(self, name: str, done: int, total: int) -> None:
        if self.options.progress is not None:
            self.options.progress(name, done, total, {})

    def _text(self, model: PreTrainedModel, data: Data | None) -> Text:
        """Return the text; None if none was given and units are ranked without one."""
        tokenizer_of = self.options.tokenizer or self.source
        if is_without_text(model, data, self.recipe):
            return Text(NO_TEXT, None, "", known_tokenizer(tokenizer_of))
        text = read_data(
            data,
            self.work,
            model_type=model.config.model_type,
            tokenizer_of=tokenizer_of,
            progress=partial(self._tell, "reading text, kB"),
        )
        segments(model, text.train, self.recipe, rows=self.recipe.batch_size)
        return text

    def _settings(self, text: Text) -> dict[str, Any]:
        """Return the settings that a resumed pruning must have been started with."""
        stats = {name: (self.source / name).stat() for name in (*self.opened.stored.files, "config.json")}
        return {
            "phase": "prune layer by layer",
            "recipe": self.recipe.model_dump(),
            "seed": self.options.seed,
            "sha256": text.sha256,
            "source": {name: [found.st_size, found.st_mtime_ns] for name, found in stats.items()},
        }

    def _plan(self, model: PreTrainedModel, text: Text) -> HeadPlan:
        """Return the plan that was kept, or choose one now."""
        recipe, seed, path = self.recipe, self.options.seed, self.work / _PLAN_FILE
        if path.exists():
            return HeadPlan.from_json(path)
        batches: list[dict[str, Tensor]] = []
        if recipe.criterion in READS_TEXT:
            batches = [*islice(batches_of(model, text.train, recipe, seed=seed), recipe.steps)]
        dense = self.opened.resident(self.opened.without_weights())
        asked: Any = recipe.criterion
        scoring = Scoring(dense.model, asked, unit=recipe.unit, blocks=asked_blocks(recipe, dense.model))
        with flushing_denormals():
            scores = score_layers(dense, scoring, batches, self.work, seed=seed, progress=self._tell)
        dense.release()
        plan, _ = plan_of_scores(model, for_cost(model, scores, recipe), recipe)
        plan.to_json(path)
        # The hidden states before every layer, where they were needed, take as much room as the model.
        shutil.rmtree(self.work / "forward", ignore_errors=True)
        return plan
