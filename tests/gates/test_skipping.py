"""What shut units would give is not computed while gates alone learn, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.attaching import gates_of, is_gate
from deadhead.gates import skipping
from deadhead.gates.hard_concrete import GateConfig
from deadhead.training.phases.learning import checkpoint_activations
from tests.models.test_transformer_xl import tiny as tiny_transformer_xl
from tests.random_models import assert_unchanged, difference, snapshot

# Grouped queries, fused projections, two modules for one attention, a feed-forward part that lies in the layer itself.
KINDS = ["llama", "gpt2", "gpt_neox", "opt", "phi3", "bert", "qwen2", "transformer-xl"]


def gated(kind: str, *, unit: Any = None, shut: float = 0.5) -> Any:
    """Return a model in training mode of which gates alone learn, about that share of them shut in each draw."""
    model = tiny_transformer_xl() if kind == "transformer-xl" else tiny_model(kind)
    model.eval()
    gates = deadhead.attach(model, config=GateConfig(seed=3), unit=unit, blocks=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_gate(name))
    for module in model.modules():
        # What it draws depends on shapes.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, gate in gates:
            gone = torch.rand(gate.num_heads, generator=generator) < shut
            # Those in doubt are drawn shut or open, and learn.
            gate.log_alpha_bias.copy_(torch.where(gone, -8.0, torch.randn(gate.num_heads, generator=generator)))
    return model.train()


@contextmanager
def widths(model: nn.Module) -> Iterator[list[int]]:
    """Collect how many numbers each gated output projection reads."""
    found: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[-1]), prepend=False)
        for module in model.modules()
        if any(type(hook).__name__ == "_GateInput" for hook in module._forward_pre_hooks.values())
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def learned(model: Any, step: int) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """Return the logits of one draw, the gates' gradients of a loss, and what output projections read."""
    gates = gates_of(model)
    assert gates is not None
    gates.begin_step(step)
    ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(), widths(model) as found:
        torch.manual_seed(0)
        output = model(input_ids=ids, **({} if model.config.model_type == "bert" else {"use_cache": False}))
    loss = output.logits.square().mean()
    gradients = torch.autograd.grad(loss, [gate.log_alpha_bias for _, gate in gates])
    return output.logits.detach(), {str(key): g for (key, _), g in zip(gates, gradients, strict=True)}, found


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_open_is_computed_and_nothing_else_changes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated(kind)
    learned(model, 1)
    before = snapshot(model)
    found = [learned(model, step) for step in range(1, 5)]
    assert_unchanged(model, before)
    monkeypatch.setattr(skipping, "_LEAST", 2.0)
    fewer = 0
    for step, (logits, gradients, read) in enumerate(found, start=1):
        expected, wanted, whole = learned(model, step)
        assert difference(logits, expected) < 1e-5
        for key, gradient in gradients.items():
            assert difference(gradient, wanted[key]) < 1e-4 or float(wanted[key].abs().max()) < 1e-9, key
        assert len(read) == len(whole) and all(here <= there for here, there in zip(read, whole, strict=True))
        fewer += sum(read) < 0.9 * sum(whole)
    assert fewer == 4


@pytest.mark.parametrize("unit", ["head", "kv_group"])
def test_query_heads_of_a_group_are_left_out_too(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gated("llama", unit=unit)
    logits, _, _ = learned(model, 1)
    monkeypatch.setattr(skipping, "_LEAST", 2.0)
    assert difference(logits, learned(model, 1)[0]) < 1e-5


def test_layers_without_an_open_unit_compute_one() -> None:
    model = gated("llama", shut=1.0)
    logits, _, read = learned(model, 1)
    gates = gates_of(model)
    assert gates is not None and set(read) == {4, min(read), max(read)}
    with torch.no_grad():
        model.eval()
        ids = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
        assert difference(logits, model(input_ids=ids, use_cache=False).logits) < 1e-5


def test_weights_that_learn_and_measurements_see_all_units() -> None:
    model = gated("llama")
    assert sum(learned(model, 0)[2]) > sum(learned(model, 1)[2])
    weight = model.get_submodule("model.layers.0.mlp.gate_proj").weight.requires_grad_()
    learning = learned(model, 1)[2]
    weight.requires_grad_(False)
    # The one module that has it computes everything.
    assert sum(learning) > sum(learned(model, 1)[2])


def test_a_module_that_fails_has_all_its_units_again() -> None:
    model = gated("llama")
    learned(model, 1)
    before = snapshot(model)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        learned(model, 1)
    hook.remove()
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_recomputed_activations_are_the_same(kind: str) -> None:
    model = gated(kind)
    expected = learned(model, 1)
    checkpoint_activations(model, True)
    found = learned(model, 1)
    assert torch.equal(found[0], expected[0])
    for key, gradient in found[1].items():
        assert difference(gradient, expected[1][key]) < 1e-6


def test_copies_have_their_own_and_gates_that_are_taken_off_leave_nothing() -> None:
    model = gated("llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert sum(learned(other, 1)[2]) and float(learned(other, 1)[0].abs().max()) > 0
    deadhead.detach(other)
    for module in other.modules():
        assert not module._forward_hooks and not module._forward_hooks_always_called
        assert not module._forward_pre_hooks
