"""Gates on blocks of persistent vectors in training: draws, what is left out, cuts on the way, kills."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deadhead
from deadhead.attaching import attach
from deadhead.cutting import cut
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.models.all_attention import layer as layer_module
from deadhead.models.all_attention.blocked import blocked_attention
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import UnitPlan
from deadhead.training import PhaseRun, PruneRecipe, train
from deadhead.training.phases.choosing import gate_config
from tests.random_models import difference, tiny_model
from tests.small_runs import KillAt, Killed, assert_same_tensors, metrics, stream

IDS = torch.randint(29, (3, 14), generator=torch.Generator().manual_seed(0))
TOTAL = dict.fromkeys(range(3), 4)


def gated(log_alpha: list[float], heads: list[float] | None = None, **values: Any) -> tuple[Any, HeadGates]:
    """Return a model that trains with gates on four heads, and four blocks of three vectors, a layer."""
    model = tiny_model(**{"seed": 3, "num_persistent": 12, **values}).train()
    gates = attach(model, blocks=3, config=GateConfig(output_scale=True))
    for key, gate in gates:
        gate.set_log_alpha(torch.tensor(log_alpha if key.kind == "block" else heads or [0.3, -0.3, 9.0, 0.1]))
    gates.begin_step(3)
    return model, gates


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and every parameter's gradient after one forward and backward pass."""
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), "data parallelism waits for every gradient"
    return output.logits, gradients


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert difference(found[0], expected[0]) <= 1e-5
    for name, gradient in expected[1].items():
        largest = max(1e-2, float(gradient.abs().max()))
        assert float((found[1][name] - gradient).abs().max()) <= 1e-5 * largest, name


UNDECIDED = pytest.mark.parametrize(
    "log_alpha", [[0.2, -0.2, 0.0, 0.1], [-0.7, 9.0, -9.0, 0.4], [-9.0] * 4, [9.0] * 4], ids=str
)


@pytest.mark.parametrize("position", ["learned", "rotary"])
@UNDECIDED
def test_a_step_is_that_of_the_plain_formula(log_alpha: list[float], position: str) -> None:
    """With the eager implementation z multiplies every exponential, and autograd does the rest."""
    found, expected = (
        step(gated(log_alpha, position=position, attn_implementation=implementation)[0])
        for implementation in ("sdpa", "eager")
    )
    assert_same(found, expected)
    gradients = torch.cat([value for name, value in expected[1].items() if "block_gate" in name])
    assert bool(gradients.any()) == (min(map(abs, log_alpha)) < 5), "gates that have settled do not learn"


def test_a_shut_gate_learns_what_its_block_would_do() -> None:
    """Its gradient, as that of a block that is open, is the slope of the loss by z."""
    model, gates = gated([0.3, -0.3, 0.1, -0.1], heads=[20.0] * 4, dtype=torch.float64, num_hidden_layers=1)
    gates.draw()
    gate = gates.gates[UnitKey("block", 0)]
    z_J = gate()[0].detach()
    assert 0 < int(z_J.sum()) < 4
    attention = model.model.layers[0].attention

    class ByHand(torch.nn.Module):
        idle = ()
        owner = torch.arange(4).repeat_interleave(3)

        def forward(self) -> tuple[Tensor, None]:
            return values_J, None

    attention.block_gate = ByHand()

    def loss(implementation: str) -> Tensor:
        model.set_attn_implementation(implementation)
        found: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        return found

    values_J = z_J.double().requires_grad_()
    (slopes_J,) = torch.autograd.grad(loss("sdpa"), values_J)
    for place in range(4):
        ends = []
        for sign in (1, -1):
            values_J = z_J.double() + sign * 1e-3 * (torch.arange(4) == place)
            with torch.no_grad():
                ends.append(loss("eager"))
        # The language-modelling loss is float32.
        assert float(slopes_J[place]) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=2e-2, abs=2e-4)


