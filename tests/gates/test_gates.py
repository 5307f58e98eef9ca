"""Hard-concrete gates: the maths against closed forms, noise, precision, output scale, plans."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deadhead.attaching import attach, detach
from deadhead.cutting import cut
from deadhead.errors import InputError
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig, gate_values, l0_probability
from deadhead.gates.head_gate import HeadGate
from deadhead.plans.plan import HeadPlan, UnitKey
from tests.random_models import choices_among, difference, tiny_model

CONFIGS = [
    GateConfig(),
    GateConfig(hard=False),
    GateConfig(beta=0.8, gamma=-0.3, zeta=1.2, hard=False),
    GateConfig(beta=0.8, gamma=-0.05, zeta=1.4),
]
configs = pytest.mark.parametrize("config", CONFIGS, ids=["default", "soft", "soft, own constants", "lopsided"])


def closed_form(log_alpha: float, config: GateConfig, u: float | None) -> tuple[float, float]:
    """Return z before hardening and ∂z / ∂log_alpha, in plain Python."""
    x = log_alpha if u is None else (math.log(u) - math.log(1 - u) + log_alpha) / config.beta
    s = 1 / (1 + math.exp(-x))
    stretched = s * (config.zeta - config.gamma) + config.gamma
    slope = s * (1 - s) * (config.zeta - config.gamma) / (1 if u is None else config.beta)
    return min(1.0, max(0.0, stretched)), slope if 0 < stretched < 1 else 0.0


@configs
@given(log_alpha=st.floats(-6, 6), u=st.none() | st.floats(1e-6, 1 - 1e-6))
@settings(deadline=None, max_examples=60)
def test_values_and_straight_through_gradients_are_the_closed_forms(
    config: GateConfig, log_alpha: float, u: float | None
) -> None:
    parameter = torch.tensor([log_alpha], dtype=torch.float64, requires_grad=True)
    z = gate_values(parameter, config, None if u is None else torch.tensor([u], dtype=torch.float64))
    value = float(z.detach())
    (gradient,) = torch.autograd.grad(z.sum(), parameter)
    expected, slope = closed_form(log_alpha, config, u)
    if not config.hard:
        assert value == pytest.approx(expected, abs=1e-9)
    elif abs(expected - 0.5) > 1e-9:
        assert value == float(expected > 0.5), "hard gates must be exactly 0 or 1"
    if min(abs(expected), abs(expected - 1)) > 1e-9 or slope == 0:
        assert float(gradient) == pytest.approx(slope, abs=1e-7)


def test_hard_gates_are_exactly_zero_or_one_in_float32() -> None:
    log_alpha = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2
    noise = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) * 0.999 + 0.0005
    for z in (gate_values(log_alpha, GateConfig()), gate_values(log_alpha, GateConfig(), noise)):
        assert set(z.unique().tolist()) == {0.0, 1.0}


@configs
def test_probabilities_agree_with_draws(config: GateConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    log_alpha_H = torch.tensor([-4.0, -2.0, -0.5, 0.0, 0.7, 2.0, 4.0])
    gate = HeadGate(7, config)
    gate.set_log_alpha(log_alpha_H)
    noise = torch.rand((100_000, 7), generator=generator) * (1 - 2e-6) + 1e-6
    open_share = (gate_values(log_alpha_H, config, noise) > 0).float().mean(0)
    soft = GateConfig(beta=config.beta, gamma=config.gamma, zeta=config.zeta, hard=False)
    positive_share = (gate_values(log_alpha_H, soft, noise) > 0).float().mean(0)
    # Five standard deviations of a share of 100 000.
    assert (gate.open_probability - open_share).abs().max() < 0.008
    assert (l0_probability(log_alpha_H, config) - positive_share).abs().max() < 0.008
    assert bool((l0_probability(log_alpha_H, config) >= gate.open_probability - 1e-6).all())


def test_constants_of_the_paper() -> None:
    config = GateConfig()
    assert (config.beta, config.gamma, config.zeta, config.init) == (1 / 3, -0.1, 1.1, 2.0)
    assert float(l0_probability(torch.zeros(()), config)) == pytest.approx(1 / (1 + math.exp(-math.log(11) / 3)))
    assert float(HeadGate(1, config).open_probability) == pytest.approx(1 / (1 + math.exp(-2.0)))


@configs
def test_which_heads_are_open_is_what_the_forward_pass_does(config: GateConfig) -> None:
    """Also where log_alpha is so near the threshold that the two could round differently."""
    centre = config.open_threshold
    offsets = [sign * 10.0**power for power in range(-12, 2) for sign in (-1, 1)]
    gate = HeadGate(len(offsets) + 1, config)
    gate.set_log_alpha(torch.tensor([centre, *(centre + offset for offset in offsets)]))
    gate.eval()
    assert torch.equal(gate.is_open, gate()[0] > 0)
    assert 2 < int(gate.is_open.sum()) < len(offsets) - 2


def test_hard_gates_are_open_from_zero_on() -> None:
    gate = HeadGate(3, GateConfig())
    gate.set_log_alpha(torch.tensor([-1e-3, 0.0, 1e-3]))
    assert gate.is_open.tolist() == [False, True, True]


def test_at_the_start_all_are_open_in_evaluation_and_88_percent_in_draws() -> None:
    model = tiny_model()
    gates = attach(model)
    assert gates.sparsity == 0 and gates.plan() == HeadPlan.keep_all({0: 4, 1: 4, 2: 4})
    open_heads = draws = 0
    for step in range(400):
        gates.begin_step(step)
        gates.draw()
        for _, gate in gates:
            gate.train()
            open_heads += int((gate()[0] > 0).sum())
            draws += gate.num_heads
    assert open_heads / draws == pytest.approx(0.881, abs=0.02)


def test_the_noise_is_uniform_and_within_its_bounds() -> None:
    gates = attach(tiny_model(), config=GateConfig(epsilon=0.1))
    values = []
    for step in range(500):
        gates.begin_step(step)
        gates.draw()
        values += [gate.noise.clone() for _, gate in gates]
    noise = torch.cat(values)
    assert noise.min() >= 0.1 and noise.max() <= 0.9
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(noise.std()) == pytest.approx(0.8 / math.sqrt(12), abs=0.02)


def noise_of(gates: HeadGates) -> Tensor:
    return torch.cat([gate.noise for _, gate in gates]).clone()


def test_noise_is_a_function_of_seed_step_and_micro_batch() -> None:
    ids = torch.arange(12).view(2, 6)
    seen: dict[tuple[int, int, int], Tensor] = {}
    for seed in (0, 1):
        # The two models differ in everything but their number of heads.
        for weights in (3, 4):
            model = tiny_model(weights).train()
            gates = attach(model, config=GateConfig(seed=seed))
            for step in (0, 1, 7):
                gates.begin_step(step)
                for micro_batch in range(3):
                    model(input_ids=ids)
                    noise = noise_of(gates)
                    key = (seed, step, micro_batch)
                    assert torch.equal(seen.setdefault(key, noise), noise), key
    distinct = {tuple(noise.tolist()) for noise in seen.values()}
    assert len(distinct) == len(seen) == 18
    # Gates attached anew go on with the same noise: nothing of it needs saving.
    detach(model)
    gates = attach(model, config=GateConfig(seed=1))
    gates.begin_step(7)
    model(input_ids=ids)
    assert torch.equal(noise_of(gates), seen[1, 7, 0])


def test_evaluation_neither_draws_nor_uses_noise() -> None:
    model = tiny_model().train()
    gates = attach(model)
    ids = torch.arange(6).view(1, 6)
    model(input_ids=ids)
    noise, micro_batch = noise_of(gates), gates._micro_batch
    model.eval()
    first = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(noise_of(gates), noise) and gates._micro_batch == micro_batch
    gates.draw()
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, first)


def test_the_global_random_state_is_left_alone() -> None:
    model = tiny_model().train()
    state = torch.get_rng_state()
    gates = attach(model)
    gates.begin_step(0)
    model(input_ids=torch.arange(6).view(1, 6))
    gates.set_plan(gates.plan(sparsity=0.5))
    cut(model, gates.plan())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gates_stay_float32_whatever_the_model_is_cast_to(dtype: torch.dtype) -> None:
    model = tiny_model()
    gates = attach(model).gates
    model.to(dtype)
    model.half() if dtype == torch.float16 else model
    assert model.model.layers[0].attention.q_proj.weight.dtype == dtype
    for gate in gates.values():
        assert gate.log_alpha_bias.dtype == gate.noise.dtype == gate.difference.dtype == torch.float32
        assert gate()[0].dtype == torch.float32
    output = model.train()(input_ids=torch.arange(6).view(1, 6), labels=torch.arange(6).view(1, 6))
    assert output.logits.dtype == dtype
    output.loss.backward()
    for gate in gates.values():
        gradient = gate.log_alpha_bias.grad
        assert gradient is not None and gradient.dtype == torch.float32 and bool(gradient.isfinite().all())


def test_gates_learn_and_measure_in_float32_under_autocast() -> None:
    ids = torch.arange(24).view(2, 12)
    found = []
    for enabled in (False, True):
        model = tiny_model(seed=2).train()
        gates = attach(model)
        gates.track_difference()
        gates.begin_step(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        for _, gate in gates:
            assert gate()[0].dtype == torch.float32
            assert gate.difference.dtype == torch.float32 and gate.log_alpha_bias.grad is not None
        found.append(torch.cat([gate.difference for _, gate in gates]))
    assert bool((found[0] > 0).all())
    assert difference(found[1], found[0]) < 0.05


@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    use_reentrant: bool, shared: bool, attention_dropout: float
) -> None:
    ids = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(0))

    def run(checkpointing: bool) -> tuple[dict[str, Tensor], dict[Any, Tensor]]:
        model = tiny_model(seed=4, share_position_bias=shared, attention_dropout=attention_dropout).train()
        gates = attach(model)
        gates.track_difference()
        for _, gate in gates:
            gate.set_log_alpha(torch.tensor([0.0, 0.3, -0.3, 0.1]))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.model.layers[0].gradient_checkpointing
        gates.begin_step(5)
        torch.manual_seed(0)
        # Two micro-batches: a redraw in the backward pass of the first would show in the second.
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(gradient is not None for gradient in found.values())
        return found, gates.difference()

    plain, measured = run(False)
    again, measured_again = run(True)
    for name, gradient in plain.items():
        assert difference(again[name], gradient) <= 1e-6, name
        if "log_alpha" in name:
            assert gradient.abs().max() > 0
    for layer, values in measured.items():
        assert difference(measured_again[layer], values) <= 1e-5, "the recomputation was measured too"


@pytest.mark.parametrize("hard", [True, False])
def test_the_output_scale_is_heads_over_open_gates_within_its_bounds(hard: bool) -> None:
    for num_open in range(7):
        gate = HeadGate(6, GateConfig(output_scale=True, hard=hard)).eval()
        gate.set_log_alpha(torch.tensor([1.0] * num_open + [-9.0] * (6 - num_open)))
        z_H, scale = gate()
        assert int((z_H > 0).sum()) == num_open
        assert float(scale) == pytest.approx(6 / max(num_open, 1))
        assert 1 <= float(scale) <= 6
        off = HeadGate(6, GateConfig(hard=hard)).eval()
        off.set_log_alpha(gate.log_alpha)
        assert float(off()[1]) == 1.0


def test_the_output_scale_is_a_constant_for_the_backward_pass() -> None:
    config = GateConfig(output_scale=True)
    gate = HeadGate(4, config).train()
    gate.set_log_alpha(torch.tensor([0.2, -0.1, 0.4, 0.0]))
    gate.noise.copy_(torch.tensor([0.5, 0.4, 0.3, 0.6]))
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    z_H, scale = gate()
    assert not scale.requires_grad and float(scale) > 1
    ((z_H * scale) * weights).sum().backward()
    log_alpha = gate.log_alpha.detach().requires_grad_()
    (gate_values(log_alpha, config, gate.noise) * float(scale) * weights).sum().backward()
    assert gate.log_alpha_bias.grad is not None and log_alpha.grad is not None
    assert difference(gate.log_alpha_bias.grad, log_alpha.grad * config.lr_scale) <= 1e-6
    assert log_alpha.grad.abs().max() > 0


def test_the_output_scale_multiplies_the_heads_sum_but_not_the_bias() -> None:
    outputs = []
    for output_scale in (False, True):
        model = tiny_model(seed=1, num_hidden_layers=1, final_layer_norm=False)
        gates = attach(model, config=GateConfig(output_scale=output_scale))
        gates.set_plan(HeadPlan(kept={0: [2]}, total={0: 4}, output_scale=output_scale))
        seen: list[Tensor] = []
        handle = model.model.layers[0].attention.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0])
        )
        with torch.no_grad():
            model(input_ids=torch.arange(8).view(1, 8))
        handle.remove()
        outputs.append(seen[0] - model.model.layers[0].attention.o_proj.bias)
    assert difference(outputs[1], 4 * outputs[0]) <= 1e-6


@given(kept=st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=3), output_scale=st.booleans())
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("config", CONFIGS)
def test_set_plan_and_plan_round_trip(config: GateConfig, kept: list[set[int]], output_scale: bool) -> None:
    gates = _gates(config)
    plan = HeadPlan(
        kept={layer: sorted(heads) for layer, heads in enumerate(kept)},
        total=dict.fromkeys(range(3), 4),
        output_scale=output_scale,
    )
    gates.set_plan(plan)
    assert gates.plan() == plan
    assert gates.sparsity == pytest.approx(plan.sparsity)
    # A plan is all or nothing, for soft gates too.
    for (_, layer), gate in gates:
        gate.eval()
        z_H, scale = gate()
        assert z_H.tolist() == [float(head in plan.kept[layer]) for head in range(4)]
        assert float(scale) == (pytest.approx(4 / max(len(plan.kept[layer]), 1)) if output_scale else 1.0)


def _gates(config: GateConfig | None = None) -> HeadGates:
    """Return gates of three layers of four heads, without a model."""
    config = config or GateConfig()
    keys = [UnitKey("head", layer) for layer in range(3)]
    return HeadGates(
        {key: HeadGate(4, config) for key in keys},
        choices=choices_among(dict.fromkeys(keys, 4)),
        config=config,
    )


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_a_plan_of_given_sparsity_closes_the_smallest_gates_of_all_layers(sparsity: float) -> None:
    gates = _gates()
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))
    for (_, gate), log_alpha_H in zip(gates, values.view(3, 4), strict=True):
        gate.set_log_alpha(log_alpha_H)
    plan = gates.plan(sparsity=sparsity)
    closed = [layer * 4 + head for layer in range(3) for head in plan.cut(layer)]
    assert len(closed) == round(sparsity * 12)
    assert sorted(closed) == sorted(values.argsort()[: len(closed)].tolist())


@configs
@given(values=st.lists(st.floats(-6, 6, width=32), min_size=12, max_size=12), sparsity=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_gates_settle_where_a_plan_has_them_and_keep_their_order(
    config: GateConfig, values: list[float], sparsity: float
) -> None:
    """Each of the two groups moves as a whole, and only if one of its gates is on the wrong side."""
    gates = _gates(config)
    for (_, gate), part in zip(gates, torch.tensor(values).split(4), strict=True):
        gate.set_log_alpha(part)
    before, plan = torch.cat(list(gates.log_alpha().values())), gates.plan(sparsity=sparsity)
    stays = torch.tensor([head in plan.kept[key.layer] for key, gate in gates for head in range(4)])
    gates.settle(plan)
    after = torch.cat(list(gates.log_alpha().values()))
    assert gates.plan() == plan == gates.plan(sparsity=sparsity)
    for group in (stays, ~stays):
        moves = (after - before)[group]
        assert not len(moves) or float(moves.max() - moves.min()) < 1e-5
    gates.settle(plan)
    assert float((torch.cat(list(gates.log_alpha().values())) - after).abs().max()) < 1e-6


def test_ties_are_closed_in_the_order_of_the_layers() -> None:
    assert _gates().plan(sparsity=0.5).kept == {0: (), 1: (2, 3), 2: (0, 1, 2, 3)}


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_a_sparsity_that_is_no_share_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        _gates().plan(sparsity=sparsity)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("plan", {"sparsity": "a"}, r"HeadGates.plan takes sparsity as float \| None, but got 'a'"),
        ("plan", {"sparsity": True}, "takes sparsity as .*, but got True"),
        ("plan", {"ranking": "x"}, "takes ranking as .*, but got 'x'"),
        ("plan", {"ranking": "layer"}, "ranking says how a share .*; set sparsity too"),
        ("settle", {"plan": None}, "takes plan as HeadPlan, but got None"),
        ("set_plan", {"plan": "plan.json"}, "HeadGates.set_plan takes plan as HeadPlan, but got 'plan.json'"),
        ("load_state_dict", {"state": None}, "takes state as Mapping"),
        ("load_state_dict", {"state": {"0.log_alpha": [0.0]}}, "takes state as Mapping"),
        ("lean", {"scores": {}, "spread": 1.0}, "takes scores as HeadScores"),
        ("lean", {"scores": _gates().scores(), "spread": math.nan}, "spread of log_alpha must be .* but it is nan"),
        ("track_difference", {"on": "yes"}, "takes on as bool, but got 'yes'"),
    ],
)
def test_what_is_of_another_type_is_refused_and_changes_nothing(
    method: str, given: dict[str, Any], message: str
) -> None:
    gates = _gates()
    before = gates.state_dict()
    with pytest.raises(InputError, match=message):
        getattr(gates, method)(**given)
    assert all(torch.equal(value, before[name]) for name, value in gates.state_dict().items())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (HeadPlan(kept={}, total={0: 4, 1: 4}), r"for \[4, 4\] heads a layer, but this model had \[4, 4, 4\]"),
        (HeadPlan(kept={}, total={0: 4, 1: 4, 2: 5}), r"for \[4, 4, 5\] heads"),
        (HeadPlan(kept={}, total={0: 4, 1: 4, "deep": 4}), "heads a layer"),
        (HeadPlan(kept={}, total=dict.fromkeys(range(3), 4), unit="kv_group"), "kv_group"),
    ],
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(plan: HeadPlan, message: str) -> None:
    gates = _gates()
    before = gates.state_dict()
    with pytest.raises(InputError, match=message):
        gates.set_plan(plan)
    assert all(torch.equal(value, before[name]) for name, value in gates.state_dict().items())


def test_after_a_cut_plans_count_in_heads_of_the_dense_model() -> None:
    model = tiny_model()
    total = dict.fromkeys(range(3), 4)
    cut(model, HeadPlan(kept={0: [1, 3], 1: []}, total=total))
    gates = attach(model)
    assert len(gates) == 6 and gates.choices.total == {UnitKey("head", layer): 4 for layer in total}
    assert gates.plan().kept == {0: (1, 3), 1: (), 2: (0, 1, 2, 3)}
    plan = HeadPlan(kept={0: [3], 1: [], 2: [0, 2]}, total=total)
    gates.set_plan(plan)
    assert gates.plan() == plan
    assert gates.gates[UnitKey("head", 0)].is_open.tolist() == [False, True]
    with pytest.raises(InputError, match="head 0 of layer 0, but that head was cut before"):
        gates.set_plan(HeadPlan(kept={0: [0], 1: []}, total=total))
    with pytest.raises(InputError, match="head 0 of layer 1, but that head was cut before"):
        gates.set_plan(HeadPlan(kept={0: [1]}, total=total))


def test_state_round_trip() -> None:
    first, second = _gates(), _gates()
    for key, gate in first:
        gate.set_log_alpha(torch.randn(4))
        gate.difference.copy_(torch.rand(4) + int(key.layer))
    state = first.state_dict()
    second.load_state_dict(copy.deepcopy(state))
    for key, gate in first:
        assert torch.equal(second.gates[key].log_alpha, gate.log_alpha)
        assert torch.equal(second.gates[key].difference, gate.difference)
    # What was saved does not move with the gates.
    first.set_plan(HeadPlan(kept={0: []}, total=dict.fromkeys(range(3), 4)))
    assert any(not torch.equal(value, state[name]) for name, value in first.state_dict().items())
    second.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in second.state_dict().items())


@pytest.mark.parametrize("change", ["layer", "heads", "extra"])
def test_a_state_of_other_gates_is_refused(change: str) -> None:
    gates = _gates()
    state = gates.state_dict()
    if change == "layer":
        del state["1.log_alpha"]
    elif change == "heads":
        state["1.log_alpha"] = torch.zeros(5)
    else:
        state["3.log_alpha"] = torch.zeros(4)
    with pytest.raises(InputError, match="do not fit this model"):
        gates.load_state_dict(state)


@pytest.mark.parametrize("lr_scale", [1.0, 10.0])
def test_gates_learn_lr_scale_times_as_fast_under_adam(lr_scale: float) -> None:
    gate = HeadGate(3, GateConfig(lr_scale=lr_scale))
    assert torch.allclose(gate.log_alpha, torch.full((3,), 2.0))
    before = gate.log_alpha.detach()
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-3)
    l0_probability(gate.log_alpha, gate.config).sum().backward()
    optimizer.step()
    assert torch.allclose(before - gate.log_alpha, torch.full((3,), 1e-3 * lr_scale), rtol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("gamma", 0.0),
        ("zeta", 1.0),
        ("lr_scale", 0.0),
        ("epsilon", 0.0),
        ("epsilon", 0.5),
        ("seed", 2**63),
    ],
)
def test_constants_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"gate's {field} must be"):
        GateConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "read",
    [
        lambda gates: gates.plan(),
        lambda gates: gates.plan(sparsity=0.5),
        lambda gates: gates.open_probability(),
        lambda gates: gates.sparsity,
        lambda gates: gates.state_dict(),
    ],
    ids=["plan", "plan of a share", "chances", "sparsity", "state"],
)
def test_gates_without_values_say_so(read: Any) -> None:
    gates = attach(tiny_model().to("meta"))
    with pytest.raises(InputError, match="The gates have no values because their model is on the meta device"):
        read(gates)
