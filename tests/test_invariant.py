"""THE contract (design, section 4): closed gates ≡ cut, on random architectures, plans, texts and precisions.

Run as a program it prints the largest differences over as many random cases as asked for:

    PYTHONPATH=src python -m tests.test_invariant 500 [FIRST_SEED]
"""

from __future__ import annotations

import copy
import os
import random
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deadhead.attaching import attach, detach, gates_of
from deadhead.cutting import cut
from deadhead.errors import CutError
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import Selection
from deadhead.layouts.all_attention import AllAttentionLayout, HeadSite
from deadhead.models import AllAttentionForCausalLM
from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import UnitPlan
from tests.random_models import (
    all_hidden_units,
    assert_unchanged,
    cached_logits,
    chunks,
    difference,
    gradients,
    kept_part,
    random_blocks,
    random_config,
    random_model,
    random_plan,
    random_text,
    segment_logits,
    snapshot,
    tiny_config,
    tiny_model,
)

CASES = int(os.environ.get("DEADHEAD_CASES", "40"))
FULL_CASES = int(os.environ.get("DEADHEAD_FULL_CASES", "400"))
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-6}
# A plan that cuts something must show: dense against gated. Below it a test could pass by comparing nothing.
VISIBLE = 1e-2


def invariant_case(seed: int) -> dict[str, float]:
    """Build one random case, assert what must differ, and return the differences that must be small.

    Keys are "logits whole", "logits cached", "logits segments", "logits second cut" and "gradients", with the
    precision behind; "visible" is how far the plan moves the logits.
    """
    draw = random.Random(seed)
    config = random_config(draw)
    dtype = draw.choice([torch.float32, torch.float64])
    model = random_model(config, seed, dtype)
    total = dict.fromkeys(range(config.num_hidden_layers), config.num_attention_heads)
    everything = {layer: tuple(range(count)) for layer, count in total.items()}
    units = all_hidden_units(config) if draw.random() < 0.7 else None
    plan = random_plan(draw, everything, total, output_scale=draw.random() < 0.5, hidden_units=units)
    ids, mask = random_text(draw, config, padded=draw.random() < 0.5)
    sizes = chunks(draw, ids.shape[1])
    precision = str(dtype).removeprefix("torch.")

    gated = copy.deepcopy(model)
    gates = attach(gated, blocks=_random_blocks(draw, units, plan))
    gates.set_plan(plan)
    assert gates.plan() == plan
    # With gates attached and without, `cut` must come to the same.
    small: Any = cut(copy.deepcopy(gated if draw.random() < 0.5 else model), plan)
    found: dict[str, float] = {}
    with torch.no_grad():
        whole = gated(input_ids=ids, attention_mask=mask, use_cache=False).logits
        dense = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found["visible"] = difference(dense, whole)
        small_whole = small(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found[f"logits whole {precision}"] = difference(small_whole, whole)
    # A cache or a memory must not change the function either, so the reference is always the gated model's whole pass.
    found[f"logits cached {precision}"] = difference(cached_logits(small, ids, sizes, mask), whole)
    if bool(mask.all()):
        found[f"logits segments {precision}"] = difference(segment_logits(small, ids, sizes), whole)
    found[f"gradients {precision}"] = _gradient_difference(gated, small, plan, ids, mask)

    left = sum(len(heads) for heads in plan.kept.values())
    if left and draw.random() < 0.5:
        # Hidden units that the first cut left may be cut, or left alone; persistent vectors go with the last head.
        there = UnitPlan.from_dict(small.config.head_plan["hidden_units"]) if plan.hidden_units else None
        left_units = there if draw.random() < 0.7 else None
        second = random_plan(draw, plan.kept, total, output_scale=draw.random() < 0.5, hidden_units=left_units)
        again = copy.deepcopy(small)
        attach(again, blocks=_random_blocks(draw, left_units, second)).set_plan(second)
        with torch.no_grad():
            expected = again(input_ids=ids, attention_mask=mask, use_cache=False).logits
            smaller: Any = cut(small, second)
            assert smaller is small
            found[f"logits second cut {precision}"] = difference(
                smaller(input_ids=ids, attention_mask=mask, use_cache=False).logits, expected
            )
            if second.output_scale == plan.output_scale:
                at_once = replace(second, hidden_units=second.hidden_units or plan.hidden_units)
                _assert_composes(model, at_once, plan, smaller, ids, mask)
    return found


def _random_blocks(draw: random.Random, units: UnitPlan | None, plan: HeadPlan) -> Any:
    """Return in which blocks hidden units have gates: none, single units, or any that can stand for the plan."""
    if units is None or plan.hidden_units is None:
        return False
    return 1 if draw.random() < 0.2 else random_blocks(draw, units.kept, plan.hidden_units.kept)


def _assert_composes(
    model: AllAttentionForCausalLM,
    second: HeadPlan,
    first: HeadPlan,
    smaller: AllAttentionForCausalLM,
    ids: Tensor,
    mask: Tensor,
) -> None:
    """Two cuts, H / k₁ then k₁ / k₂, are the one cut H / k₂."""
    at_once = cut(copy.deepcopy(model), second)
    logits = [m(input_ids=ids, attention_mask=mask, use_cache=False).logits for m in (smaller, at_once)]
    assert difference(*logits) <= ALLOWED[model.dtype], (first, second)


def _gradient_difference(
    gated: AllAttentionForCausalLM, small: AllAttentionForCausalLM, plan: HeadPlan, ids: Tensor, mask: Tensor
) -> float:
    """Return the largest difference of a remaining weight's gradient, relative to that weight's largest."""
    reference, found = gradients(gated, ids, mask), gradients(small, ids, mask)
    # A gradient that is small through cancellation carries the rounding of the large terms: float32 measures it against
    # the model's largest, float64 shows that it is right.
    floor = (1e-3 if gated.dtype == torch.float64 else 1e-2) * max(
        float(gradient.abs().max()) for gradient in reference.values()
    )
    largest = 0.0
    for name, gradient in found.items():
        expected = reference[name]
        if ".layers." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            expected = kept_part(name, expected, plan, gated.config.head_dim)
            if name.endswith("o_proj.weight") and plan.output_scale:
                gradient = gradient * plan.total[layer] / len(plan.kept[layer])
        assert gradient.shape == expected.shape, name
        scale = max(float(expected.abs().max()), floor, 1e-30)
        largest = max(largest, float((gradient - expected).abs().max()) / scale)
    return largest


def largest_difference(cases: int, seed: int = 0) -> dict[str, float]:
    """Return the largest difference of each kind over `cases` random cases; "visible" is the smallest."""
    largest: dict[str, float] = {}
    for case in range(seed, seed + cases):
        for kind, value in invariant_case(case).items():
            pick = min if kind == "visible" else max
            largest[kind] = pick(largest.get(kind, value), value)
    return largest


def assert_holds(found: Mapping[str, float]) -> None:
    """Assert that a case's, or many cases', differences are within the contract."""
    assert found["visible"] > VISIBLE
    for kind, value in found.items():
        if kind != "visible":
            assert value <= ALLOWED[getattr(torch, kind.rsplit(" ", 1)[1])], (kind, value)


@pytest.mark.parametrize("seed", range(CASES))
def test_closed_gates_equal_cut(seed: int) -> None:
    assert_holds(invariant_case(seed))


@pytest.mark.full
def test_closed_gates_equal_cut_in_many_cases() -> None:
    assert_holds(largest_difference(FULL_CASES, seed=10_000))


PLANS: dict[str, dict[int, list[int]]] = {
    "one head": {1: [0, 1, 3]},
    "layer 0 empty": {0: [], 2: [1, 2]},
    "last layer empty": {2: []},
    "all layers empty": {0: [], 1: [], 2: []},
    "one head left in each": {0: [3], 1: [0], 2: [2]},
}


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("kept", PLANS.values(), ids=PLANS.keys())
def test_greedy_generation_with_left_padding_is_the_same_before_and_after(kept: Any, position: str) -> None:
    model = tiny_model(seed=3, position=position, pad_token_id=0, attend_initial_memory=position == "learned")
    plan = HeadPlan(kept=kept, total=dict.fromkeys(range(3), 4), output_scale=True)
    attach(model).set_plan(plan)
    ids = torch.randint(1, 29, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[2, :7] = 0, 0
    ids[mask == 0] = 0

    def generate() -> Any:
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=15,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )

    before = generate()
    cut(model, plan)
    after = generate()
    # Random models repeat tokens, so the steps' logits are compared too.
    assert difference(torch.stack(after.logits), torch.stack(before.logits)) <= 1e-5
    assert torch.equal(after.sequences, before.sequences)
    # Each row alone, without padding, goes the same way: the mask is obeyed, not merely treated alike.
    alone = model.generate(
        input_ids=ids[2:, 7:], max_new_tokens=15, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert difference(torch.stack(alone.logits)[:, 0], torch.stack(after.logits)[:, 2]) <= 1e-5


@pytest.mark.parametrize("output_scale", [False, True])
def test_values_of_soft_gates_are_folded_in(output_scale: bool) -> None:
    for seed in range(10):
        model = tiny_model(seed)
        gates = attach(model, config=GateConfig(hard=False, output_scale=output_scale))
        generator = torch.Generator().manual_seed(seed)
        for _, gate in gates:
            gate.set_log_alpha(torch.randn(gate.num_heads, generator=generator) * 2 - 1)
        ids = torch.randint(29, (2, 17), generator=generator)
        with torch.no_grad():
            values = torch.cat([gate()[0] for _, gate in gates])
            expected = model(input_ids=ids, use_cache=False).logits
        assert ((values > 0.01) & (values < 0.99)).sum() > 3, "the case must hold gates that are neither shut nor open"
        cut(model, gates.plan())
        assert gates_of(model) is None
        with torch.no_grad():
            assert difference(model(input_ids=ids, use_cache=False).logits, expected) <= 1e-5


def test_a_deep_copy_of_a_gated_model_works_and_is_independent() -> None:
    model = tiny_model(seed=1)
    gates = attach(model)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
        twin = copy.deepcopy(model)
        twin_gates = gates_of(twin)
        assert twin_gates is not None and twin_gates is not gates
        assert torch.equal(twin(input_ids=ids, use_cache=False).logits, dense)
        plan = HeadPlan(kept={0: [1], 1: []}, total=dict.fromkeys(range(3), 4))
        twin_gates.set_plan(plan)
        closed = twin(input_ids=ids, use_cache=False).logits
        assert difference(closed, dense) > VISIBLE
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, dense), "the original's gates moved"
        gates.set_plan(HeadPlan(kept={2: [0]}, total=plan.total))
        assert torch.equal(twin(input_ids=ids, use_cache=False).logits, closed), "the copy's gates moved"
        twin.train()
        twin(input_ids=ids)
        assert not any(torch.equal(gate.noise, torch.full((4,), 0.5)) for _, gate in twin_gates)
        assert all(torch.equal(gate.noise, torch.full((4,), 0.5)) for _, gate in gates), (
            "the copy drew for the original"
        )
        cut(twin.eval(), plan)
        assert difference(twin(input_ids=ids, use_cache=False).logits, closed) <= 1e-5
        detach(model)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, dense)


