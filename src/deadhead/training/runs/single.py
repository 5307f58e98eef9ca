"""One phase on its own: a model (or the sizes of one) in, a model and what was measured of it out."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.attaching import detach, gates_of, unwrapped
from deadhead.checkpoints import checkpoint
from deadhead.cutting import cut as cut_heads
from deadhead.disk.files import remove_left_overs, write_json
from deadhead.disk.reading import read_json
from deadhead.errors import InputError, require_extra
from deadhead.layouts import find_layout
from deadhead.measure.cost import model_cost
from deadhead.measure.costs import Cost
from deadhead.measure.evaluation import Evaluation, evaluate
from deadhead.modes import best_device, on_device
from deadhead.training.callbacks.reporting import require_trackers
from deadhead.training.phases.checkpoints import newest_finished
from deadhead.training.phases.choosing import LATENCY_FILE
from deadhead.training.phases.segments import segments
from deadhead.training.processes import count, is_main, on_main
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.runs.inputs import Data, Text, read_data, require_named
from deadhead.training.runs.models import build_model
from deadhead.training.runs.results import Change, Pruned, Trained
from deadhead.training.runs.summary import METRICS_FILE
from deadhead.training.runs.workplace import Place, Progress, told

_SETTINGS_FILE = "settings.json"

Phase = Literal["train", "prune", "finetune"]
Model = PreTrainedModel | str | Path | ModelRecipe
"""In memory, a checkpoint's folder, its name on the hub, or the sizes of a fresh one."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a phase may be given beside its recipe.

    Args:
        tokenizer: the model's, if it does not lie beside it.
        teacher: the model to distil from with `distill`; None: in `deadhead.prune` the model itself as it is now.
        seed: of dropout, gate noise, LoRA adapters and first weights.
        out: folder of the checkpoint to write; None writes none.
        resume: go on from the last checkpoint in `OUT.work`.
        progress: told of the name of what goes on, how much is done, how much there is, and the last numbers.
        report_to: trackers that transformers knows, such as "wandb".
        device: where to run, such as "cpu"; None: the accelerator there is.
        dtype: of the weights of a model that is loaded, such as "bfloat16"; None: as they were saved.
        evaluation_tokens: tokens of the validation text to measure on; None: all.

    Raises:
        InputError: the seed or the number of tokens is out of range.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    teacher: PreTrainedModel | str | Path | None = None
    seed: int = 0
    out: str | Path | None = None
    resume: bool = False
    progress: Progress | None = None
    report_to: Sequence[str] = ()
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    evaluation_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", (self.report_to,))
        for name, least in (("seed", 0), ("evaluation_tokens", 2)):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if not (is_whole and least <= value < 2**31) and not (value is None and name == "evaluation_tokens"):
                raise InputError(f"{name} must be a whole number of at least {least} and below 2^31, but is {value!r}.")


def run_single(
    phase: Phase,
    recipe: PhaseRecipe,
    model: Model,
    data: Data | None,
    options: Options,
    *,
    cut: bool = True,
) -> Trained:
    """Run one phase; write its checkpoint, if it is to have a place.

    Checkpoints to resume from lie in `OUT.work` beside it until the phase is done. Under torchrun or
    `accelerate launch` every process calls this; all train, and the main one does the rest.

    Args:
        phase: its name.
        recipe: its settings; a `PruneRecipe` chooses units, and the result is a `Pruned`.
        model: to start from; one in memory is changed in place.
        data: the text; None for the default one of deadhead's own models.
        options: the rest.
        cut: whether units that go are cut, or the gates kept.

    Raises:
        InputError: something given cannot be used.
        DivergenceError: training diverged.
    """
    require_trackers(options.report_to)
    if recipe.lora_rank:
        require_extra("peft", "peft", what="LoRA")
    if options.teacher is not None and not recipe.distill:
        raise InputError("A teacher was given, but the weight of what it says, distill, is 0; set it, say to 0.5.")
    if options.dtype is not None and not isinstance(model, str | Path):
        raise InputError("dtype is for a model that is loaded from a folder or the hub; leave it out.")
    device = None if options.device is None else checkpoint.named_device(options.device)
    if options.out is None:
        if options.resume:
            raise InputError("There is nothing to resume without out, beside which a stopped phase leaves its work.")
        recipe = recipe.model_copy(update={"save_every": 0})
        place: Any = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    else:
        out = Path(options.out).resolve()
        options = replace(options, out=out)
        work = out.with_name(out.name + ".work")
        on_main(lambda: _check_places(out, work, model, resume=options.resume))
        place = nullcontext(str(work))
    with place as folder, _gone_if_unused(Path(folder)), on_device(device), _gates_off_on_failure(model):
        return _run(phase, recipe, model, data, options, Path(folder), cut=cut)


