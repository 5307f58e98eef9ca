"""Persistent vectors, and hidden units of our own feed-forward layers: sites, gates on blocks, cuts, costs, scores."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import deadhead
from benchmarks._tiny_models import tiny_model as hugging_face_model
from deadhead.attaching import attach, detach, gates_of
from deadhead.criteria.scoring import score_heads
from deadhead.cutting import cut
from deadhead.errors import CutError, InputError, UnsupportedModel
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import Selection, find_layout
from deadhead.layouts.all_attention import AllAttentionLayout, PersistentSite
from deadhead.measure.cost import config_cost, model_cost
from deadhead.models import AllAttentionConfig
from deadhead.models.pruned import feed_forward
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import UnitPlan
from tests.models.test_transformer_xl import tiny as tiny_transformer_xl
from tests.random_models import assert_unchanged, cached_logits, difference, segment_logits, snapshot, tiny_model

HEADS, BLOCKS = dict.fromkeys(range(3), 4), dict.fromkeys(range(3), 4)
IDS = torch.randint(29, (2, 23), generator=torch.Generator().manual_seed(0))
MODELS: dict[str, Callable[..., Any]] = {
    "persistent": lambda **values: tiny_model(**{"num_persistent": 12, **values}),
    "feed-forward": lambda **values: tiny_transformer_xl(**{"feed_forward_size": 12, **values}),
}
models = pytest.mark.parametrize("kind", MODELS)


def plan_of(blocks: dict[int, Any] | None, heads: dict[int, Any] | None = None, **values: Any) -> HeadPlan:
    """Return a plan for three layers of four heads and four blocks of three; layers not named keep all."""
    part = None if blocks is None else UnitPlan.of_blocks(size=3, kept=blocks, total=BLOCKS)
    return HeadPlan(kept=heads or {}, total=HEADS, hidden_units=part, **values)


PLANS: dict[str, HeadPlan] = {
    "blocks alone": plan_of({0: [0, 3], 1: [2], 2: [1, 2, 3]}),
    "a layer without blocks": plan_of({0: [], 1: [1]}),
    "no block left": plan_of({0: [], 1: [], 2: []}),
    "heads too": plan_of({0: [1, 2], 1: [], 2: [0]}, {0: [3], 2: [0, 2]}, output_scale=True),
    "a layer without heads, another without blocks": plan_of({0: [1], 1: []}, {0: [], 1: [1, 3]}, output_scale=True),
}


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@models
def test_closed_gates_equal_cut_in_every_way_of_reading(kind: str, plan: HeadPlan, implementation: str) -> None:
    model = MODELS[kind](seed=2, attn_implementation=implementation)
    dense, gated = logits(model), copy.deepcopy(model)
    gates = attach(gated, blocks=3)
    gates.set_plan(plan)
    assert gates.plan() == plan
    expected = logits(gated)
    assert difference(expected, dense) > 1e-2
    cut(model, plan)
    # Whole texts, chunks of many and of few queries, and segments go different ways through the attention.
    for found in (
        logits(model),
        cached_logits(model, IDS, [20, 1, 2]),
        cached_logits(gated, IDS, [20, 1, 2]),
        segment_logits(model, IDS, [6, 6, 6, 5]),
        segment_logits(gated, IDS, [6, 6, 6, 5]),
        logits(model, IDS.repeat(20, 1))[:2],
    ):
        assert difference(found, expected) <= 1e-5
    half = [copy.deepcopy(m).bfloat16() for m in (model, gated)]
    assert difference(logits(half[0]).float(), logits(half[1]).float()) <= 5e-2
    expected_tokens, tokens = (
        m.generate(input_ids=IDS[:, :9], max_new_tokens=12, do_sample=False) for m in (gated, model)
    )
    assert torch.equal(tokens, expected_tokens)


def test_what_is_left_of_the_tensors_and_where_attention_is_paid_to() -> None:
    model = MODELS["persistent"]()
    before = copy.deepcopy(model)
    cut(model, plan_of({0: [0, 3], 1: []}, {0: [1, 2], 2: []}))
    first, second, third = (layer.attention for layer in model.model.layers)
    rows = [0, 1, 2, 9, 10, 11]
    for name in ("persistent_k", "persistent_v"):
        assert torch.equal(getattr(first, name), getattr(before.model.layers[0].attention, name)[[1, 2]][:, rows])
        assert not hasattr(second, name) and not hasattr(third, name)
    assert [attention.num_persistent for attention in (first, second, third)] == [6, 0, 0]
    assert {name for name, _ in third.named_parameters()} == {"o_proj.bias"}
    weights = model(input_ids=IDS, output_attentions=True, use_cache=False).attentions
    assert [None if w is None else tuple(w.shape) for w in weights] == [(2, 2, 23, 29), (2, 4, 23, 23), None]


@models
def test_sites_name_the_units_there_are_and_those_there_were(kind: str) -> None:
    model = MODELS[kind]()
    cut(model, plan_of({0: [0, 3], 1: []}, {0: [1, 2]}))
    sites = AllAttentionLayout().hidden_sites(model)
    assert [site.units for site in sites] == [(0, 1, 2, 9, 10, 11), (), tuple(range(12))]
    assert [(site.layer, site.key, site.total, site.unit_dim) for site in sites] == [
        (layer, UnitKey("block", layer), 12, 1) for layer in range(3)
    ]
    assert not any(site.is_headless for site in sites), "a layer without hidden units still has heads"
    for part in sites[0].selections((9, 10, 11)):
        assert part.index.tolist() == [3, 4, 5]
        assert 2 * len(part.index) == sites[0].module.get_parameter(part.path).shape[part.dim]


def test_models_without_anything_to_cut_in_blocks() -> None:
    model = tiny_model(num_persistent=0)
    assert AllAttentionLayout().hidden_sites(model) == []
    with pytest.raises(UnsupportedModel, match="neither feed-forward layers nor persistent vectors"):
        attach(model, blocks=True)
    assert gates_of(model) is None
    # The code that came with an older checkpoint would not read the gate.
    older = tiny_model()
    del older.model.layers[0].attention.num_persistent
    assert AllAttentionLayout().hidden_sites(older) == []


def test_sizes_of_blocks() -> None:
    def sizes(model: Any, blocks: Any) -> list[list[int]]:
        return [[len(block) for block in found] for found in attach(model, blocks=blocks).choices.hidden.values()]

    assert sizes(tiny_model(num_persistent=128), True) == [[16] * 8] * 3
    assert sizes(tiny_model(num_persistent=5), True) == [[1] * 5] * 3
    assert sizes(tiny_model(num_persistent=12), 5) == [[5, 5, 2]] * 3
    for size in (0, -1, 13):
        with pytest.raises(InputError, match="must lie between 1 and the width of the layers, 12, but it is"):
            attach(tiny_model(num_persistent=12), blocks=size)
    model = cut(MODELS["persistent"](), PLANS["blocks alone"])
    assert sizes(model, 4) == [[4, 2], [3], [4, 4, 1]]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({9: [[0]]}, "Blocks were given for layer 9, but layers with hidden units are"),
        ({0: [[0, 1]]}, "2 is in none"),
        ({0: [range(12), [3]]}, "3 is in two blocks"),
        ({0: [range(13)]}, "12 is not one of this layer's"),
    ],
)
def test_blocks_that_are_not_those_of_a_layer_are_refused(blocks: Any, message: str) -> None:
    model = MODELS["persistent"]()
    before = snapshot(model)
    with pytest.raises(InputError, match=message):
        attach(model, blocks=blocks)
    assert_unchanged(model, before)


@models
def test_a_plan_that_keeps_a_part_of_a_block_has_no_gate(kind: str) -> None:
    model = MODELS[kind]()
    part = HeadPlan(kept={}, total=HEADS, hidden_units=UnitPlan(kept={0: [0, 4]}, total=dict.fromkeys(range(3), 12)))
    gates = attach(model, blocks=3)
    with pytest.raises(InputError, match="keeps some hidden units of a block of layer 0 and not the others"):
        gates.set_plan(part)
    # A cut by it is a cut all the same.
    assert cut(model, part).config.head_plan == part.to_dict()
    assert gates_of(model) is None


def test_both_kinds_of_vectors_are_cut_where_a_model_has_both() -> None:
    """Blocks are of the feed-forward layers then; the persistent vectors stay."""
    model = random = tiny_model(num_persistent=4, feed_forward_size=12)
    gated = copy.deepcopy(random)
    attach(gated, blocks=3).set_plan(PLANS["heads too"])
    cut(model, PLANS["heads too"])
    assert difference(logits(model), logits(gated)) <= 1e-5
    assert [layer.attention.num_persistent for layer in model.model.layers] == [4, 4, 4]
    assert [layer.feed_forward.width for layer in model.model.layers] == [6, 0, 3]


@pytest.mark.parametrize("output_scale", [False, True])
@models
def test_cuts_compose_in_either_order(kind: str, output_scale: bool) -> None:
    blocks, heads = {0: [0, 3], 1: []}, {0: [3], 2: [0, 2]}
    at_once = cut(MODELS[kind](), plan_of(blocks, heads, output_scale=output_scale))
    for plans in (
        [plan_of(blocks, output_scale=output_scale), plan_of(None, heads, output_scale=output_scale)],
        [plan_of(None, heads, output_scale=output_scale), plan_of(blocks, heads, output_scale=output_scale)],
        [
            plan_of({0: [0, 1, 3]}, {2: [0, 2]}, output_scale=output_scale),
            plan_of(blocks, heads, output_scale=output_scale),
        ],
    ):
        model = MODELS[kind]()
        for plan in plans:
            cut(model, plan)
        assert difference(logits(model), logits(at_once)) <= 1e-5
        assert model.config.head_plan == at_once.config.head_plan
    with pytest.raises(InputError, match="keeps hidden unit 3 of layer 0, but that hidden unit was cut before"):
        cut(at_once, plan_of({0: [0, 1], 1: []}, heads))


def test_persistent_vectors_are_gone_with_the_heads_of_their_layer_whatever_a_plan_says() -> None:
    keeps = plan_of({0: [1, 2], 1: [0, 3]}, {1: []})
    model = cut(MODELS["persistent"](), keeps)
    assert model.config.head_plan["hidden_units"]["kept"] == {"0": "3-8", "1": "", "2": "0-11"}
    assert [site.units for site in AllAttentionLayout().hidden_sites(model)] == [
        tuple(range(3, 9)),
        (),
        tuple(range(12)),
    ]
    gates = attach(model, blocks=3)
    assert gates.choices.headless == {UnitKey("block", 1)} and UnitKey("block", 1) not in gates.gates
    # The same plan again, and one that says of that layer what is true, mean the same and are both accepted.
    for blocks in ({0: [1], 1: [0, 3]}, {0: [1], 1: []}):
        gates.set_plan(plan_of(blocks, {1: []}))
        assert gates.plan() == plan_of({0: [1], 1: []}, {1: []})
        smaller = cut(copy.deepcopy(model), plan_of(blocks, {1: []}))
        assert difference(logits(smaller), logits(model)) <= 1e-5
        assert model_cost(model, plan_of(blocks, {1: []})) == model_cost(smaller)
    detach(model)
    # A model cut by heads alone, which says nothing of blocks.
    headless = cut(MODELS["persistent"](), plan_of(None, {1: []}))
    assert attach(headless, blocks=3).choices.units[UnitKey("block", 1)] == ()
    # A feed-forward layer outlives the heads.
    other = cut(MODELS["feed-forward"](), keeps)
    assert other.config.head_plan == keeps.to_dict()
    assert attach(other, blocks=True).choices.headless == frozenset()


def shift_blocks(patch: pytest.MonkeyPatch, path: str) -> None:
    """Let one tensor's blocks be shifted by one: what a wrong layout would look like."""
    selections, rows_of_units = PersistentSite.selections, feed_forward.rows_of_units

    def shifted_selections(self: Any, units: tuple[int, ...]) -> list[Selection]:
        return [
            replace(part, index=(part.index + self.unit_dim) % self.module.get_parameter(part.path).shape[part.dim])
            if part.path == path
            else part
            for part in selections(self, units)
        ]

    def shifted_rows(layer: Any, name: str, units: Tensor) -> Tensor:
        rows = rows_of_units(layer, name, units)
        return (rows + 3) % layer.width if name == path else rows

    patch.setattr(PersistentSite, "selections", shifted_selections)
    patch.setattr(feed_forward, "rows_of_units", shifted_rows)


