"""The sparsity callback with transformers' own Trainer, as a user with a script of their own has it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import deadhead
from deadhead.errors import InputError
from deadhead.gates.budget import Budget, BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.penalty import l0_loss
from deadhead.models import AllAttentionForCausalLM
from deadhead.plans.plan import UnitKey
from deadhead.plans.unit_costs import UnitCosts
from tests.random_models import tiny_model
from tests.small_runs import assert_same_tensors

_STEPS, _KILLED = 8, 4


class _Text(Dataset[dict[str, torch.Tensor]]):
    """64 random texts of 6 tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(29, (64, 6), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class _Recorder(TrainerCallback):
    """Keeps λ and log_alpha of every step, and stops after step `last` as a killed process would: nothing is saved."""

    def __init__(self, callback: deadhead.SparsityCallback, last: int | None = None) -> None:
        self.callback = callback
        self.last = last
        self.strengths: list[float] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.strengths.append(self.callback.strength)
        if state.global_step == self.last:
            raise _Killed


class _Killed(Exception):
    """The process is gone."""


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
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
        "seed": 3,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**values, **changes})


def _gated(**gates: Any) -> tuple[AllAttentionForCausalLM, HeadGates]:
    model = tiny_model(hidden_dropout=0.1)
    config = {"seed": 5, "lr_scale": 100.0, "init": 1.0, "output_scale": True, **gates}
    return model, deadhead.attach(model, config=GateConfig(**config))


def _run(
    folder: Path,
    *,
    last: int | None = None,
    resume: bool = False,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, HeadGates, list[float]]:
    model, gates = _gated()
    callback = deadhead.SparsityCallback(gates, **options)
    recorder = _Recorder(callback, last)
    trainer = Trainer(
        model=model,
        args=_arguments(folder, **(arguments or {})),
        train_dataset=_Text(),
        callbacks=[callback, recorder],
    )
    try:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{_KILLED}") if resume else None)
    except _Killed:
        assert last is not None
    return trainer, gates, recorder.strengths


