"""transformers' Trainer with segment memory, guards against divergence, and checkpoints that are known to be whole."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadhead.errors import DivergenceError, InputError
from deadhead.files import no_space_is_input_error, read_json, write_json
from deadhead.losses import SegmentLoss
from deadhead.training.distillation import Distillation
from deadhead.training.settled import save_trimmed
from deadhead.training.sparsity import SparsityCallback

_MEMORY_FILE = "{whose}_memory_rank{rank}.safetensors"
# Written last: a checkpoint without it, or with files of other sizes, was cut short.
_COMPLETE_FILE = "complete.json"


class LanguageModelTrainer(Trainer):
    """Trains a language model on contiguous segments, each after the true text before it.

    Args:
        model: a causal language model; those of ours get the memory of the segment before.
        args: transformers' arguments.
        train_dataset: a `deadhead.data.SegmentDataset` with as many rows as a batch over all processes.
        distillation: what a teacher adds to the loss, or None.
        kwargs: what transformers' Trainer takes.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train_dataset: Dataset[Any],
        distillation: Distillation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.distillation = distillation
        # All segments have the same length, so the mean over accumulated batches is the mean of their means.
        self.model_accepts_loss_kwargs = False
        self.segment_loss = SegmentLoss(model)
        self.clipped_steps = 0
        self.steps_since_log = 0
        # Sum of the losses of this process since the last step of the optimizer.
        self.step_loss: Tensor | float = 0.0

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        if not self.segment_loss.has_memory:
            return cast(Sampler[int], super()._get_train_sampler(train_dataset))
        # The dataset is laid out so that reading it in order continues every row of the batch.
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean negative log-likelihood of a batch of segments, and remember their hidden states."""
        outputs = self.segment_loss(model, inputs)
        loss = outputs.loss
        if self.distillation is not None:
            loss = self.distillation.loss(loss, outputs.logits, inputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward of one batch.

        Raises:
            DivergenceError: the loss is NaN or infinite. Several processes look at their losses together, before the
                step of the optimizer: one that stopped alone would leave the others waiting for it.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
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

    def _divergence(self, what: str, value: float) -> DivergenceError:
        step = self.state.global_step + 1
        last = last_checkpoint(Path(str(self.args.output_dir)))
        kept = "no checkpoint had been written yet" if last is None else f"the last good checkpoint is {last}"
        return DivergenceError(
            f"Training stopped at step {step}: the {what} is {value}; {kept}. "
            "Try a smaller learning rate, more warm-up steps or a smaller max_grad_norm."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as transformers does, with the share of steps whose gradient was clipped since the last time."""
        if "loss" in logs and self.steps_since_log:
            logs["clipped"] = self.clipped_steps / self.steps_since_log
            self.clipped_steps = self.steps_since_log = 0
            if self.distillation is not None:
                logs["teacher_divergence"] = self.distillation.mean_divergence()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(str(self.args.output_dir))
        folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with no_space_is_input_error(folder):
            super()._save_checkpoint(model, trial)
            for whose, memory in self._memories().items():
                if memory is not None:
                    tensors = {str(layer): states.contiguous() for layer, states in enumerate(memory)}
                    save_file(tensors, folder / self._memory_file(whose))
            if self.args.should_save and self.model is not None:
                save_trimmed(self.model, folder)
        if self.args.distributed_state is not None:
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
            sizes.pop(_COMPLETE_FILE, None)
            write_json(folder / _COMPLETE_FILE, sizes)
            for old in checkpoints(output_dir):
                if old != folder:
                    shutil.rmtree(old, ignore_errors=True)

    def _memories(self) -> dict[str, tuple[Tensor, ...] | None]:
        teacher = {} if self.distillation is None else {"teacher": self.distillation.memory}
        return {"segment": self.segment_loss.memory, **teacher}

    def _memory_file(self, whose: str) -> str:
        return _MEMORY_FILE.format(whose=whose, rank=self.args.process_index)

    def resume(self, checkpoint: Path) -> None:
        """Go on from `checkpoint` to the same weights, bit for bit, as a run that was never stopped."""
        for whose in self._memories():
            path = checkpoint / self._memory_file(whose)
            if path.exists():
                # Not loaded there at once: of several processes on a CPU it is called cpu:0, which safetensors refuses.
                states = load_file(path)
                memory = tuple(states[str(layer)].to(self.args.device) for layer in range(len(states)))
                if whose == "segment":
                    self.segment_loss.memory = memory
                elif self.distillation is not None:
                    self.distillation.memory = memory
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


def checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, whole or not, oldest first."""
    found = [path for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rsplit("-", 1)[1].isdigit()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named by."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest checkpoint in `output_dir` whose files are all there in full, or None."""
    for folder in reversed(checkpoints(output_dir)):
        marker = folder / _COMPLETE_FILE
        if not marker.exists():
            continue
        try:
            sizes = dict(read_json(marker, what="list of a checkpoint's files"))
        except (InputError, TypeError, ValueError):
            continue
        if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()):
            return folder
    return None
