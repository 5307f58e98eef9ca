"""Attach and detach: nothing of them stays; output differences against brute force; what is refused."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from benchmarks._tiny_models import tiny_model as stock_model
from deadhead.attaching import attach, attach_for, detach, gates_of
from deadhead.criteria.scoring import score_heads
from deadhead.cutting import cut
from deadhead.errors import InputError, UnsupportedModel
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.penalty import SparsityTarget, l0_loss, penalty_gradient
from deadhead.layouts import find_layout
from deadhead.models import AllAttentionForCausalLM
from deadhead.models.all_attention import layer as layer_module
from deadhead.models.all_attention.blocked import blocked_attention
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import UnitPlan
from tests.models.test_transformer_xl import tiny as tiny_transformer_xl
from tests.random_models import assert_unchanged, difference, snapshot, tiny_model

IDS = torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(1))
TOTAL = dict.fromkeys(range(3), 4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_open_gates_change_nothing_at_all() -> None:
    model = tiny_model()
    before = logits(model)
    attach(model)
    assert torch.equal(logits(model), before)


def test_detach_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    model.get_parameter("model.layers.1.attention.q_proj.weight").requires_grad_(False)
    before, expected, names = snapshot(model), logits(model), [name for name, _ in model.named_modules()]
    gates = attach(model)
    assert gates_of(model) is gates
    gates.track_difference()
    gates.set_plan(HeadPlan(kept={0: [], 1: [2]}, total=TOTAL))
    assert difference(logits(model), expected) > 1e-2
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    model.zero_grad(set_to_none=True)
    assert detach(model.eval()) is model
    assert gates_of(model) is None
    assert_unchanged(model, before)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), expected)
    assert detach(model) is model, "detaching twice must be harmless"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.Sequential,
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
        lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")),
    ],
    ids=["Sequential", "DataParallel", "compiled", "PEFT"],
)
def test_gates_are_found_and_taken_off_in_a_wrapper(wrap: Any) -> None:
    model = stock_model("llama")
    gates = attach(model)
    wrapped = wrap(model)
    assert gates_of(wrapped) is gates
    assert detach(wrapped) is wrapped
    assert gates_of(model) is None and gates_of(wrapped) is None
    attach(model)


def test_detach_does_nothing_to_what_never_had_gates() -> None:
    model = nn.Linear(2, 2)
    assert detach(model) is model
    for wrong in (5, None, "model"):
        with pytest.raises(InputError, match=f"detach takes model as Module, but got {wrong!r}"):
            detach(wrong)  # type: ignore[type-var]


def test_gates_are_parameters_of_the_model_outside_weight_decay() -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    gates = attach(model)
    names = [name for name, parameter in model.named_parameters() if "head_gate" in name]
    assert len(names) == 3 == len(gates.gates)
    trained = {id(parameter) for parameter in model.parameters()}
    assert all(id(gate.log_alpha_bias) in trained and gate.log_alpha_bias.requires_grad for _, gate in gates)
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    decayed = Trainer(model=model, args=arguments).get_decay_parameter_names(model)
    assert "model.layers.0.attention.q_proj.weight" in decayed
    assert not set(decayed) & set(names)


def test_attaching_twice_is_refused_and_keeps_the_first() -> None:
    model = tiny_model()
    gates = attach(model)
    before = snapshot(model)
    with pytest.raises(InputError, match="has gates already"):
        attach(model)
    assert gates_of(model) is gates
    assert_unchanged(model, before)


def test_another_unit_is_refused_and_changes_nothing() -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(InputError, match="open and close head, but the unit 'kv_group'"):
        attach(model, unit="kv_group")
    assert gates_of(model) is None
    assert_unchanged(model, before)
    assert attach(model, unit="head").unit == "head"


def test_a_model_without_a_layout_is_refused_in_one_sentence() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1))
    before = snapshot(model)
    for change in (attach, lambda m: cut(m, HeadPlan.keep_all({0: 2}))):
        with pytest.raises(UnsupportedModel, match="'mamba'") as caught:
            change(model)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        assert isinstance(caught.value, InputError)
    assert_unchanged(model, before)


@pytest.mark.parametrize("training", [True, False])
def test_gates_take_over_the_models_mode(training: bool) -> None:
    model = tiny_model().train(training)
    assert all(gate.training == training for _, gate in attach(model))


def test_the_base_model_can_be_gated_too() -> None:
    model = tiny_model()
    expected = logits(model)
    attach(model.model).set_plan(HeadPlan(kept={0: [1]}, total=TOTAL))
    assert difference(logits(model), expected) > 1e-2
    detach(model.model)
    assert torch.equal(logits(model), expected)


def test_layers_without_heads_get_no_gate() -> None:
    model = tiny_model()
    cut(model, HeadPlan(kept={1: []}, total=TOTAL))
    assert [site.layer for site in find_layout(model).sites(model, "head") if site.units] == [0, 2]
    gates = attach(model)
    assert [key.layer for key in gates.gates] == [0, 2] and len(gates) == 8
    assert not any(isinstance(module, HeadGate) for module in model.model.layers[1].modules())


def test_a_model_without_any_head_left_still_answers_every_question() -> None:
    model = tiny_model()
    plan = HeadPlan(kept={0: [], 1: [], 2: []}, total=TOTAL)
    cut(model, plan)
    gates = attach(model)
    assert len(gates) == 0 and gates.sparsity in (0.0, 1.0) and gates.plan() == plan
    assert gates.plan(sparsity=0.5) == plan
    assert float(gates.l0()) == 0.0 == float(l0_loss(gates, "output_difference"))
    assert penalty_gradient(gates, 1.0) == []
    assert score_heads(detach(model), "taylor").plan(0.5) == plan
    for exact in (False, True):
        target = SparsityTarget(0.5, ramp_steps=1, exact=exact)
        target.prepare(gates, 0)
        target.project(gates, 1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    cut(model.eval(), plan)
    assert logits(model).isfinite().all()


class Probe:
    """Remembers the input of a layer's output projection, as it is before the gates."""

    def __init__(self, model: AllAttentionForCausalLM) -> None:
        self.inputs: list[Tensor] = []
        for layer in model.model.layers:
            # Hooks run in the order in which they were added, and this one comes before the gates.
            layer.attention.o_proj.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs.append(args[0].detach().clone())