@UNDECIDED
def test_blocks_and_heads_that_a_draw_leaves_out_need_not_be_computed(
    log_alpha: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, int]] = []

    def counted(operands: Any) -> Tensor:
        computed.append((operands.q_BHTE.shape[1], operands.persistent_k_HNE.shape[1]))
        return blocked_attention(operands)

    monkeypatch.setattr(layer_module, "blocked_attention", counted)
    found = step(gated(log_alpha, heads=[-9.0, 9.0, -9.0, 9.0])[0])
    few = list(computed)
    computed.clear()
    monkeypatch.setattr(HeadGate, "idle", ())
    expected = step(gated(log_alpha, heads=[-9.0, 9.0, -9.0, 9.0])[0])
    assert_same(found, expected)
    assert computed == [(4, 12)] * 3
    least, most = (3 * sum(value > bound for value in log_alpha) for bound in (5, -5))
    assert all(heads == 2 and least <= vectors <= most for heads, vectors in few)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(attention_dropout: float, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, gates = gated([0.2, -0.2, 0.0, 0.1], attention_dropout=attention_dropout)
        gates.track_difference()
        gates.begin_step(10)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        found.append(step(model))
        assert not any(gate.difference.any() for key, gate in gates if key.kind == "block")
        assert all(gate.difference.any() for key, gate in gates if key.kind == "head")
    assert_same(found[1], found[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gates_that_have_settled_train_like_the_cut_model(implementation: str) -> None:
    units = UnitPlan.of_blocks(size=3, kept={0: [0, 3], 1: [], 2: [1]}, total=TOTAL)
    plan = HeadPlan(kept={0: [1, 2], 1: [0, 1, 3]}, total=TOTAL, hidden_units=units, output_scale=True)
    model, gates = gated([0.0] * 4, attn_implementation=implementation)
    gates.set_plan(plan)
    small = cut(copy.deepcopy(model).eval(), plan).train()
    for _, gate in gates:
        gate.set_log_alpha(gate.log_alpha * 10)
    (found, _), (expected, _) = step(small), step(model)
    assert difference(found, expected) <= 1e-5


def test_half_precision_leaves_gates_and_their_gradients_in_full() -> None:
    for log_alpha in ([0.2, -0.2, 0.0, 0.1], [9.0] * 4):
        found = []
        for enabled in (True, False):
            model, gates = gated(log_alpha)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                _, gradients = step(model)
            assert all(gate.log_alpha_bias.dtype == torch.float32 for _, gate in gates)
            found.append(torch.cat([value for name, value in gradients.items() if "block_gate" in name]))
        assert difference(found[0], found[1]) < 0.1


@pytest.mark.parametrize("training", [True, False])
def test_a_gated_layer_compiles_in_one_piece(training: bool) -> None:
    model, gates = gated([0.2, -9.0, 0.0, 9.0])
    gates.draw()
    model.train(training)
    layer, hidden = model.model.layers[0], torch.randn(2, 5, 16)
    arguments = (hidden, None, model.model.position_table, None)
    expected, _ = layer(*arguments)
    found, _ = torch.compile(layer, backend="eager", fullgraph=True)(*arguments)
    assert difference(found, expected) <= 1e-5


def _begun() -> tuple[Any, HeadGates, PruneRecipe]:
    settings: dict[str, Any] = {"steps": 12, "batch_size": 2, "learning_rate": 3e-3, "log_every": 1, "save_every": 3}
    recipe = PruneRecipe(**settings, l0=0.05, blocks=True, block_size=3)
    model = tiny_model(num_persistent=12, hidden_dropout=0.1, attention_dropout=0.1)
    gates = attach(model, config=gate_config(recipe, model, seed=4), blocks=3)
    for key, gate in gates:
        gate.set_log_alpha(torch.tensor([6.0, -20.0, 6.0, -20.0] if key.kind == "block" else [6.0, 6.0, -20.0, 6.0]))
    return model, gates, recipe


@pytest.mark.parametrize("killed", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_run_with_gates_on_blocks_goes_on_to_the_same_bits_after_a_kill(killed: int, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    model, gates, recipe = _begun()
    text = stream(300)
    train(
        model,
        text,
        recipe,
        PhaseRun(gates=gates, seed=7, folder=whole, metrics=whole / "metrics.jsonl"),
    )
    begun, begun_gates, _ = _begun()
    settings: dict[str, Any] = {"seed": 7, "folder": stopped, "metrics": stopped / "metrics.jsonl"}
    with pytest.raises(Killed):
        train(begun, text, recipe, PhaseRun(gates=begun_gates, callbacks=[KillAt(killed)], **settings))
    resumed, resumed_gates, _ = _begun()
    train(resumed, text, recipe, PhaseRun(gates=resumed_gates, resume=True, **settings))
    assert_same_tensors(model.state_dict(), resumed.state_dict())
    assert metrics(whole) == metrics(stopped)
    plan = gates.plan()
    assert resumed_gates.plan() == plan
    expected = model.eval()(input_ids=IDS, use_cache=False).logits
    deadhead.save(resumed, tmp_path / "gated")
    loaded, _ = deadhead.load_gated(tmp_path / "gated")
    assert torch.equal(loaded(input_ids=IDS, use_cache=False).logits, expected)
    assert difference(deadhead.cut(model, plan)(input_ids=IDS, use_cache=False).logits, expected) <= 1e-5
