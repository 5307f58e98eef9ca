"""An export is there whole and right, or nothing is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

import deadhead
from deadhead.export.agreement import Reference, compare, make_reference
from deadhead.export.flat import FlatSession
from tests.export.small import cut_by, dense_model
from tests.random_models import tiny_model
from tests.small_runs import tree


def test_a_reference_is_the_greedy_continuation() -> None:
    model = tiny_model()
    reference = make_reference(model)
    assert len(reference.prompt_T) == 24
    assert len(reference.continuation_C) == 16
    np.testing.assert_array_equal(reference.logits[23:].argmax(-1), reference.continuation_C)
    short = make_reference(dense_model("gpt2", n_positions=20))
    assert (len(short.prompt_T), len(short.continuation_C)) == (10, 10)


def test_agreement_counts_tokens_before_the_first_other_one() -> None:
    logits = np.eye(6, dtype=np.float32)[[0, 1, 2, 3]]
    reference = Reference(np.array([0, 0]), np.array([1, 2, 3]), logits)
    same = compare(reference, logits, runtime="x", tolerance=1e-6)
    assert (same.logit_difference, same.tokens_equal, same.tokens) == (0.0, 3, 3)
    other = logits.copy()
    other[2] = [0, 0, 1, 1.5, 0, 0]
    found = compare(reference, other, runtime="x", tolerance=2.0)
    assert (found.logit_difference, found.tokens_equal) == (1.5, 1)
    for bad in (other, logits * float("nan"), logits[:2]):
        with pytest.raises(deadhead.errors.ExportError):
            compare(reference, bad, runtime="x", tolerance=1.0)


def test_what_is_there_stays(tmp_path: Path) -> None:
    model = cut_by("llama", [1, 3, 1, 2])
    (tmp_path / "a.gguf").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    for name, to in (("a.gguf", "gguf"), ("folder", "onnx"), ("folder", "padded"), ("folder", "openvino")):
        with pytest.raises(deadhead.InputError, match=f"There is something at .*{name} already"):
            deadhead.export_model(model, tmp_path / name, to=to)
    for out, options, message in (
        ("b", {"to": "gguf"}, "ends in .gguf was expected"),
        ("b", {"to": "tflite"}, "A format was expected"),
        ("b", {"to": "onnx", "kind": "f16"}, "for gguf only, not for onnx"),
    ):
        with pytest.raises(deadhead.InputError, match=message):
            deadhead.export_model(model, tmp_path / out, **options)  # type: ignore[arg-type]
    assert tree(tmp_path) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_models_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    """Gates and adapters would be lost without a word, and other precisions differ by their rounding."""
    model = cut_by("llama", [1, 3, 1, 2])
    with pytest.raises(deadhead.InputError, match="A model in float32 was expected, but this one is in torch.bfloat16"):
        deadhead.export_model(copy.deepcopy(model).bfloat16(), tmp_path / "a", to="onnx")
    deadhead.attach(model)
    with pytest.raises(deadhead.InputError, match="The model has gates, which no runtime knows; cut it first"):
        deadhead.export_model(model, tmp_path / "a", to="padded")
    deadhead.detach(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).get_base_model()
    with pytest.raises(deadhead.InputError, match="The model has PEFT adapters; merge them first"):
        deadhead.export_model(adapted, tmp_path / "a", to="onnx")
    assert not list(tmp_path.iterdir())


_WITHOUT = """
import sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[3].split(","):
    sys.modules[name] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name in sys.argv[3].split(",") else real(name, *more)
from deadhead.cli import execute
sys.exit(execute(["export", sys.argv[1], "--out", sys.argv[2], *sys.argv[4:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "options", "code", "message"),
    [
        ("gguf", ["--to", "gguf"], 2, "pip install 'deadhead[gguf]'"),
        ("onnxscript", ["--to", "onnx"], 2, "needs onnxscript; install with: pip install 'deadhead[onnx]'"),
        ("openvino", ["--to", "openvino"], 2, "pip install 'deadhead[openvino]'"),
        (
            "llama_cpp",
            ["--to", "gguf", "--type", "q4_k_m"],
            2,
            "needs llama_cpp; install with: pip install 'deadhead[llama-cpp]'",
        ),
        ("llama_cpp", ["--to", "gguf"], 0, "Not checked: llama.cpp is not installed"),
    ],
)
def test_libraries_that_are_missing(missing: str, options: list[str], code: int, message: str, tmp_path: Path) -> None:
    """A process in which they cannot be imported: one sentence, and nothing is written but what can be."""
    cut_by("llama", [1, 3, 1, 2]).save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / ("model.gguf" if "gguf" in options else "model")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(tmp_path / "model"), str(out), missing, *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert out.exists() == (code == 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("A file system can be mounted by root only.")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "name"), [("gguf", "model.gguf"), ("onnx", "model"), ("padded", "model")])
def test_a_full_disk(to: str, name: str, small_disk: Path) -> None:
    with pytest.raises(deadhead.InputError, match="No space is left on the device") as caught:
        deadhead.export_model(cut_by("llama", [1, 3, 1, 2]), small_disk / name, to=to)
    assert "\n" not in str(caught.value)
    assert not list(small_disk.iterdir())


@pytest.mark.slow
def test_an_onnx_folder_has_what_programs_look_for(tmp_path: Path) -> None:
    """A plain configuration without code, and a session that reads as the model does."""
    model = cut_by("llama", [1, 3, 1, 2])
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "LICENSE.txt").write_text("be kind")
    found = deadhead.export_model(model, tmp_path / "out", to="onnx", base=tmp_path / "base")
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "be kind"
    assert found.agreements[0].logit_difference <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    reference = make_reference(model, seed=1)
    session = FlatSession(tmp_path / "out" / "model.onnx")
    parts = [session.read(part[None]) for part in (reference.ids[:5], reference.ids[5:6], reference.ids[6:])]
    assert np.abs(np.concatenate(parts, axis=1)[0] - reference.logits).max() < 1e-4
