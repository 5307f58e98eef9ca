"""Bad command lines and bad input: exit code 2, one sentence, no traceback, nothing written. Ctrl-C: 130."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM

from deadhead.cli import execute
from deadhead.training.recipe import to_toml
from tests.small import child, small_recipe, tree

_TRAIN = "train --data {text} --out {out} --steps 2 --batch-size 2 --layers 2 --width 32 --heads 4 --segment-length 8"
_PRUNE = "prune --model {model} --data {text} --out {out} --steps 2 --batch-size 2"
_LLAMA = _PRUNE.replace("{model}", "{llama}")
_TUNE = "finetune --model {llama} --data {text} --out {out} --steps 2 --batch-size 2"


@dataclass(frozen=True)
class _Case:
    """A command line, what its sentence must match, and how the folder it runs in is prepared."""

    command: str
    message: str
    prepare: Callable[[Path], object] = lambda folder: None


def _write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def _folder_of(name: str, file: str = "letter.txt") -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        (folder / name).mkdir()
        (folder / name / file).write_text("dear")

    return prepare


def _damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        shutil.copytree(folder.parent / "given" / "model", folder / "damaged")
        # As in a checkpoint that others wrote: by its checksums every change would be seen.
        (folder / "damaged" / "SHA256SUMS").unlink()
        change(folder / "damaged")

    return prepare


def _cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _config(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _other_architecture(folder: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1))
    model.save_pretrained(folder / "mamba")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "given" / "model" / name, folder / "mamba")


def _recipe(**sections: object) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        recipe = small_recipe(folder.parent / "given" / "prose.txt", **sections)
        (folder / "r.toml").write_text(to_toml(recipe))

    return prepare


def _edited(old: str, new: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        _recipe()(folder)
        text = (folder / "r.toml").read_text()
        assert old in text
        (folder / "r.toml").write_text(text.replace(old, new))

    return prepare


def _plan(kept: str, total: str = '{"0": 4, "1": 4}', unit: str = "head") -> Callable[[Path], object]:
    return _write("p.json", f'{{"version": 1, "unit": "{unit}", "total": {total}, "kept": {kept}}}')


def _two(*prepares: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [prepare(folder) for prepare in prepares]


_CUT = "cut {model} --plan p.json --out {out}"
_CASES = {
    # The command line itself.
    "unknown command": _Case("sprout --out {out}", "No such command 'sprout'"),
    "near command": _Case("trian --out {out}", "No such command 'trian'"),
    "unknown option": _Case("train --out {out} --setps 3", "No such option: --setps"),
    "unknown option of the program": _Case("--colour", "No such option: --colour"),
    "option without a value": _Case("train --out", "Option '--out' requires an argument"),
    "without out": _Case("train --data {text}", "Missing option '--out'"),
    "without model": _Case("inspect", "Missing argument 'MODEL'"),
    "without recipe": _Case("run", "Missing argument 'RECIPE.toml'"),
    "too many arguments": _Case("inspect {model} {model}", "unexpected extra argument"),
    "steps not a number": _Case(_TRAIN + " --steps many", "Invalid value for '--steps'"),
    "negative steps": _Case(_TRAIN + " --steps -5", "Invalid value for '--steps'"),
    "no steps": _Case(_TRAIN + " --steps 0", "Invalid value for '--steps'"),
    "negative seed": _Case(_TRAIN + " --seed -1", "Invalid value for '--seed'"),
    "unknown schedule": _Case(_TRAIN + " --schedule step", "Invalid value for '--schedule'.*'constant', 'cosine'"),
    "unknown tokenizer": _Case(_TRAIN + " --tokenizer char", "Invalid value for '--tokenizer'.*'byte', 'bpe'"),
    "negative rate": _Case(_TRAIN + " --learning-rate -1", "wrong value for 'learning_rate'"),
    "rate not a number": _Case(_TRAIN + " --learning-rate nan", "wrong value for 'learning_rate'"),
    "negative l0": _Case(_PRUNE + " --l0 -1", "Invalid value for '--l0'"),
    "l0 not a number": _Case(_PRUNE + " --l0 nan", "value for '(--)?l0'"),
    "sparsity above one": _Case(_PRUNE + " --sparsity 1.5", "Invalid value for '--sparsity'"),
    "criterion without a share": _Case(_PRUNE + " --criterion taylor", "with another set sparsity"),
    "leaning without a share": _Case(_PRUNE + " --start-from taylor", "start_from is for gates with a target"),
    "unknown criterion": _Case(_PRUNE + " --criterion best", "Invalid value for '--criterion'"),
    "unknown ranking": _Case(_PRUNE + " --ranking best", "Invalid value for '--ranking'"),
    "negative rate of gates": _Case(_PRUNE + " --gate-lr -1", "Invalid value for '--gate-lr'"),
    "no gate rate": _Case(_PRUNE + " --gate-lr-scale 0", "wrong value for 'gate_lr_scale'"),
    "prune without model": _Case("prune --data {text} --out {out}", "Missing option '--model'"),
    "scale by nothing": _Case("demo --scale-steps 0 --out {out}", "Invalid value for '--scale-steps'"),
    # Text.
    "missing text": _Case(_TRAIN.replace("{text}", "nothing.txt"), "nothing.txt"),
    "empty text": _Case(_TRAIN.replace("{text}", "t"), "empty", _write("t", "")),
    "binary text": _Case(_TRAIN.replace("{text}", "t"), "text", _write("t", b"\x00\x01\x02" * 99)),
    "text not UTF-8": _Case(_TRAIN.replace("{text}", "t"), "UTF-8", _write("t", "naïve ".encode("latin-1") * 99)),
    "text too short": _Case(_TRAIN.replace("{text}", "t"), "17 tokens were expected", _write("t", "short")),
    "text too short to go on": _Case(_PRUNE.replace("{text}", "t"), "17 tokens were expected", _write("t", "short")),
    "empty folder of texts": _Case(_TRAIN.replace("{text}", "."), "Text files were expected"),
    "column of a file": _Case(_TRAIN + " --column text", "column is for data sets"),
    "data set that cannot be loaded": _Case(_TRAIN.replace("{text}", "hf:no/such"), "no/such"),
    "data set without a name": _Case(_TRAIN.replace("{text}", "hf:"), "hf:"),
    "vocabulary of bytes": _Case(_TRAIN + " --vocab-size 99", "A byte tokenizer has 257 tokens"),
    "vocabulary too small": _Case(_TRAIN + " --tokenizer bpe --vocab-size 9", "vocab_size of at least 258"),
    # Sizes and places.
    "heads not dividing width": _Case(_TRAIN + " --heads 5", "num_attention_heads must divide hidden_size"),
    "out is a file": _Case(_TRAIN.replace("{out}", "f"), "f is a file", _write("f", "")),
    "out is below a file": _Case(_TRAIN.replace("{out}", "f/m"), "f", _write("f", "")),
    "out is not ours": _Case(_TRAIN.replace("{out}", "d"), "not written by deadhead", _folder_of("d")),
    "run out is not ours": _Case("run r.toml --out d", "not written by deadhead", _two(_recipe(), _folder_of("d"))),
    "demo out is not ours": _Case("demo --out d", "not written by deadhead", _folder_of("d")),
    "a run that was begun": _Case(
        "run r.toml --out d", "go on with --resume", _two(_recipe(), _folder_of("d", "recipe.toml"))
    ),
    "a phase that was stopped": _Case(_TRAIN.replace("{out}", "d"), "d.work is left of", _folder_of("d.work")),
    # Recipes.
    "missing recipe": _Case("run none.toml --out {out}", "there is no such file"),
    "recipe is a folder": _Case("run . --out {out}", "cannot be read as text"),
    "recipe not TOML": _Case("run r.toml --out {out}", "is not TOML", _write("r.toml", "a = [")),
    "binary recipe": _Case("run r.toml --out {out}", "cannot be read as text", _write("r.toml", b"\xff\x00")),
    "unknown key": _Case("run r.toml --out {out}", "did you mean 'l0'?", _edited("l0 =", "l_0 =")),
    "unknown section": _Case("run r.toml --out {out}", "did you mean 'finetune'?", _edited("[finetune]", "[finetuen]")),
    "wrong type": _Case("run r.toml --out {out}", "wrong value for 'train.steps'", _edited("steps = 3", 'steps = "3"')),
    "recipe's heads": _Case("run r.toml --out {out}", "must divide hidden_size", _recipe(model={"heads": 3})),
    "recipe's text": _Case("run r.toml --out {out}", "nothing.txt", _recipe(data={"source": "nothing.txt"})),
    "recipe for a phase": _Case(_TRAIN + " --recipe none.toml", "A recipe was expected at none.toml"),
    # Models.
    "missing model": _Case("inspect nothing", "There is no folder nothing"),
    "model is a file": _Case("eval {text} --data {text}", "A checkpoint folder was expected"),
    "model is a folder of something": _Case("generate d", "d/config.json, but there is no such file", _folder_of("d")),
    "model is a name": _Case("bench gpt2", "no folder gpt2, and the Hugging Face hub gave no model of that name"),
    "model cut short": _Case("eval damaged --data {text}", "damaged or cut short", _damaged(_cut_short)),
    "model cut short to prune": _Case(_PRUNE.replace("{model}", "damaged"), "cut short", _damaged(_cut_short)),
    "weights missing": _Case(
        "generate damaged", "no file named", _damaged(lambda folder: (folder / "model.safetensors").unlink())
    ),
    "configuration not JSON": _Case("inspect damaged", "JSON", _damaged(lambda d: (d / "config.json").write_text("{"))),
    "configuration a list": _Case(
        "inspect damaged", "configuration", _damaged(lambda d: (d / "config.json").write_text("[]"))
    ),
    "configuration of text": _Case("inspect damaged", "configuration", _damaged(_config(head_plan="all"))),
    "configuration does not fit": _Case("inspect damaged", "must divide", _damaged(_config(num_attention_heads=7))),
    "configuration of more layers": _Case(
        "eval damaged --data {text}", "missing tensor", _damaged(_config(num_hidden_layers=3))
    ),
    "another architecture": _Case("inspect mamba", "cannot prune heads of models of type 'mamba'", _other_architecture),
    "another architecture to cut": _Case("cut mamba --plan {plan} --out {out}", "of type 'mamba'", _other_architecture),
    "another architecture to prune": _Case(_PRUNE.replace("{model}", "mamba"), "of type 'mamba'", _other_architecture),
    "window for a model with memory": _Case("eval {model} --data {text} --window 8", "leave the window out"),
    "sequence length for a model with memory": _Case(_PRUNE + " --sequence-length 9", "leave it out"),
    "LoRA of a model of ours": _Case(_PRUNE + " --lora-rank 4", "leave the LoRA rank out"),
    "groups of a model without": _Case(_PRUNE + " --unit kv_group", "kv_group"),
    "unknown unit": _Case(_PRUNE + " --unit layer", "Invalid value for '--unit'"),
    "sequence longer than positions": _Case(_LLAMA + " --sequence-length 300", "The model has 128 positions"),
    "window longer than positions": _Case("eval {llama} --data {text} --window 300", "128"),
    "probe with adapters": _Case(_LLAMA + " --freeze-weights --lora-rank 4", "leave out one of the two"),
    "negative rank": _Case(_LLAMA + " --lora-rank -1", "Invalid value for '--lora-rank'"),
    "too much distillation": _Case(_LLAMA + " --distill 1.5", "Invalid value for '--distill'"),
    "cold distillation": _Case(_LLAMA + " --distill 0.5 --distill-temperature 0", "distill_temperature"),
    "teacher without weight": _Case(_LLAMA + " --teacher {llama}", "distill, is 0; set it"),
    "distillation without teacher": _Case(_TUNE + " --distill 0.5", "name one with --teacher"),
    "teacher that is not there": _Case(
        _TUNE + " --distill 0.5 --teacher nothing/at/all", "A checkpoint folder was expected at nothing/at/all"
    ),
    "name of no model to inspect": _Case("inspect no/model", "the Hugging Face hub gave no model of that name"),
    "without a tokenizer": _Case(
        "eval damaged --data {text}",
        "A tokenizer was expected",
        _damaged(_without_tokenizer),
    ),
    "text of nothing to validate": _Case(
        "eval {model} --data t --on test", "at least 2 tokens|empty", _write("t", "a")
    ),
    "dense model missing": _Case("bench {model} --dense nothing", "There is no folder nothing"),
    # Plans.
    "missing plan": _Case(_CUT, "A head plan was expected at p.json"),
    "plan not JSON": _Case(_CUT, "is not JSON", _write("p.json", "{")),
    "plan without totals": _Case(_CUT, "A head plan must be a JSON object", _write("p.json", '{"kept": {}}')),
    "head that is not there": _Case(_CUT, "keeps head 7 of layer 0", _plan('{"0": [7]}')),
    "layer that is not there": _Case(_CUT, "names layer 5", _plan('{"5": [0]}')),
    "plan of another model": _Case(
        _CUT, r"is for .*\[8, 8\] heads a layer, but this model had \[4, 4\]", _plan("{}", '{"0": 8, "1": 8}')
    ),
    "plan of fewer layers": _Case(
        _CUT, r"is for .*\[4\] heads a layer, but this model had \[4, 4\]", _plan("{}", '{"0": 4}')
    ),
    "plan of another unit": _Case(_CUT, "the unit 'kv_group' was asked for", _plan("{}", unit="kv_group")),
    "cut over its own model": _Case(
        "cut damaged --plan {plan} --out ./damaged", "must not overwrite", _damaged(lambda _: None)
    ),
    "cut over something": _Case("cut {model} --plan {plan} --out d", "not written by deadhead", _folder_of("d")),
    # Generation and benchmarks.
    "empty prompt": _Case("generate {model} --prompt=", "A prompt of at least one token was expected"),
    "negative temperature": _Case("generate {model} --temperature -1", "Invalid value for '--temperature'"),
    "temperature not a number": _Case(
        "generate {model} --temperature nan", "Invalid value for '--temperature'|temperature must be 0 or lie"
    ),
    "no new tokens": _Case("generate {model} --max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
    "unknown workload": _Case("bench {model} --workload sleep", "Invalid value for '--workload'"),
    "no repeats": _Case("bench {model} --repeats 0", "Invalid value for '--repeats'"),
    "no limit": _Case("eval {model} --data {text} --limit 0", "Invalid value for '--limit'"),
    "unknown part": _Case("eval {model} --data {text} --on all", "Invalid value for '--on'"),
}


@pytest.mark.parametrize("name", _CASES)
def test_one_sentence_and_nothing_written(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = _CASES[name]
    (tmp_path / "given").symlink_to(given)
    folder = tmp_path / "here"
    folder.mkdir()
    case.prepare(folder)
    monkeypatch.chdir(folder)
    names = {
        "text": given / "prose.txt",
        "model": given / "model",
        "llama": given / "llama",
        "plan": given / "plan.json",
        "out": "out",
    }
    before, given_before = tree(folder), tree(given)
    capfd.readouterr()
    code = execute([word.format(**names) for word in case.command.split()])
    output, errors = capfd.readouterr()
    assert code == 2, errors
    assert output == ""
    assert errors.startswith("deadhead: ")
    assert errors.endswith((".\n", "?\n"))
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    assert re.search(case.message, errors), errors
    assert tree(folder) == before
    assert tree(given) == given_before


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([]) in (0, 2)
    output = "".join(capsys.readouterr())
    assert "Usage: deadhead" in output
    commands = ("demo", "run", "train", "prune", "finetune", "cut", "inspect", "convert", "eval", "generate", "bench")
    for command in commands:
        assert command in output


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["prune", "--help"]) == 0
    output, errors = capsys.readouterr()
    assert "--sparsity" in output
    assert errors == ""
    assert execute(["--version"]) == 0
    assert capsys.readouterr().out.startswith("deadhead 0.")


def test_a_fault_of_ours_is_not_hidden(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can cause becomes a sentence; a bug keeps its traceback and its exit code 1."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("deadhead.cost.config_cost", fail)
    with pytest.raises(ZeroDivisionError, match="ours"):
        execute(["inspect", str(given / "model")])


_MAIN = "from deadhead.cli import main; main()"


def test_in_a_process_of_its_own(given: Path, tmp_path: Path) -> None:
    processes = {
        "good": child(_MAIN, "inspect", str(given / "model"), "--json", cwd=tmp_path),
        "bad": child(_MAIN, "inspect", "nothing", cwd=tmp_path),
    }
    results = {name: (*process.communicate(timeout=120), process.returncode) for name, process in processes.items()}
    output, errors, code = results["good"]
    assert (code, errors) == (0, "")
    assert json.loads(output)["heads"] == [4, 4]
    output, errors, code = results["bad"]
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("deadhead: There is no folder nothing, and the Hugging Face hub gave no model")
    assert list(tmp_path.iterdir()) == []
