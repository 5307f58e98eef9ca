"""The sparsity loss, its weights, its warm-up and the steered λ."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deadhead.errors import InputError
from deadhead.gates import GateConfig, HeadGate, HeadGates
from deadhead.penalty import SparsityTarget, add_penalty_gradient, difference_weights, l0_loss, linear_warmup
from tests.helpers import difference


def make_gates(config: GateConfig | None = None, seed: int = 0) -> HeadGates:
    """Return gates of two layers of five heads with random log_alpha and output differences, without a model."""
    config = config or GateConfig()
    generator = torch.Generator().manual_seed(seed)
    gates = HeadGates(
        {layer: HeadGate(5, config) for layer in range(2)},
        heads={layer: tuple(range(5)) for layer in range(2)},
        total=dict.fromkeys(range(2), 5),
        unit="head",
        config=config,
    )
    for _, gate in gates:
        gate.set_log_alpha(torch.randn(5, generator=generator) * 2)
        gate.difference.copy_(torch.rand(5, generator=generator))
    return gates


def analytic(gates: HeadGates, weights: dict[Any, Tensor]) -> tuple[float, dict[Any, Tensor]]:
    """Return Σ w σ(x) and its gradient by log_alpha, w σ(x)(1 − σ(x)), with x = log_alpha − β ln(−γ / ζ)."""
    shift = gates.config.beta * math.log(-gates.config.gamma / gates.config.zeta)
    total, slopes = 0.0, {}
    for layer, gate in gates:
        p = 1 / (1 + (-(gate.log_alpha.detach().double() - shift)).exp())
        total += float((weights[layer] * p).sum())
        slopes[layer] = weights[layer] * p * (1 - p)
    return total, slopes


@pytest.mark.parametrize("weighting", ["plain", "output_difference"])
@pytest.mark.parametrize("strength", [0.0, 0.02, 3.0])
def test_the_gradient_added_is_that_of_the_penalty(strength: float, weighting: str) -> None:
    config = GateConfig(beta=0.5, gamma=-0.2, zeta=1.3)
    gates = make_gates(config)
    weights = {
        layer: torch.ones(5) if weighting == "plain" else difference_weights(gate.difference) for layer, gate in gates
    }
    expected_l0, slopes = analytic(gates, weights)
    gates.gates[1].log_alpha_bias.grad = torch.arange(5.0)
    value = add_penalty_gradient(gates, strength, weighting)  # type: ignore[arg-type]
    plain_l0, _ = analytic(gates, dict.fromkeys(range(2), torch.ones(5)))
    assert value == pytest.approx(plain_l0, rel=1e-6)
    assert float(l0_loss(gates, weighting).detach()) == pytest.approx(expected_l0, rel=1e-6)  # type: ignore[arg-type]
    for layer, gate in gates:
        before = torch.zeros(5) if layer == 0 else torch.arange(5.0)
        assert gate.log_alpha_bias.grad is not None
        # The parameter is log_alpha / lr_scale.
        expected = before + strength * config.lr_scale * slopes[layer]
        assert torch.allclose(gate.log_alpha_bias.grad.double(), expected.double(), rtol=1e-5, atol=1e-7)


def test_the_added_gradient_is_what_a_penalty_in_the_loss_would_give() -> None:
    one, other = make_gates(), make_gates()
    add_penalty_gradient(one, 0.3)
    (0.3 * other.l0()).backward()
    for layer, gate in one:
        added, expected = gate.log_alpha_bias.grad, other.gates[layer].log_alpha_bias.grad
        assert added is not None and expected is not None
        assert difference(added, expected) <= 1e-6


@given(values=st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=16))
@settings(deadline=None, max_examples=100)
def test_weights_have_mean_one_and_fall_with_the_difference(values: list[float]) -> None:
    difference_H = torch.tensor(values)
    weights_H = difference_weights(difference_H)
    assert weights_H.shape == difference_H.shape and bool(weights_H.isfinite().all()) and bool((weights_H >= 0).all())
    assert float(weights_H.mean()) == pytest.approx(1.0, abs=1e-4)
    order = difference_H.argsort()
    assert bool((weights_H[order].diff() <= 1e-6).all())


def test_weights_fall_strictly_and_by_the_stated_law() -> None:
    difference_H = torch.tensor([0.0, 0.5, 1.0, 2.5])
    weights_H = difference_weights(difference_H)
    assert bool((weights_H.diff() < 0).all())
    # A head that adds nothing is pushed e times as hard as an average one, which would have d = mean d = 1.
    assert float(weights_H[0] / weights_H[2]) == pytest.approx(math.e, rel=1e-6)


def test_unmeasured_differences_weigh_all_heads_alike() -> None:
    gates = make_gates()
    for _, gate in gates:
        gate.difference.zero_()
    assert torch.equal(l0_loss(gates, "output_difference"), l0_loss(gates, "plain"))


def test_the_warm_up_is_a_straight_line() -> None:
    assert [linear_warmup(step, 4) for step in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert linear_warmup(0, 0) == linear_warmup(5, 0) == 1.0


def simulate(target: SparsityTarget, steps: int, *, start: int = 0, log_alpha: Tensor | None = None) -> Tensor:
    """Let gates sink at speeds of their own, in proportion to λ, and return log_alpha."""
    values = torch.full((40,), 2.0) if log_alpha is None else log_alpha
    speeds = torch.linspace(0.2, 1.8, 40)
    for step in range(start + 1, start + steps + 1):
        values = values - 0.5 * target.l0 * speeds
        target.update(step, [values[:16], values[16:]])
    return values


def test_a_saved_target_goes_on_exactly() -> None:
    whole = SparsityTarget(0.5, ramp_steps=100, initial=0.02)
    expected = simulate(whole, 80)
    first = SparsityTarget(0.5, ramp_steps=100, initial=0.02)
    half_way = simulate(first, 37)
    # As a checkpoint keeps it: through JSON.
    second = SparsityTarget(0.5, ramp_steps=100, initial=0.02)
    second.load_state(json.loads(json.dumps(first.state())))
    assert torch.equal(simulate(second, 43, start=37, log_alpha=half_way), expected)
    assert second.state() == whole.state()


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_the_target_steers_towards_its_share(sparsity: float) -> None:
    target = SparsityTarget(sparsity, ramp_steps=150, initial=0.02)
    closed = (simulate(target, 170) < 0).float().mean()
    assert float(closed) == pytest.approx(sparsity, abs=0.15)


def test_lambda_stays_within_its_bounds() -> None:
    target = SparsityTarget(0.9, ramp_steps=1, initial=0.01)
    for step in range(1, 100):
        target.update(step, [torch.full((4,), 5.0)])
    assert target.l0 == 1.0
    for step in range(100, 600):
        target.update(step, [torch.full((4,), -5.0)])
    assert target.l0 == pytest.approx(1e-4)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_target_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="target sparsity must be"):
        SparsityTarget(sparsity, ramp_steps=10, initial=0.01)
