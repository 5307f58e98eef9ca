"""The quality benchmark: what it measures, that all methods get the same, and what its table says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import deadhead
from benchmarks import quality
from benchmarks._quality import METHODS, MODELS, Budget, fresh, measure_point, train_dense
from benchmarks._torch_pruning import CannotPrune, prune_heads
from deadhead.data import load_text
from tests.random_models import difference
from tests.small_runs import write_prose

pytestmark = pytest.mark.slow

_BUDGET = Budget(dense=2, after=3, gates=2, looked_at=2, tokens=300)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int, Path]:
    """Return a text, its vocabulary, and a folder with a dense model of each kind."""
    folder = tmp_path_factory.mktemp("quality")
    text, tokenizer = load_text(str(write_prose(folder, 40_000)), tokenizer="byte")
    for name in MODELS:
        train_dense(name, 0, text, len(tokenizer), _BUDGET.dense, folder / name)
    return text, len(tokenizer), folder


_FEW = {
    ("all-attention", "gates + both"),
    ("gpt2", "topk"),
    ("llama-gqa", "taylor + compensation"),
    ("llama-gqa", "Torch-Pruning Taylor, global"),
    ("llama-gqa", "small from scratch"),
    ("llama-gqa", "dense"),
}
_ALL = [(name, method) for name in MODELS for method in METHODS]


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*case, marks=() if case in _FEW else pytest.mark.full) for case in _ALL],
)
def test_every_method_has_the_same_heads_and_steps(name: str, method: str, given: tuple[Any, int, Path]) -> None:
    text, vocab_size, folder = given
    how = METHODS[method]
    if how.kind == "torch-pruning" and name == "all-attention":
        pytest.skip("Torch-Pruning is not asked to prune our own model")
    found = measure_point(name, how, 0.5, 0, text=text, vocab_size=vocab_size, dense=folder / name, budget=_BUDGET)
    if "cannot" in found:
        assert how.kind == "torch-pruning" and len(found["cannot"]) > 20
        return
    assert sum(found["heads"]) == (32 if how.kind == "dense" else 16)
    assert found["steps"] == (5 if how.kind == "scratch" else 3)
    assert all(perplexity > 1 for split in ("test", "valid") for perplexity in (found["after"][split],))
    assert (found["before"] is None) == (how.kind == "scratch")


@pytest.mark.parametrize("importance", ["l2", "taylor"])
@pytest.mark.parametrize("ranking", ["global", "layer"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_what_the_peer_leaves_is_what_a_cut_by_the_same_plan_leaves(name: str, ranking: Any, importance: Any) -> None:
    """Whole heads are gone, and nothing else of the model has changed."""
    whole: Any = fresh(name, 29, 0).eval()
    ids = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(0))
    peer = copy.deepcopy(whole)
    left = prune_heads(peer, 0.5, importance=importance, ranking=ranking, batches=[{"input_ids": ids}])
    assert sum(left) == 16
    kept = {}
    for layer, (old, new) in enumerate(zip(_values(whole), _values(peer), strict=True)):
        rows = old.unflatten(0, (8, 16))
        kept[layer] = [int((rows == row).all((1, 2)).nonzero()) for row in new.unflatten(0, (-1, 16))]
    unit: Any = "head" if name == "gpt2" else "kv_group"
    ours: Any = deadhead.cut(whole, deadhead.HeadPlan(kept=kept, total=dict.fromkeys(kept, 8), unit=unit))
    with torch.no_grad():
        assert difference(peer(input_ids=ids).logits, ours(input_ids=ids).logits) <= 1e-5


def _values(model: Any) -> list[torch.Tensor]:
    """Return each layer's value projection, a row for each channel."""
    if isinstance(model, GPT2LMHeadModel):
        return [block.attn.c_attn.weight.detach().T.chunk(3)[2] for block in model.transformer.h]
    return [layer.self_attn.v_proj.weight.detach() for layer in model.model.layers]


def test_other_models_are_refused_with_a_reason() -> None:
    with pytest.raises(CannotPrune, match="not those of AllAttentionForCausalLM"):
        prune_heads(fresh("all-attention", 29, 0), 0.5, importance="l2", ranking="layer", batches=[])
    with pytest.raises(CannotPrune, match="would take all 8 heads"):
        prune_heads(fresh("gpt2", 29, 0), 0.9, importance="l2", ranking="layer", batches=[])


def _point(method: str, sparsity: float, seed: int, before: float | None, after: float) -> dict[str, Any]:
    numbers = {
        key: None if value is None else {"test": value, "valid": 2 * value}
        for key, value in (("before", before), ("after", after))
    }
    return {"model": "gpt2", "method": method, "sparsity": sparsity, "seed": seed, **numbers}


def test_the_table_compares_each_seed_with_its_own_dense_model() -> None:
    found = [
        _point("dense", 0.0, 0, 5.5, 5.0),
        _point("dense", 0.0, 1, 5.5, 4.0),
        _point("gates", 0.5, 0, 6.0, 5.5),
        _point("gates", 0.5, 1, 6.0, 4.8),
        _point("taylor", 0.5, 0, 7.5, 5.25),
        _point("small from scratch", 0.25, 0, None, 6.0),
        {"model": "gpt2", "method": "random", "sparsity": 0.5, "seed": 0, "cannot": "no"},
    ]
    lines = quality.table(found).splitlines()
    assert lines[0] == "### gpt2: dense 4.500 (2 seeds)"
    assert "| gates | – | +35 → **+15.0 ± 7.1** | – |" in lines
    assert "| taylor | – | +50 → +5.0 | – |" in lines
    assert "| small from scratch | **+20.0** | – | – |" in lines
    assert "| random | – | cannot | – |" in lines
    assert quality.table(found, "valid").splitlines()[0] == "### gpt2: dense 9.000 (2 seeds)"


def test_what_matters_most_is_measured_first() -> None:
    todo = quality.points(MODELS, list(METHODS), quality.SPARSITIES, (0, 1, 2))
    assert len({point.file for point in todo}) == len(todo)
    assert {point.method for point in todo[:9]} == {"dense"}
    assert {point.sparsity for point in todo[9:45]} == {0.5}
    # Each at every sparsity and seed, but Torch-Pruning for our own model, and the dense one once a seed.
    assert len(todo) == 9 * (1 + 3 * (len(METHODS) - 1)) - 3 * 9 * 4 // 3
