"""The gates' own optimizer: gradients keep their proportions, and λ means what it says."""

from __future__ import annotations

import json

import pytest
import torch

from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig, l0_probability
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.optimizer import GateOptimizer, default_rate
from deadhead.gates.penalty import penalty_gradient
from deadhead.plans.plan import UnitKey
from tests.random_models import choices_among


def make(count: int = 4, **config: float) -> tuple[HeadGates, HeadGate]:
    settings = GateConfig(**config)
    gate = HeadGate(count, settings)
    key = UnitKey("head", 0)
    return HeadGates({key: gate}, choices=choices_among({key: count}), config=settings), gate


def give(gate: HeadGate, by_log_alpha: torch.Tensor) -> None:
    gate.log_alpha_bias.grad = by_log_alpha * gate.config.lr_scale


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("lr_scale", [1.0, 10.0])
def test_moves_keep_the_proportions_of_gradients_of_any_size(scale: float, lr_scale: float) -> None:
    gates, gate = make(init=0.0, lr_scale=lr_scale)
    optimizer = GateOptimizer(gates, lr=0.1)
    gradient = torch.tensor([1.0, -2.0, 4.0, 0.0])
    give(gate, gradient * scale)
    optimizer.step([torch.zeros(4)])
    expected = -0.1 * gradient / gradient.square().mean().sqrt()
    torch.testing.assert_close(gate.log_alpha.detach(), expected, rtol=1e-5, atol=1e-6)
    # The model's optimizer has nothing left to do with them.
    assert gate.log_alpha_bias.grad is None


@pytest.mark.parametrize(
    "noise", [pytest.param(0.0, marks=pytest.mark.slow), 0.02, pytest.param(0.1, marks=pytest.mark.slow)]
)
def test_a_head_stays_if_it_is_worth_more_than_lambda(noise: float) -> None:
    """Whatever the noise of the gradients, which Adam would weigh λ against."""
    worth = torch.tensor([0.002, 0.005, 0.02, 0.05])
    gates, gate = make()
    optimizer = GateOptimizer(gates, lr=0.02)
    draw = torch.Generator().manual_seed(0)
    for _ in range(6000):
        probability = l0_probability(gate.log_alpha.detach(), gate.config)
        steepness = probability * (1 - probability)
        give(gate, steepness * (noise * torch.randn(4, generator=draw) - worth))
        optimizer.step(penalty_gradient(gates, 0.01))
    assert gate.is_open.tolist() == [False, False, True, True]


def test_what_is_not_finite_moves_nothing() -> None:
    gates, gate = make()
    optimizer = GateOptimizer(gates, lr=0.1)
    before = gate.log_alpha.detach().clone()
    for value in (float("inf"), float("nan")):
        give(gate, torch.tensor([1.0, value, 0.0, 0.0]))
        optimizer.step([torch.zeros(4)])
        assert torch.equal(gate.log_alpha.detach(), before)
        assert gate.log_alpha_bias.grad is None
    assert optimizer.steps == 0


def test_gates_stay_within_their_bound() -> None:
    gates, gate = make()
    optimizer = GateOptimizer(gates, lr=0.5)
    for _ in range(100):
        give(gate, torch.tensor([1.0, -1.0, 1.0, -1.0]))
        optimizer.step([torch.zeros(4)])
    assert gate.log_alpha.tolist() == pytest.approx([-6.0, 6.0, -6.0, 6.0], rel=1e-6)


def test_without_any_gradient_nothing_moves() -> None:
    gates, gate = make()
    before = gate.log_alpha.detach().clone()
    GateOptimizer(gates, lr=0.1).step(penalty_gradient(gates, 1.0))
    assert torch.equal(gate.log_alpha.detach(), before)


def test_the_rate_of_long_phases_is_lower() -> None:
    assert [default_rate(steps) for steps in (1, 150, 300, 15000)] == [0.3, 0.3, 0.15, 0.003]


def test_a_saved_optimizer_goes_on_exactly() -> None:
    draw = torch.Generator().manual_seed(1)
    gradients = [torch.randn(4, generator=draw) for _ in range(10)]
    whole_gates, whole_gate = make()
    whole = GateOptimizer(whole_gates, lr=0.1)
    gates, gate = make()
    parts = GateOptimizer(gates, lr=0.1)
    for index, gradient in enumerate(gradients):
        give(whole_gate, gradient)
        whole.step([torch.zeros(4)])
        if index == 5:
            state = json.loads(json.dumps(parts.state()))
            parts = GateOptimizer(gates, lr=0.1)
            parts.load_state(state)
        give(gate, gradient)
        parts.step([torch.zeros(4)])
    assert torch.equal(gate.log_alpha, whole_gate.log_alpha)