@pytest.mark.parametrize("given_gates", [False, True])
@pytest.mark.parametrize(
    ("kind", "path"),
    [("persistent", "persistent_k"), ("persistent", "persistent_v")]
    + [
        ("feed-forward", f"{name}_proj.{part}") for name, part in (("up", "weight"), ("up", "bias"), ("down", "weight"))
    ],
)
def test_a_layout_whose_blocks_are_shifted_is_found_out_and_nothing_changes(
    kind: str, path: str, given_gates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind](seed=5)
    plan = plan_of({0: [0, 2], 1: [1]}, {0: [0, 1, 2]}, output_scale=True)
    if given_gates:
        attach(model, blocks=3).set_plan(plan_of({1: [2]}))
    before, expected = snapshot(model), logits(model)
    with monkeypatch.context() as patch:
        shift_blocks(patch, path)
        with pytest.raises(CutError):
            cut(model, plan)
    assert_unchanged(model, before)
    assert (gates_of(model) is not None) == given_gates
    assert torch.equal(logits(model), expected)
    assert cut(model, plan).config.head_plan == plan.to_dict()


def test_soft_gates_are_for_what_a_weight_can_take_up() -> None:
    model = MODELS["persistent"]()
    before = snapshot(model)
    with pytest.raises(InputError, match="need hard gates, because a cut cannot fold a value between 0 and 1"):
        attach(model, blocks=3, config=GateConfig(hard=False))
    assert_unchanged(model, before)
    attach(model, config=GateConfig(hard=False))
    soft = MODELS["feed-forward"]()
    gates = attach(soft, blocks=3, config=GateConfig(hard=False))
    gates.gates[UnitKey("block", 1)].set_log_alpha(torch.tensor([0.3, -0.5, 6.0, -0.2]))
    expected = logits(soft)
    assert difference(logits(cut(soft, gates.plan())), expected) <= 1e-5


