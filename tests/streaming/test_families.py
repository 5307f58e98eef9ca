"""Architectures of transformers, cut shard by shard: the files of a cut in memory, bit for bit, or a reason why not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks._tiny_models import CAUSAL_TYPES, tiny_model
from deadhead import HeadPlan, InputError
from deadhead.attaching import attach, detach
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.streaming.cutting import cut_checkpoint
from tests.random_models import random_units
from tests.small_runs import assert_same_tensors, weights

# Fused projections, experts, biases and sinks, latent attention, the output projection elsewhere, tied embeddings;
# hybrids, whose cache has layers of several kinds; and other names in files than in memory.
_FEW = ("falcon", "gemma2", "gpt_oss", "mixtral", "opt", "phi3", "deepseek_v3", "bert", "qwen3_next", "bamba")
# A part of the reason why a type is not streamed; gemma3n's layers share keys and values, hy_v4's hand on more than
# hidden states.
_IN_MEMORY = {
    "gemma3n_text": "cannot be run alone",
    "git": "more than one stack of layers",
    "hrm_text": "in another form than in memory",
    "hy_v4": "cannot be run alone",
    "phi4_multimodal": "more than one stack of layers|not a separate entry of a list of layers",
}
# transformers itself gives one row of the embeddings another value than the file has.
_LOADED_OTHERWISE = ("youtu",)


def _cut_in_memory(model_type: str, seed: int, folder: Path) -> HeadPlan:
    """Save a random model and cut it by a random plan, which is returned."""
    draw = random.Random(f"{model_type} {seed}")
    model: Any = tiny_model(model_type, seed=seed)
    blocks = bool(HuggingFaceLayout().hidden_sites(model)) and draw.choice([False, True])
    gates = attach(model, unit=draw.choice(HuggingFaceLayout().units(model)), blocks=blocks)
    plan = random_units(draw, gates, output_scale=draw.random() < 0.3)
    detach(model)
    model.save_pretrained(folder / "source", max_shard_size=draw.choice(["20KB", "100KB", "5GB"]))
    cut_checkpoint(folder / "source", plan, folder / "in memory", stream=False)
    return plan


def _require_same(folder: Path, plan: HeadPlan) -> None:
    cut_checkpoint(folder / "source", plan, folder / "streamed", stream=True)
    assert_same_tensors(weights(folder / "streamed"), weights(folder / "in memory"))
    for name in ("config.json", "head_plan.json"):
        assert (folder / "streamed" / name).read_text() == (folder / "in memory" / name).read_text()


@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("model_type", [*_FEW, pytest.param("gemma3", marks=pytest.mark.slow)])
def test_as_in_memory(model_type: str, tmp_path: Path) -> None:
    _require_same(tmp_path, _cut_in_memory(model_type, 0, tmp_path))


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", [kind for kind in CAUSAL_TYPES if kind not in _LOADED_OTHERWISE])
def test_every_architecture_as_in_memory(model_type: str, seed: int, tmp_path: Path) -> None:
    try:
        plan = _cut_in_memory(model_type, seed, tmp_path)
    except Exception as error:
        pytest.skip(f"it is not cut in memory either: {error}")
    if model_type not in _IN_MEMORY:
        _require_same(tmp_path, plan)
        return
    with pytest.raises(InputError, match=f"cannot be cut shard by shard, because .*({_IN_MEMORY[model_type]})"):
        _require_same(tmp_path, plan)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "in memory"}
