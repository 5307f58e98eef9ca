"""Memory of the parts of pruning by formulas: near what tensors really hold, heeded, and as it must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForSequenceClassification

import deadhead
from benchmarks.memory import SIZES, compare_part
from deadhead.errors import InputError
from deadhead.measure.cost import skeleton
from deadhead.training.phases.defaults import recovery
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.forecast import Part, forecast
from deadhead.training.runs.part_memory import ranking_memory, weight_bytes
from tests.small_runs import save_small_llama, stream, tree, weights, write_prose

_HOW: dict[str, Any] = {"params": 0.8, "of": "blocks", "steps": 3, "batch_size": 4, "sequence_length": 64}
_SMALL_BERT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_FAST = ("flap", "reconstruction", "fit", "recover with LoRA")


def _llama(**sizes: int) -> Any:
    return AutoConfig.for_model("llama", **{**SIZES["tiny"], "hidden_size": 128, "vocab_size": 1024, **sizes})


@pytest.mark.parametrize(
    "part",
    [
        *_FAST,
        *(pytest.param(part, marks=pytest.mark.slow) for part in ("taylor", "second-order", "sizes", "recover")),
    ],
)
def test_the_formula_is_near_the_measured_peak(part: str) -> None:
    formula, measured = compare_part(part, _llama(), torch.float32, rows=8, length=96, fitted=48)
    assert formula == pytest.approx(measured, rel=0.35)


def _parts(config: Any, *, recover: int = 0, streamed: bool = False, **settings: Any) -> list[Part]:
    return forecast(skeleton(config), PruneRecipe(**{**_HOW, **settings}), recover=recover, streamed=streamed)


def test_what_grows_and_what_saves() -> None:
    def memory(**settings: Any) -> list[int]:
        return [part.memory for part in _parts(_llama(), recover=2, **{"criterion": "flap", **settings})]

    ranked, fitted, recovered = memory()
    assert min(ranked, fitted, recovered) > weight_bytes(skeleton(_llama()))
    assert all(more > less for more, less in zip(memory(batch_size=16), (ranked, 0, recovered), strict=True))
    assert memory(compensate_rows=2048)[1] > fitted
    assert memory(gradient_checkpointing=True)[2] < recovered and memory(lora_rank=4)[2] < recovered
    assert memory(criterion="sizes")[0] > memory(criterion="reconstruction")[0] > ranked
    gates = [_parts(_llama(), criterion="gates", freeze_weights=frozen)[0].memory for frozen in (False, True)]
    assert gates[0] > gates[1]


@pytest.mark.parametrize(
    "budget", [{"memory": "6MB"}, {"flops": 0.7}, {"kv_cache": 0.5}, {"sparsity": 0.5}, {"speedup": 1.3}], ids=str
)
def test_every_budget_has_an_estimate(budget: dict[str, Any]) -> None:
    for criterion in ("sizes", "flap", "gates"):
        if criterion != "sizes" or "sparsity" not in budget:
            settings = {"params": None, "of": "all", **budget, "criterion": criterion}
            parts = _parts(_llama(), recover=2, **settings)
            assert all(part.memory > 0 for part in parts) and len(parts) == 3


def test_layer_by_layer_a_model_may_have_any_number_of_layers() -> None:
    few, many = (_llama(num_hidden_layers=layers) for layers in (4, 40))
    for criterion in ("flap", "reconstruction", "magnitude"):
        one, ten = ([part.memory for part in _parts(each, criterion=criterion, streamed=True)] for each in (few, many))
        assert one == ten
        assert max(ten) < max(part.memory for part in _parts(many, criterion=criterion))
    derived = [_parts(each, criterion="taylor", streamed=True)[0].memory for each in (few, many)]
    assert derived[0] == pytest.approx(derived[1], rel=0.2)


def test_moments_that_do_not_fit_are_gathered_in_several_passes() -> None:
    model = skeleton(_llama(num_hidden_layers=40))
    recipe = PruneRecipe(**_HOW, criterion="reconstruction")
    assert ranking_memory(model, recipe, free=10**8) < ranking_memory(model, recipe, free=10**10)


def test_what_would_take_too_much_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    save_small_llama(tmp_path / "llama", write_prose(tmp_path))
    before, there = weights(tmp_path / "llama"), tree(tmp_path)
    how: dict[str, Any] = {**_HOW, "sequence_length": 24, "criterion": "flap", "compensate_rows": 8}
    text, out = stream(2000), tmp_path / "new" / "folders" / "out"
    needed = max(part.memory for part in forecast(deadhead.load(tmp_path / "llama"), PruneRecipe(**how)))
    for prune in (deadhead.prune, deadhead.prune_checkpoint):
        with pytest.raises(InputError, match="takes about .* of memory, more than the max_memory of 0.010 MiB; .*"):
            prune(tmp_path / "llama", text, out=out, max_memory="10kB", **how)
        assert tree(tmp_path) == there and not (tmp_path / "new").exists()
    model = deadhead.load(tmp_path / "llama")
    with pytest.raises(InputError, match="max_memory"):
        deadhead.prune(model, text, max_memory=needed // 2, **how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)
    pruned = deadhead.prune(model, text, max_memory=needed, **how)
    assert pruned.costs.after.parameters < pruned.costs.before.parameters
    with pytest.raises(InputError, match="max_memory: a size such as 4GiB or 500MB was expected, but 'lots' was given"):
        deadhead.prune(model, text, max_memory="lots", **how)
    encoder = BertForSequenceClassification(BertConfig(**_SMALL_BERT))
    with pytest.raises(InputError, match="whose memory is estimated, but BertForSequenceClassification does not"):
        deadhead.prune(encoder, criterion="magnitude", sparsity=0.5, max_memory="4GiB")
    with pytest.raises(InputError, match="max_memory is for deadhead.prune"):
        deadhead.finetune(model, text, max_memory="4GiB", steps=1)


def test_a_recovery_needs_the_dense_model_beside_it() -> None:
    phase = recovery(PruneRecipe(**_HOW), 2, skeleton(_llama()))
    assert phase.distill
    dense, recovered = weight_bytes(skeleton(_llama())), _parts(_llama(), recover=2, criterion="flap")[-1].memory
    undistilled = _parts(_llama(), recover=2, criterion="flap", distill=0.0)[-1].memory
    assert recovered > undistilled > 4 * 0.8 * dense
