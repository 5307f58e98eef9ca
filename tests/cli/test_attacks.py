"""No command runs code that comes with a checkpoint, or reads or writes outside of where it was told to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from deadhead.cli import execute
from tests.cli.cases import Case, require_one_sentence
from tests.hostile_files import write_code, write_pickle

# Every command that takes a model; {evil} is the model's folder.
_COMMANDS = {
    "inspect": "inspect {evil}",
    "inspect config.json": "inspect {evil}/config.json",
    "eval": "eval {evil} --data {text}",
    "generate": "generate {evil}",
    "bench": "bench {evil}",
    "bench dense": "bench {model} --dense {evil}",
    "cut": "cut {evil} --plan {plan} --out out",
    "cut streamed": "cut {evil} --plan {plan} --out out --stream",
    "prune": "prune --model {evil} --data {text} --out out --steps 2",
    "prune teacher": "prune --model {llama} --teacher {evil} --distill 0.5 --data {text} --out out --steps 2",
    "finetune": "finetune --model {evil} --data {text} --out out --steps 2",
    "export": "export {evil} --to padded --out out",
    "export gguf": "export {evil} --to gguf --out out.gguf",
    "watch": "watch {evil}",
    "report": "report {evil}",
}


@pytest.mark.parametrize("kind", ["unheard", "gpt2"])
@pytest.mark.parametrize("name", _COMMANDS)
def test_code_of_a_checkpoint_never_runs(
    name: str,
    kind: str,
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A type that nobody knows is refused; of a known one the code is left alone, and what it is not is said."""

    def prepare(folder: Path) -> None:
        evil = folder / "evil"
        shutil.copytree(given / "llama", evil)
        (evil / "SHA256SUMS").unlink(missing_ok=True)
        auto_map = write_code(evil, tmp_path / "touched")
        config = json.loads((evil / "config.json").read_text())
        (evil / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": auto_map}))
        words = json.loads((evil / "tokenizer_config.json").read_text())
        words = {**words, "tokenizer_class": "Words", "auto_map": auto_map}
        (evil / "tokenizer_config.json").write_text(json.dumps(words))
        write_pickle(evil / "pytorch_model.bin", tmp_path / "touched")

    command = _COMMANDS[name].replace("{evil}", "evil")
    if kind == "gpt2" and name.startswith("inspect"):
        prepare(tmp_path)
        assert execute(["inspect", str(tmp_path / "evil")]) == 0
    else:
        require_one_sentence(Case(command, "evil", prepare), given, tmp_path, monkeypatch, capfd)
    assert not (tmp_path / "touched").exists()


def test_pickled_weights_alone_are_refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare(folder: Path) -> None:
        shutil.copytree(given / "llama", folder / "evil")
        (folder / "evil" / "SHA256SUMS").unlink(missing_ok=True)
        (folder / "evil" / "model.safetensors").unlink()
        write_pickle(folder / "evil" / "pytorch_model.bin", tmp_path / "touched")

    case = Case("eval evil --data {text}", r"are pickled \(pytorch_model.bin\)", prepare)
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)
    assert not (tmp_path / "touched").exists()


def test_an_adapter_beside_the_weights_is_refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Transformers would load it unasked, with a base model from wherever it says."""

    def prepare(folder: Path) -> None:
        shutil.copytree(given / "llama", folder / "evil")
        (folder / "evil" / "SHA256SUMS").unlink(missing_ok=True)
        adapter = {"peft_type": "LORA", "base_model_name_or_path": "../../given/llama", "r": 2}
        (folder / "evil" / "adapter_config.json").write_text(json.dumps(adapter))
        write_pickle(folder / "evil" / "adapter_model.bin", tmp_path / "touched")

    case = Case("eval evil --data {text}", "holds an adapter", prepare)
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("layer", ["../../../tmp/x", "/etc/passwd", "..", "lm_head", "model.layers.0.mlp", "__class__"])
def test_a_plan_names_layers_and_nothing_else(
    layer: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare(folder: Path) -> None:
        plan = {"version": 1, "unit": "kv_group", "total": {layer: 2, "1": 2, "2": 2}, "kept": {layer: [0]}}
        (folder / "p.json").write_text(json.dumps(plan))

    case = Case("cut {llama} --plan p.json --out {out}", "head plan|plan is for", prepare)
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)
