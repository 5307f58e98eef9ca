"""The cut for good: parameters, configuration, failure, and checkpoints that reload anywhere bit for bit."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks._tiny_models import scramble
from benchmarks._tiny_models import tiny_config as stock_config
from deadhead.attaching import attach, detach, gates_of
from deadhead.cutting import cut
from deadhead.errors import CutError, InputError
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import find_layout
from deadhead.layouts.all_attention import AllAttentionLayout, HeadSite
from deadhead.models import AllAttentionForCausalLM
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import UnitPlan
from tests.fresh_process import WAYS, in_a_fresh_process
from tests.random_models import assert_unchanged, difference, gradients, snapshot, tiny_config, tiny_model
from tests.small_runs import assert_same_tensors

# The package exports the function under the module's name.
cutting = importlib.import_module("deadhead.cutting")

# transformers types this for one of its return values only.
load_model: Any = AutoModelForCausalLM.from_pretrained

TOTAL = dict.fromkeys(range(3), 4)
PLAN = HeadPlan(kept={0: [1, 3], 1: [], 2: [2]}, total=TOTAL, output_scale=True)
IDS = torch.randint(29, (2, 13), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_parameters_fall_by_what_each_head_owns(position: str, shared: bool, bias: bool) -> None:
    model = tiny_model(position=position, share_position_bias=shared, projection_bias=bias)
    width, head_dim, persistent = 16, 4, 5
    projections = 3 if position == "rotary" else 4
    each = (projections + 1) * width * head_dim + 2 * persistent * head_dim
    each += projections * head_dim * bias
    each += 2 * head_dim * (position != "rotary" and not shared)
    before = count(model)
    assert cut(model, PLAN) is model
    assert before - count(model) == each * (12 - 3)


def test_a_layer_keeps_the_shapes_of_its_heads_and_its_bias() -> None:
    model = tiny_model(projection_bias=True)
    biases = [layer.attention.o_proj.bias.detach().clone() for layer in model.model.layers]
    dense = copy.deepcopy(model)
    cut(model, PLAN)
    first, second, third = (layer.attention for layer in model.model.layers)
    assert first.heads == (1, 3) and second.heads == () and third.heads == (2,)
    assert first.q_proj.weight.shape == (8, 16) and first.q_proj.out_features == 8
    assert first.o_proj.weight.shape == (16, 8) and first.o_proj.in_features == 8
    assert third.persistent_k.shape == third.persistent_v.shape == (1, 5, 4)
    assert [name for name, _ in second.named_parameters()] == ["o_proj.bias"]
    for layer, bias in zip(model.model.layers, biases, strict=True):
        assert torch.equal(layer.attention.o_proj.bias, bias), "b_O is neither cut nor scaled"
    rows = [4, 5, 6, 7, 12, 13, 14, 15]
    old = dense.model.layers[0].attention
    assert torch.equal(first.q_proj.weight, old.q_proj.weight[rows])
    assert torch.equal(first.k_proj.bias, old.k_proj.bias[rows])
    assert torch.equal(first.content_bias, old.content_bias[[1, 3]])
    # H / kept = 4 / 2: exact in floating point.
    assert torch.equal(first.o_proj.weight, 2 * old.o_proj.weight[:, rows])


def test_without_output_scale_weights_are_copied_bit_for_bit() -> None:
    model = tiny_model()
    dense = copy.deepcopy(model)
    cut(model, HeadPlan(kept={0: [0, 1, 3]}, total=TOTAL))
    rows = [*range(8), *range(12, 16)]
    assert torch.equal(
        model.model.layers[0].attention.o_proj.weight, dense.model.layers[0].attention.o_proj.weight[:, rows]
    )
    for name, value in dense.model.layers[1].state_dict().items():
        assert torch.equal(model.model.layers[1].state_dict()[name], value)


def test_a_plan_that_cuts_nothing_changes_no_number() -> None:
    model = tiny_model()
    before, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    cut(model, HeadPlan.keep_all(TOTAL))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config.head_plan == HeadPlan.keep_all(TOTAL).to_dict()


def test_what_was_frozen_stays_frozen_and_the_mode_stays() -> None:
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name or "persistent_k" in name)
    cut(model, PLAN)
    assert model.training and all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("o_proj" in name or "persistent_k" in name), name
        assert parameter.is_leaf and parameter.grad is None


def test_an_emptied_layer_adds_its_bias_with_dropout_and_nothing_else() -> None:
    model = tiny_model(num_hidden_layers=1, hidden_dropout=0.5)
    cut(model, HeadPlan(kept={0: []}, total={0: 4}))
    layer = model.model.layers[0]
    hidden = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    bias = layer.attention.o_proj.bias
    with torch.no_grad():
        added = layer(hidden, None, None, None)[0] - hidden
        assert difference(added, bias.expand_as(added)) <= 1e-6
        added = layer.train()(hidden, None, None, None)[0] - hidden
    share = (added.abs() < 1e-6).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.05), "in training its dropout stays"
    kept = added.abs() > 1e-6
    assert difference(added[kept], (2 * bias).expand_as(added)[kept]) <= 1e-5
    found = gradients(model, IDS)
    assert found["model.layers.0.attention.o_proj.bias"].abs().max() > 0


def test_the_plan_is_recorded_and_gates_are_gone() -> None:
    model = tiny_model()
    attach(model).set_plan(HeadPlan(kept={0: [0]}, total=TOTAL))
    # Gates that say something else are set to the plan.
    cut(model, PLAN)
    assert gates_of(model) is None and not any("head_gate" in name for name, _ in model.named_modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config.head_plan == PLAN.to_dict()
    assert model.model.config is model.config is model.model.layers[0].attention.config
    assert find_layout(model).recorded_plan(model) == PLAN
    assert find_layout(tiny_model()).recorded_plan(tiny_model()) is None


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (HeadPlan(kept={}, total={0: 4, 1: 4}), "heads a layer"),
        (HeadPlan(kept={}, total=TOTAL, unit="kv_group"), "kv_group"),
    ],
)
@pytest.mark.parametrize("given_gates", [False, True])
def test_a_plan_of_another_model_is_refused_and_nothing_changes(
    plan: HeadPlan, message: str, given_gates: bool
) -> None:
    model = tiny_model()
    if given_gates:
        attach(model).set_plan(PLAN)
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        cut(model, plan)
    assert_unchanged(model, before)
    assert (gates_of(model) is not None) == given_gates


def test_a_head_that_was_cut_cannot_come_back() -> None:
    model = cut(tiny_model(), PLAN)
    before = snapshot(model)
    with pytest.raises(InputError, match="head 0 of layer 0, but that head was cut before"):
        cut(model, HeadPlan(kept={0: [0], 1: [], 2: []}, total=TOTAL))
    assert_unchanged(model, before)


@dataclass
class Failure:
    """A place in the cut where something can go wrong."""

    target: Any
    name: str
    on_call: int


FAILURES = {
    "selections of the last layer": Failure(HeadSite, "selections", 3),
    "after the first layer": Failure(HeadSite, "shrink", 1),
    "after the last layer": Failure(HeadSite, "shrink", 3),
    "recording the plan": Failure(AllAttentionLayout, "record_plan", 1),
    "logits of the gated model": Failure(cutting, "_check_outputs", 1),
    "logits of the cut model": Failure(cutting, "_check_outputs", 2),
}


@pytest.mark.parametrize("given_gates", [False, True])
@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_whatever_fails_the_model_is_as_before(
    failure: Failure, error: BaseException, given_gates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model().train()
    if given_gates:
        gates = attach(model, config=GateConfig(hard=False))
        gates.track_difference()
        gates.gates[UnitKey("head", 0)].set_log_alpha(torch.tensor([-0.3, 0.2, 5.0, -5.0]))
        model(input_ids=IDS)
    model.config.head_plan = None
    before, config = snapshot(model), copy.deepcopy(model.config)
    states = None if not given_gates else gates.state_dict()
    original, calls = getattr(failure.target, failure.name), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == failure.on_call:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(failure.target, failure.name, fail)
        with pytest.raises(type(error)):
            cut(model, PLAN)
    assert len(calls) == failure.on_call
    assert_unchanged(model, before)
    assert model.config == config
    assert model.model.config is model.config is model.model.layers[1].attention.config
    if given_gates:
        assert gates_of(model) is gates and gates.config == GateConfig(hard=False)
        assert states is not None and all(
            torch.equal(value, states[name]) for name, value in gates.state_dict().items()
        )
    else:
        assert gates_of(model) is None
    # And it can still be cut.
    cut(model, PLAN)
    assert model.model.layers[1].attention.heads == ()


def test_a_cut_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected, original = logits(model), HeadSite.shrink

    def spoil(self: Any, heads: tuple[int, ...]) -> None:
        original(self, heads)
        if heads:
            self.module.q_proj.weight.data.mul_(1.1)

    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(HeadSite, "shrink", spoil)
        with pytest.raises(CutError, match=r"differs .* by .*, but at most 1e-05 is allowed; nothing was cut"):
            cut(model, PLAN)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.0001])
def test_what_may_be_rounding_is_judged_in_float64(
    factor: float, memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that makes much of rounding is cut all the same; a fault is as large in float64."""
    model = tiny_model()
    before, expected, original = snapshot(model), logits(model), HeadSite.shrink

    def spoil(self: Any, heads: tuple[int, ...]) -> None:
        original(self, heads)
        if heads:
            self.module.q_proj.weight.data.mul_(factor)

    monkeypatch.setattr(HeadSite, "shrink", spoil)
    # Some processors round both models alike, and nothing would be above any tolerance.
    monkeypatch.setitem(cutting._TOLERANCE, torch.float32, -1)
    if not memory:
        monkeypatch.setattr(cutting, "_SHARE_OF_MEMORY", 0)
    if factor == 1.0 and memory:
        assert {parameter.dtype for parameter in cut(model, PLAN).parameters()} == {torch.float32}
        return
    allowed = "1e-06" if memory else r"-1e\+00"
    with pytest.raises(CutError, match=f"at most {allowed} is allowed; nothing was cut"):
        cut(model, PLAN)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_nan_is_not_taken_for_agreement() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"own outputs are not finite, .*: model.layers.0.norm.weight holds"):
        cut(model, PLAN)
    assert model.model.layers[0].attention.heads == (0, 1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_cut_and_kept(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    cut(model, PLAN)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("factor", "message"), [(1.04, "differs"), (1.0, None)])
def test_in_half_precision_a_cut_is_held_against_float32(
    dtype: torch.dtype, factor: float, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So small a fault is within 5 %, but beyond what rounding does."""
    model = tiny_model(dtype=dtype)
    original = HeadSite.shrink

    def spoil(self: Any, heads: tuple[int, ...]) -> None:
        original(self, heads)
        if heads:
            self.module.o_proj.weight.data.mul_(factor)

    monkeypatch.setattr(HeadSite, "shrink", spoil)
    before, whole = snapshot(model), {name: value.data_ptr() for name, value in model.named_parameters()}
    if message is None:
        cut(model, PLAN)
        assert whole["model.embed_tokens.weight"] == model.get_parameter("model.embed_tokens.weight").data_ptr()
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        return
    with pytest.raises(CutError, match=message):
        cut(model, PLAN)
    assert_unchanged(model, before)
    assert whole == {name: value.data_ptr() for name, value in model.named_parameters()}


def test_where_there_is_no_memory_for_float32_outputs_are_held_against_the_models_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cutting, "_SHARE_OF_MEMORY", 0)
    model = cut(tiny_model(dtype=torch.bfloat16), PLAN)
    assert find_layout(model).recorded_plan(model) == PLAN


def test_the_base_model_can_be_cut() -> None:
    whole, base = tiny_model(seed=2), tiny_model(seed=2).model
    cut(whole, PLAN)
    cut(base, PLAN)
    with torch.no_grad():
        expected = whole.model(input_ids=IDS, use_cache=False).last_hidden_state
        assert torch.equal(base(input_ids=IDS, use_cache=False).last_hidden_state, expected)


def blocks_too(kept: dict[int, list[int]], plan: HeadPlan) -> HeadPlan:
    """Return a plan that says of blocks of 3 which stay, too."""
    return replace(plan, hidden_units=UnitPlan.of_blocks(size=3, kept=kept, total=TOTAL))


# --- what others share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "llama", "gpt2", "bert"])
def test_models_of_one_configuration_are_cut_each_in_its_own_way(kind: str, tmp_path: Path) -> None:
    config = tiny_config() if kind == "own" else stock_config(kind)
    models: list[Any] = [AutoModelForCausalLM.from_config(config).eval() for _ in range(3)]
    for seed, model in enumerate(models):
        # from_config makes copies, which constructors do not.
        for module in model.modules():
            if hasattr(module, "config"):
                module.config = config
        scramble(model, seed)
    # An embedding in common, too.
    for model in models:
        model.set_input_embeddings(models[0].get_input_embeddings())
        model.tie_weights()
    before, kept = copy.deepcopy(config), [logits(model) for model in models]
    weights = {name: value.clone() for name, value in models[2].state_dict().items()}
    heads = attach(models[2]).choices.units
    gates = gates_of(models[2])
    plans = [gates.choices.plan_of({key: units[where:][:1] for key, units in heads.items()}) for where in (0, 1)]
    detach(models[2])
    for model, plan in zip(models, plans, strict=False):
        cut(model, plan)
        assert config.to_dict() == before.to_dict() and type(config) is type(before)
        # A second cut, so that views of one configuration become those of another.
        cut(model, plan)
    assert config.to_dict() == before.to_dict() and models[2].config is config
    assert all(torch.equal(value, weights[name]) for name, value in models[2].state_dict().items())
    assert torch.equal(logits(models[2]), kept[2])
    for place, model in enumerate(models):
        configs = {id(c) for c in (vars(m).get("config") for m in model.modules()) if isinstance(c, type(model.config))}
        assert configs == {id(model.config)}
        model.save_pretrained(tmp_path / str(place))
        again = load_model(tmp_path / str(place))
        assert torch.equal(logits(again), logits(model))
        assert getattr(again.config, "head_plan", None) == (plans[place].to_dict() if place < 2 else None)


# --- checkpoints -----------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[dict[str, Any], HeadPlan | None]] = {
    "dense": ({}, None),
    "cut": ({"projection_bias": True}, PLAN),
    "untied": ({"tie_word_embeddings": False, "lm_head_bias": True, "attend_initial_memory": True}, PLAN),
    "layer 0 empty": ({"position": "sinusoidal"}, HeadPlan(kept={0: []}, total=TOTAL)),
    "all empty": ({}, HeadPlan(kept={0: [], 1: [], 2: []}, total=TOTAL)),
    "shared u and v": ({"share_position_bias": True}, PLAN),
    "rotary": ({"position": "rotary", "final_layer_norm": False}, PLAN),
    "adaptive": ({"adaptive_cutoffs": [9, 17], "adaptive_factor": 2}, PLAN),
    "blocks": ({"num_persistent": 12}, blocks_too({0: [0, 2], 1: [], 2: []}, HeadPlan(kept={1: []}, total=TOTAL))),
    "blocks of a feed-forward layer": (
        {"num_persistent": 4, "feed_forward_size": 12},
        blocks_too({0: [0, 2], 1: [], 2: [3]}, PLAN),
    ),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    expected: dict[str, Tensor] = {}
    for name, (overrides, plan) in VARIANTS.items():
        model = tiny_model(seed=7, **overrides)
        if plan is not None:
            cut(model, plan)
        model.save_pretrained(folder / name)
        with torch.no_grad():
            expected[f"{name}.logits"] = model(input_ids=IDS).logits
        expected[f"{name}.tokens"] = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False)
    torch.save(IDS, folder / "ids.pt")
    return folder, expected


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_reloads_bit_for_bit_in_this_process(name: str, checkpoints: Any) -> None:
    folder, expected = checkpoints
    model, info = load_model(folder / name, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is AllAttentionForCausalLM
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected[f"{name}.logits"])
    plan = VARIANTS[name][1]
    assert model.config.head_plan == (None if plan is None else plan.to_dict())
    base = AutoModel.from_pretrained(folder / name)
    with torch.no_grad():
        states = [m(input_ids=IDS).last_hidden_state for m in (base, model.model)]
    assert torch.equal(*states)


def test_a_reloaded_model_can_be_cut_further(checkpoints: Any) -> None:
    folder, _ = checkpoints
    model = load_model(folder / "cut")
    again = HeadPlan(kept={0: [3], 1: [], 2: []}, total=TOTAL)
    gates = attach(model)
    assert gates.plan().kept == PLAN.kept
    cut(model, again)
    assert model.config.head_plan == again.to_dict()


def test_a_checkpoint_holds_all_it_needs(checkpoints: Any) -> None:
    folder, _ = checkpoints
    for name in VARIANTS:
        files = {path.name for path in (folder / name).iterdir()}
        code = {"modeling.py", "configuration.py", "attention.py", "positions.py", "adaptive.py"}
        assert files >= {"config.json", "model.safetensors", *code}, name
        assert not [file for file in files if file.endswith((".bin", ".pt"))], "safetensors only"
        for file in code:
            source = (folder / name / file).read_text()
            assert "import deadhead" not in source and "from deadhead" not in source, file
        config = AutoConfig.from_pretrained(folder / name)
        assert set(config.auto_map) >= {"AutoConfig", "AutoModelForCausalLM"}
        assert load_file(folder / name / "model.safetensors").keys() <= tiny_names(name)


def tiny_names(name: str) -> set[str]:
    overrides, plan = VARIANTS[name]
    model = tiny_model(**overrides)
    return set((model if plan is None else cut(model, plan)).state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_checkpoints_reload_in_a_fresh_process_bit_for_bit(how: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, expected = checkpoints
    assert_same_tensors(in_a_fresh_process(folder, how, tmp_path), expected)
