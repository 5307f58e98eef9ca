"""The model in a GGUF file and its configuration, read by transformers as if they had never been quantised."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from deadhead.disk.gguf import reading_gguf
from deadhead.layouts.classes import model_class


def read_gguf_config(file: Path) -> PreTrainedConfig:
    """Return a new copy of the configuration; InputError if it cannot be read."""
    found = file.stat()
    return copy.deepcopy(_read_config(file, found.st_mtime_ns, found.st_size))


# A command reads it before it loads the weights, and again then; it takes seconds, because all tokens are parsed.
@functools.lru_cache(maxsize=2)
def _read_config(file: Path, mtime_ns: int, size: int) -> PreTrainedConfig:
    with reading_gguf(file, "configuration") as (folder, of_gguf):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, **of_gguf)
    return config


def read_gguf_model(file: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Return the model, by default in float32.

    Raises:
        InputError: it cannot be read.
        UnsupportedModel: transformers has no class for it.
    """
    config = read_gguf_config(file)
    kind = model_class(config)
    with reading_gguf(file, "model") as (folder, of_gguf):
        model: Any = kind.from_pretrained(folder, config=config, dtype=dtype or torch.float32, **of_gguf)
    # Otherwise `save_pretrained` would refuse the model as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    return model.eval()
