"""The cost of a recipe's model before anything is trained, next to published numbers for models of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deadhead.errors import InputError
from deadhead.measure.cost import config_cost, first_heads
from deadhead.training.recipes.recipe import DataRecipe, PublishedModel, Recipe
from deadhead.training.runs.inputs import model_config

# Tokens that tokenizers without a vocab_size have (see `build_tokenizer`); how many words a text has, only it tells.
_VOCABULARIES = {"byte": 257, "bpe": 8192}


@dataclass(frozen=True, kw_only=True)
class ShapeCost:
    """The cost of a model of a recipe's shape with some of its heads.

    Args:
        heads: heads left, one number a layer; None if only their share is known: the other numbers are then
            interpolated, as if all heads had the mean size.
        sparsity: share of the heads that are gone, in [0, 1].
        parameters: parameters without embeddings and output layer.
        head_parameters: the parameters among them that belong to heads.
        layer_flops_per_token: FLOPs of a forward pass for one token, without embeddings and output layer; see `Cost`.
        flops_per_token: the same with the output layer; None if the vocabulary is not known.
        stated_parameters: parameters without embeddings and output layer as the authors count them; None if they do
            not state them.
    """

    name: str
    heads: list[int] | None
    sparsity: float
    parameters: int
    head_parameters: int
    layer_flops_per_token: float
    flops_per_token: float | None
    stated_parameters: int | None = None


def expected_vocabulary(data: DataRecipe) -> int | None:
    """Return the size of a recipe's vocabulary, or None if it depends on the text."""
    return data.vocab_size or _VOCABULARIES.get(data.tokenizer)


def recipe_costs(
    recipe: Recipe, *, vocab_size: int | None = None, length: int | None = None, layouts: Sequence[Sequence[int]] = ()
) -> list[ShapeCost]:
    """Count the cost of a recipe's model: dense, in published versions, and with other numbers of heads per layer.

    By default the vocabulary is that of `expected_vocabulary`, and `length` is the length of the model's memory.
    """
    if recipe.model.from_ is not None:
        raise InputError(
            f"The recipe names its model, {recipe.model.from_}; see its cost with deadhead inspect "
            f"{recipe.model.from_}."
        )
    tokens = vocab_size or expected_vocabulary(recipe.data)
    # Embeddings and output layer are left out of what is said without a vocabulary; the smallest that the model takes.
    config = model_config(recipe.model, tokens or max(recipe.model.adaptive_cutoffs or [0]) + 1)
    entries = [*recipe.published, *(PublishedModel(name="--heads", heads=list(heads)) for heads in layouts)]
    if not any(entry.heads is None and not entry.sparsity for entry in recipe.published):
        entries.insert(0, PublishedModel(name="dense"))
    whole = config_cost(config, length=length)
    # Feed-forward layers are in no head: two matrices, a multiply-add for each of their numbers.
    feed_forward = 4.0 * config.hidden_size * config.feed_forward_size * config.num_hidden_layers

    def entry_cost(entry: PublishedModel) -> ShapeCost:
        cost, left = whole, 1.0
        if entry.heads is not None:
            try:
                plan = first_heads(config, entry.heads)
            except InputError as error:
                raise InputError(f"The heads of {entry.name!r} are not those of the recipe's model: {error}") from None
            cost = config_cost(config, plan, length=length)
        elif entry.sparsity:
            left = 1.0 - entry.sparsity
        gone_parameters = round((1.0 - left) * cost.attention_parameters)
        gone_flops = (1.0 - left) * cost.attention_flops_per_token
        return ShapeCost(
            name=entry.name,
            heads=cost.heads if left == 1.0 else None,
            sparsity=1.0 - left * sum(cost.heads) / sum(cost.total_heads),
            parameters=cost.parameters - cost.embedding_parameters - gone_parameters,
            head_parameters=cost.attention_parameters - gone_parameters,
            layer_flops_per_token=cost.attention_flops_per_token - gone_flops + feed_forward,
            flops_per_token=None if tokens is None else cost.flops_per_token - gone_flops,
            stated_parameters=entry.parameters,
        )

    return [entry_cost(entry) for entry in entries]
