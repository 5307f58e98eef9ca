"""The sparsity loss, its weights, its warm-up, and a target for the open share."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deadhead.errors import InputError
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.optimizer import GateOptimizer
from deadhead.gates.penalty import SparsityTarget, difference_weights, l0_loss, linear_warmup, penalty_gradient
from deadhead.plans.plan import UnitKey
from tests.random_models import choices_among, difference

_KEYS = [UnitKey("head", layer) for layer in range(2)]


def make_gates(config: GateConfig | None = None, seed: int = 0) -> HeadGates:
    """Return gates of two layers of five heads with random log_alpha and output differences, without a model."""
    config = config or GateConfig()
    generator = torch.Generator().manual_seed(seed)
    gates = HeadGates(
        {key: HeadGate(5, config) for key in _KEYS},
        choices=choices_among(dict.fromkeys(_KEYS, 5)),
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
def test_the_gradient_is_that_of_the_penalty(strength: float, weighting: str) -> None:
    config = GateConfig(beta=0.5, gamma=-0.2, zeta=1.3)
    gates = make_gates(config)
    weights = {
        layer: torch.ones(5) if weighting == "plain" else difference_weights(gate.difference) for layer, gate in gates
    }
    expected_l0, slopes = analytic(gates, weights)
    found = penalty_gradient(gates, strength, weighting)  # type: ignore[arg-type]
    assert float(l0_loss(gates, weighting).detach()) == pytest.approx(expected_l0, rel=1e-6)  # type: ignore[arg-type]
    for (layer, gate), gradient in zip(gates, found, strict=True):
        assert gate.log_alpha_bias.grad is None
        # The parameter is log_alpha / lr_scale.
        expected = strength * config.lr_scale * slopes[layer]
        assert torch.allclose(gradient.double(), expected.double(), rtol=1e-5, atol=1e-7)


def test_the_gradient_is_what_a_penalty_in_the_loss_would_give() -> None:
    one, other = make_gates(), make_gates()
    (0.3 * other.l0()).backward()
    for found, (_, gate) in zip(penalty_gradient(one, 0.3), other, strict=True):
        assert gate.log_alpha_bias.grad is not None
        assert difference(found, gate.log_alpha_bias.grad) <= 1e-6


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


def expected_open(gates: HeadGates) -> dict[Any, float]:
    return {layer: float(values.sum()) for layer, values in gates.open_probability().items()}


@given(seed=st.integers(0, 10**6), sparsity=st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=50)
def test_a_target_is_met_in_expectation_and_keeps_the_order(seed: int, sparsity: float) -> None:
    gates = make_gates(seed=seed)
    before = torch.cat(list(gates.log_alpha().values()))
    target = SparsityTarget(sparsity, ramp_steps=4)
    start = target.wanted(0, gates)
    for step in range(1, 6):
        target.project(gates, step)
        share = start + (sparsity - start) * min(1.0, step / 4)
        assert sum(expected_open(gates).values()) == pytest.approx(10 * (1 - share), abs=1e-3)
    after = torch.cat(list(gates.log_alpha().values()))
    assert float(after.abs().max()) <= 6.0
    assert bool((after[before.argsort()].diff() >= 0).all())


def test_the_ramp_begins_where_the_gates_are() -> None:
    gates = make_gates()
    for _, gate in gates:
        gate.set_log_alpha(torch.full((5,), 2.0))
    target = SparsityTarget(0.5, ramp_steps=100)
    target.project(gates, 1)
    # One of a hundred steps from 12 % to 50 %, not a jump to one of a hundred steps from nothing.
    closed = 1 - torch.sigmoid(torch.tensor(2.0)).item()
    assert sum(expected_open(gates).values()) == pytest.approx(10 * (1 - closed - (0.5 - closed) / 100), abs=1e-3)


def test_each_layer_has_a_target_of_its_own() -> None:
    gates = make_gates()
    SparsityTarget(0.4, ramp_steps=1, ranking="layer").project(gates, 1)
    assert expected_open(gates) == dict.fromkeys(_KEYS, pytest.approx(3.0, abs=1e-3))


def test_weights_say_which_heads_the_target_pushes() -> None:
    plain, weighted = make_gates(), make_gates()
    for gates in (plain, weighted):
        for _, gate in gates:
            gate.set_log_alpha(torch.full((5,), 2.0))
            gate.difference.copy_(torch.tensor([0.1, 0.1, 0.1, 3.0, 3.0]))
    SparsityTarget(0.4, ramp_steps=1).project(plain, 1)
    SparsityTarget(0.4, ramp_steps=1).project(weighted, 1, "output_difference")
    assert sum(expected_open(plain).values()) == pytest.approx(sum(expected_open(weighted).values()), abs=1e-3)
    assert bool((plain.log_alpha()[_KEYS[0]].diff() == 0).all())
    assert float(weighted.log_alpha()[_KEYS[0]][2]) < float(weighted.log_alpha()[_KEYS[0]][3])


@given(seed=st.integers(0, 10**6), sparsity=st.floats(0.0, 0.95), by_layer=st.booleans())
@settings(deadline=None, max_examples=50)
def test_exact_draws_open_the_same_number_each_time(seed: int, sparsity: float, by_layer: bool) -> None:
    gates = make_gates(seed=seed)
    target = SparsityTarget(sparsity, ramp_steps=1, ranking="layer" if by_layer else "global", exact=True)
    target.prepare(gates, 0)
    total = 5 if by_layer else 10
    groups = [[gate] for _, gate in gates] if by_layer else [[gate for _, gate in gates]]
    for _ in range(8):
        gates.draw()
        z = [torch.cat([gate()[0].detach() for gate in group]) for group in groups]
        assert [float(values.sum()) for values in z] == [total - round(sparsity * total)] * len(groups)
    target.project(gates, 1, is_last=True)
    # In evaluation the same number is open: the largest log_alpha.
    assert gates.plan() == gates.plan(sparsity=sparsity, ranking="layer" if by_layer else "global")


def test_exact_draws_heed_other_constants() -> None:
    gates = make_gates(GateConfig(gamma=-0.4, zeta=1.1))
    target = SparsityTarget(0.5, ramp_steps=1, exact=True)
    target.prepare(gates, 0)
    for _ in range(20):
        gates.draw()
        assert sum(float(gate()[0].detach().sum()) for _, gate in gates) == 5.0
    target.project(gates, 1, is_last=True)
    assert sum(gates.plan().heads) == 5


def test_an_exact_target_forgets_no_order_on_its_ramp() -> None:
    """Gates that lean far, under an optimizer that keeps them within their bound, and gradients that say nothing."""
    gates = make_gates()
    for (_, layer), gate in gates:
        gate.set_log_alpha(torch.linspace(-3, 7, 10)[5 * layer : 5 * layer + 5])
    order = torch.cat(list(gates.log_alpha().values())).argsort().tolist()
    target = SparsityTarget(0.7, ramp_steps=5, exact=True)
    optimizer = GateOptimizer(gates, lr=1e-6)
    for step in range(1, 11):
        target.prepare(gates, step - 1)
        for _, gate in gates:
            gate.log_alpha_bias.grad = torch.ones(5)
        optimizer.step(penalty_gradient(gates, 0.0))
        target.project(gates, step, is_last=step == 10)
    assert torch.cat(list(gates.log_alpha().values())).argsort().tolist() == order
    assert gates.plan() == gates.plan(sparsity=0.7)


@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 12),
    ramp=st.none() | st.integers(0, 40),
    sparsity=st.floats(0.0, 0.999),
    weighting=st.sampled_from(["plain", "output_difference"]),
    ranking=st.sampled_from(["global", "layer"]),
    exact=st.booleans(),
    hard=st.booleans(),
    alike=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_a_training_ends_with_exactly_the_share_closed(
    seed: int,
    steps: int,
    ramp: int | None,
    sparsity: float,
    weighting: Any,
    ranking: Any,
    exact: bool,
    hard: bool,
    alike: bool,
) -> None:
    """Whatever the schedule, the criterion and the gradients, of gates that are all alike at first too."""
    gates = make_gates(GateConfig(hard=hard or exact), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if alike:
        for _, gate in gates:
            gate.set_log_alpha(torch.full((5,), 2.0))
    target = SparsityTarget(sparsity, ramp_steps=ramp, ranking=ranking, exact=exact)
    target.begin(gates, steps)
    optimizer = GateOptimizer(gates, lr=0.3)
    before = torch.empty(0)
    for step in range(1, steps + 1):
        target.prepare(gates, step - 1)
        for _, gate in gates:
            gate.log_alpha_bias.grad = torch.randn(5, generator=generator) * (not alike)
        optimizer.step(penalty_gradient(gates, 0.0))
        if step == steps:
            copied = copy.deepcopy(gates)
            target.project(copied, step, weighting)
            before = torch.cat(list(copied.log_alpha().values()))
        target.project(gates, step, weighting, is_last=step == steps)
    share = gates.plan(sparsity=sparsity, ranking=ranking)
    assert gates.plan() == share and target.shortfall(gates) == ""
    groups = [10] if ranking == "global" else [5, 5]
    assert 10 - sum(share.heads) == sum(round(sparsity * size) for size in groups)
    for key, gate in gates:
        assert (gate.eval()()[0] > 0).tolist() == [head in share.kept[key.layer] for head in range(5)]
    after = torch.cat(list(gates.log_alpha().values()))
    for old, new in zip(before.split(groups), after.split(groups), strict=True):
        assert bool((new[old.argsort(stable=True)].diff() >= -1e-5).all()), "the order is the one that was learned"


@pytest.mark.parametrize(
    ("asked", "steps", "ramp"), [(None, 32, 21), (None, 1, 1), (1000, 32, 32), (10, 32, 10), (0, 32, 0)]
)
def test_a_ramp_follows_the_trainings_steps(asked: int | None, steps: int, ramp: int) -> None:
    target, gates = SparsityTarget(0.5, ramp_steps=asked), make_gates()
    target.begin(gates, steps)
    assert target.ramp_steps == ramp
    assert target.wanted(steps, gates) == pytest.approx(0.5)
    # For another training it begins anew.
    target.begin(gates, 2 * steps)
    assert target.start is None


def test_what_is_missing_is_said_with_what_was_asked() -> None:
    gates = make_gates()
    for _, gate in gates:
        gate.set_log_alpha(torch.full((5,), 2.0))
    assert SparsityTarget(0.5, ranking="layer").shortfall(gates) == (
        'close 0 of the heads, but 0.5 was asked for; gates.plan(sparsity=0.5, ranking="layer") closes that'
    )
    assert SparsityTarget(0.0).shortfall(gates) == ""


@pytest.mark.parametrize("sparsity", [0.0, 0.999])
def test_a_share_out_of_reach_leaves_the_order(sparsity: float) -> None:
    gates = make_gates()
    order = torch.cat(list(gates.log_alpha().values())).argsort().tolist()
    SparsityTarget(sparsity, ramp_steps=1).project(gates, 1)
    values = torch.cat(list(gates.log_alpha().values()))
    # Not all alike at the bound: those that come next to change sides still stand apart.
    first, second = values[order[-2:]].flip(0) if sparsity else -values[order[:2]]
    assert first > second
    assert bool((values[order].diff() >= 0).all())


def test_exact_draws_differ_from_each_other() -> None:
    gates = make_gates()
    for _, gate in gates:
        gate.set_log_alpha(torch.zeros(5))
    SparsityTarget(0.5, ramp_steps=1, exact=True).prepare(gates, 0)
    drawn = set()
    for _ in range(20):
        gates.draw()
        drawn.add(tuple(float(z) for _, gate in gates for z in gate()[0].detach()))
    assert len(drawn) > 10


def test_a_saved_target_goes_on_exactly() -> None:
    first, gates = SparsityTarget(0.5, ramp_steps=100), make_gates()
    first.project(gates, 1)
    second = SparsityTarget(0.5, ramp_steps=100)
    # As a checkpoint keeps it: through JSON.
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.wanted(50, gates) == first.wanted(50, gates)
    # By now the gates are elsewhere: a fresh one would begin there.
    assert SparsityTarget(0.5, ramp_steps=100).wanted(50, gates) != first.wanted(50, gates)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_target_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="target sparsity must be"):
        SparsityTarget(sparsity, ramp_steps=10)


def test_a_ramp_that_goes_on_in_a_longer_training_stays_as_it_was() -> None:
    target = SparsityTarget(0.5, ramp_steps=None)
    target.ramp_steps, target.start = 20, 0.0
    longer = SparsityTarget(0.5, ramp_steps=None)
    longer.ramp_steps = 100
    longer.load_state(target.state())
    assert longer.ramp_steps == 20
