"""Checkpoints of a Trainer that were written without gates and are resumed with them, or the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead.errors import InputError

_IDS = torch.randint(3, VOCABULARY, (16, 8), generator=torch.Generator().manual_seed(1))
_ROWS: Any = [{"input_ids": ids, "labels": ids} for ids in _IDS]


def _trainer(folder: Path, model: Any, *callbacks: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    return Trainer(model, arguments, train_dataset=_ROWS, callbacks=list(callbacks))


def _gated(model_type: str) -> tuple[Any, Any]:
    model: Any = tiny_model(model_type)
    return model, deadhead.SparsityCallback(deadhead.attach(model), sparsity=0.5)


# GPT-2's output matrix is that of its embeddings, which a file holds once.
@pytest.mark.parametrize(("model_type", "shards"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_a_checkpoint_without_gates_is_not_resumed_with_them(model_type: str, shards: bool, tmp_path: Path) -> None:
    """Before the Trainer loads its optimizer's state, which torch refuses as one of other sizes."""
    trained: Any = tiny_model(model_type)
    _trainer(tmp_path, trained).train()
    folder = tmp_path / "checkpoint-2"
    if shards:
        (folder / "model.safetensors").unlink()
        trained.save_pretrained(folder, max_shard_size="20KB")
    trainer = _trainer(tmp_path, *_gated(model_type))
    with pytest.raises(InputError, match="The weights to load have no gates, .* before the Trainer is") as caught:
        trainer.train(resume_from_checkpoint=str(folder))
    assert len(str(caught.value)) <= 300


def test_a_checkpoint_with_gates_is_not_resumed_without_them(tmp_path: Path) -> None:
    _trainer(tmp_path, *_gated("llama")).train()
    trainer = _trainer(tmp_path, tiny_model("llama"), deadhead.SparsityCallback(sparsity=0.5))
    with pytest.raises(InputError, match="The weights to load have gates, .*; before you resume, attach") as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(str(caught.value)) <= 300


def test_weights_may_come_in_part_before_a_training_and_all_of_them_after_it(tmp_path: Path) -> None:
    model, callback = _gated("llama")
    _trainer(tmp_path, model, callback)
    trainer = _trainer(tmp_path, model, callback)
    dense = tiny_model("llama").state_dict()
    model.load_state_dict({name: value for name, value in dense.items() if "norm" in name}, strict=False)
    trainer.train()
    model.load_state_dict(dense, strict=False)
    model.load_state_dict(model.state_dict())
