"""Architectures of transformers, cut shard by shard: the files of a cut in memory, bit for bit, or a reason why not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks._tiny_models import CAUSAL_TYPES, tiny_model
from deadhead import InputError, UnsupportedModel
from deadhead.gating import attach, detach
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.streaming.cutting import cut_checkpoint
from tests.helpers import random_units
from tests.small import assert_same_tensors

# Fused projections, experts, biases and sinks, latent attention, the output projection elsewhere, tied embeddings.
_FEW = ("falcon", "gemma2", "gpt_oss", "mixtral", "opt", "phi3", "deepseek_v3", "bert")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _cut_both_ways(model_type: str, seed: int, folder: Path) -> str:
    """Cut by a random plan; return why not shard by shard, or nothing."""
    draw = random.Random(f"{model_type} {seed}")
    model: Any = tiny_model(model_type, seed=seed)
    blocks = bool(HuggingFaceLayout().block_sites(model)) and draw.choice([False, True])
    gates = attach(model, unit=draw.choice(HuggingFaceLayout().units(model)), blocks=blocks)
    plan = random_units(draw, gates, output_scale=draw.random() < 0.3)
    detach(model)
    model.save_pretrained(folder / "source", max_shard_size=draw.choice(["20KB", "100KB", "5GB"]))
    cut_checkpoint(folder / "source", plan, folder / "in memory", stream=False)
    try:
        cut_checkpoint(folder / "source", plan, folder / "streamed", stream=True)
    except InputError as error:
        assert not (folder / "streamed").exists() and not (folder / "streamed.work").exists()
        return str(error)
    assert_same_tensors(_tensors(folder / "streamed"), _tensors(folder / "in memory"))
    for name in ("config.json", "head_plan.json"):
        assert (folder / "streamed" / name).read_text() == (folder / "in memory" / name).read_text()
    return ""


@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("model_type", _FEW)
def test_as_in_memory(model_type: str, tmp_path: Path) -> None:
    assert _cut_both_ways(model_type, 0, tmp_path) == ""


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_every_architecture_as_in_memory(model_type: str, tmp_path: Path) -> None:
    try:
        attach(tiny_model(model_type), unit=HuggingFaceLayout().units(tiny_model(model_type))[0])
    except UnsupportedModel as error:
        pytest.skip(str(error))
    except Exception as error:
        pytest.skip(f"transformers itself does not make a tiny one: {error}")
    for seed in range(3):
        (tmp_path / str(seed)).mkdir()
        reason = _cut_both_ways(model_type, seed, tmp_path / str(seed))
        assert not reason or "cannot be cut shard by shard, as " in reason
