"""LoRA and gates: PEFT's own script, and adapters that a phase makes and merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead import GateConfig, HeadPlan, InputError
from deadhead.attaching import is_gate, unwrapped
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, gate_config, train
from deadhead.training.phases.learning import lora
from tests.random_models import difference
from tests.random_models import tiny_model as all_attention
from tests.small_runs import assert_same_tensors, stream

_IDS = torch.arange(3, 15)[None]
# PEFT asks transformers for activation checkpointing by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=_IDS).logits
    return found


def _wrapped(model: Any) -> Any:
    config = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=model.config.model_type == "gpt2")
    return peft.get_peft_model(model, config)


def _teach(model: Any) -> None:
    """Give the adapters values, as training would; fresh ones add nothing."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _close_some(gates: deadhead.HeadGates) -> HeadPlan:
    full = gates.plan()
    kept = {layer: heads[1:] if index else () for index, (layer, heads) in enumerate(full.kept.items())}
    plan = HeadPlan(kept=kept, total=full.total, unit=full.unit, output_scale=gates.config.output_scale)
    gates.set_plan(plan)
    return plan


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "bert", "falcon"])
def test_adapters_learn_are_merged_and_cut(model_type: str) -> None:
    """Inside the block gates act on what the adapters put out; outside, weights hold both; cut, heads are gone."""
    model: Any = tiny_model(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    gates = deadhead.attach(model)
    with lora(model, 2) as wrapped:
        trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
        assert all("lora_" in name or is_gate(name) for name in trained)
        assert sum(is_gate(name) for name in trained) == 3
        _teach(wrapped)
        open_logits = _logits(wrapped)
        plan = _close_some(gates)
        closed_logits = _logits(wrapped)
        assert float((open_logits - closed_logits).abs().max()) > 1e-2
    assert difference(_logits(model), closed_logits) < 1e-5
    assert [name for name, _ in model.named_parameters() if not is_gate(name)] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert difference(_logits(deadhead.cut(model, plan)), closed_logits) < 1e-5


def test_an_exception_takes_the_adapters_off_and_leaves_the_weights() -> None:
    model: Any = tiny_model("llama")
    gates = deadhead.attach(model)
    _close_some(gates)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = _logits(model)
    with pytest.raises(KeyboardInterrupt), lora(model, 2) as wrapped:
        _teach(wrapped)
        raise KeyboardInterrupt
    assert_same_tensors(model.state_dict(), before)
    assert torch.equal(_logits(model), logits)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_our_own_models_take_no_adapters() -> None:
    with pytest.raises(InputError, match="leave the LoRA rank out"), lora(all_attention(), 2):
        pass


def test_training_moves_weights_by_low_rank() -> None:
    model: Any = tiny_model("llama")
    before = copy.deepcopy(model)
    recipe = PruneRecipe(steps=3, batch_size=2, sequence_length=12, lora_rank=2, learning_rate=1e-2, l0=0.1)
    gates = deadhead.attach(model, config=gate_config(recipe, model))
    train(model, stream(300, vocab_size=VOCABULARY), recipe, PhaseRun(gates=gates))
    name = "model.layers.1.self_attn.o_proj.weight"
    moved = model.get_parameter(name).detach() - before.get_parameter(name).detach()
    assert int(torch.linalg.matrix_rank(moved.double(), rtol=1e-5)) == 2
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(model.get_parameter(name), before.get_parameter(name))


def test_adapters_begin_as_the_seed_says() -> None:
    """Two runs of one seed end in the same weights, whatever was drawn before; another seed in others."""
    recipe = PhaseRecipe(steps=2, batch_size=2, sequence_length=12, lora_rank=2, learning_rate=1e-2)
    found = []
    for seed in (3, 3, 4):
        torch.rand(len(found) + 1)
        model: Any = tiny_model("llama")
        train(model, stream(300, vocab_size=VOCABULARY), recipe, PhaseRun(seed=seed))
        found.append(model.get_parameter("model.layers.1.self_attn.o_proj.weight").detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_peft_and_transformers_trainer_and_one_callback(model_type: str, tmp_path: Path) -> None:
    """A user's own script: wrap, attach to the wrapper, train, merge, cut."""
    wrapped = _wrapped(tiny_model(model_type))
    gates = deadhead.attach(wrapped, config=GateConfig(lr_scale=100.0, init=1.0))
    ids = torch.randint(3, VOCABULARY, (32, 10), generator=torch.Generator().manual_seed(1))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    callback = deadhead.SparsityCallback(gates, l0=0.5, warmup_steps=0)
    Trainer(model=wrapped, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert all(bool((row != 1.0).all()) for row in gates.log_alpha().values())
    wrapped.eval()
    plan = _close_some(gates)
    expected = _logits(wrapped)
    with pytest.raises(InputError, match="merge them first"):
        deadhead.cut(wrapped, plan)
    assert torch.equal(_logits(wrapped), expected)
    merged = deadhead.cut(wrapped.merge_and_unload(), plan)
    assert difference(_logits(merged), expected) < 1e-5


# Of adapters on a layer without heads, whose matrices are empty.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape:UserWarning")
def test_lora_on_a_cut_model(tmp_path: Path) -> None:
    """Recovery: adapters on what is left, saved and loaded beside the cut checkpoint."""
    model: Any = tiny_model("llama")
    small = deadhead.cut(model, HeadPlan(kept={0: (), 1: (1, 2), 2: (0,)}, total={0: 4, 1: 4, 2: 4}, unit="kv_group"))
    small.save_pretrained(tmp_path / "small")
    wrapped = _wrapped(small)
    _teach(wrapped)
    expected = _logits(wrapped.eval())
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(deadhead.load(tmp_path / "small"), str(tmp_path / "adapter"))
    assert torch.equal(_logits(loaded.eval()), expected)


def test_gates_that_peft_froze_are_said(tmp_path: Path) -> None:
    """Attached before wrapping, gates are frozen with everything else; the message says what to do."""
    model = tiny_model("llama")
    gates = deadhead.attach(model)
    wrapped = _wrapped(model)
    assert unwrapped(wrapped) is model
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    rows: Any = [{"input_ids": _IDS[0], "labels": _IDS[0]}] * 8
    trainer = Trainer(model=wrapped, args=arguments, train_dataset=rows, callbacks=[deadhead.SparsityCallback(gates)])
    with pytest.raises(
        InputError,
        match="gates of layer 0 are frozen .*; freeze weights, or wrap the model with PEFT, before deadhead.attach",
    ):
        trainer.train()
