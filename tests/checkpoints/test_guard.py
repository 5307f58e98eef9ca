"""What a checkpoint declares is refused before it costs memory, and every honest model passes."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deadhead
from benchmarks._tiny_models import CAUSAL_TYPES, tiny_model
from deadhead.checkpoints import checkpoint, guard
from deadhead.checkpoints.guard import guarded_config, misshapen, require_sound
from deadhead.disk.stored import read_header
from deadhead.errors import InputError
from tests.small_runs import assert_same_tensors, save_small_model, write_prose

_FEW = ("llama", "gpt2", "gpt_neox", "falcon", "mixtral", "qwen3", "gemma2", "bloom", "opt", "deepseek_v3", "mamba")


def _require_passed(model_type: str, folder: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(folder)
    require_sound(folder)
    assert type(guarded_config(folder)[0]) is type(model.config)


@pytest.mark.parametrize("model_type", _FEW)
def test_honest_models_pass(model_type: str, tmp_path: Path) -> None:
    _require_passed(model_type, tmp_path)
    assert misshapen(tmp_path) == ""


@pytest.mark.full
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_every_architecture_passes(model_type: str, tmp_path: Path) -> None:
    try:
        tiny_model(model_type).save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path)
    except Exception as error:
        pytest.skip(f"transformers itself does not make, save or load a tiny one: {error}")
    _require_passed(model_type, tmp_path)


def test_models_of_ours_pass_dense_gated_and_cut(tmp_path: Path) -> None:
    folder = save_small_model(tmp_path / "model", write_prose(tmp_path))
    require_sound(folder)
    model = deadhead.load(folder)
    gates = deadhead.attach(model)
    deadhead.save(model, tmp_path / "gated")
    require_sound(tmp_path / "gated")
    plan = gates.plan()
    deadhead.detach(model)
    deadhead.save(deadhead.cut(model, deadhead.HeadPlan(kept={0: [], 1: [2]}, total=plan.total)), tmp_path / "cut")
    require_sound(tmp_path / "cut")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


_IMPOSSIBLE = {
    "10^9 layers": ({"num_hidden_layers": 10**9}, "gives num_hidden_layers as 1000000000"),
    "a layer too many": ({"num_hidden_layers": 10_001}, "between 0 and 10000"),
    "as many kinds of layers": ({"layer_types": ["full_attention"] * 10_001}, "gives layer_types as 10001"),
    "layers below 0": ({"num_hidden_layers": -5}, "gives num_hidden_layers as -5"),
    "10^12 wide": ({"hidden_size": 10**12}, "gives hidden_size as"),
    "10^400 wide": ({"hidden_size": 10**400}, "gives hidden_size as 1000"),
    "10^12 words": ({"vocab_size": 10**12}, "gives vocab_size as"),
    "10^12 positions": ({"max_position_embeddings": 10**12}, "gives max_position_embeddings as"),
    "10^12 heads": ({"num_attention_heads": 10**12}, "gives num_attention_heads as"),
    "heads below 0": ({"num_attention_heads": -4}, "gives num_attention_heads as -4"),
    "wide below 0": ({"head_dim": -8}, "gives head_dim as -8"),
    "nested": ({"text_config": {"num_hidden_layers": 10**9}}, "gives num_hidden_layers as 1000000000"),
    "5 * 10^13 parameters": ({"vocab_size": 2**31, "hidden_size": 2**14}, "describes .* parameters, but no model has"),
    "more than the files hold": ({"intermediate_size": 2**21}, "parameters, but its files hold"),
    "a kernel of the hub": ({"_attn_implementation": "someone/kernel"}, "which is code of the Hugging Face hub"),
    "a kernel, nested": ({"text_config": {"attn_implementation": {"": "a/b@c"}}}, "attn_implementation|'a/b@c'"),
    "weights elsewhere": (
        {"transformers_weights": "../model.safetensors"},
        "only .safetensors files of its own folder",
    ),
    "weights of another kind": ({"transformers_weights": "model.bin"}, "only .safetensors files of its own folder"),
    "wide as a string": ({"hidden_size": "wide"}, "hidden_size"),
    "wide as a fraction": ({"hidden_size": 64.5}, "hidden_size"),
    "wide as null": ({"hidden_size": None}, "hidden_size"),
    "heads that do not divide": ({"num_attention_heads": 7}, "config.json|cannot be used|parameters|do not fit"),
    "no type": ({"model_type": None}, "model_type|model type|cannot be used"),
    "type of a list": ({"model_type": ["llama"], "auto_map": {}}, "never runs code"),
    "activation of nothing": ({"hidden_act": "none at all"}, "none at all"),
    "a type of numbers": ({"dtype": "float33"}, "float33|cannot be"),
}


@pytest.mark.parametrize("name", _IMPOSSIBLE)
def test_what_cannot_be_is_refused_in_one_sentence(name: str, llama: Path) -> None:
    values, message = _IMPOSSIBLE[name]
    _configure(llama, **values)
    with pytest.raises(InputError, match=message) as caught:
        deadhead.load(llama)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.slow
def test_a_memory_of_4_gib_is_enough_to_refuse_a_petabyte(llama: Path) -> None:
    """In a process whose memory is limited, so that what is refused late fails in another way."""
    code = (
        "import json, resource, sys\n"
        "from pathlib import Path\n"
        "from deadhead.checkpoints.checkpoint import load\n"
        "from deadhead.errors import InputError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))\n"
        "path = Path(sys.argv[1], 'config.json')\n"
        "good = json.loads(path.read_text())\n"
        "for name, value in json.loads(sys.argv[2]).items():\n"
        "    path.write_text(json.dumps({**good, name: value}))\n"
        "    try:\n"
        "        load(path.parent)\n"
        "    except InputError as error:\n"
        "        print(error)\n"
    )
    values = {"num_hidden_layers": 10**9, "intermediate_size": 2**31, "vocab_size": 2**31, "hidden_size": 2**30}
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama), json.dumps(values)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == len(values), done.stdout


def _header(path: Path, length: int, content: bytes) -> None:
    path.write_bytes(struct.pack("<Q", length) + content)


@pytest.mark.parametrize(
    ("length", "content"),
    [
        (10**18, b"{}"),
        (2**63, b"{}"),
        (100, b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'),
        (62, b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'),
        (2, b"[]"),
        (2, b"{}extra"),
    ],
)
def test_headers_that_lie(length: int, content: bytes, llama: Path) -> None:
    _header(llama / "model.safetensors", length, content)
    with pytest.raises(InputError, match="damaged|cut short") as caught:
        deadhead.load(llama)
    assert "\n" not in str(caught.value)


def test_a_header_of_shapes_that_overflow(llama: Path) -> None:
    content = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}).encode()
    _header(llama / "model.safetensors", len(content), content + b"\0" * 4)
    with pytest.raises(InputError, match="by the header, tensor a has shape"):
        deadhead.load(llama)


def test_a_tensor_of_another_shape_is_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} has shape \[3, 5\], but \[.*\] was expected"):
        deadhead.load(llama)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/../../model.safetensors", "..\\b.safetensors", "passwd", ""]
)
def test_an_index_that_points_outside(name: str, llama: Path) -> None:
    names = [tensor.name for tensor in read_header(llama / "model.safetensors")]
    (llama / "model.safetensors").rename(llama.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="only .safetensors files of its own folder"):
        deadhead.load(llama)


def test_more_modules_than_any_model_has(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_MOST_MODULES", 40)
    with pytest.raises(InputError, match="describes over 40 modules, but no model has as many"):
        deadhead.load(llama)
    monkeypatch.setattr(guard, "_MOST_MODULES", 60)
    deadhead.load(llama)


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"])
def test_links_that_lead_outside(name: str, llama: Path) -> None:
    outside = llama.parent / "outside"
    if (llama / name).exists():
        (llama / name).rename(outside)
    outside.touch()
    (llama / name).symlink_to(outside)
    with pytest.raises(InputError, match=f"{name} is a link to .*outside, outside of its folder"):
        deadhead.load(llama)


def test_the_cache_of_the_hub_is_made_of_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    model = tiny_model("llama")
    model.save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs") / str(number))
    assert_same_tensors(deadhead.load(snapshot).state_dict(), model.state_dict())


@pytest.mark.parametrize("size", ["sparse", "deep"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_files_that_are_too_much(name: str, size: str, llama: Path) -> None:
    if name.endswith("index.json"):
        (llama / "model.safetensors").rename(llama / "model-00001-of-00001.safetensors")
    with (llama / name).open("wb") as file:
        file.truncate(2**41) if size == "sparse" else file.write(b"[" * 200_000)
    with pytest.raises(InputError, match="longer than 64 MiB|nested too deep|cannot be") as caught:
        deadhead.load(llama)
    assert "\n" not in str(caught.value)


def test_pickles_are_refused(llama: Path) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    deadhead.load(llama)
    (llama / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"are pickled \(pytorch_model.bin\), and reading a pickle can run any code"):
        deadhead.load(llama)


def test_a_configuration_alone_is_read(llama: Path) -> None:
    assert checkpoint.load_config(llama / "config.json").model_type == "llama"
    _configure(llama, num_hidden_layers=10**9)
    for path in (llama, llama / "config.json"):
        with pytest.raises(InputError, match="num_hidden_layers"):
            checkpoint.load_config(path)
