"""`deadhead inspect --training`: the memory of training, of a folder or of a configuration alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig

from deadhead.cli import execute
from deadhead.measure.cost import skeleton
from deadhead.training.recipes.recipe import PruneRecipe
from deadhead.training.runs.training_memory import training_memory
from tests.conftest import ROOT


@pytest.fixture
def inspect(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `deadhead inspect` and return its code, what it printed, and its errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = execute(["inspect", *(str(argument) for argument in arguments)])
        return (code, *capfd.readouterr())

    return run


def test_the_table(given: Path, inspect: Any) -> None:
    code, text, errors = inspect(given / "llama", "--training", "--batch-size", 2, "--sequence-length", 16)
    assert (code, errors) == (0, "")
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if "activations" in line)
    assert lines[start].split() == ["weights", "gradients", "optimizer", "activations", "total"]
    names = [line[:20].strip() for line in lines[start + 1 : start + 4]]
    assert names == ["all weights learn", "LoRA adapters learn", "only gates learn"]
    assert max(map(len, lines[start : start + 4])) <= 80
    assert "2 rows" in lines[start + 4]
    code, without, _ = inspect(given / "llama")
    assert code == 0
    assert "activations" not in without and text.startswith(without)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_the_numbers(settings: dict[str, bool], given: Path, inspect: Any) -> None:
    options = [f"--{name.replace('_', '-')}" for name in settings]
    arguments = ("--training", "--batch-size", 2, "--sequence-length", 16, *options, "--json")
    code, text, errors = inspect(given / "llama", *arguments)
    assert (code, errors) == (0, "")
    found = json.loads(text)["training_memory"]
    model = skeleton(AutoConfig.from_pretrained(given / "llama"))
    modes: dict[str, Any] = {"full": {}, "lora": {"lora_rank": 16}, "frozen": {"freeze_weights": True}}
    assert list(found) == ["full", "lora", "frozen"]
    for mode, memory in found.items():
        recipe = PruneRecipe(batch_size=2, sequence_length=16, blocks=False, **settings, **modes[mode])  # type: ignore[arg-type]
        assert memory == asdict(training_memory(model, recipe))
    assert "training_memory" not in json.loads(inspect(given / "llama", "--json")[1])


def test_a_model_of_ours(given: Path, inspect: Any) -> None:
    """It takes no adapters, and its rows are its segments."""
    found = json.loads(inspect(given / "model", "--training", "--json")[1])["training_memory"]
    assert list(found) == ["full", "frozen"]
    model = skeleton(AutoConfig.from_pretrained(given / "model"))
    assert found["full"] == asdict(training_memory(model, PruneRecipe(batch_size=8, blocks=False)))


def test_a_configuration_alone(given: Path, tmp_path: Path, inspect: Any) -> None:
    """A config.json says all there is to say, by whatever name, and in its folder."""
    expected = inspect(given / "llama", "--json", "--training")
    (tmp_path / "folder").mkdir()
    shutil.copy(given / "llama" / "config.json", tmp_path / "folder")
    shutil.copy(given / "llama" / "config.json", tmp_path / "other.json")
    for place in (tmp_path / "folder", tmp_path / "folder" / "config.json", tmp_path / "other.json"):
        assert inspect(place, "--json", "--training") == expected
    (tmp_path / "broken.json").write_text("{")
    code, text, errors = inspect(tmp_path / "broken.json")
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert f"The model configuration {tmp_path / 'broken.json'} is not JSON" in errors


def test_seventy_billions(tmp_path: Path, inspect: Any) -> None:
    """Llama 3's largest first shape: what is published of it, and a cache in its own precision."""
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    found = json.loads(inspect(tmp_path, "--length", 8192, "--json")[1])
    assert found["parameters"] == 70_553_706_496
    # Keys and values of 80 layers × 8 heads × 128 numbers × 2 bytes.
    assert found["kv_cache_bytes"] == 2 * 80 * 8 * 128 * 2 * 8192
    # Twice the parameters but for the embedding, norms, and the context's two products.
    norms = 161 * 8192
    assert found["flops_per_token"] == 2 * (70_553_706_496 - 128256 * 8192 - norms) + 2 * 2 * 80 * 8192 * 8193


def test_what_is_refused(given: Path, inspect: Any) -> None:
    code, text, errors = inspect(ROOT / "src" / "deadhead" / "recipes" / "paper.toml", "--training")
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert "leave out --training" in errors
    code, text, errors = inspect(given / "llama", "--training", "--sequence-length", 100_000)
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert "positions, but got a sequence_length of 100000" in errors
