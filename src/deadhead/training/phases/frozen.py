"""A Trainer whose checkpoints leave out frozen weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import nn
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from deadhead.attaching import is_gate


class FrozenWeightsTrainer(Trainer):
    """transformers' Trainer, with checkpoints that leave out the weights while only gates learn.

    Such a checkpoint has some kilobytes: gates, optimizer, buffers, and whatever else a Trainer needs to resume.
    Training resumes from it, bit for bit, with the model that it started with. `save_model` still writes all weights,
    and so do checkpoints of any other training, under FSDP, and for the hub. As the first of two bases, the class does
    the same for other Trainers: ``class Mine(FrozenWeightsTrainer, SFTTrainer)``.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; for a checkpoint, only the parts that can have changed."""
        if not _internal_call or output_dir is None or self.args.push_to_hub or not self._only_gates_learn():
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            model = cast(nn.Module, self.model)
            named = model.named_parameters(remove_duplicate=False)
            frozen = {name for name, parameter in named if not parameter.requires_grad}
            state = {name: value for name, value in model.state_dict().items() if name not in frozen}
            state = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
            # Where a Trainer looks for weights; without a configuration nobody takes it for a model.
            save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if not self._only_gates_learn():
            super()._issue_warnings_after_load(load_result)

    def _only_gates_learn(self) -> bool:
        named = cast(nn.Module, self.model).named_parameters()
        learning = [name for name, parameter in named if parameter.requires_grad]
        return bool(learning) and all(map(is_gate, learning)) and not self.is_fsdp_enabled
