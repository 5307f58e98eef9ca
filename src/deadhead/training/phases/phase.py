"""One phase of training: the Trainer set up for a section of a recipe, run, and resumed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from deadhead.attaching import gates_of
from deadhead.data import SegmentDataset, TokenStream
from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import DivergenceError, InputError, require_extra
from deadhead.gates.budget import BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.measure.criteria import READS_TEXT, score_heads
from deadhead.measure.evaluation import max_positions
from deadhead.measure.latency import Latency
from deadhead.modes import best_device, flushing_denormals
from deadhead.plans.kinds import OneShot
from deadhead.plans.plan import HeadPlan
from deadhead.plans.scores import HeadScores
from deadhead.training.callbacks.logs import MetricsFile, StepReporter
from deadhead.training.callbacks.reporting import require_trackers, tensorboard_callbacks, tracker_callbacks
from deadhead.training.callbacks.sparsity import SparsityCallback
from deadhead.training.callbacks.stopping import Stopping
from deadhead.training.callbacks.validation import Validation
from deadhead.training.phases.arguments import training_arguments
from deadhead.training.phases.checkpoints import checkpoint_step, checkpoints, last_checkpoint
from deadhead.training.phases.choosing import (
    ROW,
    asked_blocks,
    attach_gates,
    budget_costs,
    budget_target,
    close_to_budget,
    gate_config,
    latency_in,
    plan_of_scores,
    ramp_steps,
    reached,
)
from deadhead.training.phases.defaults import with_defaults
from deadhead.training.phases.distillation import Distillation
from deadhead.training.phases.learning import checkpoint_activations, learner
from deadhead.training.phases.rolling_back import roll_back, smaller_step
from deadhead.training.phases.trainer import LanguageModelTrainer
from deadhead.training.processes import on_main, require_data_parallel
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe

# How far apart gates begin that lean: so far that few of them are open to doubt.
_LEAN = 3.0

Report = Callable[[int, int, dict[str, Any]], None]


def _require_same_gates(attached: GateConfig, asked: GateConfig, *, rate: bool) -> None:
    # The scale of their rate is of no account to gates that have an optimizer of their own.
    for name in ("init", "hard", "output_scale", *(["lr_scale"] if rate else [])):
        if getattr(attached, name) != getattr(asked, name):
            raise InputError(
                f"The prune recipe asks for gates with {name} = {getattr(asked, name)}, but those attached have "
                f"{getattr(attached, name)}; attach them with deadhead.gate_config(recipe, model)."
            )


def sparsity_callback(gates: HeadGates, recipe: PruneRecipe, budget: BudgetTarget | None = None) -> SparsityCallback:
    """Return the callback that trains `gates` as a recipe asks for, at a budget that is no share of heads if given."""
    return SparsityCallback(
        gates,
        l0=recipe.l0,
        warmup_steps=recipe.l0_warmup_steps,
        sparsity=recipe.sparsity,
        ranking=recipe.ranking,
        exact=recipe.criterion == "topk",
        gate_lr=recipe.gate_lr,
        budget=budget,
        ramp_steps=ramp_steps(recipe),
        weighting=recipe.weighting,
        track_difference=recipe.track_difference,
    )


def train(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PhaseRecipe,
    *,
    folder: str | Path | None = None,
    phase: str = "train",
    seed: int = 0,
    first_segment: int = 0,
    gates: HeadGates | None = None,
    latency: Latency | None = None,
    teacher: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    metrics: Path | None = None,
    tensorboard: Path | None = None,
    report_to: Sequence[str] = (),
    run_name: str | None = None,
    valid: TokenStream | None = None,
    report: Report | None = None,
    resume: bool = False,
) -> PreTrainedModel:
    """Train `model` in place for one phase; it ends in evaluation mode.

    Args:
        model: with gates attached if `gates` is given.
        text: the training text.
        recipe: steps, batch, optimizer; a `PruneRecipe` with `gates`.
        folder: where checkpoints go; None keeps none.
        phase: its name in the metrics.
        seed: of dropout (data order is the text's own).
        first_segment: where in the text to begin, in segments read of each row before.
        gates: trained under the sparsity loss that `recipe` describes.
        latency: of this model on this machine, for a recipe with a speedup; None measures it.
        teacher: the model to distil from, with the weight that the recipe's `distill` gives it.
        callbacks: further callbacks, called after ours.
        metrics: metrics.jsonl, or None.
        tensorboard: where TensorBoard events go, or None.
        report_to: trackers that the numbers go to through transformers' integrations, such as "wandb".
        run_name: what the trackers call the run.
        valid: the validation text, for a recipe with `eval_every`.
        report: told of every step, for a progress bar.
        resume: go on from the newest whole checkpoint in `folder`, if there is one.

    On Ctrl-C or SIGTERM the step is finished and a checkpoint saved before the signal takes effect. After a loss or a
    gradient that is not finite, the phase goes on from its last checkpoint with half the learning rate, once.

    Raises:
        InputError: the text is too short, something is asked for that is not there (bf16, PEFT, a teacher), settings
            do not go together, or `folder` has checkpoints but `resume` was not asked for.
        DivergenceError: the loss or the gradient is not finite, and there is no checkpoint to roll back to, or it
            happened again.

    Warns:
        RunWarning: a checkpoint is damaged and passed over, or the phase rolled back.
    """
    settings: dict[str, Any] = {"phase": phase, "seed": seed, "first_segment": first_segment}
    settings |= {"gates": gates, "latency": latency, "teacher": teacher, "callbacks": callbacks}
    settings |= {"metrics": metrics, "tensorboard": tensorboard, "report": report}
    settings |= {"report_to": report_to, "run_name": run_name, "valid": valid}
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return train(model, text, recipe.model_copy(update={"save_every": 0}), folder=temporary, **settings)
    folder = Path(folder)
    if not resume and checkpoints(folder):
        raise InputError(
            f"{folder} holds checkpoints of an earlier training; go on with resume=True, or choose another folder."
        )
    asked = recipe
    if recipe.distill and teacher is None:
        raise InputError("The recipe's distill asks for a teacher to learn from, but none was given.")
    if recipe.eval_every and valid is None:
        raise InputError("The recipe's eval_every asks for a validation text, but none was given.")
    require_trackers(report_to)
    if recipe.lora_rank:
        require_extra("peft", "peft", what="LoRA")
    require_data_parallel()
    if isinstance(recipe, PruneRecipe) and recipe.freeze_weights and recipe.lora_rank:
        raise InputError("With frozen weights only gates learn, so a LoRA rank has no use; leave out one of the two.")
    recipe = with_defaults(recipe, model)
    args = training_arguments(recipe, folder, seed=seed, run_name=run_name)
    rows = recipe.batch_size * args.world_size
    dataset = segments(model, text, recipe, rows=rows, first_segment=first_segment)
    # The last rows of a shuffled text that make no whole batch: several processes would fill it up, one would not.
    args.dataloader_drop_last = len(cast(Sized, dataset)) >= rows
    ours: list[TrainerCallback] = []
    if gates is not None:
        if not isinstance(recipe, PruneRecipe):
            raise InputError("A phase with gates needs a prune recipe, which says how they learn.")
        if recipe.is_one_shot:
            raise InputError(f"The criterion {recipe.criterion} ranks heads and trains no gates; use deadhead.rank.")
        _require_same_gates(gates.config, gate_config(recipe, model, seed), rate=recipe.gate_lr == 0)
        if bool(recipe.blocks) != (gates.block_size is not None):
            raise InputError(
                f"The prune recipe {'asks for' if recipe.blocks else 'has no'} gates on blocks, but those attached "
                f"have {'none' if recipe.blocks else 'some'}; attach them with deadhead.attach_gates(model, recipe)."
            )
        prune = recipe
        target = on_main(lambda: budget_target(model, prune, latency=latency))
        ours.append(sparsity_callback(gates, recipe, target))
    if recipe.eval_every and valid is not None:
        ours.append(Validation(model, valid, every=recipe.eval_every, tokens=recipe.eval_tokens))
    if metrics is not None:
        ours.append(MetricsFile(metrics, phase, gates))
    checkpoint = last_checkpoint(folder) if resume else None
    if checkpoint is None and gates is not None and isinstance(recipe, PruneRecipe) and recipe.start_from is not None:
        look = partial(_score, model, text, recipe, recipe.start_from, recipe.start_batches)
        gates.lean(on_main(lambda: look(seed=seed, first_segment=first_segment)), spread=_LEAN)
    if report is not None:
        ours.append(StepReporter(report))
    distillation = None
    if teacher is not None:
        distillation = Distillation(teacher, weight=recipe.distill, temperature=recipe.distill_temperature)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model, True)
    begin = 0 if checkpoint is None else checkpoint_step(checkpoint)
    ours += smaller_step(folder, checkpoint)
    stopping = Stopping(saves=bool(recipe.save_every))
    try:
        with ExitStack() as stack:
            learning = stack.enter_context(learner(model, recipe))
            if args.process_index == 0:
                if tensorboard is not None:
                    ours += stack.enter_context(tensorboard_callbacks(tensorboard, gates, begin=begin))
                ours += stack.enter_context(tracker_callbacks(report_to))
            last = [*ours, *callbacks, stopping]
            trainer = LanguageModelTrainer(
                learning, args, dataset, distillation, keep=recipe.save_total_limit, callbacks=last
            )
            trainer.remove_callback(PrinterCallback)
            if args.world_size > 1 and hasattr(model.config, "memory_length"):
                # Dropout of its own for each process. The order of texts for models without memory is drawn from the
                # same seed, and must be the same.
                set_seed(seed + args.process_index)
            stack.enter_context(stopping.heeding_signals())
            # With many gates closed gradients underflow.
            with warnings.catch_warnings(), no_space_is_input_error(folder), flushing_denormals():
                # Segments are read in order on purpose, and the scheduler is saved by the Trainer itself.
                warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
                if checkpoint is None:
                    trainer.train()
                else:
                    trainer.resume(checkpoint)
    except DivergenceError as error:
        failed = error
    else:
        return model
    finally:
        if recipe.gradient_checkpointing:
            checkpoint_activations(model, False)
        model.eval()
    on_main(lambda: roll_back(Path(folder), failed))
    return train(model, text, asked, folder=folder, resume=True, **settings)


def rank(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int = 0,
    first_segment: int = 0,
    latency: Latency | None = None,
) -> HeadPlan:
    """Choose the units that stay by a one-shot criterion; the model is not changed.

    Where the budget is not a share of heads, those go that score least for what they cost.

    Args:
        model: without gates.
        text: `recipe.steps` batches of it are looked at by the criteria that look at text.
        recipe: with a one-shot criterion and a budget.
        seed: of the choice of batches (of a model without segment memory), and of "random".
        first_segment: where in the text to begin, for a model with segment memory.
        latency: of this model on this machine, for a recipe with a speedup; None measures it.

    Raises:
        InputError: the criterion is not a one-shot one, the budget cannot be reached, or the text is too short.
    """
    if not recipe.is_one_shot:
        raise InputError(f"The criterion {recipe.criterion} trains gates; use deadhead.train with gates attached.")
    criterion = cast(OneShot, recipe.criterion)
    scores = _score(model, text, recipe, criterion, recipe.steps, seed=seed, first_segment=first_segment)
    found = budget_costs(model, recipe, latency=latency)
    if found is not None:
        scores = scores.over(found[1])
    return plan_of_scores(model, scores, recipe, latency=latency)[0]


def choose_units(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    folder: Path,
    train_gates: Callable[[HeadGates, Latency | None], None],
    seed: int = 0,
    first_segment: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[HeadGates, dict[str, Any] | None]:
    """Attach gates and close those of the units that go: they learn which, or units are ranked.

    Args:
        model: without gates.
        text: what criteria look at.
        recipe: how units are chosen.
        folder: where the measured latencies that a speedup asks for are kept.
        train_gates: trains the model with its gates.
        seed: see `rank`, and of the gates' noise.
        first_segment: see `rank`.
        report: told of what is measured.

    Returns:
        The gates, and the recipe's budget with what was asked for and reached; None without a budget.
    """
    budget = recipe.budget
    latency = on_main(lambda: latency_in(folder, model, recipe, report=report))
    if recipe.is_one_shot:
        ranked = partial(rank, seed=seed, first_segment=first_segment, latency=latency)
        plan = on_main(lambda: ranked(model, text, recipe))
        gates = attach_gates(model, recipe, seed)
        gates.set_plan(plan)
        found: float | None = on_main(lambda: reached(model, recipe, plan))
    else:
        gates = attach_gates(model, recipe, seed)
        train_gates(gates, latency)
        found = close_to_budget(model, gates, recipe, latency=latency)
    return gates, None if budget is None else {"kind": budget.kind, "asked": budget.value, "reached": found}


def _score(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    criterion: OneShot,
    count: int,
    *,
    seed: int,
    first_segment: int,
) -> HeadScores:
    """Score heads by `count` batches of the recipe's size, if the criterion looks at any."""
    batches: Iterable[dict[str, Tensor]] = ()
    if criterion in READS_TEXT:
        dataset = segments(model, text, recipe, rows=recipe.batch_size, first_segment=first_segment)
        in_order = hasattr(model.config, "memory_length")
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            dataset, batch_size=recipe.batch_size, shuffle=not in_order, generator=generator, drop_last=in_order
        )
        batches = islice(loader, count)
    model.to(best_device())  # type: ignore[arg-type]
    gates = gates_of(model)
    with flushing_denormals():
        unit = recipe.unit if gates is None else gates.unit
        blocks = asked_blocks(recipe, model) if gates is None else gates.block_size or False
        return score_heads(model, criterion, batches, unit=unit, blocks=blocks, seed=seed)


