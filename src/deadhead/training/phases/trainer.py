"""transformers' Trainer and its arguments: segment memory, guards against divergence, complete checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import DivergenceError, InputError
from deadhead.measure.losses import SegmentLoss
from deadhead.modes import best_device
from deadhead.training.callbacks.sparsity import SparsityCallback
from deadhead.training.phases.checkpoints import (
    checkpoint_step,
    finish_checkpoint,
    newest_finished,
    require_tensors,
)
from deadhead.training.phases.distillation import Distillation
from deadhead.training.phases.frozen import FrozenWeightsTrainer
from deadhead.training.recipes.recipe import PhaseRecipe

# What each process knows that transformers does not save: memories, and sums since the last line of the log.
_RANK_FILE = "deadhead_rank{rank}.safetensors"

# Settings that have the names of transformers' arguments.
_NAMED_ALIKE = {"learning_rate", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm", "bf16"}
_SCHEDULERS = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


def training_arguments(recipe: PhaseRecipe, folder: Path, *, seed: int, run_name: str | None) -> TrainingArguments:
    """Return the Trainer's arguments for one phase, whose recipe has a learning rate, with checkpoints in a folder.

    The seed sets dropout, and for a model without segment memory the order of texts.
    """
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise InputError("The recipe asks for bf16, but this GPU does not support it; leave it out.")
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        **recipe.model_dump(include=_NAMED_ALIKE),
        lr_scheduler_type=_SCHEDULERS[recipe.schedule],
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
            f"One GPU per process was expected, but there are {args.n_gpu}, and batches spread over them would mix up "
            "the segments' memories; start one process a GPU with torchrun, or choose one with CUDA_VISIBLE_DEVICES."
        )
    return args


class _Finishing(TrainerCallback):
    """Marks a checkpoint as complete, after callbacks that write into it, such as that of the gates."""

    def __init__(self, keep: int) -> None:
        self.keep = keep

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if args.should_save:
            finish_checkpoint(_folder(args, state), keep=self.keep)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


class LanguageModelTrainer(FrozenWeightsTrainer):
    """Trains a language model on contiguous segments, each of which follows the text before it.

    Deadhead's own models get the memory of the segment before, so the data set, a `deadhead.data.SegmentDataset`, has
    as many rows as a batch over all processes. A teacher may add to the loss; the newest `keep` checkpoints are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        distillation: Distillation | None = None,
        keep: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.add_callback(_Finishing(keep))
        self.distillation = distillation
        # All segments have the same length, so the mean over accumulated batches is the mean of their means; rows of
        # which not every token counts are weighted by `compute_loss`.
        self.model_accepts_loss_kwargs = False
        self.segment_loss = SegmentLoss(model)
        self.clipped_steps = 0
        self.steps_since_log = 0
        # Sums of the losses of this process, since the last step of the optimizer and since the last line of the log.
        self.step_loss: Tensor | float = 0.0
        self.logged_loss: Tensor | float = 0.0

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        if not self.segment_loss.has_memory:
            return cast(Sampler[int], super()._get_train_sampler(train_dataset))
        # The dataset is laid out so that reading it in order continues every row of the batch.
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Return how many tokens count in the batches of a step over all processes; None if all count."""
        if not batch_samples or "scored" not in batch_samples[0]:
            return None
        own = torch.stack([_counted(batch) for batch in batch_samples]).sum().to(device)
        return cast(Tensor, self.accelerator.reduce(own, "sum"))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of a batch of segments, and store their hidden states.

        If not every token counts, the loss is weighted so that a step's loss is the mean over all tokens that count.
        """
        found = self.segment_loss(model, inputs)
        loss = found.loss if self.distillation is None else self.distillation.loss(found, inputs)
        if num_items_in_batch is not None:
            # Batches of a step, and processes, are averaged later.
            batches = self.current_gradient_accumulation_steps * self.args.world_size
            loss = loss * (_counted(inputs) * batches / num_items_in_batch)
        return (loss, found.read.outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward and backward pass of one batch; raise DivergenceError if its loss is not finite.

        Several processes check their losses together, before the optimizer's step: a process that stopped alone would
        leave the others waiting.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        self.logged_loss = self.logged_loss + loss
        if self.args.world_size > 1:
            self.step_loss = self.step_loss + loss
        elif not bool(torch.isfinite(loss)):
            raise self._divergence("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if isinstance(self.step_loss, Tensor):
            loss = float(cast(Tensor, self.accelerator.reduce(self.step_loss, "mean")))
            self.step_loss = 0.0
            if not math.isfinite(loss):
                raise self._divergence("loss", loss)
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = float(norm)
        if not math.isfinite(value) and self.accelerator.scaler is None:
            raise self._divergence("gradient norm", value)
        self.steps_since_log += 1
        self.clipped_steps += bool(self.args.max_grad_norm and value > self.args.max_grad_norm)
        return norm

    def _divergence(self, what: str, value: float, *, step: int | None = None) -> DivergenceError:
        step = self.state.global_step + 1 if step is None else step
        last = newest_finished(Path(str(self.args.output_dir)))
        kept = "no checkpoint had been written yet" if last is None else f"the last good checkpoint is {last}"
        return DivergenceError(
            f"Training stopped at step {step}: the {what} is {value}; {kept}. "
            "Try a smaller learning rate, more warm-up steps or a smaller max_grad_norm.",
            step,
            f"{what} is {value}",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, and add the share of steps whose gradient was clipped since the last log."""
        if "loss" in logs and self.steps_since_log:
            # Transformers' own mean begins anew where a stopped run goes on; this one is of all steps since the last
            # line, so that lines are equal wherever it was stopped.
            mean = self.accelerator.reduce(torch.as_tensor(self.logged_loss, device=self.args.device), "mean")
            logs["loss"] = float(cast(Tensor, mean)) / self.steps_since_log
            self.logged_loss = 0.0
            logs["clipped"] = self.clipped_steps / self.steps_since_log
            self.clipped_steps = self.steps_since_log = 0
            if self.distillation is not None:
                logs["teacher_divergence"] = self.distillation.mean_divergence()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = _folder(self.args, self.state)
        if self.args.should_save and folder.exists():
            # Cut short or damaged: from a whole one training would have gone on.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        self._require_finite_weights()
        try:
            with no_space_is_input_error(folder):
                super()._save_checkpoint(model, trial)
                save_file(self._rank_state(), folder / _RANK_FILE.format(rank=self.args.process_index))
        except Exception:
            # On a full disk what is left of it would be in the way.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _require_finite_weights(self) -> None:
        """Refuse to checkpoint weights that are not finite: the last loss was that of the weights before the step."""
        weights = [parameter.detach() for parameter in cast(nn.Module, self.model).parameters()]
        bad = torch.tensor(float(sum(not bool(torch.isfinite(weight).all()) for weight in weights)))
        # All processes, which may hold different parts of the weights, stop together.
        if float(cast(Tensor, self.accelerator.reduce(bad.to(self.args.device), "sum"))):
            raise self._divergence("weights' largest value", math.nan, step=self.state.global_step)

    def _rank_state(self) -> dict[str, Tensor]:
        """Return the state that this process must save, as tensors."""
        sums = {"logged_loss": self.logged_loss, "clipped_steps": self.clipped_steps}
        sums["steps_since_log"] = self.steps_since_log
        memories = {"segment": self.segment_loss.memory}
        if self.distillation is not None:
            sums |= {"divergence": self.distillation.divergence, "batches": self.distillation.batches}
            memories["teacher"] = self.distillation.memory
        state = {name: torch.as_tensor(value).detach().cpu().clone() for name, value in sums.items()}
        for whose, memory in memories.items():
            state |= {f"{whose}.{layer}": states.contiguous() for layer, states in enumerate(memory or ())}
        return state

    def _load_rank_state(self, state: Mapping[str, Tensor]) -> None:
        def memory(whose: str) -> tuple[Tensor, ...] | None:
            count = sum(name.startswith(f"{whose}.") for name in state)
            return tuple(state[f"{whose}.{layer}"].to(self.args.device) for layer in range(count)) or None

        self.logged_loss = state["logged_loss"].to(self.args.device)
        self.clipped_steps, self.steps_since_log = int(state["clipped_steps"]), int(state["steps_since_log"])
        self.segment_loss.memory = memory("segment")
        if self.distillation is not None:
            self.distillation.divergence = state["divergence"].to(self.args.device)
            self.distillation.batches = int(state["batches"])
            self.distillation.memory = memory("teacher")

    def resume(self, checkpoint: Path) -> None:
        """Resume from `checkpoint`, and reach the same weights, bit for bit, as a run that was never stopped."""
        require_tensors(checkpoint)
        path = checkpoint / _RANK_FILE.format(rank=self.args.process_index)
        try:
            # Not loaded there at once: of several processes on a CPU it is called cpu:0, which safetensors refuses.
            self._load_rank_state(load_file(path))
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(
                f"The checkpoint {checkpoint} cannot be resumed: {path.name} is missing or not what was expected; "
                "delete the checkpoint, then the phase continues from an earlier one, or starts again."
            ) from error
        if checkpoint_step(checkpoint) >= self.args.max_steps:
            # All steps are done; transformers would do one more.
            self._load_from_checkpoint(str(checkpoint))
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            for callback in self.callback_handler.callbacks:
                # Checkpoints of adapters have no weights of gates.
                if isinstance(callback, SparsityCallback):
                    callback.restore(state)
        else:
            self.train(resume_from_checkpoint=str(checkpoint))


def _counted(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of a batch are learned from; the first of a row is never predicted."""
    return batch["scored"][:, 1:].sum()
