"""`deadhead export`: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import deadhead
from deadhead.checkpoints.gate_files import save_gates
from deadhead.cli import execute
from deadhead.errors import is_installed
from tests.small_runs import tree


def test_padded(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = {"version": 1, "unit": "kv_group", "total": {"0": 2, "1": 2, "2": 2}, "kept": {"0": [1], "1": []}}
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"kept": {"0": [1], "1": [], "2": [0, 1]}}))
    cut = ["cut", str(given / "llama"), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "cut")]
    assert execute(cut) == 0
    capsys.readouterr()
    assert execute(["export", str(tmp_path / "cut"), "--to", "padded", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["form"], said["detail"], said["tokenizer"]) == ("padded", "LlamaForCausalLM", True)
    assert said["agreements"][0]["logit_difference"] <= 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "trust_remote_code" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("llama_cpp"), reason="llama-cpp-python is not installed")
def test_gguf(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the checkpoint's own tokenizer, of bytes."""
    assert execute(["export", str(given / "llama"), "--to", "gguf", "--out", str(tmp_path / "model.gguf")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "model.gguf: gguf, f16, as llama, " in first
    assert "without a tokenizer" not in first
    assert "llama-cpp-python" in second
    assert "of 16 greedy tokens are equal" in second
    path = tmp_path / "bare.gguf"
    assert execute(["export", str(given / "llama"), "--to", "gguf", "--out", str(path), "--no-tokenizer"]) == 0
    assert "without a tokenizer" in capsys.readouterr().out
    assert path.stat().st_size < (tmp_path / "model.gguf").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{llama}", "--to", "gguf", "--out", "{out}"], "A file name that ends in .gguf was expected"),
        (["{llama}", "--to", "onnx", "--out", "{text}"], "There is something at .* already"),
        (["{llama}", "--to", "onnx", "--type", "f16", "--out", "{out}"], "for gguf only"),
        (["{llama}", "--to", "coreml", "--out", "{out}"], "coreml"),
        (["{out}/none/at/all", "--to", "onnx", "--out", "{out}"], "A checkpoint folder was expected"),
        (
            ["{model}", "--to", "gguf", "--out", "{out}.gguf"],
            "of type all_attention cannot be written as GGUF: .* Export it to onnx",
        ),
        (["{model}", "--to", "padded", "--out", "{out}"], "has no stock architecture"),
        (["{llama}", "--to", "padded", "--out", "{out}"], "its checkpoint loads in every server as it is"),
        (["{llama}", "--to", "gguf", "--type", "q99", "--out", "{out}.gguf"], "q99"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, exit code 2, nothing written."""
    shutil.copy(given / "prose.txt", tmp_path / "prose.txt")
    before = tree(tmp_path)
    names = {
        "llama": given / "llama",
        "model": given / "model",
        "out": tmp_path / "out",
        "text": tmp_path / "prose.txt",
    }
    assert execute(["export", *(argument.format(**names) for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert re.search(message, said), said
    assert tree(tmp_path) == before


def test_gates_that_are_still_on(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan is named where there is one; a Trainer's checkpoint has none."""
    folder = Path(shutil.copytree(given / "llama", tmp_path / "gated"))
    save_gates(deadhead.attach(deadhead.load(folder)), folder)
    command = ["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "out")]
    for how in (
        "deadhead.load_gated returns model and gates",
        f"deadhead cut {folder} --plan {folder / 'head_plan.json'}",
    ):
        assert execute(command) == 2
        assert f"has gates that are still on; cut it first: {how}." in capsys.readouterr().err
        (folder / "head_plan.json").write_text("{}")