def segments(
    model: PreTrainedModel, text: TokenStream, recipe: PhaseRecipe, *, rows: int, first_segment: int
) -> Dataset[Any]:
    """Return what a phase reads of a text.

    Args:
        model: on any device; without weights on the meta device.
        text: it.
        recipe: of the phase.
        rows: that are read side by side, on all processes.
        first_segment: see `train`.

    Raises:
        InputError: the text is too short, or the recipe's sequence_length is not one that the model can read.
    """
    has_memory = hasattr(model.config, "memory_length")
    return SegmentDataset(
        text.tokens,
        # Without memory the rows of a batch need not go on where those of the last one ended.
        rows=rows if has_memory else 1,
        segment_length=segment_length(model, recipe),
        first_segment=first_segment if has_memory else 0,
    )


def segment_length(model: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return the tokens of a row."""
    if hasattr(model.config, "memory_length"):
        if recipe.sequence_length not in (None, model.config.segment_length):
            raise InputError(
                f"This model reads segments of {model.config.segment_length} tokens, so a sequence_length of "
                f"{recipe.sequence_length} cannot be had; leave it out."
            )
        return int(model.config.segment_length)
    most = max_positions(model)
    length = recipe.sequence_length or min(ROW, most or ROW)
    if most is not None and length > most:
        raise InputError(f"The model has {most} positions, but a sequence_length of {length} was asked for.")
    return length
