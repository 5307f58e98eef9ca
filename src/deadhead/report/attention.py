"""The attention of each head of a model while it reads a sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.checkpoints import checkpoint
from deadhead.data import load_tokenizer
from deadhead.errors import InputError
from deadhead.layouts import find_layout
from deadhead.measure.evaluation import require_known
from deadhead.measure.positions import max_positions
from deadhead.modes import evaluating
from deadhead.report.run_facts import ATTENTION_OF, checkpoints_in, packed

# Weights of all heads together that a page takes along, one byte each, and tokens that can be read on an axis.
_MOST_WEIGHTS = 600_000
_MOST_TOKENS = 48
_SIGNS = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})


def run_attention(
    folder: Path, sentence: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Return the attention patterns of a run's dense and pruned model, if they exist, on a sentence.

    `folder` may also be a checkpoint; `progress` is called with the number of models done and in total.
    """
    found = checkpoints_in(folder, ATTENTION_OF)
    patterns: dict[str, Any] = {}
    for done, (name, path) in enumerate(found.items()):
        patterns[name] = attention_patterns(checkpoint.load(path), load_tokenizer(path), sentence)
        progress(done + 1, len(found))
    return patterns


def attention_patterns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentence: str) -> dict[str, Any]:
    """Return the attention weights of every head, dense, gated or cut, on a sentence, or the beginning of a long one.

    Returns:
        ``tokens``; ``columns``: the tokens and, if the model has persistent vectors, one column for all of them; and
        ``layers``: for each layer its ``heads``, by the indices of the dense model's query heads, the ``total`` that
        the dense model had, and ``weights``, bytes (H, T, columns) in base64, where 255 stands for 1.

    Raises:
        InputError: the sentence is empty, or the model does not return its attention.
    """
    layout = find_layout(model)
    plan = layout.recorded_plan(model)
    all_sites = layout.sites(model, "head" if plan is None else plan.unit)
    heads = sum(site.total for site in all_sites) or 1
    most = min(_MOST_TOKENS, max(8, math.isqrt(_MOST_WEIGHTS // heads)), max_positions(model) or _MOST_TOKENS)
    ids = tokenizer(sentence, return_tensors="pt").input_ids[:, :most]
    if ids.shape[1] == 0:
        raise InputError("A sentence of at least one token was expected, but it is empty.")
    require_known(model, int(ids.max()), of="sentence")
    attentions = _weights(model, ids.to(model.device))
    tokens = [str(tokenizer.decode([token])).translate(_SIGNS) or f"[{token}]" for token in ids[0].tolist()]
    length = len(tokens)
    layers = {}
    has_persistent = any(found.shape[-1] > length for found in attentions)
    # A layer without heads has nothing to tell.
    sites = [site for site in all_sites if site.units]
    if len(sites) != len(attentions):
        raise InputError(f"Models of type {model.config.model_type} do not return the attention of all their layers.")
    for site, found in zip(sites, attentions, strict=True):
        weights_HTK = found[0].float()
        if weights_HTK.shape[-1] > length:
            rest_HT1 = weights_HTK[..., length:].sum(-1, keepdim=True)
            weights_HTK = torch.cat([weights_HTK[..., :length], rest_HT1], dim=-1)
        # A model that was cut by groups counts in groups, each with as many query heads.
        each = len(weights_HTK) // len(site.units)
        layers[str(site.layer)] = {
            "heads": [unit * each + place for unit in site.units for place in range(each)],
            "total": site.total * each,
            "weights": packed(weights_HTK.cpu().numpy()),
        }
    columns = [*tokens, *(["persistent vectors"] if has_persistent else [])]
    return {"tokens": tokens, "columns": columns, "layers": layers}


def _weights(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return the attention weights (1, H, T, K) of each layer that has heads."""
    before = model.config._attn_implementation
    try:
        # The fused kernels do not keep the weights.
        model.set_attn_implementation("eager")
        with evaluating(model), torch.inference_mode():
            found = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    if not found:
        raise InputError(f"Models of type {model.config.model_type} do not return their attention weights.")
    return [weights for weights in found if weights is not None and weights.shape[1]]
