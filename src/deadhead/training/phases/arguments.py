"""A phase's recipe as transformers' training arguments."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import TrainingArguments

from deadhead.errors import InputError
from deadhead.modes import best_device
from deadhead.training.recipes.recipe import PhaseRecipe

_SCHEDULERS = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


def training_arguments(recipe: PhaseRecipe, folder: Path, *, seed: int, run_name: str | None) -> TrainingArguments:
    """Return the arguments for one phase.

    Args:
        recipe: with a learning rate.
        folder: where checkpoints go.
        seed: of dropout, and of the order of texts for a model without segment memory.
        run_name: what trackers call the run.

    Raises:
        InputError: bf16 is asked for where it is not to be had, or one process would train on several GPUs.
    """
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError("The recipe asks for bf16, which this GPU does not have; leave it out.")
    assert recipe.learning_rate is not None
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=_SCHEDULERS[recipe.schedule],
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        seed=seed,
        # Trackers come after our own callbacks, whose numbers they are to see.
        report_to=[],
        run_name=run_name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        average_tokens_across_devices=False,
        # transformers refuses bf16 on a CPU unless it is told that the CPU is meant.
        use_cpu=best_device().type == "cpu",
    )
    if args.n_gpu > 1:
        raise InputError(
            f"Training in one process would spread batches over {args.n_gpu} GPUs and mix up the segments' memories; "
            "start one process a GPU with torchrun, or choose one with CUDA_VISIBLE_DEVICES."
        )
    return args
