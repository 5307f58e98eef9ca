"""Checkpoints without the weights that are frozen: small, and gone on from to the bit, in anybody's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead.attaching import is_gate
from deadhead.checkpoints.gate_files import load_gates
from deadhead.errors import InputError
from deadhead.gates.gates import HeadGates
from deadhead.training import FrozenWeightsTrainer
from tests.small_runs import assert_same_tensors

_IDS = torch.randint(3, VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(1))
_ROWS: Any = [{"input_ids": ids, "labels": ids} for ids in _IDS]


class _Theirs(Trainer):
    """Another library's Trainer."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        assert output_dir is not None
        (Path(output_dir) / "theirs").touch()


class _Both(FrozenWeightsTrainer, _Theirs):
    """Both in one."""


def _train(
    folder: Path,
    kind: type[Trainer] = FrozenWeightsTrainer,
    *,
    resume: bool = False,
    model_type: str = "llama",
    **k: Any,
) -> tuple[Any, HeadGates, Trainer]:
    model = tiny_model(model_type)
    model.requires_grad_(bool(k.pop("learns", False)))
    gates = deadhead.attach(model)
    often = {"save_strategy": "steps", "save_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, dataloader_pin_memory=False, **{**often, **k}
    )
    callbacks = [deadhead.SparsityCallback(gates, sparsity=0.5)]
    trainer = kind(model, args, train_dataset=_ROWS, eval_dataset=_ROWS[:2], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model, gates, trainer


@pytest.mark.parametrize("kind", [FrozenWeightsTrainer, _Both])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_checkpoint_of_gates_alone_is_small_and_gone_on_from(
    kind: type[Trainer], model_type: str, tmp_path: Path
) -> None:
    """Also where weights are tied, which have two names and are one parameter."""
    whole, whole_gates, trainer = _train(tmp_path, kind, model_type=model_type)
    model, gates, _ = _train(tmp_path, kind, model_type=model_type, resume=True)
    assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
    assert_same_tensors(model.state_dict(), whole.state_dict())
    checkpoint = tmp_path / "checkpoint-3"
    assert all(map(is_gate, load_file(checkpoint / "model.safetensors")))
    weights = sum(value.nbytes for value in model.state_dict().values())
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < min(weights, 40_000)
    # Saved on purpose, a model is whole.
    trainer.save_model(str(tmp_path / "model"))
    assert not all(map(is_gate, load_file(tmp_path / "model" / "model.safetensors")))


def test_what_such_a_checkpoint_holds_is_said(tmp_path: Path) -> None:
    _, gates, _ = _train(tmp_path)
    for load in (deadhead.load, deadhead.load_gated):
        with pytest.raises(InputError, match="holds gates without the model that they were trained on"):
            load(tmp_path / "checkpoint-6")
    loaded = load_gates(tiny_model("llama"), tmp_path / "checkpoint-6")
    assert_same_tensors(loaded.state_dict(), gates.state_dict())


def test_the_best_gates_come_back(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "eval_delay": 6}
    _, gates, trainer = _train(tmp_path, **best)
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-6")
    assert gates.plan() == gates.plan(sparsity=0.5)


def test_weights_that_learn_are_in_every_checkpoint(tmp_path: Path) -> None:
    _train(tmp_path, learns=True)
    model, _ = deadhead.load_gated(tmp_path / "checkpoint-3")
    assert any(
        not torch.equal(value, tiny_model("llama").state_dict()[name])
        for name, value in model.state_dict().items()
        if not is_gate(name)
    )