def brute_force(weight_DI: Tensor, heads_BTI: Tensor, is_open_H: Tensor) -> Tensor:
    """Return d_h: run the output projection of all open heads, and with each head taken out or put in."""
    num_heads = len(is_open_H)
    heads_BTHE = heads_BTI.unflatten(-1, (num_heads, -1)).double()
    weight_DI = weight_DI.double()

    def output(mask_H: Tensor) -> Tensor:
        return (heads_BTHE * mask_H.double()[:, None]).flatten(-2) @ weight_DI.T

    found = []
    for head in range(num_heads):
        with_head, without_head = is_open_H.clone(), is_open_H.clone()
        with_head[head], without_head[head] = True, False
        found.append((output(with_head) - output(without_head)).norm() / output(is_open_H).norm())
    return torch.stack(found)


@pytest.mark.parametrize("output_scale", [False, True])
def test_output_differences_are_those_of_brute_force(output_scale: bool) -> None:
    model = tiny_model(seed=6).train()
    probe = Probe(model)
    gates = attach(model, config=GateConfig(output_scale=output_scale))
    gates.track_difference()
    for _, gate in gates:
        gate.set_log_alpha(torch.tensor([0.4, 0.0, -0.4, 9.0]))
    expected: dict[Any, Tensor] = {}
    some_closed = 0
    for step in range(0, 30, 5):
        gates.begin_step(step)
        probe.inputs.clear()
        before = gates.difference()
        model(input_ids=torch.roll(IDS, step, dims=1))
        if step % 10:
            assert all(torch.equal(values, before[key]) for key, values in gates.difference().items())
            continue
        for ((_, layer), gate), heads in zip(gates, probe.inputs, strict=True):
            is_open = gate()[0] > 0
            some_closed += int((~is_open).sum())
            weight = model.model.layers[layer].attention.o_proj.weight.detach()
            now = brute_force(weight, heads, is_open)
            expected[layer] = now if step == 0 else expected[layer].lerp(now, 0.4)
            assert difference(gate.difference, expected[layer]) <= 1e-5, (step, layer)
    assert some_closed > 3, "closed heads count as what they would add"
    assert all(torch.equal(gates.difference()[key], gate.difference) for key, gate in gates)


