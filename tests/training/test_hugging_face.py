"""Training transformers' own models with gates: by their own Trainer and a callback, and by ours without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead import GateConfig, InputError
from deadhead.attaching import is_gate
from deadhead.checkpoints.gate_files import load_gates
from deadhead.gates.gates import HeadGates
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, train
from deadhead.training.phases.choosing import gate_config
from deadhead.training.phases.defaults import with_defaults
from tests.small_runs import KillAt, Killed, assert_same_tensors, metrics, stream

_TEXT = stream(600, vocab_size=VOCABULARY)
_STEPS, _KILLED = 6, 3


class _Rows(Dataset[dict[str, torch.Tensor]]):
    """64 random texts of 10 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(3, VOCABULARY, (64, 10), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def _gated(model_type: str, **gates: Any) -> tuple[Any, HeadGates]:
    model = tiny_model(model_type)
    return model, deadhead.attach(model, config=GateConfig(seed=5, lr_scale=100.0, init=1.0, **gates))


def _their_trainer(
    folder: Path, model_type: str, *, kill: int | None = None, resume: bool = False
) -> tuple[Any, HeadGates, Trainer]:
    model, gates = _gated(model_type)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": _STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "save_steps": _KILLED,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    callbacks: list[Any] = [
        deadhead.SparsityCallback(gates, l0=0.01, warmup_steps=0, weighting="output_difference"),
        *([] if kill is None else [KillAt(kill)]),
    ]
    trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=_Rows(), callbacks=callbacks)
    try:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{_KILLED}") if resume else None)
    except Killed:
        assert kill is not None
    return model, gates, trainer


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_their_trainer_with_one_callback(model_type: str, tmp_path: Path) -> None:
    """Weight decay, accumulation, a kill and a resume; then heads that are gone, and a checkpoint that reloads."""
    whole, whole_gates, trainer = _their_trainer(tmp_path / "whole", model_type)
    _their_trainer(tmp_path / "killed", model_type, kill=_KILLED + 1)
    model, gates, _ = _their_trainer(tmp_path / "killed", model_type, resume=True)
    assert_same_tensors(model.state_dict(), whole.state_dict())
    assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == _STEPS
    assert losses[-1]["l0"] < losses[0]["l0"]

    with torch.no_grad():
        order = torch.cat([gate.log_alpha_bias for _, gate in gates]).argsort()
        for _, gate in gates:  # few steps move gates, but close none
            gate.log_alpha_bias -= torch.cat([g.log_alpha_bias for _, g in gates])[order[3]] + 2.0
    model.eval()
    ids = torch.arange(3, 15)[None]
    plan = gates.plan()
    assert 0 < sum(plan.heads) < sum(plan.total.values())
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        # The open gates are not fully open: their values are folded into the weights.
        found = deadhead.cut(model, plan)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "small")
    reloaded = type(model).from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, found)


def _prune(**changes: Any) -> PruneRecipe:
    values: dict[str, Any] = {"steps": _STEPS, "batch_size": 2, "sequence_length": 12, "save_every": _KILLED}
    values |= {"log_every": 1, "l0": 0.001, "l0_warmup_steps": 0, "init": 1.0}
    return PruneRecipe(**{**values, **changes})


