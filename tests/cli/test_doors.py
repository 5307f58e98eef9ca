"""What people ask of the wrong thing: models without a loss on text, gated ones, runs' folders, options without use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import deadhead
from deadhead.checkpoints.checkpoint import load
from deadhead.cli import execute
from tests.cli.cases import Case, require_one_sentence, write
from tests.small_runs import tree

_LOSS = "needs a model that predicts the next token, but BertForSequenceClassification has no such loss"
_TEXT = "name one with data (--data): a text file, a directory, stdlib (the default of deadhead's own models only)"
_LLAMA = "../given/llama"
_QUICK = "--data ../given/prose.txt --steps 1 --batch-size 2 --out o"


def classifier(folder: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(**sizes, vocab_size=257, intermediate_size=16))
    model.save_pretrained(folder / "bert")
    plan = deadhead.HeadPlan(kept={0: (0, 2), 1: (1,)}, total={0: 4, 1: 4})
    plan.to_json(folder / "p.json")


def gated(folder: Path) -> None:
    model = load(folder.parent / "given" / "llama")
    deadhead.attach(model)
    deadhead.save(model, folder / "gated")


def headless_run(folder: Path) -> None:
    shutil.copytree(folder.parent / "given" / "llama", folder / "run" / "pruned")


def other_teacher(folder: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, intermediate_size=8)).save_pretrained(folder / "small")


def from_recipe(place: str, data: str) -> Any:
    return write("r.toml", f'[model]\nfrom = "{place}"\n[data]\n{data}\n')


_CASES = {
    "gates on a classifier": Case(f"prune --model bert --sparsity 0.5 {_QUICK}", _LOSS, classifier),
    "taylor on a classifier": Case(f"prune --model bert --criterion taylor --sparsity 0.5 {_QUICK}", _LOSS, classifier),
    "dry run on a classifier": Case("prune --model bert --sparsity 0.5 --dry-run", _LOSS, classifier),
    "tuning of a classifier": Case(f"finetune --model bert {_QUICK}", _LOSS, classifier),
    "perplexity of a classifier": Case("eval bert --data ../given/prose.txt", f"Perplexity {_LOSS}", classifier),
    "text of a classifier": Case("generate bert", f"Continuing a text {_LOSS}", classifier),
    "decoding of a classifier": Case("bench bert --workload decode", f"workload decode {_LOSS}", classifier),
    "GGUF of a classifier": Case("export bert --to gguf --out o.gguf", "only such are exported to gguf", classifier),
    "prune without text": Case(f"prune --model {_LLAMA} --out o", _TEXT.replace("(", r"\(").replace(")", r"\)")),
    "Taylor without text": Case(
        f"prune --model {_LLAMA} --criterion taylor --sparsity 0.5 --out o", "name one with data"
    ),
    "tuning without text": Case(f"finetune --model {_LLAMA} --out o", "name one with data"),
    "training without text": Case(f"train --model {_LLAMA} --out o", "name one with data"),
    "perplexity without text": Case(f"eval {_LLAMA}", "name one with data"),
    "recipe without text": Case(
        "run r.toml --out o", r"\[data\] source: a text file, a directory, hf:NAME", from_recipe(_LLAMA, "")
    ),
    "gated to prune": Case(f"prune --model gated {_QUICK}", "has gates that are still on", gated),
    "gated to tune": Case(f"finetune --model gated {_QUICK}", "has gates that are still on", gated),
    "gated to dry run": Case("prune --model gated --dry-run", "has gates that are still on", gated),
    "gated teacher": Case(
        f"finetune --model {_LLAMA} --teacher gated --distill 0.5 {_QUICK}", "has gates that are still on", gated
    ),
    "tokenizer beside from": Case(
        "run r.toml --out o", r"leave \[data\] tokenizer out", from_recipe("x", 'source = "t"\ntokenizer = "bpe"')
    ),
    "vocabulary beside from": Case(
        "run r.toml --out o", r"leave \[data\] vocab_size out", from_recipe("x", 'source = "t"\nvocab_size = 300')
    ),
    "from where nothing is": Case(
        "run r.toml --out o", "A checkpoint folder was expected at ./no", from_recipe("./no", 'source = "t"')
    ),
    "tokenizer of a model that has one": Case(
        f"train --model {_LLAMA} --tokenizer bpe {_QUICK}", "--tokenizer is for a fresh model"
    ),
    "small teacher": Case(
        f"prune --model {_LLAMA} --teacher small --distill 0.5 {_QUICK}",
        "the model has 257 tokens and the teacher 100",
        other_teacher,
    ),
    "a run's folder": Case("inspect run", "its models are in run/pruned", headless_run),
    "a run's folder to eval": Case("eval run --data ../given/prose.txt", "its models are in run/pruned", headless_run),
    "rows without training": Case(f"inspect {_LLAMA} --batch-size 4", "--batch-size is for the memory of training"),
    "bf16 without training": Case(f"inspect {_LLAMA} --bf16", "--bf16 is for the memory of training"),
    "dry run on no device": Case(f"prune --model {_LLAMA} --dry-run --device tpu9", "A device was expected"),
    "no place": Case(f"prune --model {_LLAMA} --data t", "add --out"),
    "a place in proc": Case("demo --out /proc/x --scale-steps 0.01", "nothing can be made there"),
    "a place below it": Case(f"export {_LLAMA} --to padded --out /proc/x/y", "/proc/x/y cannot be written"),
}


@pytest.mark.parametrize("name", _CASES)
def test_one_sentence_and_nothing_written(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(_CASES[name], given, tmp_path, monkeypatch, capfd)


def test_a_classifier_is_inspected_cut_pruned_padded_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    classifier(tmp_path)
    for command in (
        "inspect bert --json",
        "cut bert --plan p.json --out cut -q",
        "inspect cut --json",
        "export cut --to padded --out padded",
        "bench cut --dense bert --length 4 --repeats 1",
        "prune --model bert --criterion magnitude --sparsity 0.5 --out pruned -q --json",
        "prune --model cut --criterion magnitude --params 0.9 --out again -q",
    ):
        assert execute(command.split()) == 0, capfd.readouterr().err
    for folder in ("cut", "pruned", "again"):
        assert type(load(tmp_path / folder)).__name__ == "DeadheadBertForSequenceClassification"
    assert type(load(tmp_path / "padded")) is BertForSequenceClassification
    assert '"perplexity"' not in capfd.readouterr().out


def test_a_dry_run_needs_no_place_and_heeds_the_precision(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bytes_of_weights = []
    for dtype in ("float32", "bfloat16"):
        line = f"prune --model {given / 'llama'} --sparsity 0.5 --dry-run --freeze-weights --dtype {dtype} --json"
        assert execute(line.split()) == 0
        bytes_of_weights.append(json.loads(capfd.readouterr().out)["memory"]["weights"])
    assert bytes_of_weights[1] < 0.7 * bytes_of_weights[0]
    assert tree(tmp_path) == {}


def test_a_tracker_without_a_login(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda prompt=True, verify=True: False)
    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    with pytest.raises(deadhead.InputError, match="wandb is not logged in here"):
        deadhead.prune(given / "llama", given / "prose.txt", report_to="wandb", out=tmp_path / "o")
    assert tree(tmp_path) == {}
