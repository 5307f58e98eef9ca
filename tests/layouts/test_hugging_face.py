"""Transformers' own models: closed gates ≡ cut, on random plans, texts, units and precisions of each kind of attention.

Run as a program it prints the largest differences over as many random cases of every architecture as asked for:

    PYTHONPATH=src python -m tests.layouts.test_hugging_face 20
"""

from __future__ import annotations

import copy
import os
import random
import statistics
import sys
import warnings
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from benchmarks._tiny_models import VOCABULARY, scramble, tiny_config, tiny_model
from deadhead.attaching import attach, detach, gates_of
from deadhead.cutting import cut
from deadhead.errors import CutError, InputError, RunWarning, UnsupportedModel
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import find_layout
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.models.pruned import feed_forward, shrinking
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.training.phases.learning import checkpoint_activations
from tests.random_models import (
    assert_unchanged,
    cached_logits,
    chunks,
    difference,
    gradients,
    random_blocks,
    random_units,
    snapshot,
)

# One of each kind: separate projections with groups, biases, norms and sinks; fused ones in every order; one key/value
# head; Conv1D; the output projection in another module; latent attention; sliding windows; a hybrid.
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "mistral", "opt", "gpt2", "gpt_neox", "phi3", "falcon"),
    *("gpt_bigcode", "bert", "deepseek_v3", "jamba"),
)
# torch's grouped product of experts takes no float64.
_FLOAT32_ONLY = ("gpt_oss", "deepseek_v3", "jamba")
CASES = int(os.environ.get("DEADHEAD_CASES", "40")) // 20
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-6}
VISIBLE = 1e-2


def _unpadded(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask.bool()]


def invariant_case(model_type: str, seed: int) -> dict[str, float]:
    """Build a random case of an architecture and return its differences; see `tests.test_invariant`."""
    draw = random.Random(f"{model_type} {seed}")
    dtype = draw.choice([torch.float32, torch.float64])
    if model_type in _FLOAT32_ONLY:
        dtype = torch.float32
    model: Any = tiny_model(model_type, seed=seed, dtype=dtype)
    unit = draw.choice(HuggingFaceLayout().units(model))
    gated = copy.deepcopy(model)
    hidden = {site.layer: site.units for site in HuggingFaceLayout().hidden_sites(model)}
    blocks: Any = draw.choice([False, True, 4, "any"]) if hidden else False
    if blocks == "any":
        some = {layer: draw.sample(units, draw.randint(0, len(units))) for layer, units in hidden.items()}
        blocks = random_blocks(draw, hidden, some)
    gates = attach(gated, unit=unit, blocks=blocks)
    plan = random_units(draw, gates, output_scale=draw.random() < 0.3)
    gates.set_plan(plan)
    assert gates.plan() == plan
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*key/value cache grows")
        small: Any = cut(copy.deepcopy(gated if draw.random() < 0.5 else model), plan)

    batch, length = draw.randint(1, 3), draw.randint(3, 24)
    ids = torch.tensor([[draw.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(batch)])
    mask = torch.ones_like(ids)
    sizes = chunks(draw, length)
    precision = str(dtype).removeprefix("torch.")
    found: dict[str, float] = {}
    with torch.no_grad():
        whole = gated(input_ids=ids).logits
        found["visible"] = difference(model(input_ids=ids).logits, whole)
        found[f"logits whole {precision}"] = difference(small(input_ids=ids).logits, whole)
        if model_type != "jamba":  # its recurrent layers read one token at a time once there is a cache
            found[f"logits cached {precision}"] = difference(
                cached_logits(small, ids, sizes), cached_logits(gated, ids, sizes)
            )
        for row in range(batch):
            mask[row, : draw.randint(0, length - 2)] = 0
        # Eager attention takes the softmax in float32, in which the mask's number, float64's least, is -inf.
        if dtype == torch.float64 and model.config._attn_implementation == "eager":
            mask.fill_(1)
        padded = [_unpadded(m(input_ids=ids, attention_mask=mask).logits, mask) for m in (small, gated)]
        found[f"logits padded {precision}"] = difference(*padded)
    found[f"gradients {precision}"] = _gradient_difference(gated, small, plan, ids)

    if sum(plan.heads) and draw.random() < 0.5:
        again = copy.deepcopy(small)
        gates = attach(again, blocks=bool(blocks) and draw.random() < 0.5)
        second = random_units(draw, gates, output_scale=False)
        gates.set_plan(second)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*key/value cache grows")
            expected = again(input_ids=ids).logits
            found[f"logits second cut {precision}"] = difference(cut(small, second)(input_ids=ids).logits, expected)
    return found


def _gradient_difference(gated: Any, small: Any, plan: HeadPlan, ids: Tensor) -> float:
    """Return the largest relative difference of gradients, the fold undone and copies of a key/value head summed."""
    reference, found = gradients(gated, ids), gradients(small, ids)
    floor = 1e-2 * max(float(gradient.abs().max()) for gradient in reference.values())
    names = {id(module): name for name, module in gated.named_modules()}
    layout = find_layout(gated)
    rows: dict[str, tuple[int, Tensor]] = {}
    for site in layout.all_sites(gated, plan.unit, hidden=plan.hidden_units is not None):
        kept = plan.units[site.key]
        for part in site.selections(kept):
            name = f"{names[id(site.module)]}.{part.path}"
            rows[name] = (part.dim, part.index)
            scaled = part.path == f"{site.output_path}.weight" and plan.output_scale and not site.is_hidden
            if scaled and kept and name in found:
                found[name] = found[name] * site.total / len(kept)
    largest = 0.0
    for name, expected in reference.items():
        if name not in found:
            assert name in rows or "norm" in name or expected.abs().max() <= floor, name
            continue
        gradient = found[name]
        if name in rows:
            dim, index = rows[name]
            gradient = torch.zeros_like(expected).index_add(dim, index, gradient)
        assert gradient.shape == expected.shape, name
        largest = max(largest, float((gradient - expected).abs().max()) / max(float(expected.abs().max()), floor))
    return largest


@pytest.mark.parametrize("seed", range(CASES))
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_closed_gates_equal_cut(model_type: str, seed: int) -> None:
    found = invariant_case(model_type, seed)
    assert found.pop("visible") > VISIBLE
    for kind, value in found.items():
        assert value <= ALLOWED[getattr(torch, kind.rsplit(" ", 1)[1])], (kind, value)


@pytest.mark.full
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_closed_gates_equal_cut_in_many_cases(model_type: str) -> None:
    for seed in range(1000, 1020):
        test_closed_gates_equal_cut(model_type, seed)


_FEED_FORWARDS = [
    ("llama", ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]),
    ("phi3", ["gate_up_proj.weight", "down_proj.weight"]),
    ("gpt2", ["c_fc.weight", "c_fc.bias", "c_proj.weight"]),
    ("bert", ["intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"]),
    ("opt", ["fc1.weight", "fc1.bias", "fc2.weight"]),
]


