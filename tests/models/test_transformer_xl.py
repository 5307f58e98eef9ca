"""The Transformer-XL: the same code as the All-attention Transformer, checked against its formulas and cut for good."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import deadhead
from deadhead.measure.cost import config_cost
from deadhead.models import AllAttentionConfig, TransformerXLConfig, TransformerXLForCausalLM
from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import UnitPlan
from deadhead.training import PhaseRun, close_to_budget, gate_config, train
from deadhead.training.phases.defaults import with_defaults
from deadhead.training.recipes.recipe import ModelRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.runs.run import model_config
from tests.fresh_process import WAYS, in_a_fresh_process
from tests.models.test_all_attention import POSITIONS, text, written_out
from tests.random_models import cached_logits, chunks, difference, gradients, random_model, segment_logits
from tests.small_runs import stream

positions = pytest.mark.parametrize("position", POSITIONS)
initial_memory = pytest.mark.parametrize("attend_initial_memory", [False, True])


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return a tiny Transformer-XL whose every parameter is random."""
    make: Any = TransformerXLConfig
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    lengths = {"memory_length": 5, "segment_length": 6, "feed_forward_size": 12}
    return random_model(make(**{**sizes, **lengths, **overrides}), seed, dtype)


@initial_memory
@positions
def test_logits_and_gradients_are_those_of_the_formulas(position: str, attend_initial_memory: bool) -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "memory_length": 3}
    model = tiny(1, torch.float64, position=position, attend_initial_memory=attend_initial_memory, **sizes)
    ids = text(2, 7)
    expected = torch.stack([written_out(model, row) for row in ids])
    assert difference(model(input_ids=ids, use_cache=False).logits, expected) <= 1e-7
    assert difference(cached_logits(model, ids, [3, 1, 3]), expected) <= 1e-7
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    references = torch.autograd.grad(loss, list(model.parameters()))
    for (name, found), reference in zip(gradients(model, ids).items(), references, strict=True):
        # Tables of sines are float32, and transformers takes the loss in it.
        assert float((found - reference).abs().max()) <= 1e-7, name


@initial_memory
@positions
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whole_cached_and_segmented_reading_agree(
    implementation: str, position: str, attend_initial_memory: bool
) -> None:
    switches = {"position": position, "attend_initial_memory": attend_initial_memory}
    model = tiny(attn_implementation=implementation, **switches)
    ids, draw = text(3, 40), random.Random(0)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    assert difference(cached_logits(model, ids, chunks(draw, 40)), whole) <= 1e-5
    assert difference(segment_logits(model, ids, chunks(draw, 40)), whole) <= 1e-5


@positions
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_left_padding_changes_no_row(dtype: torch.dtype, implementation: str, position: str) -> None:
    """Without persistent vectors a padded query sees nothing at all, and must not spread NaN."""
    model = tiny(dtype=dtype, attn_implementation=implementation, position=position)
    ids, mask = text(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    mask[2, :16] = 0
    allowed = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert bool(padded.isfinite().all())
        cached = cached_logits(model, ids, [9, 1, 10], mask)
        for row, start in ((0, 0), (1, 7), (2, 16)):
            alone = model(input_ids=ids[row : row + 1, start:], use_cache=False).logits[0]
            for found in (padded, cached):
                assert difference(found[row, start:], alone) <= allowed
    if dtype == torch.float32:
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, ids, mask).values())


def test_it_has_the_weights_of_an_all_attention_model_but_for_biases_and_norms() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    ours = config_cost(AllAttentionConfig(num_persistent=96, **sizes))
    theirs = config_cost(TransformerXLConfig(feed_forward_size=96, **sizes))
    assert theirs.parameters - ours.parameters == 3 * (96 + 64 + 2 * 64)
    # A multiply-add for each weight in both, so the same FLOPs.
    assert theirs.flops_per_token == ours.flops_per_token


def test_a_cut_takes_projections_only_and_an_empty_layer_keeps_its_feed_forward_layer() -> None:
    model = tiny()
    plan = HeadPlan(kept={0: (), 1: (2,), 2: (0, 3)}, total=dict.fromkeys(range(3), 4), output_scale=True)
    gated = copy.deepcopy(model)
    deadhead.attach(gated).set_plan(plan)
    ids = text(2, 17)
    with torch.no_grad():
        expected = gated(input_ids=ids, use_cache=False).logits
        before = sum(parameter.numel() for parameter in model.parameters())
        deadhead.cut(model, plan)
        assert difference(model(input_ids=ids, use_cache=False).logits, expected) <= 1e-5
    assert difference(cached_logits(model, ids, [1, 9, 7]), expected) <= 1e-5
    each = 5 * 16 * 4 + 2 * 4
    assert before - sum(parameter.numel() for parameter in model.parameters()) == (4 + 3 + 2) * each
    assert model.model.layers[0].feed_forward.up_proj.weight.shape == (12, 16)


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_checkpoints_reload_in_a_fresh_process_bit_for_bit(how: str, tmp_path: Path) -> None:
    ids, expected = text(2, 9), {}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(ids, folder / "ids.pt")
    plan = HeadPlan(kept={0: (1,), 1: (), 2: (0, 3)}, total=dict.fromkeys(range(3), 4))
    units = UnitPlan.of_blocks(size=3, kept={0: (1, 3), 2: ()}, total=dict.fromkeys(range(3), 4))
    for name, cut_by in (("dense", None), ("cut", plan), ("hidden units", replace(plan, hidden_units=units))):
        model = tiny()
        if cut_by is not None:
            deadhead.cut(model, cut_by)
        deadhead.save(model, folder / name)
        with torch.no_grad():
            expected[f"{name}.logits"] = model(input_ids=ids).logits
        expected[f"{name}.tokens"] = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    work = tmp_path / "work"
    work.mkdir()
    found = in_a_fresh_process(folder, how, work)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_it_is_trained_with_gates_and_counts_as_a_model_of_ours() -> None:
    model = tiny()
    recipe = PruneRecipe(steps=3, batch_size=2, sparsity=0.5)
    assert with_defaults(recipe, model).output_scale
    gates = deadhead.attach(model, config=gate_config(recipe, model))
    train(model, stream(400), recipe, PhaseRun(gates=gates))
    close_to_budget(model, gates, recipe)
    assert gates.sparsity == 0.5
    deadhead.cut(model, gates.plan())
    train(model, stream(400), PhaseRecipe(steps=2, batch_size=2))


def test_sizes_that_are_not_those_of_a_transformer_xl_are_refused() -> None:
    make: Any = TransformerXLConfig
    for sizes in ({"num_persistent": 4}, {"feed_forward_size": 0}):
        with pytest.raises(ValueError, match="no persistent vectors and a feed-forward layer"):
            make(**sizes)
    with pytest.raises(ValueError, match="feed_forward_size must be at least 0"):
        AllAttentionConfig(feed_forward_size=-1)


def test_a_recipe_names_the_architecture() -> None:
    recipe = ModelRecipe(architecture="transformer_xl", width=32, heads=4)
    config = model_config(recipe, 29)
    assert isinstance(config, TransformerXLConfig) and config.feed_forward_size == 128
    assert isinstance(AutoModelForCausalLM.from_config(config), TransformerXLForCausalLM)
    with pytest.raises(ValueError, match="all_attention has no feed_forward"):
        ModelRecipe(feed_forward=4)
    with pytest.raises(ValueError, match="transformer_xl has no persistent"):
        ModelRecipe(architecture="transformer_xl", persistent=4)
