"""Write a language model as an ONNX file with its key/value cache, by PyTorch's exporter."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deadhead.errors import UnsupportedModel
from deadhead.export.flat_model import FlatModel

FILE = "model.onnx"
_OPSET = 18
# Any sizes but 0 and 1, which the exporter would take for constants, all different, so that none is taken for another.
_BATCH, _NEW, _PAST = 2, 3, 5


@torch.no_grad()
def write_onnx(model: FlatModel, path: Path) -> None:
    """Write the file; weights beyond 2 GB lie in one beside it.

    Inputs are `input_ids`, `attention_mask`, `position_ids` and `past_key_values.{i}.key|value` of the layers i that
    have heads, outputs `logits` and `present.{i}.key|value`; batch and lengths are free.

    Args:
        model: in evaluation mode.
        path: of the file.

    Raises:
        UnsupportedModel: PyTorch's exporter cannot trace the model.
    """
    total = _PAST + _NEW
    past = tuple(torch.randn(_BATCH, tensor.heads, _PAST, tensor.width) for tensor in model.cache)
    positions = torch.arange(_PAST, total).expand(_BATCH, -1).contiguous()
    ids = torch.zeros((_BATCH, _NEW), dtype=torch.long)
    inputs = (ids, torch.ones((_BATCH, total), dtype=torch.long), positions, *past)
    new, whole = {0: "batch", 1: "sequence"}, {0: "batch", 1: "total"}
    shapes: tuple[Any, ...] = (new, whole, new)
    if past:
        shapes += (tuple({0: "batch", 2: "past"} for _ in past),)
    try:
        with _quietly():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=["input_ids", "attention_mask", "position_ids", *(t.past_name for t in model.cache)],
                output_names=["logits", *(tensor.present_name for tensor in model.cache)],
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
