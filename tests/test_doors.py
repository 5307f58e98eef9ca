"""Plausible mistakes at every door: wrong types, wrong objects, wrong files, calls in the wrong order.

Whatever is refused is refused by an InputError of one sentence, and the model, its gates and the folder stay as they
were. A mistake that turns out to be none, such as a whole number where a share is asked for, may also go well.
"""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

import deadhead
from deadhead.checkpoints.gate_files import load_gates, save_gates
from deadhead.cli import execute
from deadhead.data import (
    Corpus,
    RowDataset,
    SegmentDataset,
    TokenStream,
    build_tokenizer,
    load_text,
    load_tokenizer,
    open_corpus,
    special_token_ids,
    tokenize_corpus,
)
from deadhead.errors import CutError, InputError
from deadhead.gates.budget import Budget, BudgetTarget
from deadhead.gates.penalty import SparsityTarget
from tests.small_runs import tree

pytestmark = pytest.mark.slow

_WRONG: tuple[Any, ...] = (
    5,
    -1,
    0,
    1.5,
    float("nan"),
    True,
    "x",
    "",
    b"x",
    None,
    [],
    {},
    {"a": 1},
    object(),
    Path("no"),
)
_WRONG += (torch.ones(2), np.ones(2), torch.nn.Linear(2, 2), LlamaConfig())
_SMALL: dict[str, Any] = {"steps": 1, "batch_size": 1, "sequence_length": 8}
_CONFIG: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**_CONFIG, num_key_value_heads=2, intermediate_size=16)).eval()


def text() -> TokenStream:
    return TokenStream(tokens=(np.arange(300) % 40).astype(np.uint16), num_bytes=300, num_words=60)


def corpus(folder: Path) -> Corpus:
    return open_corpus(folder / "llama" / "config.json", data_format="text")


