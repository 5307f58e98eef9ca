"""A single phase in one call: it takes a model (or the sizes of one), and returns a model and its measurements."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel

from deadhead.checkpoints import checkpoint
from deadhead.disk.files import remove_left_overs, write_json
from deadhead.disk.places import checked_path, empty_parents_gone
from deadhead.disk.reading import read_json
from deadhead.errors import InputError, require_extra, typed
from deadhead.layouts import find_layout
from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.measure.evaluation import Evaluation, evaluate
from deadhead.modes import best_device, moved, on_device, restored_on_failure
from deadhead.training.callbacks.reporting import require_trackers
from deadhead.training.phases.checkpoints import newest_finished
from deadhead.training.phases.choosing import LATENCY_FILE
from deadhead.training.phases.defaults import segments
from deadhead.training.phases.distillation import require_weight
from deadhead.training.phases.phase import PhaseRun, train
from deadhead.training.phases.rolling_back import rolled_back
from deadhead.training.processes import count, counted, is_main, on_main, told
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.runs.beginning import Model, Phase, announcing_once, base_of, begin
from deadhead.training.runs.inputs import NO_TEXT, Data, Text, teacher_of
from deadhead.training.runs.options import Options
from deadhead.training.runs.pruning import CUT, RECOVERY, Known, prune_in_place
from deadhead.training.runs.results import Change, Pruned, Trained
from deadhead.training.runs.self_text import FILE
from deadhead.training.runs.summary import METRICS_FILE

_log = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
# What a phase leaves once it has settings: checkpoints, a cut model, scores and fits of layers.
_BEGUN = ("checkpoints/*", f"{RECOVERY}/*", CUT, "*/layer-*")

_P = TypeVar("_P", bound=PhaseRecipe)


@typed
def prune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PruneRecipe | None = None,
    cut: bool = True,
    **settings: Any,
) -> Pruned:
    """Find the units of a model that matter least, by gates or a criterion, and cut them off.

        pruned = deadhead.prune("gpt2", "my.txt", params=0.8, steps=500)
        pruned.model, pruned.plan, pruned.costs.after.parameters, pruned.measured.after.perplexity

    It does what `deadhead prune` does. One budget says how much to cut, in shares of the model as it is; with `l0`,
    training finds how much.

    Args:
        model: a model in memory, which is changed in place; or a checkpoint folder, a GGUF file, or a name on the
            Hugging Face hub.
        data: a `TokenizedCorpus` or `TokenStream`; or a text file, a directory, "stdlib" or "hf:NAME[:CONFIG]", read
            by the model's tokenizer; or "self", which the model writes before it is pruned. None takes "stdlib" for a
            model of deadhead's own; other models can then be ranked by "magnitude" or "random" only, and are not
            measured.
        recipe: values of settings that are not given as arguments; None: the defaults.
        cut: False keeps the gates on the model.
        settings: fields of `PruneRecipe`, such as `params`, `sparsity`, `criterion`, `steps`, `batch_size`, and of
            `Options`: `tokenizer`, `teacher`, `seed`, `out`, `resume`, `progress`, `report_to`, `device`, `dtype`,
            `evaluation_tokens`.

    Raises:
        InputError: an argument cannot be used; for an unknown setting the message names the nearest known one.
        UnsupportedModel: the model has no heads that could be cut.
        DivergenceError: training diverged.
    """
    asked, options = divided(recipe, PruneRecipe, settings)
    return cast(Pruned, run_single("prune", asked, model, data, options, cut=cut))


@typed
def finetune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PhaseRecipe | None = None,
    **settings: Any,
) -> Trained:
    """Train a model further, to recover what a cut cost or for any other reason.

        tuned = deadhead.finetune(pruned.model, "my.txt", steps=500, teacher="gpt2", distill=0.5)

    Args:
        model: as for `prune`.
        data: as for `prune`, but "self" is written by the `teacher`.
        recipe: values of settings that are not given as arguments; None: the defaults.
        settings: fields of `PhaseRecipe`, such as `steps`, `learning_rate`, `lora_rank`, and of `Options`.

    Raises:
        InputError: an argument cannot be used; for an unknown setting the message names the nearest known one.
        DivergenceError: training diverged.
    """
    asked, options = divided(recipe, PhaseRecipe, settings)
    return run_single("finetune", asked, model, data, options)


def divided(recipe: _P | None, kind: type[_P], settings: dict[str, Any]) -> tuple[_P, Options]:
    """Return the given recipe, or the default one, with the settings that belong to it, and the other settings."""
    if recipe is not None and type(recipe) is not kind:
        raise InputError(
            f"The recipe of this phase must be a {kind.__name__} of deadhead.training, but got a "
            f"{type(recipe).__name__}."
        )
    options = {field.name for field in fields(Options)}
    others = {name: settings.pop(name) for name in options & settings.keys()}
    known = {*kind.model_fields, *options, *(["cut"] if issubclass(kind, PruneRecipe) else [])}
    for name in settings.keys() - known:
        near = get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"see help(deadhead.training.{kind.__name__})"
        raise InputError(f"The call has an unknown key {name!r}; {hint}")
    return changed(recipe or kind(), **settings), Options(**others)


def run_single(
    phase: Phase,
    recipe: PhaseRecipe,
    model: Model,
    data: Data | Text | None,
    options: Options,
    *,
    cut: bool = True,
    known: Known | None = None,
) -> Trained:
    """Run one phase; write its checkpoint if `out` is given.

    Checkpoints to resume from are in `OUT.work` until the phase is done. Under torchrun or `accelerate launch` every
    process calls this; all train, and the main one does the rest. A model in memory is changed in place. With a
    `PruneRecipe`, units are chosen and cut, unless the gates are kept, and the result is a `Pruned`; a plan that is
    `known` already is used unchanged.
    """
    require_trackers(options.report_to)
    if recipe.lora_rank:
        require_extra("peft", "peft", what="LoRA")
    if options.recover and (not isinstance(recipe, PruneRecipe) or not cut):
        raise InputError("recover is for a model that is cut by deadhead.prune; leave it out.")
    if options.max_memory is not None and not isinstance(recipe, PruneRecipe):
        raise InputError("max_memory is for deadhead.prune, whose memory is estimated; leave it out.")
    if options.teacher is not None and not options.recover:
        require_weight(recipe.distill)
    if options.dtype is not None and not isinstance(model, str | Path):
        raise InputError("dtype is for a model that is loaded from a folder or the hub; leave it out.")
    device = None if options.device is None else checkpoint.named_device(options.device)
    if options.out is None:
        if options.resume:
            raise InputError(
                "resume needs out, beside which a stopped phase leaves its work, but none was given; give out, or "
                "leave resume out."
            )
        recipe = recipe.model_copy(update={"save_every": 0})
        place: Any = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    else:
        out = checked_path(options.out).resolve()
        options = replace(options, out=out)
        work = checked_path(out.with_name(out.name + ".work"))
        on_main(lambda: check_places(out, work, model, resume=options.resume))
        place = nullcontext(str(work))
    with place as folder, empty_parents_gone(Path(folder)), _gone_on_failure(Path(folder)), on_device(device):
        return _run(phase, recipe, model, data, options, Path(folder), cut=cut, known=known)


@contextmanager
def _gone_on_failure(work: Path) -> Iterator[None]:
    """Remove `work` if the block created it and fails, unless it holds something to resume.

    A text that was written, which takes minutes, is kept only after an interruption: a phase that was refused would be
    refused again.
    """
    fresh = not work.exists()
    try:
        yield
    except BaseException as error:
        begun = [name for name in ("checkpoints", RECOVERY) if newest_finished(work / name) is not None]
        is_written = isinstance(error, KeyboardInterrupt | SystemExit) and (work / FILE).exists()
        if fresh and is_main() and not begun and not is_written and not (work / CUT).is_dir():
            shutil.rmtree(work, ignore_errors=True)
        raise


def _run(
    phase: Phase,
    recipe: PhaseRecipe,
    model: Model,
    data: Data | Text | None,
    options: Options,
    work: Path,
    *,
    cut: bool,
    known: Known | None,
) -> Trained:
    progress = told(options.progress)
    options = announcing_once(options)
    network, text, recipe = begin(phase, model, data, options, work, progress, recipe, cut=cut)
    _log.info("%s begins: %s of %d parameters", phase, type(network).__name__, network.num_parameters())
    if options.out is not None:
        on_main(lambda: keep_settings(work, _settings(phase, recipe, model, data, options, text) | {"cut": cut}))

    def measured(what: str) -> Evaluation | None:
        if text.valid is None or not network.can_generate():
            return None
        moved(network, best_device())
        return evaluate(network, text.valid, limit=options.evaluation_tokens, progress=counted(progress, what))

    # Until the units are cut another try begins anew with a model in memory; what fails afterwards loses nothing.
    with restored_on_failure(network) if isinstance(model, PreTrainedModel) else nullcontext():
        if text.train is not NO_TEXT:
            # A text that is too short is told before anything is measured.
            segments(network, text.train, recipe, rows=recipe.batch_size * count())
        before = on_main(lambda: (model_cost(network), known.before if known else measured("evaluating before")))
        run = PhaseRun(
            folder=work / "checkpoints",
            phase=phase,
            seed=options.seed,
            teacher=teacher_of(options.teacher, _own_teacher(phase, model), network, recipe),
            metrics=work / METRICS_FILE,
            tensorboard=work / "tensorboard",
            report_to=options.report_to,
            run_name=f"{work.name.removesuffix('.work')} {phase}",
            valid=text.valid,
            progress=progress,
            resume=options.resume,
        )
        found: dict[str, Any] = {}
        if isinstance(recipe, PruneRecipe):
            plan = None if known is None else known.plan
            where: dict[str, Any] = {"work": work, "cut": cut, "measured": measured, "plan": plan}
            found = prune_in_place(network, text, recipe, run, options, **where)
        else:
            train(network, text.train, recipe, run)
            found["plan"] = find_layout(network).recorded_plan(network)

    def measure_and_save() -> tuple[Cost, Evaluation | None, dict[str, Any] | None]:
        result = measured("evaluating")
        if options.out is not None:
            checkpoint.save(
                network,
                options.out,
                tokenizer=text.tokenizer,
                metrics={} if result is None else {"validation perplexity a token": result.perplexity},
                base=base_of(model),
                files=(work / METRICS_FILE, work / "tensorboard", work / LATENCY_FILE),
            )
        setback = rolled_back(work / "checkpoints") or rolled_back(work / RECOVERY)
        shutil.rmtree(work, ignore_errors=True)
        return model_cost(network), result, setback

    cost, result, setback = on_main(measure_and_save)
    _log.info("%s is done: %d parameters", phase, cost.parameters)
    made = Pruned if isinstance(recipe, PruneRecipe) else Trained
    return made(
        model=network,
        tokenizer=text.tokenizer,
        costs=Change(before[0], cost),
        measured=None if result is None or before[1] is None else Change(before[1], result),
        steps=recipe.training_steps + options.recover,
        rolled_back=setback,
        **found,
    )


def _own_teacher(phase: Phase, model: Model) -> PreTrainedModel | str | Path | None:
    """Return the teacher of a phase if none is named: in pruning, the model as it was."""
    return model if phase == "prune" and not isinstance(model, ModelRecipe) else None


def check_places(out: Path, work: Path, model: Model, *, resume: bool) -> None:
    """Check that a phase's folders may be written, and that there is work to resume if and only if it is asked for."""
    if isinstance(model, str | Path) and Path(model).resolve() == out:
        raise InputError(
            f"The checkpoint must not overwrite the model it is made of, {model}; choose another out (--out)."
        )
    checkpoint.require_ours_or_free(out)
    checkpoint.require_no_model(work, Path(model) if isinstance(model, str | Path) else None)
    if work.exists() and not work.is_dir():
        raise InputError(f"Unfinished work is kept in the folder {work}, but a file is there; move it away.")
    if work.exists() and not resume:
        raise InputError(f"{work} is left from a stopped phase; continue it with resume (--resume), or delete it.")
    if resume and not work.exists():
        raise InputError(
            f"There is nothing to resume: {work}, where a stopped phase leaves its checkpoints, does not exist."
        )
    if resume:
        remove_left_overs(out.parent, out.name)