def test_gates_come_off_and_leave_a_copy_alone() -> None:
    model = MODELS["persistent"]()
    before, dense = snapshot(model), logits(model)
    gates = attach(model, blocks=3)
    assert len(gates) == 12 + 12 and gates.block_sparsity == 0.0
    assert torch.equal(logits(model), dense)
    twin = copy.deepcopy(model)
    twin_gates = gates_of(twin)
    assert twin_gates is not None
    twin_gates.set_plan(PLANS["heads too"])
    assert difference(logits(twin), dense) > 1e-2 and torch.equal(logits(model), dense)
    assert twin_gates.block_sparsity == 0.75 and gates.block_sparsity == 0.0
    deadhead.attaching.rehang(model)
    assert torch.equal(logits(model), dense)
    assert_unchanged(detach(model), before)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@models
def test_a_plan_costs_what_the_cut_model_and_one_built_so_cost(kind: str, plan: HeadPlan) -> None:
    position = "rotary" if plan.output_scale else "learned"
    # torch's counter stumbles over the bias of an emptied layer where it needs a gradient.
    model = MODELS[kind](position=position, attn_implementation="eager").requires_grad_(False)
    dense, config = model_cost(model), copy.deepcopy(model.config)
    gated = copy.deepcopy(model)
    attach(gated, blocks=3)
    assert model_cost(gated) == dense
    foretold = model_cost(model, plan)
    cut(model, plan)
    assert model_cost(model) == foretold == config_cost(model.config) == config_cost(config, plan)
    assert foretold.parameters == sum({id(p): p.numel() for p in model.parameters()}.values())
    assert plan.hidden_units is not None
    there = (
        plan.hidden_units.kept
        if kind == "feed-forward"
        else {layer: units if plan.kept[layer] else () for layer, units in plan.hidden_units.kept.items()}
    )
    assert foretold.hidden_units == [len(units) for units in there.values()]
    assert foretold.total_hidden_units == [12, 12, 12]
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :9], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == 2 * model_cost(model, length=5).flops_per_token


