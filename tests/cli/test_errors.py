"""Bad command lines and bad input: exit code 2, one sentence, no traceback, nothing written. Ctrl-C: 130."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deadhead.cli import execute
from tests.cli.cases import (
    Case,
    config,
    cut_short,
    damaged,
    edited,
    folder_of,
    other_architecture,
    plan,
    recipe,
    require_one_sentence,
    two,
    without_tokenizer,
    write,
)
from tests.small_runs import child

_TRAIN = "train --data {text} --out {out} --steps 2 --batch-size 2 --layers 2 --width 32 --heads 4 --segment-length 8"
_PRUNE = "prune --model {model} --data {text} --out {out} --steps 2 --batch-size 2"
_LLAMA = _PRUNE.replace("{model}", "{llama}")
_TUNE = "finetune --model {llama} --data {text} --out {out} --steps 2 --batch-size 2"


_CUT = "cut {model} --plan p.json --out {out}"
_CASES = {
    # The command line itself.
    "unknown command": Case("sprout --out {out}", "No such command 'sprout'"),
    "near command": Case("trian --out {out}", "No such command 'trian'"),
    "unknown option": Case("train --out {out} --setps 3", "No such option: --setps"),
    "unknown option of the program": Case("--colour", "No such option: --colour"),
    "option without a value": Case("train --out", "Option '--out' requires an argument"),
    "without out": Case("train --data {text}", "Missing option '--out'"),
    "without model": Case("inspect", "Missing argument 'MODEL'"),
    "without recipe": Case("run", "Missing argument 'RECIPE.toml'"),
    "too many arguments": Case("inspect {model} {model}", "unexpected extra argument"),
    "steps not a number": Case(_TRAIN + " --steps many", "Invalid value for '--steps'"),
    "negative steps": Case(_TRAIN + " --steps -5", "Invalid value for '--steps'"),
    "too large a share": Case(_PRUNE + " --params=1.5", "for '--params': it must be less .* 1, but got '1.5'"),
    "share that is no number": Case(_PRUNE + " --params 80%", "it must be a valid number, but got '80%'"),
    "no steps": Case(_TRAIN + " --steps 0", "Invalid value for '--steps'"),
    "negative seed": Case(_TRAIN + " --seed -1", "Invalid value for '--seed'"),
    "unknown schedule": Case(_TRAIN + " --schedule step", "Invalid value for '--schedule'.*'constant', 'cosine'"),
    "unknown tokenizer": Case(_TRAIN + " --tokenizer char", "Invalid value for '--tokenizer'.*'byte', 'bpe'"),
    "negative rate": Case(_TRAIN + " --learning-rate -1", "wrong value for 'learning_rate'"),
    "rate not a number": Case(_TRAIN + " --learning-rate nan", "wrong value for 'learning_rate'"),
    "negative l0": Case(_PRUNE + " --l0 -1", "Invalid value for '--l0'"),
    "l0 not a number": Case(_PRUNE + " --l0 nan", "value for '(--)?l0'"),
    "sparsity above one": Case(_PRUNE + " --sparsity 1.5", "'sparsity': input should be less than 1, but it is 1.5"),
    "criterion without a share": Case(_PRUNE + " --criterion taylor", "with another set sparsity"),
    "leaning without a share": Case(_PRUNE + " --start-from taylor", "start_from is for gates with a target"),
    "unknown criterion": Case(_PRUNE + " --criterion best", "Invalid value for '--criterion'"),
    "unknown ranking": Case(_PRUNE + " --ranking best", "Invalid value for '--ranking'"),
    "negative rate of gates": Case(_PRUNE + " --gate-lr -1", "Invalid value for '--gate-lr'"),
    "no gate rate": Case(_PRUNE + " --gate-lr-scale 0", "wrong value for 'gate_lr_scale'"),
    "prune without model": Case("prune --data {text} --out {out}", "Missing option '--model'"),
    "scale by nothing": Case("demo --scale-steps 0 --out {out}", "Invalid value for '--scale-steps'"),
    # Text.
    "missing text": Case(_TRAIN.replace("{text}", "nothing.txt"), "nothing.txt"),
    "empty text": Case(_TRAIN.replace("{text}", "t"), "empty", write("t", "")),
    "binary text": Case(_TRAIN.replace("{text}", "t"), "text", write("t", b"\x00\x01\x02" * 99)),
    "text not UTF-8": Case(_TRAIN.replace("{text}", "t"), "UTF-8", write("t", "naïve ".encode("latin-1") * 99)),
    "text too short": Case(_TRAIN.replace("{text}", "t"), "17 tokens were expected", write("t", "short")),
    "text too short to go on": Case(_PRUNE.replace("{text}", "t"), "17 tokens were expected", write("t", "short")),
    "empty folder of texts": Case(_TRAIN.replace("{text}", "."), "Text files were expected"),
    "text column of a text file": Case(_TRAIN + " --text-column text", "text_column is for data with fields"),
    "damaged data": Case(_TRAIN.replace("{text}", "t.jsonl"), "JSON was expected in t.jsonl", write("t.jsonl", "{{{{")),
    "data named as text": Case(_TRAIN.replace("{text}", "t"), "looks like JSON", write("t", '{"text": "a"}\n' * 99)),
    "damaged archive": Case(_TRAIN.replace("{text}", "t.gz"), "damaged or truncated", write("t.gz", b"\x1f\x8b\x08\0")),
    "conversations without a template": Case(
        _TRAIN.replace("{text}", "t.jsonl"),
        "the tokenizer has no chat template",
        write("t.jsonl", '{"prompt": "a", "completion": "b"}\n' * 99),
    ),
    "missing chat template": Case(_TRAIN + " --chat-template no.jinja", "A chat template was expected at no.jinja"),
    "answers of a text": Case(_TRAIN + " --answers-only", "answers_only is for conversations"),
    "data set that cannot be loaded": Case(_TRAIN.replace("{text}", "hf:no/such"), "no/such"),
    "data set without a name": Case(_TRAIN.replace("{text}", "hf:"), "hf:"),
    "vocabulary of bytes": Case(_TRAIN + " --vocab-size 99", "A byte tokenizer has 257 tokens"),
    "vocabulary too small": Case(_TRAIN + " --tokenizer bpe --vocab-size 9", "vocab_size of at least 258"),
    # Sizes and places.
    "heads not dividing width": Case(_TRAIN + " --heads 5", "num_attention_heads must divide hidden_size"),
    "out is a file": Case(_TRAIN.replace("{out}", "f"), "f is a file", write("f", "")),
    "out is below a file": Case(_TRAIN.replace("{out}", "f/m"), "f", write("f", "")),
    "out is not ours": Case(_TRAIN.replace("{out}", "d"), "not written by deadhead", folder_of("d")),
    "run out is not ours": Case("run r.toml --out d", "not written by deadhead", two(recipe(), folder_of("d"))),
    "demo out is not ours": Case("demo --out d", "not written by deadhead", folder_of("d")),
    "a run that was begun": Case(
        "run r.toml --out d", "continue it with resume", two(recipe(), folder_of("d", "recipe.toml"))
    ),
    "a phase that was stopped": Case(_TRAIN.replace("{out}", "d"), "d.work is left from", folder_of("d.work")),
    # Recipes.
    "missing recipe": Case("run none.toml --out {out}", "there is no such file"),
    "recipe is a folder": Case("run . --out {out}", "cannot be read as text"),
    "recipe not TOML": Case("run r.toml --out {out}", "is not TOML", write("r.toml", "a = [")),
    "binary recipe": Case("run r.toml --out {out}", "cannot be read as text", write("r.toml", b"\xff\x00")),
    "unknown key": Case("run r.toml --out {out}", "did you mean 'l0'?", edited("l0 =", "l_0 =")),
    "unknown section": Case("run r.toml --out {out}", "did you mean 'finetune'?", edited("[finetune]", "[finetuen]")),
    "wrong type": Case("run r.toml --out {out}", "wrong value for 'train.steps'", edited("steps = 3", 'steps = "3"')),
    "recipe's heads": Case("run r.toml --out {out}", "must divide hidden_size", recipe(model={"heads": 3})),
    "recipe's text": Case("run r.toml --out {out}", "nothing.txt", recipe(data={"source": "nothing.txt"})),
    "recipe for a phase": Case(_TRAIN + " --recipe none.toml", "A recipe was expected at none.toml"),
    # Models.
    "missing model": Case("inspect nothing", "There is no folder nothing"),
    "model is a file": Case("eval {text} --data {text}", "A checkpoint folder was expected"),
    "model is a folder of something": Case("generate d", "d/config.json, but there is no such file", folder_of("d")),
    "model is a name": Case("bench gpt2", "no folder gpt2, and the Hugging Face hub gave no model of that name"),
    "model cut short": Case("eval damaged --data {text}", "cut short", damaged(cut_short)),
    "model cut short to prune": Case(_PRUNE.replace("{model}", "damaged"), "cut short", damaged(cut_short)),
    "weights missing": Case(
        "generate damaged", "Weights were expected at", damaged(lambda folder: (folder / "model.safetensors").unlink())
    ),
    "configuration not JSON": Case("inspect damaged", "JSON", damaged(lambda d: (d / "config.json").write_text("{"))),
    "configuration a list": Case(
        "inspect damaged", "configuration", damaged(lambda d: (d / "config.json").write_text("[]"))
    ),
    "configuration of text": Case("inspect damaged", "configuration", damaged(config(head_plan="all"))),
    "configuration does not fit": Case("inspect damaged", "must divide", damaged(config(num_attention_heads=7))),
    "configuration of more layers": Case(
        "eval damaged --data {text}", "missing tensor", damaged(config(num_hidden_layers=3))
    ),
    "another architecture": Case("inspect mamba", "cannot prune heads of models of type 'mamba'", other_architecture),
    "another architecture to cut": Case("cut mamba --plan {plan} --out {out}", "of type 'mamba'", other_architecture),
    "another architecture to prune": Case(_PRUNE.replace("{model}", "mamba"), "of type 'mamba'", other_architecture),
    "window for a model with memory": Case("eval {model} --data {text} --window 8", "leave the window out"),
    "sequence length for a model with memory": Case(_PRUNE + " --sequence-length 9", "leave it out"),
    "LoRA of a model of ours": Case(_PRUNE + " --lora-rank 4", "leave the LoRA rank out"),
    "groups of a model without": Case(_PRUNE + " --unit kv_group", "kv_group"),
    "unknown unit": Case(_PRUNE + " --unit layer", "Invalid value for '--unit'"),
    "sequence longer than positions": Case(_LLAMA + " --sequence-length 300", "The model has 128 positions"),
    "window longer than positions": Case("eval {llama} --data {text} --window 300", "128"),
    "probe with adapters": Case(_LLAMA + " --freeze-weights --lora-rank 4", "leave out one of the two"),
    "negative rank": Case(_LLAMA + " --lora-rank -1", "Invalid value for '--lora-rank'"),
    "too much distillation": Case(_LLAMA + " --distill 1.5", "Invalid value for '--distill'"),
    "cold distillation": Case(_LLAMA + " --distill 0.5 --distill-temperature 0", "distill_temperature"),
    "teacher without weight": Case(_LLAMA + " --teacher {llama}", "distill, is 0; set distill"),
    "distillation without teacher": Case(_TUNE + " --distill 0.5", "name one as teacher"),
    "teacher that is not there": Case(
        _TUNE + " --distill 0.5 --teacher nothing/at/all", "A checkpoint folder was expected at nothing/at/all"
    ),
    "name of no model to inspect": Case("inspect no/model", "the Hugging Face hub gave no model of that name"),
    "without a tokenizer": Case(
        "eval damaged --data {text}",
        "A tokenizer was expected",
        damaged(without_tokenizer),
    ),
    "text of nothing to validate": Case("eval {model} --data t --on test", "at least 2 tokens|empty", write("t", "a")),
    "dense model missing": Case("bench {model} --dense nothing", "There is no folder nothing"),
    # Plans.
    "missing plan": Case(_CUT, "A head plan was expected at p.json"),
    "plan not JSON": Case(_CUT, "is not JSON", write("p.json", "{")),
    "plan without totals": Case(_CUT, "A head plan must be a JSON object", write("p.json", '{"kept": {}}')),
    "head that is not there": Case(_CUT, "keeps head 7 of layer 0", plan('{"0": [7]}')),
    "layer that is not there": Case(_CUT, "names layer 5", plan('{"5": [0]}')),
    "plan of another model": Case(
        _CUT, r"is for .*\[8, 8\] heads a layer, but this model had \[4, 4\]", plan("{}", '{"0": 8, "1": 8}')
    ),
    "plan of fewer layers": Case(
        _CUT, r"is for .*\[4\] heads a layer, but this model had \[4, 4\]", plan("{}", '{"0": 4}')
    ),
    "plan of another unit": Case(_CUT, "the unit 'kv_group' was asked for", plan("{}", unit="kv_group")),
    "cut over its own model": Case(
        "cut damaged --plan {plan} --out ./damaged", "must not overwrite", damaged(lambda _: None)
    ),
    "cut over something": Case("cut {model} --plan {plan} --out d", "not written by deadhead", folder_of("d")),
    # Generation and benchmarks.
    "empty prompt": Case("generate {model} --prompt=", "A prompt of at least one token was expected"),
    "negative temperature": Case("generate {model} --temperature -1", "Invalid value for '--temperature'"),
    "temperature not a number": Case(
        "generate {model} --temperature nan", "Invalid value for '--temperature'|temperature must be 0 or lie"
    ),
    "no new tokens": Case("generate {model} --max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
    "unknown workload": Case("bench {model} --workload sleep", "Invalid value for '--workload'"),
    "no repeats": Case("bench {model} --repeats 0", "Invalid value for '--repeats'"),
    "no limit": Case("eval {model} --data {text} --limit 0", "Invalid value for '--limit'"),
    "unknown part": Case("eval {model} --data {text} --on all", "Invalid value for '--on'"),
}


@pytest.mark.parametrize("name", _CASES)
def test_one_sentence_and_nothing_written(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(_CASES[name], given, tmp_path, monkeypatch, capfd)


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([]) in (0, 2)
    output = "".join(capsys.readouterr())
    assert "Usage: deadhead" in output
    commands = ("demo", "run", "train", "prune", "finetune", "cut", "inspect", "eval", "generate", "bench")
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

    monkeypatch.setattr("deadhead.checkpoints.folder_cost.folder_cost", fail)
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