def _ours(
    folder: Path, model_type: str, recipe: PruneRecipe, *, kill: int | None = None, resume: bool = False
) -> tuple[Any, HeadGates]:
    model = tiny_model(model_type)
    gates = deadhead.attach(model, config=gate_config(recipe, model, seed=1))
    try:
        train(
            model,
            _TEXT,
            recipe,
            PhaseRun(
                folder=folder / "checkpoints",
                gates=gates,
                metrics=folder / "metrics.jsonl",
                callbacks=() if kill is None else (KillAt(kill),),
                resume=resume,
            ),
        )
    except Killed:
        assert kill is not None
    return model, gates


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.5, "bf16": True},
        pytest.param({"lora_rank": 2, "gradient_accumulation": 2}, marks=pytest.mark.slow),
        pytest.param({"freeze_weights": True, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
    ids=["target", "lora", "probe"],
)
@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_if_never_stopped(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = _prune(**changes)
    whole, whole_gates = _ours(tmp_path / "whole", model_type, recipe)
    _ours(tmp_path / "killed", model_type, recipe, kill=_KILLED + 1)
    resumed, gates = _ours(tmp_path / "killed", model_type, recipe, resume=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert all(bool((row != 1.0).all()) for row in gates.log_alpha().values())


def test_a_probe_moves_gates_and_not_one_bit_of_the_weights(tmp_path: Path) -> None:
    model, gates = _ours(tmp_path, "llama", _prune(freeze_weights=True))
    before = tiny_model("llama")
    weights = {name: value for name, value in model.state_dict().items() if not is_gate(name)}
    assert_same_tensors(weights, before.state_dict())
    assert all(bool((row != 1.0).any()) for row in gates.log_alpha().values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [line["grad_norm"] > 0 for line in metrics(tmp_path)] == [True] * _STEPS
    checkpoint = tmp_path / "checkpoints" / f"checkpoint-{_STEPS}"
    # AdamW's state is of gates alone: two moments of 4 numbers a layer.
    assert (checkpoint / "optimizer.pt").stat().st_size < 10_000
    assert all(map(is_gate, load_file(checkpoint / "model.safetensors"))), "frozen weights are not written again"
    assert_same_tensors(load_gates(tiny_model("llama"), checkpoint).state_dict(), gates.state_dict())


def test_frozen_weights_stay_frozen_where_they_were(tmp_path: Path) -> None:
    """What a user froze before is frozen after; what learned before learns again."""
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    recipe = _prune(steps=1, freeze_weights=True)
    gates = deadhead.attach(model, config=gate_config(recipe, model))
    train(model, _TEXT, recipe, PhaseRun(gates=gates))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["lm_head.weight"]


def test_the_loss_is_the_models_own_on_rows_of_the_text(tmp_path: Path) -> None:
    """Without gates, dropout or memory: the step's loss is the mean NLL of the text's two rows, each begun anew."""
    model, untouched = tiny_model("llama"), tiny_model("llama")
    recipe = PhaseRecipe(steps=1, batch_size=2, sequence_length=12, log_every=1)
    text = stream(2 * 12 + 1, vocab_size=VOCABULARY)
    train(model, text, recipe, PhaseRun(metrics=tmp_path / "metrics.jsonl"))
    ids = torch.from_numpy(text.tokens[:24].astype("int64")).view(2, 12)
    with torch.no_grad():
        expected = float(untouched(input_ids=ids, labels=ids).loss)
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_weights_learn_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Steps far smaller than a rounding of bfloat16 add up, the losses are float32's, the precision is given back."""
    recipe = PhaseRecipe(steps=40, batch_size=2, sequence_length=12, learning_rate=1e-4, log_every=40)
    half: Any = tiny_model("llama").to(dtype)
    full: Any = tiny_model("llama").to(dtype).float()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    train(half, _TEXT, recipe, PhaseRun(metrics=tmp_path / "half" / "metrics.jsonl"))
    train(full, _TEXT, recipe, PhaseRun(metrics=tmp_path / "full" / "metrics.jsonl"))
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert metrics(tmp_path / "half") == metrics(tmp_path / "full")
    for name, value in full.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.to(dtype)), name
    moved = [float((half.state_dict()[name] != value).float().mean()) for name, value in before.items()]
    assert sum(moved) / len(moved) > 0.3


def test_defaults_of_pretrained_models() -> None:
    """A learning rate and gates' output scaling that a pretrained model bears; ours keep the paper's."""
    theirs = with_defaults(PruneRecipe(), tiny_model("llama"))
    assert theirs.learning_rate == 5e-5
    assert theirs.output_scale is False
    chosen = with_defaults(PruneRecipe(learning_rate=1e-3, output_scale=True), tiny_model("llama"))
    assert (chosen.learning_rate, chosen.output_scale) == (1e-3, True)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (_prune(sequence_length=512), "The model has 256 positions, but got a sequence_length of 512"),
        (_prune(lora_rank=4, freeze_weights=True), "leave out one of the two"),
        (_prune(distill=0.5), "distill asks for a teacher"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(recipe: PruneRecipe, message: str) -> None:
    model = tiny_model("llama")
    gates = deadhead.attach(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        train(model, _TEXT, recipe, PhaseRun(gates=gates))
    assert_same_tensors(model.state_dict(), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