def test_parameters_of_hidden_units() -> None:
    model = MODELS["persistent"]()
    attention = sum(getattr(layer.attention, f"persistent_{x}").numel() for layer in model.model.layers for x in "kv")
    dense = model_cost(model)
    assert model_cost(cut(MODELS["persistent"](), plan_of({0: []}))).hidden_parameters * 3 == attention * 2
    without = model_cost(model, PLANS["no block left"])
    assert without.hidden_parameters == 0 and dense.parameters - without.parameters == attention
    # A query meets each vector twice, in the score and in the sum.
    assert dense.flops_per_token - without.flops_per_token == 2 * attention


@models
def test_magnitude_is_the_square_of_what_the_cut_takes_away(kind: str) -> None:
    found = score_heads(
        MODELS[kind](), "magnitude", blocks={layer: [[unit] for unit in range(12)] for layer in range(3)}
    )

    def square(module: Any) -> float:
        return sum(float(parameter.detach().double().square().sum()) for parameter in module.parameters())

    total = dict.fromkeys(range(3), 12)
    for unit in range(12):
        units = UnitPlan(kept={1: [other for other in range(12) if other != unit]}, total=total)
        smaller = cut(MODELS[kind](), HeadPlan(kept={}, total=HEADS, hidden_units=units))
        expected = square(MODELS[kind]()) - square(smaller)
        assert float(found.scores[UnitKey("block", 1)][unit]) == pytest.approx(expected, rel=1e-3)
    assert score_heads(MODELS[kind](), "random", blocks=3).plan(0.5).hidden_units is not None