@pytest.mark.parametrize(("model_type", "name"), [(kind, name) for kind, names in _FEED_FORWARDS for name in names])
def test_a_feed_forward_tensor_whose_blocks_are_shifted_is_found_out_and_nothing_changes(
    model_type: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model(model_type, seed=3)
    before = snapshot(model)
    gates = attach(model, blocks=8)
    detach(model)
    every = {key: range(count) for key, count in gates.choices.counts.items()}
    plan = gates.choices.plan({key: found[::2] if key.kind == "block" else found for key, found in every.items()})
    original = feed_forward.rows_of_units

    def shifted(layer: Any, path: str, units: Tensor) -> Tensor:
        rows = original(layer, path, units)
        return (rows + 8) % (layer.width * layer.copies) if path == name else rows

    monkeypatch.setattr(feed_forward, "rows_of_units", shifted)
    with pytest.raises(CutError):
        cut(model, plan)
    assert_unchanged(model, before)
    monkeypatch.setattr(feed_forward, "rows_of_units", original)
    assert cut(model, plan).config.head_plan == plan.to_dict()


def _plan(model: Any, seed: int = 0, unit: Unit | None = None) -> HeadPlan:
    """Return a plan that empties the first layer, keeps the last, and cuts about half of the others."""
    gates = attach(model, unit=unit)
    detach(model)
    draw = random.Random(seed)
    kept = {key: tuple(draw.sample(heads, len(heads) // 2)) for key, heads in gates.choices.units.items()}
    first, *_, last = kept
    return gates.choices.plan_of({**kept, first: (), last: gates.choices.units[last]})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gpt_oss", "deepseek_v3", "bert"])
def test_bfloat16_cut_is_as_near_to_float32_as_the_gated_model(model_type: str) -> None:
    gated_errors, cut_errors = [], []
    for seed in range(4):
        half: Any = tiny_model(model_type, seed=seed, dtype=torch.bfloat16)
        reference = copy.deepcopy(half).float()
        gates = attach(reference)
        plan = random_units(random.Random(seed), gates, output_scale=False)
        gates.set_plan(plan)
        attach(half).set_plan(plan)
        ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            models = (reference, half, cut(copy.deepcopy(half), plan))
            expected, gated, small = (m(input_ids=ids).logits.float() for m in models)
        scale = expected.square().mean().sqrt()
        gated_errors.append(float((gated - expected).square().mean().sqrt() / scale))
        cut_errors.append(float((small - expected).square().mean().sqrt() / scale))
    assert max(gated_errors) > 1e-4, "the reference must be more precise than bfloat16"
    assert statistics.mean(cut_errors) <= 1.5 * statistics.mean(gated_errors)


def _all_parts() -> list[tuple[str, str]]:
    found = []
    for model_type in ARCHITECTURES:
        model = tiny_model(model_type)
        layout = HuggingFaceLayout()
        site = layout.sites(model, layout.units(model)[0])[-1]
        found += [(model_type, part.path) for part in site.selections(site.units)]
    # Without rotary positions a key's bias adds the same to all scores of a query, and the softmax takes it away.
    return [pair for pair in found if pair not in (("opt", "k_proj.bias"), ("bert", "self.key.bias"))]


@pytest.mark.parametrize(("model_type", "path"), _all_parts())
def test_a_tensor_whose_rows_are_shifted_is_found_out_and_nothing_changes(
    model_type: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model(model_type, seed=3)
    layout = HuggingFaceLayout()
    unit = layout.units(model)[0]
    sites = layout.sites(model, unit)
    plan = HeadPlan(
        kept={site.layer: site.units[: len(site.units) // 2] for site in sites},
        total={site.layer: site.total for site in sites},
        unit=unit,
    )
    site: Any = sites[-1]
    each = {part.path: part for part in site.attention.parts}[path]
    size = site.module.get_parameter(path).shape[each.dim]
    heads = len(shrinking.head_order(each.order, site.attention.num_heads, site.attention.num_kv_heads))
    original = shrinking.rows_of
    ids = torch.arange(3, 23).view(2, 10)

    def shifted(attention: Any, order: str, rows: int, kept: Any) -> Tensor:
        found = original(attention, order, rows, kept)
        # By a whole head, so that every size still fits; in one tensor of one layer only.
        is_it = attention.key == site.layer and calls.count(attention.key) == place
        calls.append(attention.key)
        return (found + size // heads) % size if is_it else found

    calls: list[Any] = []
    place = [part.path for part in site.attention.parts].index(path)
    before = snapshot(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(shrinking, "rows_of", shifted)
        with pytest.raises(CutError):
            cut(model, plan)
    assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)
    cut(model, plan)
    assert model.config.head_plan == plan.to_dict()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bert"])
def test_left_padded_generation_with_an_empty_first_layer(model_type: str) -> None:
    model: Any = tiny_model(model_type, seed=5)
    plan = _plan(model)
    attach(model).set_plan(plan)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :7] = 0, 0

    def generate() -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    before = generate()
    cut(model, plan)
    after = generate()
    assert difference(torch.stack(after.logits), torch.stack(before.logits)) <= 1e-5
    assert torch.equal(after.sequences, before.sequences)


def test_groups_by_default_and_query_heads_as_an_option() -> None:
    model: Any = tiny_model("llama")
    assert attach(model).choices.total == {UnitKey("head", layer): 4 for layer in range(3)}
    detach(model)
    gates = attach(model, unit="head")
    assert gates.choices.total == {UnitKey("head", layer): 8 for layer in range(3)}
    detach(model)
    with pytest.raises(InputError, match="open and close head, but the unit 'kv_group'"):
        attach(tiny_model("gpt2"), unit="kv_group")
    assert attach(tiny_model("gpt_bigcode")).unit == "head", "one key/value head for all queries is never cut"


def test_ragged_groups_repeat_keys_and_values_and_say_so() -> None:
    model: Any = tiny_model("llama", seed=1)
    # Groups of two queries: one is left whole, one loses a query.
    plan = HeadPlan(kept={0: (0, 1, 2)}, total={0: 8, 1: 8, 2: 8}, unit="head")
    attach(model, unit="head").set_plan(plan)
    ids = torch.arange(3, 15).view(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        cut(model, plan)
        assert difference(model(input_ids=ids).logits, expected) <= 1e-5
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (3 * 8, 3 * 8)
    assert torch.equal(attention.k_proj.weight[:8], attention.k_proj.weight[8:16])
    ragged = HeadPlan(kept={0: (0, 1, 2), 1: (0, 1, 2, 3, 4, 5, 6)}, total=plan.total, unit="head")
    with pytest.warns(RunWarning, match="key/value cache grows by"):
        cut(model, ragged)


def test_the_rest_of_a_hybrid_is_left_alone() -> None:
    model: Any = tiny_model("jamba")
    others = {name: value.clone() for name, value in model.state_dict().items() if "self_attn" not in name}
    gates = attach(model)
    assert list(gates.choices.total) == [UnitKey("head", 1)]
    cut(model, gates.choices.plan_of({UnitKey("head", 1): ()}))
    state = model.state_dict()
    assert {name for name in state if "self_attn" not in name} == others.keys()
    assert all(torch.equal(state[name], value) for name, value in others.items())


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "no attention with query, key, value and output projections"),
        ("olmo2", "its norm q_norm.weight runs over all heads at once"),
        ("bloom", "the model itself makes a position bias for every head"),
        ("diffllama", "a parameter lambda_q1 whose part in each head is not known"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(model_type: str, message: str) -> None:
    model: Any = tiny_model(model_type)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match=f"of type '{model_type}': .*{message}"):
        attach(model)
    assert_unchanged(model, before)


def test_an_encoder_with_a_decoder_is_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    with pytest.raises(UnsupportedModel, match="'t5' has an encoder and a decoder"):
        attach(T5ForConditionalGeneration(T5Config(**sizes)))


def test_quantised_weights_are_refused() -> None:
    model: Any = tiny_model("llama")
    weight = model.model.layers[0].self_attn.o_proj.weight
    model.model.layers[0].self_attn.o_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"o_proj.weight is torch.int8.*prune it, and quantise it then"):
        attach(model)
    assert gates_of(model) is None


def test_a_class_that_no_checkpoint_could_name_is_refused_and_nothing_changes() -> None:
    class Mine(GPT2LMHeadModel):
        """A user's own."""

    config: Any = tiny_config("gpt2")
    model = Mine(config).eval()
    scramble(model, 0)
    before = snapshot(model)
    with pytest.raises(UnsupportedModel, match="The class Mine is not one of those that transformers offers"):
        attach(model)
    assert_unchanged(model, before)
    assert type(model) is Mine and type(model.config) is GPT2Config


def test_a_model_that_accelerate_has_dispatched_is_cut() -> None:
    model: Any = tiny_model("llama")
    plan, ids = _plan(model), torch.arange(3, 23).view(2, 10)
    dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[0].self_attn, "_hf_hook")
    gates = attach(model)
    gates.set_plan(plan)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert difference(cut(model, plan)(input_ids=ids).logits, expected) <= 1e-5


def test_a_cut_that_fails_puts_classes_and_configuration_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    plan, before, kind, config = _plan(model), snapshot(model), type(model), model.config
    kinds = [type(module) for module in model.modules()]

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("deadhead.layouts.stock.pruned_class", fail)
        with pytest.raises(MemoryError):
            cut(model, plan)
    assert_unchanged(model, before)
    assert type(model) is kind and model.config is config and [type(module) for module in model.modules()] == kinds
    cut(model, plan)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(model_type: str) -> None:
    model: Any = tiny_model(model_type).train()
    gates = attach(model, config=GateConfig(init=0.5))
    ids = torch.arange(3, 23).view(2, 10)

    def gate_gradients() -> dict[Any, Tensor]:
        gates.begin_step(3)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found: dict[Any, Tensor] = {layer: gate.log_alpha_bias.grad for layer, gate in gates}
        return {layer: gradient.clone() for layer, gradient in found.items()}

    plain = gate_gradients()
    checkpoint_activations(model, True)
    checkpointed = gate_gradients()
    assert any(bool(gradient.any()) for gradient in plain.values())
    for layer, gradient in plain.items():
        assert torch.equal(checkpointed[layer], gradient)


@pytest.mark.slow
def test_gated_and_cut_models_compile() -> None:
    model: Any = tiny_model("llama", seed=2)
    plan = _plan(model)
    attach(model).set_plan(plan)
    ids = torch.arange(3, 23).view(2, 10)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(input_ids=ids, use_cache=False).logits
        for _ in range(2):
            compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
            assert difference(compiled(input_ids=ids, use_cache=False).logits, expected) <= 1e-5
            torch._dynamo.reset()
            cut(model, plan)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _largest: dict[str, float] = {}
    for _type in ARCHITECTURES:
        for _seed in range(int(sys.argv[1])):
            for _kind, _value in invariant_case(_type, _seed).items():
                _pick = min if _kind == "visible" else max
                _largest[_kind] = _pick(_largest.get(_kind, _value), _value)
                if _value < VISIBLE if _kind == "visible" else _value > 1e-5:
                    print(_type, _seed, _kind, f"{_value:.2e}")
    for _kind, _value in sorted(_largest.items()):
        print(f"{_kind:28} {_value:.2e}")