def _losses(trainer: Trainer) -> list[dict[str, float]]:
    """Return what was logged of each step, the sparsity callback's numbers included."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"l0": 0.05, "warmup_steps": 20}, marks=pytest.mark.slow),
        pytest.param({"l0": 0.05, "warmup_steps": 0, "weighting": "output_difference"}, marks=pytest.mark.slow),
        pytest.param({"l0": 0.05, "warmup_steps": 20, "gate_lr": 0}, marks=pytest.mark.slow),
        {"sparsity": 0.5, "ramp_steps": 6},
        pytest.param({"sparsity": 0.5, "ramp_steps": 6, "exact": True}, marks=pytest.mark.slow),
    ],
    ids=["lambda", "weighted", "adam", "target", "topk"],
)
def test_killed_and_resumed_is_as_if_never_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    whole, whole_gates, whole_strengths = _run(tmp_path / "whole", **options)
    # Killed one step after the checkpoint: what that step did must be done again, from the checkpoint.
    _run(tmp_path / "killed", last=_KILLED + 1, **options)
    resumed, gates, strengths = _run(tmp_path / "killed", resume=True, **options)

    assert resumed.model is not None and whole.model is not None
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
    assert _losses(resumed) == _losses(whole)
    assert len(_losses(whole)) == _STEPS
    assert strengths == whole_strengths[_KILLED:]
    if options.get("warmup_steps"):
        # Else the test could not tell a state that was restored from a fresh one.
        assert len(set(whole_strengths)) == _STEPS
    assert not torch.equal(gates.log_alpha()[UnitKey("head", 0)], torch.full((4,), 1.0))


def test_target_and_optimizer_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    trainer, _, _ = _run(tmp_path, sparsity=0.5, ramp_steps=6)
    saved = json.loads((tmp_path / f"checkpoint-{_STEPS}" / "trainer_state.json").read_text(encoding="utf-8"))
    attributes = saved["stateful_callbacks"]["SparsityCallback"]["attributes"]["saved"]
    assert 0 < attributes["target"]["start"] < 0.5
    assert attributes["optimizer"]["steps"] == _STEPS and attributes["optimizer"]["square"] > 0
    assert [len(means) for means in attributes["optimizer"]["means"]] == [4, 4, 4]
    assert trainer.state.global_step == _STEPS


def test_exact_draws_end_with_their_phase(tmp_path: Path) -> None:
    model, gates = _gated(init=0.0)
    callback = deadhead.SparsityCallback(gates, sparsity=0.5, ramp_steps=1, exact=True)
    arguments = _arguments(tmp_path, max_steps=2, save_strategy="no")
    Trainer(model=model, args=arguments, train_dataset=_Text(), callbacks=[callback]).train()
    # Six of twelve stay, whatever draws come later.
    assert sum(gates.plan().heads) == 6
    model.train()
    counts = set()
    for _ in range(20):
        gates.draw()
        counts.add(sum(float(gate()[0].detach().sum()) for _, gate in gates))
    assert len(counts) > 1


def test_exact_draws_of_soft_gates_are_refused() -> None:
    _, gates = _gated(hard=False)
    with pytest.raises(InputError, match="exact draws need hard gates"):
        deadhead.SparsityCallback(gates, sparsity=0.5, exact=True)


def test_gates_are_kept_out_of_weight_decay(tmp_path: Path) -> None:
    trainer, _, _ = _run(tmp_path, arguments={"max_steps": 1})
    assert trainer.model is not None and trainer.optimizer is not None
    gates = {id(parameter) for name, parameter in trainer.model.named_parameters() if "head_gate" in name}
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(gates) == 3
    assert {decays[gate] for gate in gates} == {0.0}
    assert 0.1 in decays.values()


def test_a_gate_moves_lr_scale_times_the_learning_rate(tmp_path: Path) -> None:
    """AdamW's first step is the learning rate in the direction of the sign."""
    rate, scale = 1e-3, 30.0
    model, gates = _gated(lr_scale=scale)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, max_steps=1, learning_rate=rate, weight_decay=0.0, save_strategy="no"),
        train_dataset=_Text(),
        callbacks=[deadhead.SparsityCallback(gates, l0=10.0, warmup_steps=0, gate_lr=0)],
    )
    trainer.train()
    # λ is so large that every gate's gradient is positive: each log_alpha falls by exactly one step.
    for values in gates.log_alpha().values():
        torch.testing.assert_close(values, torch.full_like(values, 1.0 - scale * rate), rtol=0, atol=1e-6)
    moved = (model.model.layers[0].attention.q_proj.weight - before["model.layers.0.attention.q_proj.weight"]).abs()
    assert float(moved.detach().max()) == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_penalty_is_added_once_for_each_step(accumulation: int, tmp_path: Path) -> None:
    """What the callback adds to a gate's gradient is λ ∂L0, whatever the number of accumulated batches."""
    model, gates = _gated()
    callback = deadhead.SparsityCallback(gates, l0=0.3, warmup_steps=0, gate_lr=0)
    expected = torch.autograd.grad(l0_loss(gates) * 0.3, [gate.log_alpha_bias for _, gate in gates])
    seen: list[list[torch.Tensor]] = []

    class Before(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            grads = [gate.log_alpha_bias.grad for _, gate in gates]
            seen.append([grad.clone() for grad in grads if grad is not None])

    class After(Before):
        pass

    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, max_steps=1, gradient_accumulation_steps=accumulation, save_strategy="no"),
        train_dataset=_Text(),
        callbacks=[Before(), callback, After()],
    )
    trainer.train()
    before, after = seen
    assert len(before) == len(after) == 3
    # A draw that saturates a gate gives it no gradient of the loss, but not all of them.
    assert any(bool(old.any()) for old in before)
    for old, new, penalty in zip(before, after, expected, strict=True):
        torch.testing.assert_close(new - old, penalty, rtol=1e-4, atol=1e-6)