def state_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Return what a refusal may not change: classes, weights, gates, hooks, modules and configuration."""
    modules = [
        (name, type(module), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    learns = [parameter.requires_grad for parameter in model.parameters()]
    config = {name: value for name, value in model.config.to_dict().items() if name != "dtype"}
    return modules, learns, config, deadhead.gates_of(model) is None, weights


def require_same(before: tuple[Any, ...], model: PreTrainedModel) -> None:
    *parts, weights = state_of(model)
    assert parts == list(before[:-1])
    assert weights.keys() == before[-1].keys()
    assert all(torch.equal(weights[name], value) for name, value in before[-1].items())


def plan_for(model: PreTrainedModel) -> deadhead.HeadPlan:
    return deadhead.HeadPlan(kept={0: (0,), 1: (0, 1)}, total={0: 2, 1: 2}, unit="kv_group")


# Each takes a model, a folder and a wrong value; the value stands for one argument after the other.
_DOORS: dict[str, Callable[[Any, Path, Any], object]] = {
    "attach config": lambda m, f, v: deadhead.attach(m, config=v),
    "attach unit": lambda m, f, v: deadhead.attach(m, unit=v),
    "attach blocks": lambda m, f, v: deadhead.attach(m, blocks=v),
    "attach model": lambda m, f, v: deadhead.attach(v),
    "cut plan": lambda m, f, v: deadhead.cut(m, v),
    "cut model": lambda m, f, v: deadhead.cut(v, plan_for(m)),
    "cut_checkpoint source": lambda m, f, v: deadhead.cut_checkpoint(v, plan_for(m), f / "o"),
    "cut_checkpoint plan": lambda m, f, v: deadhead.cut_checkpoint(f / "llama", v, f / "o"),
    "prune_checkpoint source": lambda m, f, v: deadhead.prune_checkpoint(v, text(), out=f / "o", params=0.8, **_SMALL),
    "prune_checkpoint data": lambda m, f, v: deadhead.prune_checkpoint(
        f / "llama", v, out=f / "o", params=0.8, **_SMALL
    ),
    "prune_checkpoint out": lambda m, f, v: deadhead.prune_checkpoint(f / "llama", text(), out=v, params=2, **_SMALL),
    "prune_checkpoint recipe": lambda m, f, v: deadhead.prune_checkpoint(f / "llama", text(), out=f / "o", recipe=v),
    "prune_checkpoint seed": lambda m, f, v: deadhead.prune_checkpoint(
        f / "llama", text(), out=f / "o", params=0.8, seed=v, **_SMALL
    ),
    "load path": lambda m, f, v: deadhead.load(v),
    "load dtype": lambda m, f, v: deadhead.load(f / "llama", dtype=v),
    "load device": lambda m, f, v: deadhead.load(f / "llama", device=v),
    "load_gated": lambda m, f, v: deadhead.load_gated(v),
    "save model": lambda m, f, v: deadhead.save(v, f / "o"),
    "save tokenizer": lambda m, f, v: deadhead.save(m, f / "o", tokenizer=v),
    "save metrics": lambda m, f, v: deadhead.save(m, f / "o", metrics=v),
    "save files": lambda m, f, v: deadhead.save(m, f / "o", files=v),
    "export to": lambda m, f, v: deadhead.export_model(m, f / "o", to=v),
    "export kind": lambda m, f, v: deadhead.export_model(m, f / "o", to="padded", kind=v),
    "evaluate model": lambda m, f, v: deadhead.evaluate(v, text()),
    "evaluate text": lambda m, f, v: deadhead.evaluate(m, v),
    "evaluate batch_size": lambda m, f, v: deadhead.evaluate(m, text(), batch_size=v),
    "evaluate limit": lambda m, f, v: deadhead.evaluate(m, text(), limit=v),
    "evaluate window": lambda m, f, v: deadhead.evaluate(m, text(), window=v),
    "model_cost plan": lambda m, f, v: deadhead.model_cost(m, v),
    "model_cost length": lambda m, f, v: deadhead.model_cost(m, length=v),
    "bench models": lambda m, f, v: deadhead.bench(v, length=2, repeats=1),
    "bench one": lambda m, f, v: deadhead.bench({"m": v}, length=2, repeats=1),
    "bench workload": lambda m, f, v: deadhead.bench({"m": m}, workload=v, length=2, repeats=1),
    "GateConfig init": lambda m, f, v: deadhead.GateConfig(init=v),
    "GateConfig seed": lambda m, f, v: deadhead.GateConfig(seed=v),
    "HeadPlan kept": lambda m, f, v: deadhead.HeadPlan(kept=v, total={0: 2}),
    "HeadPlan kept of a layer": lambda m, f, v: deadhead.HeadPlan(kept={0: v}, total={0: 2}),
    "HeadPlan total": lambda m, f, v: deadhead.HeadPlan(kept={0: (1,)}, total=v),
    "HeadPlan unit": lambda m, f, v: deadhead.HeadPlan(kept={0: (1,)}, total={0: 2}, unit=v),
    "HeadPlan.from_json": lambda m, f, v: deadhead.HeadPlan.from_json(v),
    "report_run": lambda m, f, v: deadhead.report_run(v),
    "callback gates": lambda m, f, v: deadhead.SparsityCallback(v),
    "plan sparsity": lambda m, f, v: deadhead.attach(llama()).plan(sparsity=v),
    "plan ranking": lambda m, f, v: deadhead.attach(llama()).plan(sparsity=0.5, ranking=v),
    "HeadPlan hidden_units": lambda m, f, v: deadhead.HeadPlan(kept={0: (1,)}, total={0: 2}, hidden_units=v),
    "UnitPlan kept": lambda m, f, v: deadhead.UnitPlan(kept=v, total={0: 2}),
    "UnitPlan total": lambda m, f, v: deadhead.UnitPlan(kept={}, total=v),
    "HeadPlan.cut": lambda m, f, v: plan_for(m).cut(v),
    "load_gates path": lambda m, f, v: load_gates(m, v),
    "load_gates model": lambda m, f, v: load_gates(v, f),
    "save_gates gates": lambda m, f, v: save_gates(v, f / "o"),
    "save_gates path": lambda m, f, v: save_gates(deadhead.attach(llama()), v),
    "Budget kind": lambda m, f, v: Budget(kind=v, value=0.5),
    "Budget value": lambda m, f, v: Budget(kind="params", value=v),
    "BudgetTarget costs": lambda m, f, v: BudgetTarget(v, 0.5),
    "SparsityTarget": lambda m, f, v: SparsityTarget(v),
    "prune data": lambda m, f, v: deadhead.prune(m, v, **_SMALL),
    "prune progress": lambda m, f, v: deadhead.prune(m, text(), progress=None if callable(v) else v, **_SMALL),
    "prune model": lambda m, f, v: deadhead.prune(v, text(), **_SMALL),
    "finetune model": lambda m, f, v: deadhead.finetune(v, text(), **_SMALL),
}
_OF_PRUNE = (
    "tokenizer",
    "teacher",
    "seed",
    "resume",
    "report_to",
    "device",
    "dtype",
    "recipe",
    "criterion",
)
_OF_CALLBACK = ("l0", "warmup_steps", "sparsity", "budget", "weighting", "gate_lr", "track_difference")
_DOORS |= {
    f"callback {name}": (lambda m, f, v, name=name: deadhead.SparsityCallback(**{name: v}))  # type: ignore[misc]
    for name in _OF_CALLBACK
}
_DOORS |= {
    f"callback sparsity with {name}": (  # type: ignore[misc]
        lambda m, f, v, name=name: deadhead.SparsityCallback(sparsity=0.5, **{name: v})
    )
    for name in ("ramp_steps", "ranking", "exact")
}
_DOORS |= {
    f"prune {name}": (lambda m, f, v, name=name: deadhead.prune(m, text(), **{**_SMALL, name: v}))  # type: ignore[misc]
    for name in (
        *_OF_PRUNE,
        "criterion",
        "evaluation_tokens",
        "sparsity",
        "batch_size",
        "learning_rate",
        "lora_rank",
        "unit",
        "nme",
    )
}
_DOORS |= {
    f"callback {name}": (lambda m, f, v, name=name: deadhead.SparsityCallback(**{name: v}))  # type: ignore[misc]
    for name in ("l0", "warmup_steps", "sparsity", "weighting", "gate_lr", "exact", "track_difference")
}
_DOORS |= {
    f"gates.{name}": (lambda m, f, v, call=call: call(deadhead.attach(copy.deepcopy(m)), v))  # type: ignore[misc]
    for name, call in {
        "plan sparsity": lambda g, v: g.plan(sparsity=v),
        "plan ranking": lambda g, v: g.plan(ranking=v),
        "set_plan": lambda g, v: g.set_plan(v),
        "settle": lambda g, v: g.settle(v),
        "load_state_dict": lambda g, v: g.load_state_dict(v),
        "track_difference": lambda g, v: g.track_difference(v),
        "lean": lambda g, v: g.lean(v, spread=1.0),
    }.items()
}


_IDS = np.arange(60)
_OF_LOAD_TEXT = ("tokenizer", "vocab_size", "text_column", "split", "data_format", "chat_template", "answers_only")
_DOORS |= {
    f"load_text {name}": (
        lambda m, f, v, name=name: load_text(f / "llama" / "config.json", **{"data_format": "text", name: v})  # type: ignore[misc]
    )
    for name in (*_OF_LOAD_TEXT, "cache_dir")
}
_DOORS |= {
    f"{made.__name__} {name}": (lambda m, f, v, made=made, given=given, name=name: made(**{**given, name: v}))  # type: ignore[misc]
    for made, given in (
        (TokenStream, {"tokens": _IDS, "num_bytes": 60, "num_words": 9, "prefix": (), "scored": None}),
        (SegmentDataset, {"tokens": _IDS, "rows": 1, "segment_length": 4, "first_segment": 0}),
        (RowDataset, {"tokens": _IDS, "length": 4, "prefix": (), "scored": None}),
    )
    for name in given
}
_DOORS |= {
    "load_text source": lambda m, f, v: load_text(v),
    "load_text progress": lambda m, f, v: load_text(
        f / "llama" / "config.json", data_format="text", progress=None if callable(v) else v
    ),
    "load_tokenizer": lambda m, f, v: load_tokenizer(v),
    "open_corpus source": lambda m, f, v: open_corpus(v),
    "open_corpus chat": lambda m, f, v: open_corpus(f / "llama" / "config.json", data_format="text", chat=v),
    "open_corpus valid_share": lambda m, f, v: open_corpus(
        f / "llama" / "config.json", data_format="text", valid_share=v
    ),
    "corpus split": lambda m, f, v: list(corpus(f).documents(v)),
    "build_tokenizer kind": lambda m, f, v: build_tokenizer(v, corpus(f)),
    "build_tokenizer corpus": lambda m, f, v: build_tokenizer("byte", v),
    "build_tokenizer vocab_size": lambda m, f, v: build_tokenizer("bpe", corpus(f), vocab_size=v),
    "special_token_ids": lambda m, f, v: special_token_ids(v),
    "tokenize_corpus corpus": lambda m, f, v: tokenize_corpus(v, build_tokenizer("byte", corpus(f)), cache_dir=f / "o"),
    "tokenize_corpus tokenizer": lambda m, f, v: tokenize_corpus(corpus(f), v, cache_dir=f / "o"),
    "tokenize_corpus cache_dir": lambda m, f, v: tokenize_corpus(
        corpus(f), build_tokenizer("byte", corpus(f)), cache_dir=v
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("doors")
    llama().save_pretrained(made / "llama")
    return made


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    shutil.copytree(folder, tmp_path / "f")
    monkeypatch.chdir(tmp_path / "f")
    yield tmp_path / "f"


@pytest.mark.parametrize("door", _DOORS)
def test_wrong_types_and_objects(door: str, here: Path) -> None:
    model = llama()
    before, files = state_of(model), tree(here)
    for value in _WRONG:
        try:
            _DOORS[door](model, here, value)
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) <= 400, f"{value!r}: {error}"
            require_same(before, model)
            assert tree(here) == files, value
        else:
            # It was no mistake: another model for the next.
            model = llama()
            shutil.rmtree(here / "o", ignore_errors=True)
            for left in here.iterdir():
                if left.name != "llama":
                    shutil.rmtree(left) if left.is_dir() else left.unlink()


def _after_cut(model: PreTrainedModel) -> PreTrainedModel:
    return deadhead.cut(model, plan_for(model))


_ORDERS: dict[str, Callable[[Any], object]] = {
    "attach twice": lambda m: (deadhead.attach(m), deadhead.attach(m)),
    "prune with gates on": lambda m: (deadhead.attach(m), deadhead.prune(m, text(), **_SMALL)),
    "finetune with gates on": lambda m: (deadhead.attach(m), deadhead.finetune(m, text(), **_SMALL)),
    "cut by another model's plan": lambda m: deadhead.cut(m, deadhead.HeadPlan(kept={0: (0,)}, total={0: 9})),
    "cut what is cut already": lambda m: deadhead.cut(
        _after_cut(m), deadhead.HeadPlan(kept={0: (1,), 1: (0,)}, total={0: 2, 1: 2}, unit="kv_group")
    ),
    "distil without teacher": lambda m: deadhead.finetune(m, text(), distill=0.5, **_SMALL),
    "teacher without weight": lambda m: deadhead.finetune(m, text(), teacher=m, **_SMALL),
    "resume nothing": lambda m: deadhead.prune(m, text(), resume=True, **_SMALL),
    "text too short": lambda m: deadhead.prune(m, text(), **{**_SMALL, "sequence_length": 9999}),
    "unknown setting": lambda m: deadhead.prune(m, text(), sparsty=0.5),
    "no head": lambda m: deadhead.finetune(LlamaModel(m.config), text(), **_SMALL),
    "masked": lambda m: deadhead.prune(BertForMaskedLM(BertConfig(**_CONFIG, intermediate_size=16)), text(), **_SMALL),
    "frozen": lambda m: deadhead.finetune(m.requires_grad_(False), text(), **_SMALL),
    "on meta": lambda m: deadhead.prune(m.to("meta"), text(), **_SMALL),
    "meta evaluated": lambda m: deadhead.evaluate(m.to("meta"), text()),
    "meta saved": lambda m: deadhead.save(m.to("meta"), "o"),
    "small teacher": lambda m: deadhead.finetune(m, text(), distill=0.5, teacher=_small_teacher(), **_SMALL),
}


def _small_teacher() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**{**_CONFIG, "vocab_size": 10}, intermediate_size=16))


@pytest.mark.parametrize("order", _ORDERS)
def test_calls_in_a_wrong_order(order: str, here: Path) -> None:
    with pytest.raises((InputError, CutError)) as caught:
        _ORDERS[order](llama())
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400
    assert {path.name for path in here.iterdir()} == {"llama"}


_OPTIONS = ["sparsity", "params", "steps", "seed", "device", "dtype", "data", "criterion", "recipe", "teacher"]
_OPTIONS += ["batch-size", "unit", "lora-rank", "learning-rate", "report-to", "spasity"]


def _lines(draw: random.Random) -> str:
    """Return a command line with one plausible mistake, or several."""
    model = draw.choice(["llama", "nothing", "./nothing", "file", "empty", "picture.png", "llama/config.json", "", "/"])
    value = draw.choice(["-1", "0", "1.5", "nan", "x", "1e99", "a,b", "9" * 30, "''", "llama", "file", "--quiet"])
    option = f"--{draw.choice(_OPTIONS)}"
    command = draw.choice(
        [
            f"prune --model {model} --out o {option} {value}",
            f"finetune --model {model} --out o {option} {value}",
            f"train --model {model} --out o {option} {value}",
            f"inspect {model}",
            f"inspect {model} --plan {draw.choice(['file', 'nothing', 'llama/config.json', 'empty'])}",
            f"inspect {model} --heads {value}",
            f"cut {model} --plan {draw.choice(['file', 'nothing', 'llama/config.json'])} --out o",
            f"eval {model} --data {draw.choice(['file', 'nothing', 'picture.png', 'hf:', 'empty'])}",
            f"generate {model} --temperature {value}",
            f"bench {model} --length {value}",
            f"export {model} --to {draw.choice(['gguf', 'onnx', 'padded', 'pdf'])} --out {draw.choice(['o', 'file'])}",
            f"run {draw.choice(['file', 'nothing', 'llama/config.json', 'empty'])} --out o",
            f"report {model}",
        ]
    )
    return str(command)


@pytest.mark.parametrize("seed", range(120))
def test_command_lines(seed: int, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("words and words\n" * 3)
    (here / "empty").mkdir()
    (here / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    files = tree(here)
    line = _lines(random.Random(seed))
    code = execute([part.strip("'") for part in line.split()])
    errors = capfd.readouterr().err
    assert code in (0, 2), line
    assert "Traceback" not in errors, line
    if code == 2:
        assert errors.startswith("deadhead: ") and errors.count("\n") == 1, f"{line}: {errors}"
        assert tree(here) == files, line
