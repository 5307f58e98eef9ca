"""PEFT takes a cut model as it takes a dense one, layers without heads and without hidden units included."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import deadhead
from deadhead.checkpoints import checkpoint
from deadhead.models.pruned.modeling_pruned import PrunedModel
from tests.export.small import emptied
from tests.random_models import difference

IDS = torch.randint(3, 250, (2, 13), generator=torch.Generator().manual_seed(1))
# PEFT's own, and torch's where it draws no numbers for an empty matrix.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning"),
    # Of adapters' empty matrices, as they are loaded.
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape:UserWarning"),
]
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ADALORA: dict[str, Any] = {"total_step": 10, "init_r": 4, "target_r": 2}
METHODS = {
    "LoRA": lambda: peft.LoraConfig(init_lora_weights=False),
    "LoRA, the usual modules": lambda: peft.LoraConfig(target_modules=USUAL, init_lora_weights=False),
    "LoRA, all-linear": lambda: peft.LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    ),
    "IA3": lambda: peft.IA3Config(init_ia3_weights=False),
    "IA3, the usual modules": lambda: peft.IA3Config(
        target_modules=USUAL, feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "AdaLoRA": lambda: peft.AdaLoraConfig(**_ADALORA, init_lora_weights=False),
    "AdaLoRA, the usual modules": lambda: peft.AdaLoraConfig(**_ADALORA, target_modules=USUAL, init_lora_weights=False),
    "LoHa, the usual modules": lambda: peft.LoHaConfig(target_modules=USUAL, init_weights=False),
}


def adapted(config: Any) -> tuple[Any, Any]:
    """Return a cut model, and another that has adapters, after a backward pass."""
    base = emptied("llama")
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(copy.deepcopy(base), config)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return base, model.eval()


@pytest.mark.parametrize("name", METHODS)
def test_adapters_are_saved_loaded_merged_and_cut(name: str, tmp_path: Path) -> None:
    """Without targets PEFT finds them by the model's type."""
    base, model = adapted(METHODS[name]())
    learned = [parameter.grad for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    assert any(grad is not None and grad.abs().max() > 0 for grad in learned)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert difference(base(input_ids=IDS).logits, expected) > 1e-3
        model.save_pretrained(tmp_path / "adapters")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapters").eval()
        assert difference(again(input_ids=IDS).logits, expected) < 1e-6
        merged = model.merge_and_unload()
        assert isinstance(merged, PrunedModel)
        checkpoint.save(merged, tmp_path / "merged")
        assert difference(deadhead.load(tmp_path / "merged")(input_ids=IDS).logits, expected) < 1e-5
    plan = deadhead.attach(merged).plan()
    deadhead.detach(merged)
    cut = deadhead.cut(merged, replace(plan, kept={**plan.kept, 3: ()}))
    assert deadhead.model_cost(cut).heads[-1] == 0


def test_targets_are_those_of_the_dense_type() -> None:
    """For each method that has a table of its own."""
    constants = peft.utils.constants
    emptied("llama").config.to_dict()
    tables = [table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")]
    known = [table for table in tables if "llama" in table]
    assert len(known) > 10
    assert [table["deadhead_llama"] == table["llama"] for table in known] == [True] * len(known)