def test_clipping_sees_the_language_model_alone(tmp_path: Path) -> None:
    """A penalty a thousand times as strong leaves the first step's norm and its clipped gradients as they were."""
    norms = []
    for l0 in (0.0, 1000.0):
        trainer, _, _ = _run(
            tmp_path / str(l0), l0=l0, warmup_steps=0, arguments={"max_steps": 1, "max_grad_norm": 0.01}
        )
        norms.append(_losses(trainer)[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.01


def test_reported_loss_is_the_language_models(tmp_path: Path) -> None:
    """The mean over both batches of what a copy with the same gates computes, and nothing of the penalty."""
    model = tiny_model()
    gates = deadhead.attach(model, config=GateConfig(seed=5))
    untouched = copy.deepcopy(model).train()
    batches: list[dict[str, torch.Tensor]] = []

    class Remembering(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            batches.append({name: value.clone() for name, value in inputs.items()})
            return super().training_step(model, inputs, *args, **kwargs)

    trainer = Remembering(
        model=model,
        args=_arguments(tmp_path, max_steps=1, save_strategy="no"),
        train_dataset=_Text(),
        callbacks=[deadhead.SparsityCallback(gates, l0=100.0, warmup_steps=0, gate_lr=0)],
    )
    trainer.train()
    logged = _losses(trainer)[0]
    assert logged["lambda"] == 100.0
    assert logged["l0"] > 1.0
    copied_gates = deadhead.gates_of(untouched)
    assert copied_gates is not None
    copied_gates.begin_step(0)
    with torch.no_grad():
        expected = [float(untouched(**batch, use_cache=False).loss) for batch in batches]
    assert len(expected) == 2
    assert expected[0] != expected[1]
    assert logged["loss"] == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_noise_depends_on_step_and_batch_alone() -> None:
    model, gates = _gated()
    model.train()
    ids = torch.zeros((1, 3), dtype=torch.long)

    def draws() -> Iterator[torch.Tensor]:
        for step in (0, 1):
            gates.begin_step(step)
            for _ in range(2):
                model(input_ids=ids, use_cache=False)
                yield gates.gates[UnitKey("head", 0)].noise.clone()

    first = list(draws())
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(), strict=True))
    assert len({tuple(noise.tolist()) for noise in first}) == 4


def test_gates_of_another_copy_are_refused(tmp_path: Path) -> None:
    model, gates = _gated()
    trainer = Trainer(
        model=copy.deepcopy(model),
        args=_arguments(tmp_path),
        train_dataset=_Text(),
        callbacks=[deadhead.SparsityCallback(gates)],
    )
    with pytest.raises(InputError, match="gates of layer 0 are not among the parameters that the optimizer trains"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_gates_that_get_no_gradient_are_refused(tmp_path: Path) -> None:
    """The optimizer has them, but the forward pass goes round them."""
    model, gates = _gated()
    copied = copy.deepcopy(model)
    deadhead.detach(copied)
    for index, (_, gate) in enumerate(gates):
        copied.model.layers[index].add_module("stray", gate)
    trainer = Trainer(
        model=copied,
        args=_arguments(tmp_path),
        train_dataset=_Text(),
        callbacks=[deadhead.SparsityCallback(gates)],
    )
    with pytest.raises(InputError, match="No gradient of the loss reached the gates"):
        trainer.train()


def test_frozen_gates_are_refused(tmp_path: Path) -> None:
    model, gates = _gated()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    trainer = Trainer(
        model=model, args=_arguments(tmp_path), train_dataset=_Text(), callbacks=[deadhead.SparsityCallback(gates)]
    )
    with pytest.raises(InputError, match="gates of layer 0 are frozen"):
        trainer.train()


@pytest.mark.parametrize("twice", [True, False], ids=["one twice", "two"])
def test_two_callbacks_are_refused(twice: bool, tmp_path: Path) -> None:
    model, gates = _gated()
    first = deadhead.SparsityCallback(gates, sparsity=0.5)
    second = first if twice else deadhead.SparsityCallback(gates, l0=0.5)
    trainer = Trainer(model=model, args=_arguments(tmp_path), train_dataset=_Text(), callbacks=[first, second])
    with pytest.raises(InputError, match="One SparsityCallback was expected, .*; give it one"):
        trainer.train()
    trainer.remove_callback(first)
    if not twice:
        trainer.train()


@pytest.mark.parametrize(
    ("made", "trained", "message"),
    [
        (torch.no_grad(), torch.inference_mode(), "cannot learn under torch.no_grad.. or torch.inference_mode"),
        (torch.no_grad(), torch.no_grad(), "cannot learn under torch.no_grad.. or torch.inference_mode"),
        (torch.inference_mode(), torch.enable_grad(), "a model that was loaded under torch.inference_mode"),
    ],
    ids=["trained in inference mode", "trained without gradients", "made in inference mode"],
)
def test_what_lets_nothing_learn_is_refused(made: Any, trained: Any, message: str, tmp_path: Path) -> None:
    with made:
        model = tiny_model()
    callbacks = [deadhead.SparsityCallback(deadhead.attach(model))]
    with pytest.raises(InputError, match=message), trained:
        Trainer(model=model, args=_arguments(tmp_path), train_dataset=_Text(), callbacks=callbacks).train()


def test_gates_that_were_attached_in_inference_mode_learn(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.inference_mode():
        gates = deadhead.attach(model)
    callbacks = [deadhead.SparsityCallback(gates, sparsity=0.5)]
    Trainer(model=model, args=_arguments(tmp_path), train_dataset=_Text(), callbacks=callbacks).train()
    assert gates.sparsity == 0.5


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    _, gates = _gated()
    arguments = _arguments(tmp_path)
    arguments.deepspeed = {"zero_optimization": {"stage": 1}}
    with pytest.raises(InputError, match="under DeepSpeed, which steps inside backward"):
        deadhead.SparsityCallback(gates).on_train_begin(arguments, TrainerState(), TrainerControl())


def _budget() -> BudgetTarget:
    costs = UnitCosts(tables={UnitKey("head", 0): torch.arange(3.0)}, fixed=1.0)
    return BudgetTarget(costs, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l0": -0.1}, "l0 .* must be a number that is not negative, but got -0.1"),
        ({"l0": float("nan")}, "l0 .* must be a number that is not negative"),
        ({"l0": float("inf")}, "l0 .* must be a number that is not negative"),
        ({"weighting": "both"}, "takes weighting as .*'plain', 'output_difference'.*, but got 'both'"),
        ({"sparsity": 1.0}, "target sparsity must be at least 0 and below 1, but it is 1.0"),
        ({"sparsity": -0.5}, "target sparsity must be at least 0 and below 1, but it is -0.5"),
        ({"gate_lr": -1.0}, "gate_lr must be a number that is not negative, or None, but got -1.0"),
        ({"exact": True}, "exact says how a target sparsity is reached; give sparsity too"),
        ({"ranking": "layer"}, "ranking says how a target sparsity is reached"),
        ({"ramp_steps": 0}, "ramp_steps says how a target sparsity is reached"),
        ({"l0": 0.5, "sparsity": 0.5}, "l0 is for training that finds how much to close, but sparsity says it"),
        ({"warmup_steps": 2, "sparsity": 0.5}, "warmup_steps is for training that finds how much to close"),
        ({"l0": 0.5, "budget": _budget()}, "l0 is for training that finds how much to close, but budget says it"),
        ({"warmup_steps": -5}, "warmup_steps must be a number of steps that is at least 0, or None, but it is -5"),
        ({"sparsity": 0.5, "ranking": "best"}, "takes ranking as .*'global', 'layer'.*, but got 'best'"),
        ({"sparsity": 0.5, "ramp_steps": 0.6}, "takes ramp_steps as int .*, but got 0.6"),
        (
            {"sparsity": 0.5, "ramp_steps": -1},
            "ramp_steps must be a number of steps that is at least 0, .* it is -1",
        ),
        ({"budget": 0.5}, "takes budget as BudgetTarget . None, but got 0.5"),
        ({"budget": "0.5"}, "takes budget as BudgetTarget . None, but got '0.5'"),
        ({"budget": Budget(kind="params", value=0.5)}, "takes budget as .*, but got an object of type Budget"),
        ({"gates": "heads"}, "takes gates as HeadGates .*, but got 'heads'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    _, gates = _gated()
    with pytest.raises(InputError, match=message) as caught:
        deadhead.SparsityCallback(**{"gates": gates, **options})
    assert str(caught.value).count("\n") == 0


def test_the_snippet_of_the_documentation_learns_a_plan(tmp_path: Path) -> None:
    """Attach → train → plan → cut, with nothing but the callback: heads that only cost are closed and cut."""
    model, gates = _gated(init=0.5)
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, save_strategy="no", learning_rate=5e-3),
        train_dataset=_Text(),
        callbacks=[deadhead.SparsityCallback(gates, l0=1.0, warmup_steps=0)],
    )
    trainer.train()
    plan = gates.plan()
    assert sum(plan.heads) < 12
    deadhead.cut(model, plan)
    assert deadhead.model_cost(model).heads == plan.heads
