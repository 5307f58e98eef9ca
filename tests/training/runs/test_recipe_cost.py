"""What a recipe's model costs, counted by hand and by the model that would be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from deadhead.data import build_tokenizer, open_corpus
from deadhead.errors import InputError
from deadhead.measure.cost import first_heads, model_cost
from deadhead.models import AllAttentionConfig
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe, Recipe
from deadhead.training.runs.inputs import model_config
from deadhead.training.runs.recipe_cost import expected_vocabulary, recipe_costs
from tests.conftest import ROOT
from tests.small_runs import write_prose

_PAPER = ROOT / "src" / "deadhead" / "recipes" / "paper.toml"


def _recipe(**sections: Any) -> Recipe:
    model = {"layers": 3, "width": 16, "heads": 4, "persistent": 5, "memory_length": 6, **sections.pop("model", {})}
    return Recipe.model_validate({"model": model, **sections})


def test_the_papers_model_by_hand() -> None:
    """Every tensor but those of embeddings and output layer, and what follows for each published model."""
    width, heads, persistent, layers, memory = 512, 8, 2048, 16, 192
    head = (5 * width + 2 * persistent + 2) * (width // heads)  # q, k, v, r, o; persistent vectors; u, v
    outside = layers * 3 * width + (memory + 1) * width + 2 * width  # norm and b_O; positions; last norm
    # Of a token and a head: q, k, v, o; contexts and positions of the window, and persistent vectors.
    flops = 2 * 4 * width * (width // heads) + (width // heads) * (6 * (memory + 1) + 4 * persistent)
    costs = {cost.name: cost for cost in recipe_costs(load_recipe(_PAPER))}
    assert list(costs) == ["dense", "43 % gone", "106 of 128 heads", "87 of 128 heads", "59 of 128 heads"]
    for name, left in (("dense", 128), ("106 of 128 heads", 106), ("87 of 128 heads", 87), ("59 of 128 heads", 59)):
        cost = costs[name]
        assert cost.heads is not None and sum(cost.heads) == left
        assert (cost.head_parameters, cost.parameters) == (left * head, left * head + outside)
        assert cost.layer_flops_per_token == left * flops
        assert cost.sparsity == pytest.approx(1 - left / 128)
        assert cost.flops_per_token is None and cost.heads is not None
    between = costs["43 % gone"]
    assert between.heads is None and between.sparsity == pytest.approx(0.43)
    assert between.head_parameters == pytest.approx(0.57 * 128 * head, abs=1)
    assert between.parameters == between.head_parameters + outside
    assert between.layer_flops_per_token == pytest.approx(0.57 * 128 * flops)
    # What is stated is 1.6 % less for the dense model; the other is 57 % of that.
    stated = [cost.stated_parameters for cost in costs.values()]
    assert stated == [53_800_000, 30_700_000, None, None, None]
    assert costs["dense"].parameters == 54_666_752


@pytest.mark.parametrize("architecture", ["all_attention", "transformer_xl"])
def test_as_the_model_itself_costs(architecture: str) -> None:
    """FLOPs of the layers and of the output layer are those of the whole model together."""
    persistent = 5 if architecture == "all_attention" else None
    recipe = _recipe(model={"architecture": architecture, "persistent": persistent})
    dense, cut = recipe_costs(recipe, length=4, layouts=[[2, 0, 4]])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(recipe.model, 257))
    expected = model_cost(model, length=4)
    assert (dense.name, dense.heads, dense.sparsity) == ("dense", [4, 4, 4], 0)
    assert dense.parameters == expected.parameters - expected.embedding_parameters
    assert dense.flops_per_token == expected.flops_per_token == dense.layer_flops_per_token + 2 * 257 * 16
    assert (cut.name, cut.heads, cut.sparsity) == ("--heads", [2, 0, 4], 0.5)
    assert cut.head_parameters * 2 == dense.head_parameters
    assert cut.parameters == dense.parameters - cut.head_parameters
    assert cut.flops_per_token == cut.layer_flops_per_token + 2 * 257 * 16


def test_vocabularies_are_those_of_the_tokenizers(tmp_path: Any) -> None:
    corpus = open_corpus(str(write_prose(tmp_path)))
    assert expected_vocabulary(DataRecipe(tokenizer="byte")) == len(build_tokenizer("byte", corpus))
    # A text this short has fewer pairs than the tokenizer would take.
    assert len(build_tokenizer("bpe", corpus)) < (expected_vocabulary(DataRecipe(tokenizer="bpe")) or 0) == 8192
    assert expected_vocabulary(DataRecipe(tokenizer="word")) is None
    assert expected_vocabulary(DataRecipe(tokenizer="word", vocab_size=50)) == 50


def test_a_vocabulary_that_is_given_goes_first() -> None:
    recipe = _recipe(model={"adaptive_cutoffs": [10, 20]}, data={"tokenizer": "word"})
    (unknown,), (known,) = recipe_costs(recipe), recipe_costs(recipe, vocab_size=30)
    assert unknown.flops_per_token is None and known.flops_per_token is not None
    assert (unknown.parameters, unknown.layer_flops_per_token) == (known.parameters, known.layer_flops_per_token)
    assert known.flops_per_token > known.layer_flops_per_token
    with pytest.raises(InputError, match="must rise and lie between 1 and vocab_size 15"):
        recipe_costs(recipe, vocab_size=15)


def test_a_dense_model_that_is_published_is_not_shown_twice() -> None:
    names = [{"name": "half", "sparsity": 0.5}, {"name": "whole", "sparsity": 0.0, "parameters": 7}]
    costs = recipe_costs(_recipe(published=names))
    assert [(cost.name, cost.heads, cost.stated_parameters) for cost in costs] == [
        ("half", None, None),
        ("whole", [4, 4, 4], 7),
    ]
    assert [cost.name for cost in recipe_costs(_recipe(published=names[:1]))] == ["dense", "half"]


@pytest.mark.parametrize("heads", [[4, 4], [4, 4, 4, 4], [4, 5, 4], [4, -1, 4], []])
def test_heads_of_another_model(heads: list[int]) -> None:
    with pytest.raises(InputError, match=r"^The heads of 'theirs' are not .* must be 3 numbers, .*\[4, 4, 4\]"):
        recipe_costs(_recipe(published=[{"name": "theirs", "heads": heads}]))


def test_first_heads_of_those_a_cut_left() -> None:
    make: Any = AllAttentionConfig
    plan = {"version": 1, "unit": "head", "total": {"0": 4, "1": 4}, "kept": {"0": [1, 3], "1": [0, 1, 2]}}
    config = make(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, head_plan=plan)
    found = first_heads(config, [1, 0])
    assert (found.kept, found.total, found.unit) == ({0: (1,), 1: ()}, {0: 4, 1: 4}, "head")
    with pytest.raises(InputError, match=r"at most \[2, 3\], but are \[3, 0\]"):
        first_heads(config, [3, 0])
