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
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from benchmarks._tiny_models import VOCABULARY, scramble, tiny_config, tiny_model
from deadhead.cut import cut
from deadhead.errors import CutError, InputError, UnsupportedModel
from deadhead.gates import GateConfig
from deadhead.gating import attach, detach, gates_of
from deadhead.layouts import find_layout
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.models.pruned import shrinking
from deadhead.plan import HeadPlan
from tests.helpers import assert_unchanged, cached_logits, chunks, difference, gradients, random_plan, snapshot

# One of each kind: separate projections with groups, biases, norms and sinks; fused ones in every order; one key/value
# head; Conv1D; the output projection in another module; latent attention; sliding windows; a hybrid.
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "mistral", "opt", "gpt2", "gpt_neox", "phi3", "falcon"),
    *("gpt_bigcode", "bert", "deepseek_v3", "jamba"),
)
CASES = int(os.environ.get("DEADHEAD_CASES", "40")) // 20
ALLOWED = {torch.float32: 1e-5, torch.float64: 1e-6}
VISIBLE = 1e-2


def _unpadded(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask.bool()]


def invariant_case(model_type: str, seed: int) -> dict[str, float]:
    """Build a random case of an architecture and return its differences; see `tests.test_invariant`."""
    draw = random.Random(f"{model_type} {seed}")
    dtype = draw.choice([torch.float32, torch.float64])
    model: Any = tiny_model(model_type, seed=seed, dtype=dtype)
    unit = draw.choice(HuggingFaceLayout().units(model))
    gated = copy.deepcopy(model)
    gates = attach(gated, unit=unit)
    plan = random_plan(draw, gates.heads, gates.total, output_scale=draw.random() < 0.3, unit=unit)
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
        padded = [_unpadded(m(input_ids=ids, attention_mask=mask).logits, mask) for m in (small, gated)]
        found[f"logits padded {precision}"] = difference(*padded)
    found[f"gradients {precision}"] = _gradient_difference(gated, small, plan, ids)

    if sum(plan.heads) and draw.random() < 0.5:
        second = random_plan(draw, plan.kept, plan.total, output_scale=False, unit=unit)
        again = copy.deepcopy(small)
        attach(again).set_plan(second)
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
    for site in layout.sites(gated, plan.unit):
        kept = plan.kept[site.layer]
        for part in layout.selections(site, kept):
            name = f"{names[id(site.module)]}.{part.path}"
            rows[name] = (part.dim, part.index)
            if part.path == f"{site.output_path}.weight" and plan.output_scale and kept and name in found:
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
        allowed = ALLOWED[getattr(torch, kind.rsplit(" ", 1)[1])]
        # Gradients through float32 softmaxes and norms keep their rounding in float64 models too.
        assert value <= (2e-5 if kind.startswith("gradients") else allowed), (kind, value)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _largest: dict[str, float] = {}
    for _type in ARCHITECTURES:
        for _seed in range(int(sys.argv[1])):
            for _kind, _value in invariant_case(_type, _seed).items():
                _pick = min if _kind == "visible" else max
                _largest[_kind] = _pick(_largest.get(_kind, _value), _value)
                if _kind == "visible" and _value < VISIBLE or _kind != "visible" and _value > 1e-5:
                    print(_type, _seed, _kind, f"{_value:.2e}")
    for _kind, _value in sorted(_largest.items()):
        print(f"{_kind:28} {_value:.2e}")