def _settings(
    phase: Phase, recipe: PhaseRecipe, model: Model, data: Data | Text | None, options: Options, text: Text
) -> dict[str, Any]:
    """Return the settings that a resumed phase must have been started with."""
    return {
        "phase": phase,
        "recipe": recipe.model_dump(),
        "data": data.model_dump() if isinstance(data, DataRecipe) else data if isinstance(data, str) else None,
        "model": None if isinstance(model, ModelRecipe) else _named(model),
        "shape": model.model_dump() if isinstance(model, ModelRecipe) else None,
        "seed": options.seed,
        "recover": options.recover,
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        "teacher": None if options.teacher is None else _named(options.teacher),
        "processes": count(),
        "sha256": text.sha256,
    }


def _named(model: PreTrainedModel | str | Path) -> str:
    if isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} in memory"
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def keep_settings(work: Path, settings: dict[str, Any]) -> None:
    """Write a phase's settings beside its checkpoints, or check that it is resumed with those it started with."""
    path = work / SETTINGS_FILE
    anew = f"delete {work} to begin anew"
    if not path.exists():
        if any(any(work.glob(pattern)) for pattern in _BEGUN):
            raise InputError(f"{work} is left of a phase, but its {SETTINGS_FILE} is missing; {anew}.")
        write_json(path, settings)
        return
    try:
        found = read_json(path, what="list of a phase's settings")
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')}; {anew}.") from error
    if found != settings:
        raise InputError(
            f"{work} is left from a phase with other settings, another text or another number of processes; resume "
            "with those, or delete it."
        )