def test_output_differences_are_only_measured_on_request_and_in_training() -> None:
    model = tiny_model()
    gates = attach(model)
    model.train()(input_ids=IDS)
    assert not any(values.any() for values in gates.difference().values())
    gates.track_difference()
    gates.begin_step(0)
    logits(model.eval())
    assert not any(values.any() for values in gates.difference().values())
    model.train()(input_ids=IDS)
    measured = gates.difference()
    assert all(bool((values > 0).all()) for values in measured.values())
    gates.track_difference(False)
    gates.begin_step(10)
    model(input_ids=torch.roll(IDS, 3, dims=1))
    assert all(torch.equal(values, measured[key]) for key, values in gates.difference().items())


def test_a_layer_whose_draw_is_all_closed_stays_finite() -> None:
    model = tiny_model().train()
    gates = attach(model, config=GateConfig(output_scale=True))
    gates.track_difference()
    gates.gates[UnitKey("head", 1)].set_log_alpha(torch.full((4,), -20.0))
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert all(values.isfinite().all() for values in gates.difference().values())
    assert not gates.gates[UnitKey("head", 1)]()[0].any()


def test_a_closed_head_passes_no_gradient_but_its_gate_still_learns() -> None:
    model = tiny_model().train()
    gates = attach(model)
    gate = gates.gates[UnitKey("head", 0)]
    gate.set_log_alpha(torch.tensor([-0.4, 0.5, 0.5, 0.5]))
    gates.begin_step(0)
    noise = torch.full((4,), 0.5)
    gates.draw = lambda: [each.noise.copy_(noise) for _, each in gates]  # type: ignore[assignment,method-assign]
    model(input_ids=IDS, labels=IDS).loss.backward()
    attention = model.model.layers[0].attention
    assert gate()[0].tolist() == [0.0, 1.0, 1.0, 1.0]
    assert not attention.q_proj.weight.grad[:4].any() and attention.q_proj.weight.grad[4:].any()
    assert not attention.o_proj.weight.grad[:, :4].any()
    assert gate.log_alpha_bias.grad is not None and gate.log_alpha_bias.grad[0] != 0


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("share_position_bias", [False, True])
@pytest.mark.parametrize("log_alpha", [[-9.0, 9.0, -9.0, 0.1], [-9.0] * 4, [9.0] * 4])
def test_heads_that_a_draw_leaves_out_need_not_be_computed(
    log_alpha: list[float], share_position_bias: bool, position: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the loss nor any gradient changes; the first head is computed where no other is."""
    computed: list[int] = []

    def counted(operands: Any) -> Tensor:
        computed.append(operands.q_BHTE.shape[1])
        return blocked_attention(operands)

    monkeypatch.setattr(layer_module, "blocked_attention", counted)
    found = []
    for skips in (True, False):
        model = tiny_model(seed=3, position=position, share_position_bias=share_position_bias).train()
        gates = attach(model, config=GateConfig(output_scale=True))
        for _, gate in gates:
            gate.set_log_alpha(torch.tensor(log_alpha))
        gates.begin_step(3)
        if not skips:
            monkeypatch.setattr(HeadGate, "idle", ())
        computed.clear()
        output = model(input_ids=IDS, labels=IDS, use_cache=False)
        output.loss.backward()
        found.append((output.logits, {name: value.grad for name, value in model.named_parameters()}, list(computed)))
    (logits_1, gradients_1, heads_1), (logits_2, gradients_2, heads_2) = found
    assert difference(logits_1, logits_2) <= 1e-6
    for name, gradient in gradients_2.items():
        assert gradient is not None, name
        assert gradients_1[name] is not None, "data parallelism waits for every gradient"
        assert float((gradients_1[name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), name
    assert heads_2 == [4] * 3
    always = max(1, sum(value > 5 for value in log_alpha))
    ever = max(1, sum(value > -5 for value in log_alpha))
    assert all(always <= count <= ever for count in heads_1)


def test_attention_weights_in_training_are_those_of_every_head() -> None:
    model = tiny_model().train()
    gates = attach(model)
    for _, gate in gates:
        gate.set_log_alpha(torch.tensor([-9.0, 9.0, -9.0, 9.0]))
    weights = model(input_ids=IDS, output_attentions=True, use_cache=False).attentions
    for layer in weights:
        assert torch.allclose(layer.sum(-1), torch.ones(()))


@pytest.mark.parametrize("log_alpha", [-9.0, 9.0])
def test_a_gated_layer_compiles_in_one_piece_in_training(log_alpha: float) -> None:
    model = tiny_model().train()
    gates = attach(model)
    for _, gate in gates:
        gate.set_log_alpha(torch.tensor([log_alpha, 9.0, 9.0, 9.0]))
    gates.begin_step(1)
    gates.draw()
    layer, hidden = model.model.layers[0], torch.randn(2, 5, 16)
    arguments = (hidden, None, model.model.position_table, None)
    expected, _ = layer(*arguments)
    found, _ = torch.compile(layer, backend="eager", fullgraph=True)(*arguments)
    assert difference(found, expected) <= 1e-5


# --- compiled models -------------------------------------------------------------------------------------------------


def _in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _its_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def _around(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def _in_a_function(model: Any) -> Any:
    return torch.compile(lambda **inputs: model(**inputs), backend="eager")


_LLAMA = partial(stock_model, "llama")


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (_LLAMA, _its_layers),
        (tiny_model, _in_a_function),
        *(pytest.param(_LLAMA, way, marks=pytest.mark.slow) for way in (_in_place, _around, _in_a_function)),
        *(pytest.param(tiny_model, way, marks=pytest.mark.slow) for way in (_in_place, _around, _its_layers)),
    ],
)
def test_gates_take_effect_on_a_model_that_was_compiled_before(make: Any, compiled: Any) -> None:
    model, plain = make(), make()
    run = compiled(model)

    def outputs() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return tuple(m(input_ids=IDS, use_cache=False).logits for m in (run, plain))  # type: ignore[return-value]

    dense, _ = outputs()
    heads = attach(plain).choices.units
    gates = attach(model)
    outputs()
    for keep in (lambda units: units[1:], lambda units: units[:1]):
        plan = gates.choices.plan_of({key: keep(units) for key, units in heads.items()})
        for each in (gates, gates_of(plain)):
            each.set_plan(plan)
        found, expected = outputs()
        assert difference(found, expected) <= 1e-5 < difference(found, dense)
    assert difference(logits(detach(model)), dense) <= 1e-5 and difference(outputs()[0], dense) <= 1e-5
    cut(model, plan)
    assert difference(outputs()[0], expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["LoRA", "IA3", "prompt tuning", "DataParallel"])
def test_gates_come_off_through_a_wrapper(kind: str) -> None:
    model = stock_model("llama")
    attach(model)
    configs: dict[str, peft.PeftConfig] = {
        "LoRA": peft.LoraConfig(target_modules=["q_proj"]),
        "IA3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    wrapped: Any = peft.get_peft_model(model, configs[kind]) if kind in configs else nn.DataParallel(model)
    assert detach(wrapped) is wrapped
    assert gates_of(model) is None
    assert not any(isinstance(module, HeadGate) for module in model.modules())


def test_a_plan_of_wide_layers_is_attached_in_no_time() -> None:
    """In seconds, where the square of the width would take minutes."""
    width = 40_000
    model = tiny_transformer_xl(feed_forward_size=width, num_hidden_layers=1)
    heads = model.config.num_attention_heads
    units = UnitPlan(kept={0: range(0, width, 2)}, total={0: width})
    plan = HeadPlan(kept={}, total={0: heads}, hidden_units=units)
    began = time.process_time()
    gates = attach_for(model, plan)
    assert time.process_time() - began < 5
    assert gates.plan() == plan and gates.choices.counts[UnitKey("block", 0)] == 2


def test_a_plan_of_hidden_units_for_a_model_that_has_none() -> None:
    plan = HeadPlan(kept={}, total=TOTAL, hidden_units=UnitPlan(kept={}, total={0: 5}))
    with pytest.raises(UnsupportedModel, match="neither feed-forward layers nor persistent vectors"):
        cut(tiny_model(num_persistent=0), plan)
