"""GGUF files: llama.cpp computes from them what PyTorch computes, for whatever plan, or they are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deadhead
from deadhead.errors import is_installed
from deadhead.export import gguf
from deadhead.export.gguf import plan_file
from tests.export.small import cut_by, cut_model, dense_model

_HAS_LLAMA_CPP = pytest.mark.skipif(not is_installed("llama_cpp"), reason="llama-cpp-python is not installed")


def needs_llama_cpp(test: Any) -> Any:
    """Mark a test that reads a file in llama.cpp, in a process of its own."""
    return pytest.mark.slow(_HAS_LLAMA_CPP(test))


_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_KINDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": _LLAMA_3, "tie_word_embeddings": True}),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen3", {"tie_word_embeddings": True}),
]
_FULL = pytest.mark.full


@needs_llama_cpp
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=_FULL) for seed in range(2, 8))])
@pytest.mark.parametrize("unit", ["kv_group", "head"])
@pytest.mark.parametrize(("kind", "fields"), _KINDS)
def test_any_plan_computes_the_same(kind: str, fields: dict[str, Any], unit: str, seed: int, tmp_path: Path) -> None:
    """Empty layers, the first among them, uneven groups and other numbers of hidden units included."""
    model = cut_model(kind, seed, unit=unit, **fields)
    found = deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32")
    (agreement,) = found.agreements
    assert agreement.logit_difference <= 1e-5
    assert agreement.tokens_equal == agreement.tokens == 16
    assert found.num_bytes == (tmp_path / "model.gguf").stat().st_size


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "counts", "architecture"),
    [
        ("llama", [2, 2, 2, 2], "llama"),
        ("llama", [0, 0, 0, 0], "deci"),
        ("llama", [0, 4, 1, 0], "deci"),
        ("qwen2", [1, 1, 1, 1], "qwen2"),
        ("qwen2", [2, 2, 2, 2], "deci"),
        ("qwen3", [3, 3, 3, 3], "qwen3"),
        ("qwen3", [0, 0, 0, 0], "openelm"),
    ],
)
def test_the_architecture_follows_from_the_plan(
    kind: str, counts: list[int], architecture: str, tmp_path: Path
) -> None:
    model = cut_by(kind, counts, tie_word_embeddings=kind == "qwen3")
    found = deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32")
    assert found.detail == architecture
    assert found.agreements[0].logit_difference <= 1e-5


@needs_llama_cpp
@pytest.mark.parametrize(("kind", "most"), [("f16", 0.01), ("bf16", 0.05), ("q8_0", 0.2), ("q5_k_m", 0.5)])
def test_other_types(kind: str, most: float, tmp_path: Path) -> None:
    """The less a type remembers, the smaller the file."""
    model = cut_by("llama", [0, 3, 1, 2])
    whole = deadhead.export_model(model, tmp_path / "whole.gguf", to="gguf", kind="f32")
    found = deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind=kind)
    assert 1e-5 < found.agreements[0].logit_difference < most
    assert found.num_bytes < 0.6 * whole.num_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "whole.gguf"]


@needs_llama_cpp
def test_a_file_that_computes_something_else_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotated rows left where transformers has them: a file that loads, and is wrong."""
    model = cut_by("llama", [1, 3, 1, 2])
    monkeypatch.setattr(gguf, "interleave_halves", lambda tensor, heads: tensor)
    with pytest.raises(deadhead.errors.ExportError, match="does not compute in llama-cpp-python"):
        deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32")
    assert not list(tmp_path.iterdir())


@needs_llama_cpp
def test_a_file_that_llama_cpp_cannot_read_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cut_by("llama", [1, 3, 1, 2])
    wrong = replace(plan_file(model), head_dim=16)
    monkeypatch.setattr(gguf, "plan_file", lambda _: wrong)
    with pytest.raises(deadhead.errors.ExportError, match="llama.cpp could not use the file: .*wrong shape"):
        deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32")
    assert not list(tmp_path.iterdir())


def test_a_file_holds_each_layers_numbers(tmp_path: Path) -> None:
    """What any program finds in the file, whether llama.cpp is there or not."""
    from gguf import GGUFReader

    model = cut_by("llama", [0, 3, 0, 2])
    path = tmp_path / "model.gguf"
    gguf.write_gguf(model, path, plan_file(model), kind="f16", name="small")
    reader = GGUFReader(path)
    numbers = {name: reader.get_field(f"deci.attention.{name}") for name in ("head_count", "head_count_kv")}
    # Llama.cpp refuses a first layer without heads: there stands one of zeros.
    assert numbers["head_count"].contents() == [1, 6, 0, 4]  # type: ignore[union-attr]
    assert numbers["head_count_kv"].contents() == [1, 3, 0, 2]  # type: ignore[union-attr]
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert not any(name.startswith("blk.2.attn") for name in tensors)
    assert not tensors["blk.0.attn_q.weight"].any()
    stored: Any = model.get_decoder().layers[1].self_attn.v_proj.weight  # type: ignore[operator]
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], stored.detach().half().numpy())


def test_rows_that_turn_together_come_side_by_side() -> None:
    rows = torch.arange(8)
    assert gguf.interleave_halves(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf.interleave_halves(rows[:, None], 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gpt2", {}, "A model of type gpt2 cannot be written as GGUF: .* to onnx"),
        ("gpt_neox", {}, "A model of type gpt_neox cannot be written as GGUF"),
        ("mistral", {"sliding_window": 8}, "attends to a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "has the activation gelu, where llama.cpp has silu"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "of type yarn"),
    ],
)
def test_what_cannot_be_said_is_refused(kind: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = dense_model(kind, **fields)
    with pytest.raises(deadhead.UnsupportedModel, match=message):
        deadhead.export_model(model, tmp_path / "model.gguf", to="gguf")
    assert not list(tmp_path.iterdir())


def test_norms_of_queries_need_a_tied_output_layer(tmp_path: Path) -> None:
    model = cut_by("qwen3", [1, 2, 3, 4], tie_word_embeddings=False)
    with pytest.raises(deadhead.UnsupportedModel, match="has an output layer of its own"):
        deadhead.export_model(model, tmp_path / "model.gguf", to="gguf")
