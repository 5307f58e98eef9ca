"""The memory that training takes, before it starts: counted, with a formula for activations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deadhead.attaching import detach, is_gate
from deadhead.layouts import find_layout
from deadhead.layouts.feed_forward import FeedForwardSite
from deadhead.measure.chunks import AT_ONCE, fits_at_once
from deadhead.training.phases.choosing import attach_gates
from deadhead.training.phases.defaults import segment_length
from deadhead.training.phases.learning import learner
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe

# Numbers in a buffer of deadhead's blocked attention.
_CAPACITY = 2**21
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_DROPOUT = ("hidden_dropout", "resid_pdrop", "resid_dropout", "hidden_dropout_prob")


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory that training with gates takes, in bytes.

    Args:
        weights: parameters and buffers as they are held during training, including gates and adapters.
        gradients: gradients of everything that learns, at the end of the backward pass.
        optimizer: two moments of everything that learns, for AdamW, and one of each gate, for its own optimizer.
        activations: what a step holds besides the three above when its backward pass begins, and its working memory.
        total: the peak. It is less than the sum, because gradients are allocated while activations are freed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int


def training_memory(model: PreTrainedModel, recipe: PhaseRecipe) -> TrainingMemory:
    """Estimate the memory that `deadhead.training.train` needs for a model, with gates if the recipe has some.

    Weights, gradients and moments are counted. Activations are a formula of batch, length and the layers' widths, for
    decoders like Llama and GPT-2 and for deadhead's own models, with the kernels of a CPU. The estimate was within 25 %
    of the peak of allocated tensors for all of these (`benchmarks/memory.py`). A process takes more: libraries, a GPU's
    context, and what its allocator wastes. A teacher is not counted, and neither are accumulated batches, which keep
    gradients from one to the next (then the sum of the four parts is an upper bound). The model may be on any device,
    including meta, and is not changed.

    Raises:
        UnsupportedModel: the model has no head that could be pruned.
        InputError: the model cannot be trained by this recipe.
    """
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    empty = detach(copy.deepcopy(model, memo))
    held, late = activations(empty, recipe)
    if isinstance(recipe, PruneRecipe):
        attach_gates(empty, recipe)
    with torch.device("meta"), learner(empty, recipe) as trainee:
        learning = {name: p.nbytes for name, p in trainee.named_parameters() if p.requires_grad or is_gate(name)}
        weights = sum(tensor.nbytes for tensor in (*trainee.parameters(), *trainee.buffers()))
    gradients = sum(learning.values())
    optimizer = sum(size * (1 if is_gate(name) else 2) for name, size in learning.items())
    total = weights + optimizer + max(held, gradients + late)
    return TrainingMemory(weights=weights, gradients=gradients, optimizer=optimizer, activations=held, total=total)


def activations(model: PreTrainedModel, recipe: PhaseRecipe) -> tuple[int, int]:
    """Return the bytes a step holds besides weights when its backward pass begins, and besides gradients when it ends.

    Counted are the bytes of a token over all layers: before each of two sublayers the state, its normed value and the
    projections' input; queries, keys, values, the heads' outputs before and after their gates; the hidden units.
    """
    config: Any = model.config.get_text_config()
    layout, length = find_layout(model), segment_length(model, recipe)
    sites, tokens = layout.sites(model, layout.units(model)[-1]), recipe.batch_size * length
    layers, memory = len(sites), getattr(config, "memory_length", 0)
    frozen = isinstance(recipe, PruneRecipe) and recipe.freeze_weights
    learns = not (recipe.lora_rank or frozen)
    # Bytes of a number in the states between layers, and within a layer.
    wide = 4 if learns else model.dtype.itemsize
    narrow = 2 if recipe.bf16 else wide
    seen = 1 + memory / length
    heads = sum(site.unit_dim * len(site.units) for site in sites)
    width = getattr(config, "hidden_size", heads // layers)
    keys = sum(site.cache_values(1) for site in sites)
    attention = narrow * ((2 if frozen else 3) * heads + seen * keys)
    dropout = any(getattr(config, name, 0) for name in _ATTENTION_DROPOUT)
    queries = sum(len(site.units) for site in sites)
    scores = 0
    if memory:
        # Blocks keep a byte of dropout's choice for each weight. Scores, slopes and factors have one buffer each.
        columns = memory + length + config.num_persistent
        attention += dropout * queries * columns
        scores = (2 + dropout) * narrow * min(_CAPACITY, tokens * queries // layers * columns)
    elif dropout or config._attn_implementation == "eager":
        # Softmax over all pairs, dropout's factors and their product, in float32.
        attention += queries * length * 4 * (3 if dropout else 1)
    # In the first layer nothing before the first gate has a gradient.
    attention *= (layers - 1) / layers if frozen else 1
    # States of the segment before, and with those of this one, beside the layer's input.
    kept = layers * width * wide * (1 + 2 * seen if memory else 1)
    is_rms = not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    normed = wide * (learns and is_rms) + narrow * (not frozen) * (2 if recipe.bf16 else 1)
    norms = layers * width * ((seen * narrow * (not frozen)) if memory else wide + 2 * normed)
    norms += 2 * layers * width * wide * any(getattr(config, name, 0) for name in _DROPOUT)
    within = attention + norms + narrow * _hidden_numbers(model, frozen=frozen)
    # Logits' log-softmax, and the gradients of both, in float32. Where there are many, a chunk has them, and the output
    # layer's gradient is there before the backward pass, beside a chunk's.
    words = (getattr(config, "adaptive_cutoffs", None) or [config.vocab_size])[0]
    logits = 12 * min(tokens * words, AT_ONCE)
    if learns and not fits_at_once(tokens, words):
        logits += 8 * words * width
    # A layer's backward pass works with about a quarter of what the layer had kept.
    layer = tokens * within / layers
    working = (1.25 if recipe.gradient_checkpointing else 0.25) * layer + scores
    held = kept if recipe.gradient_checkpointing else kept + within
    # Autocast keeps a copy of each matrix until the backward pass has used it.
    linear = [module.weight.numel() for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    copies = 2 * sum(linear) if recipe.bf16 and wide == 4 else 0
    return int(tokens * held + max(logits, working) + copies), int(1.25 * layer + scores)


def _hidden_numbers(model: PreTrainedModel, *, frozen: bool) -> int:
    """Return how many numbers of hidden units a token keeps for the backward pass."""
    config: Any = model.config.get_text_config()
    found = [site for site in find_layout(model).hidden_sites(model) if isinstance(site, FeedForwardSite)]
    layers = [(site.feed_forward.width, len(site.feed_forward.inputs) * site.feed_forward.copies) for site in found]
    if not layers and getattr(config, "num_experts_per_tok", None):
        used = config.num_experts_per_tok
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        layers = [(used * width, 2)] * config.num_hidden_layers
    # Gated: what goes into the activation and comes out, the other factor, the product. GPT-2's is put together of
    # five functions. Frozen output projections do not need the product.
    names = (getattr(config, name, None) for name in ("hidden_act", "activation_function"))
    plain = 5 if "gelu_new" in names else 2
    return sum(width * ((4 if inputs > 1 else plain) - frozen) for width, inputs in layers)
