"""One phase of training: the Trainer set up for a section of a recipe, run, and resumed."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from deadhead.attaching import attach_for
from deadhead.data import TokenStream
from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import DivergenceError, InputError
from deadhead.gates.budget import BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.layouts import own_config
from deadhead.measure.latency import Latency
from deadhead.measure.losses import require_language_model
from deadhead.modes import flushing_denormals, restored_on_failure
from deadhead.plans.plan import HeadPlan
from deadhead.training.callbacks.logs import MetricsFile, StepReporter, Validation
from deadhead.training.callbacks.reporting import require_trackers, tensorboard_callbacks, tracker_callbacks
from deadhead.training.callbacks.sparsity import SparsityCallback
from deadhead.training.callbacks.stopping import Stopping
from deadhead.training.phases.checkpoints import checkpoint_step, checkpoints, last_checkpoint
from deadhead.training.phases.choosing import (
    attach_gates,
    budget_costs,
    close_to_budget,
    gate_config,
    reached,
    true_share,
)
from deadhead.training.phases.defaults import segments, with_defaults
from deadhead.training.phases.distillation import Distillation, require_same_vocabulary
from deadhead.training.phases.learning import checkpoint_activations, learner
from deadhead.training.phases.ranking import rank_together
from deadhead.training.phases.rolling_back import roll_back, smaller_step
from deadhead.training.phases.starting import Start, start_of
from deadhead.training.phases.trainer import LanguageModelTrainer, training_arguments
from deadhead.training.processes import Progress, on_main, require_data_parallel
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe

_log = logging.getLogger(__name__)

# Settings that the callback of gates has under the same names, however is said how much goes.
_OF_GATES = {"gate_lr", "weighting", "track_difference"}


@dataclass(frozen=True, kw_only=True)
class PhaseRun:
    """Arguments of `train` besides the model, the text and the recipe.

    Args:
        folder: folder of the checkpoints; None writes none.
        phase: name of the phase in the metrics.
        seed: seed of dropout and of LoRA adapters (the order of data does not depend on it).
        first_segment: where in the text to begin: the number of segments of each row that were read before.
        gates: gates to train under the sparsity loss that the recipe describes.
        start: initial state of the gates, for a recipe with `start_from`; None scores their units.
        latency: latency of this model on this machine, for a recipe with a speedup; None measures it.
        teacher: the model to distil from, with the weight that the recipe's `distill` sets.
        callbacks: further callbacks, called after deadhead's.
        metrics: path of metrics.jsonl, or None.
        tensorboard: folder of TensorBoard events, or None.
        report_to: trackers to report to through transformers' integrations, such as "wandb".
        run_name: name of the run in the trackers.
        valid: the validation text, for a recipe with `eval_every`.
        progress: called at every step with the phase's name, and while units are scored.
        resume: continue from the newest complete checkpoint in `folder`, if there is one.
    """

    folder: str | Path | None = None
    phase: str = "train"
    seed: int = 0
    first_segment: int = 0
    gates: HeadGates | None = None
    start: Start | None = None
    latency: Latency | None = None
    teacher: PreTrainedModel | None = None
    callbacks: Sequence[TrainerCallback] = ()
    metrics: Path | None = None
    tensorboard: Path | None = None
    report_to: Sequence[str] = ()
    run_name: str | None = None
    valid: TokenStream | None = None
    progress: Progress = lambda *_: None
    resume: bool = False


_ALONE = PhaseRun()


def train(model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, run: PhaseRun = _ALONE) -> PreTrainedModel:
    """Train `model` in place for one phase and leave it in evaluation mode. After a failure it keeps its last weights.

    On Ctrl-C or SIGTERM, the step is finished and a checkpoint is saved before the signal takes effect. If a loss or a
    gradient is not finite, the phase continues from its last checkpoint with half the learning rate, once.

    Args:
        model: the model to train, with gates attached if `run` has gates.
        text: the training text.
        recipe: steps, batch, optimizer; a `PruneRecipe` for a phase with gates.
        run: folders of checkpoints and metrics, gates, teacher, seed.

    Raises:
        InputError: the text is too short, something that the recipe needs is missing (bf16, PEFT, a teacher), settings
            contradict each other, or the folder has checkpoints but `resume` is False.
        DivergenceError: the loss or the gradient is not finite, and there is no checkpoint to roll back to, or the
            phase rolled back before.

    Warns:
        RunWarning: a damaged checkpoint is skipped, or the phase rolled back.
    """
    if run.folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            unsaved = recipe.model_copy(update={"save_every": 0})
            return train(model, text, unsaved, replace(run, folder=temporary))
    folder = Path(run.folder)
    if not run.resume and checkpoints(folder):
        raise InputError(
            f"{folder} holds checkpoints of an earlier training; continue it with resume=True, or choose another "
            "folder."
        )
    _require_what_is_asked_for(model, recipe, run)
    recipe = with_defaults(recipe, model)
    with restored_on_failure(model):
        for resume in (run.resume, True):
            try:
                _log.info("phase %s: training for %d steps", run.phase, recipe.training_steps)
                _attempt(model, text, recipe, run, folder, resume=resume)
                _log.info("phase %s: done", run.phase)
                return model
            except DivergenceError as error:
                # It raises if the phase has rolled back before.
                on_main(partial(roll_back, folder, error))
    raise AssertionError("a phase rolls back once")


def choose_units(
    model: PreTrainedModel, text: TokenStream, recipe: PruneRecipe, run: PhaseRun, plan: HeadPlan | None = None
) -> tuple[HeadGates, dict[str, Any] | None]:
    """Attach gates and close those of the units to remove, which the gates learn or a ranking chooses.

    Args:
        model: a model without gates.
        text: the text to choose units by.
        recipe: a recipe with a criterion.
        run: arguments of a phase with gates.
        plan: the plan that a ranking chose before, if it is known.

    Returns:
        The gates, and the recipe's budget with the values asked for and reached; None without a budget.
    """
    budget = recipe.budget
    if recipe.is_ranked:
        where: dict[str, Any] = {"seed": run.seed, "first_segment": run.first_segment, "latency": run.latency}
        plan = plan or rank_together(model, text, recipe, **where, progress=run.progress)
        # Not those that would learn: a ranking's blocks are of units of like scores.
        gates = attach_for(model, plan)
        chosen = plan
        found: float | None = on_main(lambda: reached(model, recipe, true_share(model, recipe, chosen)))
    else:
        start = None if recipe.start_from is None else _start(model, text, recipe, run)
        gates = attach_gates(model, recipe, run.seed, None if start is None else start.blocks)
        train(model, text, recipe, replace(run, gates=gates, start=start))
        found = close_to_budget(model, gates, recipe, latency=run.latency)
    return gates, None if budget is None else {**budget.words, "reached": found}


def _require_what_is_asked_for(model: PreTrainedModel, recipe: PhaseRecipe, run: PhaseRun) -> None:
    """Check that whatever a recipe needs is given and installed, and that its settings do not contradict each other."""
    require_language_model(model, "Training on a text")
    if run.teacher is not None:
        require_same_vocabulary(run.teacher, model)
    if recipe.distill and run.teacher is None:
        raise InputError("The recipe's distill asks for a teacher to learn from, but none was given.")
    if recipe.eval_every and run.valid is None:
        raise InputError("The recipe's eval_every asks for a validation text, but none was given.")
    require_trackers(run.report_to)
    require_data_parallel()
    if isinstance(recipe, PruneRecipe) and recipe.freeze_weights and recipe.lora_rank:
        raise InputError(
            "With frozen weights only gates learn, but a LoRA rank was given too; leave out one of the two."
        )


def _attempt(
    model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, run: PhaseRun, folder: Path, *, resume: bool
) -> None:
    """Train for one phase by a recipe without open settings, from the start or the newest complete checkpoint.

    The model ends in evaluation mode, whatever happens.
    """
    # The Trainer writes into the configuration, which other models may share.
    own_config(model)
    settings = dict(vars(model.config))
    args = training_arguments(recipe, folder, seed=run.seed, run_name=run.run_name)
    rows = recipe.batch_size * args.world_size
    dataset = segments(model, text, recipe, rows=rows, first_segment=run.first_segment)
    # The last rows of a shuffled text that make no whole batch: several processes would fill it up, one would not.
    args.dataloader_drop_last = len(cast(Sized, dataset)) >= rows
    ours = _callbacks(model, recipe, run)
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is None:
        _lean_gates(model, text, recipe, run)
    ours.append(StepReporter(partial(run.progress, run.phase)))
    distillation = None
    if run.teacher is not None:
        distillation = Distillation(run.teacher, weight=recipe.distill, temperature=recipe.distill_temperature)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model, True)
    begin = 0 if checkpoint is None else checkpoint_step(checkpoint)
    ours += smaller_step(folder, checkpoint)
    stopping = Stopping(saves=bool(recipe.save_every))
    try:
        with ExitStack() as stack:
            if recipe.lora_rank:
                # Adapters begin with random values.
                set_seed(run.seed)
            learning = stack.enter_context(learner(model, recipe))
            if args.process_index == 0:
                if run.tensorboard is not None:
                    ours += stack.enter_context(tensorboard_callbacks(run.tensorboard, run.gates, begin=begin))
                ours += stack.enter_context(tracker_callbacks(run.report_to))
            last = [*ours, *run.callbacks, stopping]
            trainer = LanguageModelTrainer(
                learning, args, dataset, distillation, keep=recipe.save_total_limit, callbacks=last
            )
            trainer.remove_callback(PrinterCallback)
            if args.world_size > 1 and hasattr(model.config, "memory_length"):
                # Dropout of its own for each process. The order of texts for models without memory is drawn from the
                # same seed, and must be the same.
                set_seed(run.seed + args.process_index)
            stack.enter_context(stopping.heeding_signals())
            # With many gates closed gradients underflow.
            with warnings.catch_warnings(), no_space_is_input_error(folder), flushing_denormals():
                # Segments are read in order on purpose, and the scheduler is saved by the Trainer itself.
                warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
                # A phase that is stopped is gone on with.
                warnings.filterwarnings("ignore", message="Training ended at step")
                if checkpoint is None:
                    trainer.train()
                else:
                    trainer.resume(checkpoint)
    finally:
        if recipe.gradient_checkpointing:
            checkpoint_activations(model, False)
        vars(model.config).update(settings)
        model.eval()


def _callbacks(model: PreTrainedModel, recipe: PhaseRecipe, run: PhaseRun) -> list[TrainerCallback]:
    """Return the callbacks that train the gates, validate and log."""
    found: list[TrainerCallback] = []
    if run.gates is not None:
        prune = _recipe_of_gates(model, recipe, run.gates, run.seed)
        budgeted = on_main(lambda: budget_costs(model, prune, latency=run.latency))
        ramp_steps = prune.ramp_steps or None
        settings = prune.model_dump(include=_OF_GATES)
        if budgeted is not None:
            settings["budget"] = BudgetTarget(budgeted[1], budgeted[0].share, ramp_steps=ramp_steps)
        elif prune.sparsity is not None:
            settings |= prune.model_dump(include={"sparsity", "ranking"})
            settings |= {"exact": prune.criterion == "topk", "ramp_steps": ramp_steps}
        else:
            settings |= {"l0": prune.l0, "warmup_steps": prune.l0_warmup_steps}
        found.append(SparsityCallback(run.gates, **settings))
    if recipe.eval_every and run.valid is not None:
        found.append(Validation(model, run.valid, every=recipe.eval_every, tokens=recipe.eval_tokens))
    if run.metrics is not None:
        found.append(MetricsFile(run.metrics, run.phase, run.gates))
    return found


def _recipe_of_gates(model: PreTrainedModel, recipe: PhaseRecipe, gates: HeadGates, seed: int) -> PruneRecipe:
    """Return the recipe as a PruneRecipe, after checking that it describes the gates that are attached."""
    if not isinstance(recipe, PruneRecipe):
        raise InputError("A phase with gates needs a PruneRecipe, which says how they learn; give one as recipe.")
    if recipe.is_ranked:
        raise InputError(
            f"The criterion {recipe.criterion} ranks heads and trains no gates; use deadhead.training.rank."
        )
    asked = gate_config(recipe, model, seed)
    # The scale of their rate is of no account to gates that have an optimizer of their own.
    for name in ("init", "hard", "output_scale", *(["lr_scale"] if recipe.gate_lr == 0 else [])):
        if getattr(gates.config, name) != getattr(asked, name):
            raise InputError(
                f"The prune recipe asks for gates with {name} = {getattr(asked, name)}, but those attached have "
                f"{getattr(gates.config, name)}; attach them with deadhead.training.attach_gates(model, recipe)."
            )
    if bool(recipe.blocks) != gates.choices.has_blocks:
        raise InputError(
            f"The prune recipe {'asks for' if recipe.blocks else 'has no'} gates on blocks, but those attached have "
            f"{'none' if recipe.blocks else 'some'}; attach them with deadhead.training.attach_gates(model, recipe)."
        )
    return recipe


def _start(model: PreTrainedModel, text: TokenStream, recipe: PruneRecipe, run: PhaseRun) -> Start:
    return start_of(
        model,
        text,
        recipe,
        seed=run.seed,
        first_segment=run.first_segment,
        latency=run.latency,
        folder=None if run.folder is None else Path(run.folder),
        resume=run.resume,
        progress=run.progress,
    )


def _lean_gates(model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, run: PhaseRun) -> None:
    """Initialise gates in the order of a criterion's scores, if the recipe asks for it."""
    if run.gates is not None and isinstance(recipe, PruneRecipe) and recipe.start_from is not None:
        start = _start(model, text, recipe, run) if run.start is None else run.start
        start.lean(run.gates)
