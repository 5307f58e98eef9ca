"""Write a language model as an ONNX file with its key/value cache, and what onnxruntime-genai needs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.export.graphs import FlatModel

FILE = "model.onnx"
GENAI_FILE = "genai_config.json"
_OPSET = 18
_INPUTS = ("input_ids", "attention_mask", "position_ids")
# Any sizes but 0 and 1, which the exporter would take for constants, all different, so that none is taken for another.
_BATCH, _NEW, _PAST = 2, 3, 5


@torch.no_grad()
def write_onnx(model: FlatModel, path: Path) -> None:
    """Write the file of a model in evaluation mode; weights beyond 2 GB lie in one beside it.

    Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key|value` of the layers i that
    have heads, outputs `logits` and `present.{i}.key|value`; batch and lengths are free.

    Raises:
        UnsupportedModel: PyTorch's exporter cannot trace the model.
    """
    past = tuple(torch.randn(_BATCH, heads, _PAST, width) for heads, width in model.cache.values())
    mask = torch.ones((_BATCH, _PAST + _NEW), dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, -1).contiguous()
    inputs = (torch.zeros((_BATCH, _NEW), dtype=torch.long), mask, positions, *past)
    new, whole = {0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}
    shapes = (new, whole, new, *([tuple({0: "batch", 2: "past"} for _ in past)] if past else []))
    try:
        with _quietly():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[*_INPUTS, *(f"past_key_values.{name}" for name in model.cache)],
                output_names=["logits", *(f"present.{name}" for name in model.cache)],
                opset_version=_OPSET,
                verbose=False,
            )
    except Exception as error:  # whatever the model does that the tracer does not know
        raise UnsupportedModel(
            f"{type(model.model).__name__} cannot be exported to ONNX: PyTorch's exporter stopped with a "
            f"{type(error).__name__}."
        ) from error
    assert program is not None
    program.save(str(path))


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter speaks of its own deprecations and of operators of packages that are not there."""
    exporter = logging.getLogger("torch.onnx._internal.exporter")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def genai_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return what onnxruntime-genai must be told to continue texts with the file: the content of `genai_config.json`.

    The numbers of heads stand there once for all layers; genai takes each layer's own from the file's inputs.
    """
    config: Any = model.config.get_text_config()
    generation: Any = model.generation_config
    special = {name: getattr(generation, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = getattr(config, "max_position_embeddings", None) or 2**17
    heads = config.num_attention_heads
    return {
        "model": {
            # Its name for any decoder that takes token ids, a mask, positions and a cache.
            "type": "decoder",
            "context_length": length,
            "vocab_size": config.vocab_size,
            **{name: token for name, token in special.items() if token is not None},
            "decoder": {
                "session_options": {},
                "filename": FILE,
                "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "hidden_size": config.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    **{name: name for name in _INPUTS},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The cache is a new tensor each time: one that is shared would have to be of the greatest length.
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