@models
def test_blocks_are_units_of_like_scores_and_worth_their_sum(kind: str) -> None:
    key = UnitKey("block", 1)
    single = score_heads(MODELS[kind](), "magnitude", blocks=1)
    values = dict(zip((unit for (unit,) in single.choices.members[key]), single.scores[key].tolist(), strict=True))
    order = sorted(values, key=lambda unit: values[unit])
    found = score_heads(MODELS[kind](), "magnitude", blocks=5)
    # What is left over goes first, so that five or ten stay.
    assert [list(block) for block in found.choices.members[key]] == [order[:2], order[2:7], order[7:]]
    sums = [sum(values[unit] for unit in block) for block in found.choices.members[key]]
    assert found.scores[key].tolist() == pytest.approx(sums)
    assert set(found.plan(0.3, ranking="layer").units[key]) == set(order[2:])


class _Weighted(torch.nn.Module):
    """A gate by hand."""

    idle = ()

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights
        self.owner = torch.arange(len(weights))

    def forward(self) -> tuple[Tensor, None]:
        """Return the values for each of three texts."""
        return self.weights.expand(3, -1), None


@pytest.mark.parametrize("with_gates", [False, True])
def test_taylor_is_the_derivative_by_the_blocks_weight(with_gates: bool) -> None:
    model = MODELS["persistent"](dtype=torch.float64)
    ids = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "is_first": torch.tensor([True] * 3)}
    reference = copy.deepcopy(model)
    if with_gates:
        attach(model, blocks=3)
    before = snapshot(model)
    found = score_heads(model, "taylor", [batch], blocks={layer: [[u] for u in range(12)] for layer in range(3)})
    assert_unchanged(model, before)

    def row_losses(layer: int, weights: list[float]) -> Tensor:
        gate = _Weighted(torch.tensor(weights, dtype=torch.float64))
        reference.model.layers[layer].attention.block_gate = gate
        with torch.no_grad():
            found = reference(input_ids=ids[:, :-1], use_cache=False).logits
        del reference.model.layers[layer].attention.block_gate
        return cross_entropy(found.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    step = 1e-4
    for layer in range(3):
        for unit in range(12):
            more, less = (
                row_losses(layer, [1.0 + sign * step * (other == unit) for other in range(12)]) for sign in (1, -1)
            )
            expected = float(((more - less) / (2 * step)).abs().mean())
            assert float(found.scores[UnitKey("block", layer)][unit]) == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_output_differences_are_not_for_persistent_vectors() -> None:
    batch = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:], "is_first": torch.tensor([True] * 2)}
    with pytest.raises(
        InputError, match="no score by .output-difference., because a layer's output is not a sum over them"
    ):
        score_heads(MODELS["persistent"](), "output-difference", [batch], blocks=3)
    assert score_heads(MODELS["persistent"](), "output-difference", [batch]).plan(0.5).hidden_units is None
    assert UnitKey("block", 0) in score_heads(MODELS["feed-forward"](), "output-difference", [batch], blocks=3).scores


