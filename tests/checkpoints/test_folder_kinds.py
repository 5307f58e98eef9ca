"""What people take for a checkpoint folder is told as what it is, in one sentence of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.checkpoints import checkpoint
from deadhead.errors import InputError, UnsupportedModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _named(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "but there is no such file; fetch it"),
        (_named("weights.safetensors"), "but there is no such file; the folder holds weights.safetensors"),
        (_named("consolidated.00.pth"), "holds consolidated.00.pth, .* another format"),
        (_named("tf_model.h5"), "holds tf_model.h5, .* another format"),
        (_named("flax_model.msgpack"), "holds flax_model.msgpack, .* another format"),
        (_named("model.gguf"), "the folder holds model.gguf"),
        (_named("model.bin"), "are pickled .model.bin."),
        (_named("pytorch_model-00001-of-00002.bin"), "are pickled .pytorch_model-00001-of-00002.bin."),
    ],
)
def test_weights_that_are_not_there(change: Callable[[Path], object], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        deadhead.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("load", [deadhead.load, deadhead.load_gated])
def test_a_file_of_the_folder(load: Callable[[Path], object], name: str, folder: Path) -> None:
    with pytest.raises(InputError, match=f"{name}, but that is a file; name the folder that it lies in, .*model"):
        load(folder / name)


def test_a_file_that_is_no_configuration(folder: Path) -> None:
    with pytest.raises(InputError, match="but that is a file; name the folder"):
        checkpoint.load_config(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_numbers_that_only_a_quantiser_understands(dtype: torch.dtype, folder: Path) -> None:
    """Transformers would take them for the weights themselves."""
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=rf"is quantised \({name} is .*8\), and heads cannot be cut out of"):
        deadhead.load(folder)


@pytest.mark.parametrize("value", ["LlamaForCausalLM", [3], {"a": "b"}])
def test_classes_that_are_none(value: Any, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": value}))
    for load in (deadhead.load, checkpoint.load_config):
        with pytest.raises(InputError, match="must have a list of names as architectures, or none, but it is"):
            load(folder)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_small_files_that_are_no_objects(name: str, folder: Path) -> None:
    (folder / name).write_text("[1]")
    with pytest.raises(InputError, match=f"{name} must be a JSON object, but it is a list"):
        deadhead.load(folder)
