"""What `deadhead convert` refuses: one sentence, exit code 2, nothing written, and no code of a file runs."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deadhead
from deadhead.cli import execute
from tests.authors import CUTOFFS, WIDTH, State, authors_state, random_model, write_state
from tests.small import tree


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _changed(change: Callable[[State], object], ending: str = ".pt", **values: Any) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        state = authors_state(random_model(**({"tie_word_embeddings": False} | values)))
        change(state)
        write_state(state, folder / f"state{ending}")

    return prepare


def _bomb(folder: Path) -> None:
    torch.save(
        {**authors_state(random_model(tie_word_embeddings=False)), "args": _Bomb(folder / "boom")}, folder / "x.pt"
    )


def _array_of_objects(folder: Path) -> None:
    values: Any = {"layers.0.attn.q_proj.weight": np.array([_Bomb(folder / "boom")], dtype=object)}
    np.savez(folder / "x.npz", **values)


def _occupied(folder: Path) -> None:
    _good(folder)
    (folder / "full").mkdir()
    (folder / "full" / "letter.txt").write_text("dear")


def _one() -> State:
    return authors_state(random_model(tie_word_embeddings=False))


def _state_in_checkpoint(folder: Path) -> None:
    deadhead.save(random_model(), folder / "full")
    write_state(_one(), folder / "full" / "state.safetensors")


_good = _changed(lambda state: None)
_adaptive: dict[str, Any] = {"adaptive_cutoffs": CUTOFFS, "tie_word_embeddings": True}
_CASES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "missing file": ("none.pt", "A state dict was expected at none.pt, but there is no such file", lambda _: None),
    "another ending": ("x.h5", "ending in .safetensors, .npz, .pt", lambda d: (d / "x.h5").write_bytes(b"1")),
    "no pickle": ("x.pt", "is damaged or holds more than tensors", lambda d: (d / "x.pt").write_bytes(b"1")),
    "bare pickle": ("x.pt", "save its state dict anew", lambda d: (d / "x.pt").write_bytes(pickle.dumps(_Bomb(d)))),
    "unsafe pickle": ("x.pt", "holds more than tensors.*torch.save", _bomb),
    "array of objects": ("x.npz", "cannot be read as arrays of numbers", _array_of_objects),
    "no arrays": ("x.npz", "cannot be read as arrays", lambda d: (d / "x.npz").write_bytes(b"PK")),
    "no safetensors": ("x.safetensors", "damaged or cut short", lambda d: (d / "x.safetensors").write_bytes(b"12")),
    "a list": ("x.pt", "holds no state dict of the paper", lambda d: torch.save([torch.ones(2)], d / "x.pt")),
    "another model": ("x.pt", "no tensor layers.0.attn.q_proj", lambda d: torch.save({"w": torch.ones(2)}, d / "x.pt")),
    "missing": (
        "state.pt",
        "has no tensor layers.1.attn.r_pos_bias,",
        _changed(lambda state: state.pop("layers.1.attn.r_pos_bias.data")),
    ),
    "missing table": ("state.pt", "has no tensor pos_emb,", _changed(lambda state: state.pop("pos_emb.data"))),
    "missing embedding": (
        "state.pt",
        "has no tensor word_emb.shortlist.0.weight,",
        _changed(lambda state: state.pop("word_emb.weight.data")),
    ),
    "missing gate": (
        "state.pt",
        "has no tensor layers.0.attn.gate.gate,",
        _changed(lambda state: state.pop("layers.0.attn.gate.gate.data")),
    ),
    "a layer too many": (
        "state.pt",
        "has no tensor layers.2.attn.q_proj.weight,",
        _changed(lambda state: state.update({"layers.99.norm.bias": torch.ones(WIDTH)})),
    ),
    "unexpected": (
        "state.pt",
        "has a tensor layers.0.feed.weight, which no",
        _changed(lambda state: state.update({"layers.0.feed.weight": torch.ones(2)})),
    ),
    "shape": (
        "state.pt",
        r"layers.1.norm.bias must be of shape \(64,\), but is of \(63,\)",
        _changed(lambda state: state.update({"layers.1.norm.bias.data": torch.ones(63)})),
    ),
    "width of the heads": (
        "state.pt",
        "layers.0.attn.mem_k and pos_emb do not fit",
        _changed(lambda state: state.update({"layers.0.attn.mem_k.data": torch.ones(1, 3, 6, 16)})),
    ),
    "dimensions": (
        "state.pt",
        r"pos_emb must have 3 dimensions and none empty, but is of shape \[0\]",
        _changed(lambda state: state.update({"pos_emb.data": torch.ones(0)})),
    ),
    "whole numbers": (
        "state.pt",
        "floating-point numbers was expected for layers.1.norm.bias",
        _changed(lambda state: state.update({"layers.1.norm.bias.data": torch.ones(64, dtype=torch.int64)})),
    ),
    "not finite": (
        "state.pt",
        "layers.0.norm.bias in state.pt has values that are not finite",
        _changed(lambda state: state["layers.0.norm.bias.data"].fill_(torch.nan)),
    ),
    "twice": (
        "state.npz",
        "holds the tensor layers.0.norm.bias twice",
        _changed(lambda state: state.update({"layers.0.norm.bias": torch.ones(64)}), ".npz"),
    ),
    "untied": (
        "state.pt",
        "word_emb.tail.1.0.weight and criterion.tail.1.1.weight must be equal",
        _changed(lambda state: state["criterion.tail.1.1.weight.data"].add_(1), **_adaptive),
    ),
    "width of a tail": (
        "state.pt",
        r"word_emb.tail.1.0.weight must be of shape \(16, 4\), but is of \(16, 5\)",
        _changed(lambda state: state.update({"word_emb.tail.1.0.weight.data": torch.ones(16, 5)}), **_adaptive),
    ),
    "long memory": ("state.pt --memory-length 18", "can be at most 17, but it is 18", _good),
    "dropout": ("state.pt --dropout 1", "hidden_dropout must be at least 0 and below 1", _good),
    "cut what": (
        "state.pt --cut",
        "has no gates",
        _changed(lambda state: [state.pop(f"layers.{layer}.attn.gate.gate.data") for layer in range(2)]),
    ),
    "cut without gates": ("state.pt --cut --no-gates", "exclude each other", _good),
    "two tokenizers": ("state.pt --vocab v --tokenizer t", "one of the two", _good),
    "missing vocabulary": ("state.pt --vocab v", "A vocabulary was expected at v, but there is no such", _good),
    "small vocabulary": (
        "state.pt --vocab v",
        "has a vocabulary of 60 tokens, but that of v has 3;",
        lambda d: (_good(d), (d / "v").write_text("<eos>\n<unk>\na\n")),
    ),
    "words in a line": ("x.pt --vocab v", "line 2, 'a b', is not one", lambda d: (d / "v").write_text("<eos>\na b\n")),
    "word again": ("x.pt --vocab v", "line 2, '<eos>', stands in", lambda d: (d / "v").write_text("<eos>\n<eos>\n")),
    "no unk": ("x.pt --vocab v", "has no <unk>", lambda d: (d / "v").write_text("<eos>\nb\n")),
    "not UTF-8": ("x.pt --vocab v", "cannot be read as UTF-8", lambda d: (d / "v").write_bytes(b"\xff")),
    "no tokenizer": ("state.pt --tokenizer ./v", "A tokenizer was expected at v", _good),
    "two state dicts": (
        "x.pt",
        r"x.pt holds 2 state dicts \(model, average.model\); save the one that is meant alone",
        lambda d: torch.save({"model": _one(), "average": {"model": _one()}}, d / "x.pt"),
    ),
    "sparse": (
        "state.pt",
        "floating-point numbers was expected for layers.1.norm.bias",
        _changed(lambda state: state.update({"layers.1.norm.bias.data": torch.ones(WIDTH).to_sparse()})),
    ),
    "a layer far away": (
        "state.pt",
        "has no tensor layers.2.attn.q_proj.weight,",
        _changed(lambda state: state.update({"layers.123456789012.norm.bias": torch.ones(WIDTH)})),
    ),
    "over its own state dict": (
        "full/state.safetensors --out full",
        "state.safetensors lies in full, which the checkpoint would replace; choose another --out",
        _state_in_checkpoint,
    ),
    "out is not ours": ("state.pt --out full", "not written by deadhead", _occupied),
}


@pytest.mark.parametrize("name", _CASES)
def test_one_sentence_and_nothing_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, message, prepare = _CASES[name]
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    code = execute(["convert", "--out", "out", *arguments.split()])
    output, errors = capfd.readouterr()
    assert (code, output) == (2, ""), errors
    assert errors.startswith("deadhead: ") and errors.endswith(".\n") and errors.count("\n") == 1, errors
    assert re.search(message, errors), errors
    assert tree(tmp_path) == before, "a file's code ran, or something was written"