@models
def test_saved_gates_come_back_with_their_model(kind: str, tmp_path: Path) -> None:
    model = cut(MODELS[kind](), plan_of({0: [0, 2, 3]}, {1: []}))
    gates = attach(model, blocks={0: [[0, 6], [1, 11], [2, 7, 8, 9, 10]], 2: [range(12)]})
    for index, (_, gate) in enumerate(gates):
        gate.set_log_alpha(torch.linspace(-1.0, 2.0 - index / 4, gate.num_heads))
    deadhead.save(model, tmp_path / "gated")
    loaded, loaded_gates = deadhead.load_gated(tmp_path / "gated")
    assert loaded_gates.choices == gates.choices
    assert loaded_gates.plan() == gates.plan()
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(detach(loaded)), logits(deadhead.load(tmp_path / "gated")))
    other = hugging_face_model("gpt2")
    with pytest.raises(InputError):
        deadhead.checkpoints.gate_files.load_gates(other, tmp_path / "gated")
    assert gates_of(other) is None


_BLOCKS = {"size": 3, "kept": {"0": [0]}, "total": {"0": 4}}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("three", "head_plan must give blocks a size"),
        ({**_BLOCKS, "size": None}, "head_plan must give blocks a size"),
        ({**_BLOCKS, "kept": {}}, "each of the 1 layers in kept and total"),
        ({**_BLOCKS, "total": {"0": 4, "1": 4}}, "each of the 1 layers in kept and total"),
        ({**_BLOCKS, "size": 4}, "blocks of 4 do not make up the 12 persistent vectors of a layer"),
        ({**_BLOCKS, "kept": {"0": [4]}}, "names a block of layer 0 that is not one of 4"),
    ],
)
def test_a_configuration_whose_blocks_do_not_fit_is_refused(blocks: Any, message: str) -> None:
    plan = {"kept": {"0": [0]}, "total": {"0": 8}, "blocks": blocks}
    with pytest.raises(ValueError, match=message):
        AllAttentionConfig(num_hidden_layers=1, num_persistent=12, head_plan=plan)
    if isinstance(blocks, dict) and blocks["size"] == 4:
        with pytest.raises(ValueError, match="do not make up the 15 hidden units"):
            AllAttentionConfig(num_hidden_layers=1, num_persistent=0, feed_forward_size=15, head_plan=plan)


@pytest.mark.parametrize(
    ("kept", "total", "message"),
    [
        ([0], 12, "must keep hidden_units as ranges by layer"),
        ("0-x", 12, "invalid literal"),
        ("5-2", 12, "ranges of units must ascend, but are '5-2'"),
        ("0-4,4", 12, "ranges of units must ascend"),
        ("0-12", 12, "names a persistent vector of layer 0 that is not one of 12"),
        ("0-4", 16, "hidden_units are not the 12 persistent vectors of a layer"),
    ],
)
def test_a_configuration_whose_hidden_units_do_not_fit_is_refused(kept: Any, total: int, message: str) -> None:
    units = {"kept": {"0": kept}, "total": {"0": total}}
    plan = {"version": 3, "kept": {"0": [0]}, "total": {"0": 8}, "hidden_units": units}
    with pytest.raises(ValueError, match=message):
        AllAttentionConfig(num_hidden_layers=1, num_persistent=12, head_plan=plan)
    units = {"kept": {"0": "0-4,7,9-11"}, "total": {"0": 12}}
    config = AllAttentionConfig(num_hidden_layers=1, num_persistent=12, head_plan={**plan, "hidden_units": units})
    assert config.layer_persistent(0) == 9


def test_layers_as_their_configuration_says() -> None:
    config = AllAttentionConfig(
        num_hidden_layers=1,
        num_persistent=12,
        head_plan={
            "version": 2,
            "kept": {"0": [0]},
            "total": {"0": 8},
            "blocks": _BLOCKS,
        },
    )
    assert (config.layer_persistent(0), config.layer_feed_forward(0)) == (3, 0)
    (site,) = find_layout(tiny_model()).hidden_sites(deadhead.models.AllAttentionForCausalLM(config))
    assert site.units == (0, 1, 2)