@contextmanager
def _gates_off_on_failure(model: Model) -> Iterator[None]:
    """Take the gates off a model in memory if the block fails, unless it had some: another try then begins anew."""
    had_gates = not isinstance(model, PreTrainedModel) or gates_of(unwrapped(model)) is not None
    try:
        yield
    except BaseException:
        if not had_gates:
            detach(cast(PreTrainedModel, model))
        raise


def _run(
    phase: Phase,
    recipe: PhaseRecipe,
    model: Model,
    data: Data | None,
    options: Options,
    work: Path,
    *,
    cut: bool,
) -> Trained:
    progress = told(options.progress)
    network, text = _begin(model, data, options, work, progress)
    if options.out is not None:
        settings = _settings(phase, recipe, model, data, options, text) | {"cut": cut}
        on_main(lambda: _keep_settings(work, settings))

    def measured(what: str) -> Evaluation | None:
        if text.valid is None:
            return None
        network.to(best_device())  # type: ignore[arg-type]
        limit = options.evaluation_tokens
        return evaluate(network, text.valid, limit=limit, progress=lambda done, total: progress(what, done, total, {}))

    # A text that is too short is told before anything is measured.
    segments(network, text.train, recipe, rows=recipe.batch_size * count(), first_segment=0)
    before = on_main(lambda: (model_cost(network), measured("evaluating before")))
    place = Place(
        phase=phase,
        folder=work,
        name=work.name.removesuffix(".work"),
        text=text.train,
        valid=text.valid,
        seed=options.seed,
        teacher=_teacher(options.teacher or (model if phase == "prune" else None), network, recipe),
        progress=progress,
        report_to=options.report_to,
        resume=options.resume,
    )
    found: dict[str, Any] = {}
    gates = None
    if isinstance(recipe, PruneRecipe):
        gates, found["budget"] = place.choose_units(network, recipe)
        plan = gates.plan()
        if cut:
            cut_heads(network, plan)
            gates = None
            plan = find_layout(network).recorded_plan(network) or plan
        found |= {"plan": plan, "gates": gates}
    else:
        place.train(network, recipe)
        found["plan"] = find_layout(network).recorded_plan(network)

    def measure_and_save() -> tuple[Cost, Evaluation | None, dict[str, Any] | None]:
        result = measured("evaluating")
        if options.out is not None:
            checkpoint.save(
                network,
                options.out,
                tokenizer=text.tokenizer,
                metrics={} if result is None else {"validation perplexity a token": result.perplexity},
                base=_base(model),
                files=(work / METRICS_FILE, work / "tensorboard", work / LATENCY_FILE),
            )
        setback = place.rolled_back()
        shutil.rmtree(work, ignore_errors=True)
        return model_cost(network), result, setback

    cost, result, setback = on_main(measure_and_save)
    make: Callable[..., Trained] = Pruned if isinstance(recipe, PruneRecipe) else Trained
    return make(
        model=network,
        tokenizer=text.tokenizer,
        costs=Change(before[0], cost),
        measured=None if result is None or before[1] is None else Change(before[1], result),
        steps=recipe.training_steps,
        rolled_back=setback,
        **found,
    )