def test_bfloat16_cut_is_as_near_to_float32_as_the_gated_model() -> None:
    gated_errors, cut_errors = [], []
    for seed in range(24):
        draw = random.Random(seed)
        config = random_config(draw)
        total = dict.fromkeys(range(config.num_hidden_layers), config.num_attention_heads)
        everything = {layer: tuple(range(count)) for layer, count in total.items()}
        plan = random_plan(draw, everything, total, output_scale=draw.random() < 0.5)
        ids, mask = random_text(draw, config, padded=False)
        half = random_model(config, seed, torch.bfloat16)
        # The reference has the very same weights, so that only the arithmetic and the fold differ.
        reference = copy.deepcopy(half).float()
        attach(half).set_plan(plan)
        attach(reference).set_plan(plan)
        with torch.no_grad():
            expected, gated, small = (
                m(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
                for m in (reference, half, cut(copy.deepcopy(half), plan))
            )
        assert small.isfinite().all()
        scale = expected.square().mean().sqrt()
        gated_errors.append(float((gated - expected).square().mean().sqrt() / scale))
        cut_errors.append(float((small - expected).square().mean().sqrt() / scale))
    assert max(gated_errors) > 1e-4, "the reference must be more precise than bfloat16"
    for gated_error, cut_error in zip(gated_errors, cut_errors, strict=True):
        assert cut_error <= 1.5 * gated_error + 2e-3
    assert statistics.mean(cut_errors) <= 1.5 * statistics.mean(gated_errors)


def shift_rows(patch: pytest.MonkeyPatch, path: str) -> None:
    """Let one tensor's rows be off by one: what a wrong layout would look like."""
    original = HeadSite.selections

    def selections(self: Any, heads: tuple[int, ...]) -> list[Selection]:
        size = {part.path: self.module.get_parameter(part.path).shape[part.dim] for part in original(self, self.units)}
        return [
            replace(part, index=(part.index + 1) % size[part.path]) if part.path == path else part
            for part in original(self, heads)
        ]

    patch.setattr(HeadSite, "selections", selections)


def _all_slices() -> list[tuple[str, str, bool]]:
    found = []
    for position in ("learned", "sinusoidal", "rotary"):
        for bias in (False, True):
            model = tiny_model(position=position, projection_bias=bias)
            site = AllAttentionLayout().sites(model, "head")[0]
            found += [(part.path, position, bias) for part in site.selections(site.units)]
    return found


@pytest.mark.parametrize("given_gates", [False, True])
@pytest.mark.parametrize(("path", "position", "bias"), _all_slices())
def test_a_layout_with_a_shifted_slice_is_found_out_and_nothing_changes(
    path: str, position: str, bias: bool, given_gates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(seed=5, position=position, projection_bias=bias)
    plan = HeadPlan(kept={0: [0, 2], 1: [1], 2: []}, total=dict.fromkeys(range(3), 4), output_scale=True)
    ids = torch.arange(20).view(2, 10)
    if given_gates:
        attach(model).set_plan(HeadPlan(kept={1: [2]}, total=plan.total))
    before, config = snapshot(model), copy.deepcopy(model.config)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    with monkeypatch.context() as patch:
        shift_rows(patch, path)
        with pytest.raises(CutError):
            cut(model, plan)
    assert_unchanged(model, before)
    assert model.config == config
    assert (gates_of(model) is not None) == given_gates
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, logits)
    # The right layout still cuts the very same model.
    cut(model, plan)
    assert model.config.head_plan == plan.to_dict()


def test_every_parameter_of_the_attention_is_in_a_slice_but_the_output_bias() -> None:
    for position in ("learned", "rotary"):
        model = random_model(tiny_config(position=position, projection_bias=True), 0)
        for site in AllAttentionLayout().sites(model, "head"):
            parts = site.selections(site.units)
            named = {name for name, _ in site.module.named_parameters()}
            assert {part.path for part in parts} == named - {"o_proj.bias"}
            for part in parts:
                size = site.module.get_parameter(part.path).shape[part.dim]
                assert part.index.tolist() == list(range(size)), part.path


if __name__ == "__main__":
    torch.set_num_threads(1)
    for _kind, _value in sorted(largest_difference(int(sys.argv[1]), *map(int, sys.argv[2:])).items()):
        print(f"{_kind:28} {_value:.2e}")
