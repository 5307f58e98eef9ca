"""Bad plans, texts, checkpoints and numbers on the command line: each gives one sentence, and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.cases import Case, config, damaged, folder_of, require_one_sentence, two, write

_CUT = "cut {model} --plan p.json --out {out}"
_TOTAL = '"total": {"0": 4, "1": 4}'
# What the plan says, and what the sentence must say of it.
_PLANS = {
    "nothing": ("", "is not JSON"),
    "not UTF-8": (b"\xff\xfe{}", "not UTF-8"),
    "two values": ("{} {}", "is not JSON"),
    "a comma too many": ('{"total": {"0": 4,}}', "is not JSON"),
    "single quotes": ("{'total': {}}", "is not JSON"),
    "a list": ("[]", "A head plan must be a JSON object"),
    "null": ("null", "A head plan must be a JSON object"),
    "nested too deep": ("[" * 100_000, "nested too deep"),
    "a number of 5,000 digits": (f'{{{_TOTAL}, "kept": {{"0": [{"9" * 5000}]}}}}', "too many digits"),
    "a number of 4,000 digits": (f'{{{_TOTAL}, "kept": {{"0": [{"9" * 4000}]}}}}', "keeps head 999.* …"),
    "without kept": (f"{{{_TOTAL}}}", "A head plan must be a JSON object"),
    "no layers": ('{"total": {}, "kept": {}}', "at least one layer"),
    "total as a list": ('{"total": [4, 4], "kept": {}}', "must be JSON objects"),
    "kept as a list": (f'{{{_TOTAL}, "kept": [[0], [1]]}}', "must be JSON objects"),
    "heads as a number": (f'{{{_TOTAL}, "kept": {{"0": 1}}}}', "must be a list of numbers"),
    "heads as a string": (f'{{{_TOTAL}, "kept": {{"0": "01"}}}}', "must be a list of numbers"),
    "heads as an object": (f'{{{_TOTAL}, "kept": {{"0": {{}}}}}}', "must be a list of numbers"),
    "a head as a string": (f'{{{_TOTAL}, "kept": {{"0": ["1"]}}}}', "keeps head '1'"),
    "a head as a fraction": (f'{{{_TOTAL}, "kept": {{"0": [1.0]}}}}', "keeps head 1.0"),
    "a head below 0": (f'{{{_TOTAL}, "kept": {{"0": [-1]}}}}', "keeps head -1"),
    "a head of NaN": (f'{{{_TOTAL}, "kept": {{"0": [NaN]}}}}', "keeps head nan"),
    "a head twice": (f'{{{_TOTAL}, "kept": {{"0": [1, 1]}}}}', "names a head of layer 0 twice"),
    "a layer twice": (f'{{{_TOTAL}, "kept": {{"0": [1], "0": [2]}}}}', "names the key '0' twice"),
    "a layer under two names": (f'{{{_TOTAL}, "kept": {{"0": [1], "00": [2]}}}}', "name layer 0 twice"),
    "no heads in all": ('{"total": {"0": 0, "1": 4}, "kept": {}}', "at least one head"),
    "10^9 heads": ('{"total": {"0": 1000000000, "1": 4}, "kept": {}}', "no model has over"),
    "version 4": (f'{{"version": 4, {_TOTAL}, "kept": {{}}}}', "reads 1, 2 and 3"),
    "version as a string": (f'{{"version": "1", {_TOTAL}, "kept": {{}}}}', "version '1'"),
    "an unknown key": (f'{{"keep": 1, {_TOTAL}, "kept": {{}}}}', "unknown key 'keep'"),
    "an unknown unit": (f'{{"unit": "neuron", {_TOTAL}, "kept": {{}}}}', "'head' or 'kv_group'"),
    "scale as a number": (f'{{"output_scale": 1, {_TOTAL}, "kept": {{}}}}', "true or false"),
    "blocks of another size": (
        f'{{"version": 2, {_TOTAL}, "kept": {{}}, "blocks": {{"size": 5, "total": {{"0": 2}}, "kept": {{}}}}}}',
        "hidden units",
    ),
    "a command for the terminal": (f'{{{_TOTAL}, "kept": {{"\\u001b[2J": [1]}}}}', r"layer '\\x1b\[2J'"),
}


@pytest.mark.parametrize("name", _PLANS)
def test_plans(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content, message = _PLANS[name]
    require_one_sentence(Case(_CUT, message, write("p.json", content)), given, tmp_path, monkeypatch, capfd)


def _file(name: str, content: str | bytes) -> Callable[[Path], object]:
    return damaged(write(name, content))


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damaged(prepare)


def _reshaped(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("in_proj.weight") or tensors[name].dim() == 2)
    tensors[name] = tensors[name][:-1].clone()


def _without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def _one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["stranger"] = torch.zeros(2)


def _moved_to(name: str) -> Callable[[Path], object]:
    return damaged(lambda folder: shutil.move(folder / name, folder / f"{name}.bak"))


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


_EVAL = "eval damaged --data {text}"
_INSPECT = "inspect damaged"
_CHECKPOINTS = {
    # Configurations.
    "configuration of nothing": Case(_INSPECT, "JSON", _file("config.json", "")),
    "configuration not UTF-8": Case(_INSPECT, "UTF-8|JSON|cannot be read", _file("config.json", b"\xff\xfe")),
    "configuration nested too deep": Case(_INSPECT, "nested too deep", _file("config.json", "[" * 100_000)),
    "configuration without a type": Case(_INSPECT, "model.type|configuration", _file("config.json", "{}")),
    "type as a number": Case(_INSPECT, "3", damaged(config(model_type=3))),
    "type that nobody knows": Case(_INSPECT, "'unheard'", damaged(config(model_type="unheard"))),
    "type with code": Case(
        _EVAL, "never runs code", damaged(config(model_type="unheard", auto_map={"AutoConfig": "evil.Evil"}))
    ),
    "width as a string": Case(_EVAL, "hidden_size", damaged(config(hidden_size="wide"))),
    "width below 0": Case(_EVAL, "hidden_size", damaged(config(hidden_size=-32))),
    "width as a fraction": Case(_EVAL, "hidden_size", damaged(config(hidden_size=32.5))),
    "heads of 0": Case(_EVAL, "num_attention_heads", damaged(config(num_attention_heads=0))),
    "layers below 0": Case(_EVAL, "num_hidden_layers", damaged(config(num_hidden_layers=-1))),
    "layers as a list": Case(_EVAL, "num_hidden_layers", damaged(config(num_hidden_layers=[2]))),
    "memory of text": Case(_EVAL, "memory_length", damaged(config(memory_length="long"))),
    "vocabulary of 0": Case(_EVAL, "vocab_size", damaged(config(vocab_size=0))),
    "position of nothing": Case(_EVAL, "position", damaged(config(position="none"))),
    "a plan of other layers": Case(
        _EVAL,
        "plan|layer",
        damaged(config(head_plan={"version": 1, "unit": "head", "total": {"9": 4}, "kept": {}})),
    ),
    "a plan as a list": Case(_EVAL, "head_plan|head plan|configuration", damaged(config(head_plan=[1]))),
    # Weights.
    "weights of nothing": Case(_EVAL, "damaged or cut short", _file("model.safetensors", b"")),
    "weights of eight bytes": Case(_EVAL, "damaged or cut short", _file("model.safetensors", b"\xff" * 8)),
    "weights of noise": Case(
        _EVAL,
        "damaged or cut short",
        _file("model.safetensors", np.random.default_rng(0).bytes(5000)),
    ),
    "a header of no JSON": Case(
        _EVAL, "header is not JSON", _file("model.safetensors", (5).to_bytes(8, "little") + b"{{{{{")
    ),
    "weights of another shape": Case(_EVAL, "do not fit|are not those", _weights(_reshaped)),
    "a tensor missing": Case(_EVAL, "missing tensor", _weights(_without_one)),
    "a tensor too many": Case(_EVAL, "unexpected tensor stranger", _weights(_one_more)),
    "no weights": Case(_EVAL, "Weights were expected at", _moved_to("model.safetensors")),
    "weights as a folder": Case(
        _EVAL,
        "cannot be loaded|cannot be read|damaged|Weights were expected at",
        damaged(lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir())),
    ),
    "pickled weights alone": Case(_EVAL, "pickle|safetensors", damaged(_pickled)),
    # Tokenizers.
    "tokenizer of nothing": Case(_EVAL, "tokenizer", _file("tokenizer.json", "")),
    "tokenizer of a list": Case(_EVAL, "tokenizer", _file("tokenizer.json", "[]")),
    "tokenizer of another kind": Case(_EVAL, "tokenizer", _file("tokenizer.json", '{"model": {"type": "None"}}')),
    # Checksums.
    "checksums of nothing known": Case(_EVAL, "SHA256SUMS is damaged in line 1", _file("SHA256SUMS", "abc\n")),
    "checksums of a file outside": Case(
        _EVAL, "SHA256SUMS is damaged in line 1", _file("SHA256SUMS", f"{'0' * 64}  ../given/prose.txt\n")
    ),
    "a checksum that is another's": Case(_EVAL, "config.json", _file("SHA256SUMS", f"{'0' * 64}  config.json\n")),
}


@pytest.mark.parametrize("name", _CHECKPOINTS)
def test_checkpoints(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(_CHECKPOINTS[name], given, tmp_path, monkeypatch, capfd)


_TRAIN = "train --data {text} --out {out} --steps 2 --batch-size 2 --layers 2 --width 32 --heads 4 --segment-length 8"
_TOO_MUCH = f"{10**30}"
_NUMBERS = {
    f"{command.split()[0]} {option}": Case(
        f"{command} {option} {_TOO_MUCH}", f"{option}|{option[2:].replace('-', '_')}"
    )
    for command, options in {
        _TRAIN: (
            *("--steps", "--batch-size", "--layers", "--width", "--heads", "--segment-length", "--memory-length"),
            *("--persistent", "--vocab-size", "--learning-rate", "--save-every", "--gradient-accumulation", "--seed"),
        ),
        "prune --model {llama} --data {text} --out {out} --steps 2": (
            *("--l0", "--sparsity", "--params", "--flops", "--kv-cache", "--speedup", "--gate-lr", "--gate-lr-scale"),
            *("--init", "--lora-rank", "--block-size", "--budget-length", "--sequence-length"),
            *("--distill", "--distill-temperature", "--l0-warmup-steps", "--eval-every"),
        ),
        "eval {model} --data {text}": ("--limit", "--batch-size", "--window"),
        "generate {model}": ("--max-new-tokens", "--temperature", "--seed"),
        "bench {model}": ("--batch-size", "--length", "--repeats"),
        "inspect {model}": ("--length", "--batch-size", "--sequence-length"),
        "watch {model}": ("--port", "--tokens"),
    }.items()
    for option in options
}


@pytest.mark.parametrize("name", _NUMBERS)
def test_numbers_of_31_digits(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(_NUMBERS[name], given, tmp_path, monkeypatch, capfd)


_OTHERS = {
    "a path with a line": Case("inspect {name}", r"nothing\\nat all", lambda folder: None),
    "a path for a terminal": Case("inspect {escape}", r"\\x1b\[2J", lambda folder: None),
    "a path too long": Case(f"cut {{model}} --plan {'p' * 5000} --out {{out}}", "too long"),
    "a path with a null character": Case("cut {model} --plan {null} --out {out}", "null"),
    "a model too long": Case(f"inspect {'m' * 5000}", "mmm"),
    "out too long": Case(f"cut {{model}} --plan {{plan}} --out {'o' * 300}", "too long"),
    "a plan for what has none": Case("cut {model} --out {out}", "plan"),
    "heads of text": Case("inspect {model} --heads 1,a", "--heads takes whole numbers"),
    "heads of 5,000 digits": Case(f"inspect {{model}} --heads {'9' * 5000},1", "--heads takes whole numbers"),
    "too many heads": Case("inspect {model} --heads 9,9", "Heads that stay must be 2 numbers"),
    "an empty prompt": Case("generate {model} --prompt=", "prompt"),
    "a text of nulls": Case("eval {model} --data t", "text", write("t", "\0" * 1000)),
    "a text of one byte": Case("eval {model} --data t", "tokens|empty", write("t", "a")),
    "a folder of pictures": Case("eval {model} --data d", "at least 2 tokens|Text files", folder_of("d", "a.png")),
    "latencies of nothing": Case("inspect {model} --plan {plan} --latency l.json", "JSON", write("l.json", "")),
    "latencies of another thing": Case(
        "inspect {model} --plan {plan} --latency l.json", "does not hold latencies", write("l.json", '{"a": 1}')
    ),
    "latencies as a list": Case(
        "inspect {model} --plan {plan} --latency l.json", "must be a JSON object", write("l.json", "[]")
    ),
    "a report of nothing": Case("report d", "neither recipe.toml nor metrics.jsonl", folder_of("d")),
    "a report of a broken summary": Case(
        "report d", "must be a JSON object", two(folder_of("d", "metrics.jsonl"), write("d/summary.json", "[]"))
    ),
    "a report of a broken plan": Case(
        "report d", "is not JSON", two(folder_of("d", "metrics.jsonl"), write("d/head_plan.json", "{"))
    ),
    "a report of a wrong stage": Case(
        "report d",
        "wrong value for 'dense'",
        two(folder_of("d", "metrics.jsonl"), write("d/summary.json", '{"dense": 3}')),
    ),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_others(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    require_one_sentence(_OTHERS[name], given, tmp_path, monkeypatch, capfd)
