"""ONNX and OpenVINO files: both runtimes compute from them what PyTorch computes, with empty, whole and padded past."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import deadhead
from deadhead.export import flat, onnx
from deadhead.export.agreement import make_reference
from deadhead.export.onnx import FlatModel, flat_model
from deadhead.plans.plan import HeadPlan
from tests.export.small import cut_by, cut_model
from tests.random_models import tiny_model

pytestmark = pytest.mark.slow

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")
_FULL = pytest.mark.full
_CUT = HeadPlan(kept={0: (), 1: (0, 2), 2: (3,)}, total=dict.fromkeys(range(3), 4))


def _own(**fields: Any) -> Any:
    return deadhead.cut(tiny_model(**fields), _CUT)


# Each takes some seconds to trace: `make test-full` has the rest.
_MODELS = {
    "llama": lambda: cut_model("llama", 1),
    "gemma2, window of 8": lambda: cut_model("gemma2", 1, sliding_window=8),
    "all-attention": lambda: _own(attend_initial_memory=True, position="learned"),
}
_MORE = {
    "llama, single heads": lambda: cut_model("llama", 2, unit="head"),
    "mistral, window of 8": lambda: cut_model("mistral", 1, sliding_window=8),
    "qwen2": lambda: cut_model("qwen2", 3),
    "qwen3": lambda: cut_model("qwen3", 3),
    "gpt2": lambda: cut_model("gpt2", 1),
    "gpt_neox": lambda: cut_model("gpt_neox", 1),
    "opt": lambda: cut_model("opt", 1),
    "phi3": lambda: cut_model("phi3", 1),
    "gemma3": lambda: cut_model("gemma3_text", 1, sliding_window=8),
    "no head left": lambda: cut_by("llama", [0, 0, 0, 0]),
    "all-attention, rotary": lambda: _own(position="rotary"),
    "all-attention, rotary, zero memory": lambda: _own(position="rotary", attend_initial_memory=True),
    "all-attention, adaptive": lambda: _own(adaptive_cutoffs=[10, 20], adaptive_factor=2),
    "all-attention, shared biases": lambda: _own(share_position_bias=True, projection_bias=True),
    "transformer-xl": lambda: _own(num_persistent=0, feed_forward_size=24),
}


@pytest.mark.parametrize("name", [*_MODELS, *(pytest.param(name, marks=_FULL) for name in _MORE)])
def test_both_runtimes_compute_the_same(name: str, tmp_path: Path) -> None:
    """The check itself reads in two chunks and then token by token, beside it the same text padded on the left."""
    model = {**_MODELS, **_MORE}[name]()
    graph = flat_model(model)
    path = tmp_path / onnx.FILE
    onnx.write_onnx(graph, path)
    reference = make_reference(model)
    for runtime in ("onnxruntime", "openvino"):
        agreement = flat.check(path, reference, runtime, 1e-5)
        assert agreement.tokens_equal == agreement.tokens
    _check_names(path, graph, model)


def _check_names(path: Path, graph: FlatModel, model: Any) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past = {given.name: given.shape for given in session.get_inputs() if given.name.startswith("past")}
    heads = {f"past_key_values.{name}": heads for name, (heads, _) in graph.cache.items()}
    assert {name: shape[1] for name, shape in past.items()} == heads
    assert all([shape[0], shape[2]] == ["batch", "past"] for shape in past.values())
    empty = [layer for layer, count in enumerate(deadhead.model_cost(model).heads) if not count]
    assert not any(f"past_key_values.{layer}.key" in past for layer in empty)
    assert [output.name for output in session.get_outputs()] == ["logits", *(f"present.{name}" for name in graph.cache)]


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    """Beside the right file, the reference of a model with another head cut."""
    model, other = cut_by("llama", [1, 3, 1, 2]), cut_by("llama", [1, 3, 2, 2])
    path = tmp_path / onnx.FILE
    onnx.write_onnx(flat_model(model), path)
    with pytest.raises(deadhead.errors.ExportError, match="does not compute in onnxruntime"):
        flat.check(path, make_reference(other), "onnxruntime", 1e-4)
    # A runtime that meets what is no model says so in a sentence too.
    path.write_bytes(path.read_bytes()[:1000])
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(deadhead.errors.ExportError, match="cannot load the file"):
            flat.FlatSession(path, runtime)


def test_genai_continues_texts(tmp_path: Path) -> None:
    """onnxruntime-genai takes an exported folder as it is, layers without heads too, and continues as PyTorch does."""
    genai = pytest.importorskip("onnxruntime_genai")
    for name, model in (("llama", cut_by("llama", [0, 3, 1, 2], eos_token_id=None)), ("ours", _own(eos_token_id=None))):
        deadhead.export_model(model, tmp_path / name, to="onnx")
        prompt = [2, 3, 4, 5, 6]
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=15, do_sample=False, pad_token_id=0)
        loaded = genai.Model(str(tmp_path / name))
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=20)
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        assert generator.get_sequence(0).tolist() == expected[0].tolist()


def test_models_without_such_a_cache_are_refused(tmp_path: Path) -> None:
    config: Any = MambaConfig
    mamba = MambaForCausalLM(config(vocab_size=99, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(deadhead.UnsupportedModel, match="not keys and values; such models are not exported"):
        deadhead.export_model(mamba, tmp_path / "out", to="onnx")
    assert not list(tmp_path.iterdir())


def test_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    make: Any = BertConfig
    bert = BertModel(
        make(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(deadhead.UnsupportedModel, match="BertModel does not; only such are exported"):
        deadhead.export_model(bert, tmp_path / "out", to="onnx")
