"""A recipe's own model: its configuration, and a fresh one of it."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deadhead.data import special_token_ids
from deadhead.errors import InputError, own_sentence
from deadhead.models import AllAttentionConfig, TransformerXLConfig
from deadhead.training.recipes.recipe import ModelRecipe


def model_config(recipe: ModelRecipe, vocab_size: int, **special_tokens: Any) -> AllAttentionConfig:
    """Return the configuration of a recipe's model, given its vocabulary.

    Raises:
        InputError: the sizes do not fit each other.
    """
    make: Any = AllAttentionConfig
    inner: dict[str, int] = {"num_persistent": recipe.persistent or 128}
    if recipe.architecture == "transformer_xl":
        make, inner = TransformerXLConfig, {"feed_forward_size": recipe.feed_forward or 4 * recipe.width}
    try:
        config: AllAttentionConfig = make(
            vocab_size=vocab_size,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            **inner,
            memory_length=recipe.memory_length,
            segment_length=recipe.segment_length,
            position=recipe.position,
            adaptive_cutoffs=recipe.adaptive_cutoffs,
            attention_dropout=recipe.attention_dropout,
            hidden_dropout=recipe.hidden_dropout,
            embedding_dropout=recipe.embedding_dropout,
            output_dropout=recipe.output_dropout,
            **special_tokens,
        )
    except ValueError as error:
        raise InputError(f"The recipe's model does not fit together: {own_sentence(error)}") from None
    return config


def build_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Return a fresh model for a tokenizer's vocabulary.

    Raises:
        InputError: the sizes do not fit each other.
    """
    config = model_config(recipe, len(tokenizer), **special_token_ids(tokenizer))
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
