"""One phase on its own: a checkpoint (or nothing) in, a checkpoint out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from deadhead.checkpoints import checkpoint
from deadhead.measure.cost import model_cost
from deadhead.cutting import cut as cut_heads
from deadhead.errors import InputError, require_extra
from deadhead.measure.evaluation import evaluate
from deadhead.disk.files import remove_left_overs, write_json
from deadhead.gates.gates import HeadGates
from deadhead.measure.latency import Latency
from deadhead.layouts import find_layout
from deadhead.disk.reading import read_json
from deadhead.training.phases.checkpoints import newest_finished
from deadhead.training.phases.choosing import LATENCY_FILE
from deadhead.training.runs.inputs import prepare_text
from deadhead.training.phases.phase import choose_units, train
from deadhead.training.processes import count, is_main, on_main
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.callbacks.reporting import require_trackers
from deadhead.training.phases.rolling_back import rolled_back
from deadhead.training.runs.run import Progress, build_model
from deadhead.training.runs.summary import METRICS_FILE

_SETTINGS_FILE = "settings.json"

Phase = Literal["train", "prune", "finetune"]


def _silent(*_: Any) -> None:
    """Tell nobody what goes on."""


def run_single(
    phase: Phase,
    recipe: PhaseRecipe,
    out: Path,
    *,
    model: Path | None,
    data: DataRecipe,
    seed: int = 0,
    shape: ModelRecipe | None = None,
    cut: bool = True,
    teacher: Path | None = None,
    resume: bool = False,
    progress: Progress = _silent,
    report_to: Sequence[str] = (),
) -> dict[str, Any]:
    """Run one phase and write its checkpoint; return what was measured.

    Checkpoints to resume from lie in `OUT.work` beside it until the phase is done. Under torchrun or
    `accelerate launch` every process calls this; all train, and the main one does the rest.

    Args:
        phase: which.
        recipe: its settings; a `PruneRecipe` for "prune".
        out: folder of the checkpoint to write.
        model: checkpoint to start from; None, in "train" only, makes a fresh model of `shape`.
        data: the text.
        seed: of first weights, dropout and gate noise.
        shape: sizes of a fresh model.
        cut: whether "prune" cuts the heads whose gates closed, or saves the gated model.
        teacher: checkpoint to distil from with the recipe's `distill`; None takes `model` itself in "prune", as it is
            at the start, and no teacher in other phases.
        resume: go on from the last checkpoint in `OUT.work`.
        progress: told of what goes on, in the main process.
        report_to: trackers; see `deadhead.train`.

    Raises:
        InputError: something given cannot be used.
        DivergenceError: training diverged.
    """
    require_trackers(report_to)
    if recipe.lora_rank:
        require_extra("peft", "peft", what="LoRA")
    out = out.resolve()
    work = out.with_name(out.name + ".work")
    on_main(lambda: _check_places(out, work, model, resume=resume))
    if not is_main():
        progress = _silent
    settings: dict[str, Any] = {
        "phase": phase,
        "recipe": recipe.model_dump(),
        "data": data.model_dump(),
        "model": None if model is None else str(model.resolve()),
        "shape": None if shape is None else shape.model_dump(),
        "seed": seed,
        "teacher": None if teacher is None else str(teacher.resolve()),
        "processes": count(),
    }
    if teacher is not None and not recipe.distill:
        raise InputError("A teacher was given, but the weight of what it says, distill, is 0; set it, say to 0.5.")
    with _gone_if_unused(work):

        def reading(done: int, total: int) -> None:
            progress("reading text, kB", done, total, {})

        network = None if model is None else checkpoint.load(model)
        text, tokenizer = prepare_text(data, work, tokenizer_of=model, progress=reading)
        if network is None:
            network = build_model(shape or ModelRecipe(), tokenizer, seed=seed)
        settings["sha256"] = text.sha256
        on_main(lambda: _keep_settings(work, settings))
        gates: HeadGates | None = None
        budget = None

        def learn(gates: HeadGates | None, latency: Latency | None = None) -> None:
            train(
                network,
                text.splits["train"],
                recipe,
                folder=work / "checkpoints",
                phase=phase,
                seed=seed,
                gates=gates,
                latency=latency,
                teacher=_load_teacher(teacher or (model if phase == "prune" else None)) if recipe.distill else None,
                metrics=work / METRICS_FILE,
                tensorboard=work / "tensorboard",
                report_to=report_to,
                run_name=f"{out.name} {phase}",
                valid=text.splits["valid"],
                report=lambda done, total, logs: progress(phase, done, total, logs),
                resume=resume,
            )

        if isinstance(recipe, PruneRecipe):
            gates, budget = choose_units(
                network,
                text.splits["train"],
                recipe,
                folder=work,
                train_gates=learn,
                seed=seed,
                report=lambda done, total: progress("measuring latency", done, total, {}),
            )
            if cut:
                cut_heads(network, gates.plan())
        else:
            learn(None)

        def measure_and_save() -> dict[str, Any]:
            measured = evaluate(
                network, text.splits["valid"], progress=lambda done, total: progress("evaluating", done, total, {})
            )
            checkpoint.save(
                network,
                out,
                tokenizer=tokenizer,
                metrics={"validation perplexity a token": measured.perplexity},
                base=model,
                files=(work / METRICS_FILE, work / "tensorboard", work / LATENCY_FILE),
            )
            setback = rolled_back(work / "checkpoints")
            shutil.rmtree(work, ignore_errors=True)
            cost = model_cost(network)
            plan = gates.plan() if gates is not None and not cut else find_layout(network).recorded_plan(network)
            return {
                "heads": cost.heads if gates is None or cut or plan is None else plan.heads,
                **({} if plan is None or plan.blocks is None else {"blocks": plan.blocks.blocks}),
                **({} if budget is None else {"budget": budget}),
                **({} if setback is None else {"rolled_back": setback}),
                "parameters": cost.parameters,
                "flops_per_token": cost.flops_per_token,
                "perplexity": measured.perplexity,
                "word_perplexity": measured.word_perplexity,
                "bits_per_byte": measured.bits_per_byte,
                "steps": recipe.training_steps,
            }

        return on_main(measure_and_save)


def _check_places(out: Path, work: Path, model: Path | None, *, resume: bool) -> None:
    if model is not None and model.resolve() == out:
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


def _load_teacher(path: Path | None) -> PreTrainedModel:
    if path is None:
        raise InputError("distill asks for a teacher to learn from; name one with --teacher, say the dense model.")
    return checkpoint.load(path)


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
