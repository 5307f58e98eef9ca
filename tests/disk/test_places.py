"""A path that no file system can have is told in one sentence, wherever it is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.gate_files import load_gates, save_gates
from deadhead.cli import execute
from deadhead.data import load_text, load_tokenizer
from deadhead.disk.places import checked_path
from deadhead.errors import InputError
from deadhead.measure.latency import Latency
from deadhead.streaming.cutting import cut_checkpoint
from deadhead.training.recipes.reading import load_recipe
from tests.small_phase import stream

_PATHS = {
    "a long name": ("a" * 5000, "too long: a name of 5,000 bytes"),
    "many names": ("/".join(["b" * 200] * 30), "too long: [0-9,]+ bytes"),
    "like one of the hub": ("someone/" + "c" * 300, "too long: a name of 300 bytes"),
    "a null character": ("a\0b", "null character"),
    "half a character": ("a\ud800b", "no name can hold"),
}


def _model() -> Any:
    return tiny_model("llama")


_CALLS: dict[str, Callable[[str], object]] = {
    "load": deadhead.load,
    "load_gated": deadhead.load_gated,
    "load_config": checkpoint.load_config,
    "save": lambda path: deadhead.save(_model(), path),
    "save of a base": lambda path: deadhead.save(_model(), "saved", base=path),
    "save_gates": lambda path: save_gates(deadhead.attach(_model()), path),
    "load_gates": lambda path: load_gates(_model(), path),
    "a plan read": deadhead.HeadPlan.from_json,
    "a plan written": deadhead.attach(tiny_model("llama")).plan().to_json,
    "a model": lambda path: deadhead.prune(path, criterion="magnitude", sparsity=0.5),
    "a text": lambda path: deadhead.prune(_model(), path, criterion="taylor", sparsity=0.5),
    "a place": lambda path: deadhead.prune(_model(), criterion="magnitude", sparsity=0.5, out=path),
    "a teacher": lambda path: deadhead.finetune(
        _model(), stream(300, vocab_size=9), teacher=path, distill=0.5, sequence_length=12
    ),
    "load_text": lambda path: load_text(path, tokenizer="bytes"),
    "a data set": lambda path: load_text(f"hf:{path}", tokenizer="bytes"),
    "load_tokenizer": load_tokenizer,
    "a recipe": load_recipe,
    "latencies": Latency.from_json,
    "export": lambda path: deadhead.export_model(_model(), path, to="padded"),
    "a cut from": lambda path: cut_checkpoint(Path(path), deadhead.attach(_model()).plan(), Path("cut")),
    "a cut to": lambda path: cut_checkpoint(Path("from"), deadhead.attach(_model()).plan(), Path(path)),
}


@pytest.mark.parametrize("name", _PATHS)
@pytest.mark.parametrize("call", _CALLS)
def test_functions(call: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, message = _PATHS[name]
    with pytest.raises(InputError, match=message) as caught:
        _CALLS[call](path)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable()
    assert list(tmp_path.iterdir()) == []


_COMMANDS = (
    "inspect {}",
    "inspect model --plan {}",
    "cut {} --plan p.json --out o",
    "prune --model {} --sparsity 0.5 --out o",
    "prune --model model --criterion magnitude --sparsity 0.5 --out {}",
    "prune --model model --criterion taylor --data {} --sparsity 0.5 --out o",
    "bench {}",
    "eval {}",
    "export {} --out o --to padded",
    "export model --out {} --to padded",
    "run {}",
    "report {}",
)


@pytest.mark.parametrize("name", ["a long name", "a null character"])
@pytest.mark.parametrize("command", _COMMANDS)
def test_commands(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("model")
    deadhead.attach(_model()).plan().to_json("p.json")
    path, message = _PATHS[name]
    assert execute([word.format(path) for word in command.split()]) == 2
    said = capfd.readouterr().err
    assert said.startswith("deadhead: ") and said.count("\n") == 1 and len(said) < 400
    # Of a null character typer says so itself.
    assert message.removesuffix("character") in said


@pytest.mark.parametrize("length", [243, 250, 255])
def test_names_that_leave_no_room_for_one_beside(length: int, tmp_path: Path) -> None:
    """What is written goes under a longer name first."""
    gates = deadhead.attach(_model())
    for name, write in {"d": lambda path: deadhead.save(_model(), path), "p": gates.plan().to_json}.items():
        try:
            write(tmp_path / (name * length))
        except InputError as error:
            assert "too long" in str(error)
            assert length > 243


def test_usual_paths_pass(tmp_path: Path) -> None:
    for path in ("", ".", "a b", "ü" * 127, tmp_path, "a" * 255, "/".join(["x"] * 1000)):
        assert checked_path(path) == Path(path)