def _begin(
    model: Model,
    data: Data | None,
    options: Options,
    work: Path,
    progress: Progress,
) -> tuple[PreTrainedModel, Text]:
    """Return the model to begin with, and the text."""
    network = None
    if isinstance(model, ModelRecipe):
        data = DataRecipe() if data is None else data
    else:
        network = model if isinstance(model, PreTrainedModel) else checkpoint.load(model, dtype=options.dtype)
        data = require_named(data, network.config.model_type)
    where = _base(model) or (None if network is None else network.name_or_path or None)
    text = read_data(
        data,
        work,
        tokenizer_of=options.tokenizer or where,
        is_fresh=network is None,
        progress=lambda done, total: progress("reading text, kB", done, total, {}),
    )
    if network is None:
        if text.tokenizer is None:
            raise InputError("A fresh model is made for a tokenizer's tokens, but none was given; give it a text.")
        assert isinstance(model, ModelRecipe)
        network = build_model(model, text.tokenizer, seed=options.seed)
    return network, text


def _base(model: Model) -> str | Path | None:
    """Return where a model came from: its folder or name, if it was given by that or its folder is still there."""
    if isinstance(model, str | Path):
        return model
    name = model.name_or_path if isinstance(model, PreTrainedModel) else ""
    return name if name and Path(name).is_dir() else None


def _teacher(teacher: Model | None, network: PreTrainedModel, recipe: PhaseRecipe) -> Callable[[], PreTrainedModel]:
    """Return what loads the teacher, once it is needed; a model that is to be changed is copied now."""
    if recipe.distill and teacher is network:
        kept = copy.deepcopy(network)
        return lambda: kept

    def load() -> PreTrainedModel:
        if isinstance(teacher, PreTrainedModel):
            return teacher
        if isinstance(teacher, str | Path):
            return checkpoint.load(teacher)
        raise InputError("distill asks for a teacher to learn from; name one with --teacher, say the dense model.")

    return load


def _check_places(out: Path, work: Path, model: Model, *, resume: bool) -> None:
    if isinstance(model, str | Path) and Path(model).resolve() == out:
        raise InputError(f"The checkpoint must not overwrite the model it is made of, {model}; choose another --out.")
    checkpoint.require_ours_or_free(out)
    if work.exists() and not resume:
        raise InputError(f"{work} is left of a phase that was stopped; go on with --resume, or delete it.")
    if resume and not work.exists():
        raise InputError(
            f"There is nothing to resume: {work}, where a stopped phase leaves its checkpoints, is not there."
        )
    if resume:
        remove_left_overs(out.parent, out.name)


def _settings(
    phase: Phase,
    recipe: PhaseRecipe,
    model: Model,
    data: Data | None,
    options: Options,
    text: Text,
) -> dict[str, Any]:
    """Return what a phase that is resumed must have been begun with."""
    return {
        "phase": phase,
        "recipe": recipe.model_dump(),
        "data": data.model_dump() if isinstance(data, DataRecipe) else data if isinstance(data, str) else None,
        "model": None if isinstance(model, ModelRecipe) else _named(model),
        "shape": model.model_dump() if isinstance(model, ModelRecipe) else None,
        "seed": options.seed,
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        "teacher": None if options.teacher is None else _named(options.teacher),
        "processes": count(),
        "sha256": text.sha256,
    }


def _named(model: PreTrainedModel | str | Path) -> str:
    if isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} in memory"
    return str(Path(model).resolve()) if Path(model).exists() else str(model)


def _keep_settings(work: Path, settings: dict[str, Any]) -> None:
    """Write a phase's settings beside its checkpoints, or check that it goes on with those it began with."""
    path = work / _SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
    elif read_json(path, what="list of a phase's settings") != settings:
        raise InputError(
            f"{work} is left of a phase with other settings, another text or another number of processes; resume with "
            "those, or delete it."
        )


@contextmanager
def _gone_if_unused(work: Path) -> Iterator[None]:
    """Remove `work` after bad input or an interruption, if it was made in the block and there is nothing to resume."""
    fresh = not work.exists()
    try:
        yield
    except BaseException:
        if fresh and is_main() and newest_finished(work / "checkpoints") is None:
            shutil.rmtree(work, ignore_errors=True)
        raise
