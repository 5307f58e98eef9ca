"""The memory that the parts of pruning take, before they start: counted weights, and formulas for working memory.

The numbers are bytes of tensors of a process on a CPU. A GPU holds the same except for some statistics, which are in
the memory of the machine.

Dimensions: n inputs of an output projection, D its outputs, R tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from deadhead.attaching import has_blocks
from deadhead.layouts import find_layout, head_columns
from deadhead.measure.chunks import AT_ONCE, fits_at_once
from deadhead.measure.cost import cut_skeleton, model_cost
from deadhead.measure.self_generated import rows_at_once
from deadhead.modes import best_device, free_memory
from deadhead.plans.kinds import READS_TEXT
from deadhead.training.phases.choosing import asked_blocks, asked_choices, budget_costs, even_plan
from deadhead.training.phases.defaults import segment_length
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.training_memory import activations, training_memory

# Numbers of 8 bytes for each pair of a projection's inputs while its units are removed one by one, or fits prepared.
_REMOVAL, _NESTED = 3, 3
# Of the memory that is free, what the moments of a pass over the text may take.
_MOMENTS_SHARE = 0.25


def ranking_memory(model: PreTrainedModel, recipe: PruneRecipe, *, free: int | None = None) -> int:
    """Return the most bytes that are held at any time while units are ranked, weights among them.

    Args:
        model: a model without gates, on any device, including meta.
        recipe: a recipe with a criterion that ranks units or learns sizes.
        free: free memory, in bytes, which decides whether moments are gathered in one pass over the text or in several;
            None asks the device that pruning would use.
    """
    weights = weight_bytes(model)
    if recipe.criterion != "sizes" and recipe.criterion not in READS_TEXT:
        return weights
    shapes = _shapes(model, recipe)
    if recipe.criterion == "sizes":
        return weights + _sizes(model, recipe, shapes)
    tokens = recipe.batch_size * segment_length(model, recipe)
    most_D, most_n = _widest(shapes)
    reading = _forward(model, tokens, widest=most_n)
    if recipe.criterion in ("taylor", "second-order"):
        reading = max(reading, _with_gradients(model, recipe))
    if recipe.criterion in ("wanda", "flap"):
        # The weight, and its numbers' absolute values or squares.
        return weights + max(reading, 16 * most_D * most_n)
    if recipe.criterion in ("second-order", "reconstruction"):
        each = [4 * (n**2 + D**2 * (recipe.criterion == "second-order")) for D, n in shapes]
        most = _MOMENTS_SHARE * (free_memory(best_device()) if free is None else free - weights)
        return weights + int(max(max(each), min(sum(each), most))) + max(reading, _removal(most_D, most_n))
    return weights + reading


def gates_memory(model: PreTrainedModel, recipe: PruneRecipe, *, keeps_dense: bool) -> int:
    """Return the most bytes that are held while gates learn.

    Args:
        model: a model without gates, on any device, including meta.
        recipe: a recipe with a criterion that trains gates.
        keeps_dense: whether the dense model is kept for the steps after the cut.
    """
    is_copied = (keeps_dense and not recipe.freeze_weights) or recipe.distill > 0
    return training_memory(model, recipe).total + is_copied * weight_bytes(model) + _taught(model, recipe)


def recovery_memory(model: PreTrainedModel, pruned: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return the most bytes that are held while a pruned model learns from the dense one.

    Args:
        model: the dense model, on any device, including meta.
        pruned: the model that learns.
        recipe: the recipe of the recovery.
    """
    return training_memory(pruned, recipe).total + weight_bytes(model) + _taught(model, recipe)


def _taught(model: PreTrainedModel, recipe: PhaseRecipe) -> int:
    """Return what a step holds of a teacher besides weights: its states, and the output distribution of a chunk."""
    config: Any = model.config.get_text_config()
    tokens = recipe.batch_size * segment_length(model, recipe)
    return int(recipe.distill > 0) * (tokens * config.hidden_size * 4 + 12 * min(tokens * config.vocab_size, AT_ONCE))


def fitting_memory(model: PreTrainedModel, pruned: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the most bytes that are held while a pruned model is compensated.

    Args:
        model: the dense model, on any device, including meta.
        pruned: the model to fit, which shares the dense model's embeddings.
        recipe: gives the number of rows of text to read.
    """
    cost = model_cost(pruned)
    blocks = model.dtype.itemsize * (cost.parameters - cost.embedding_parameters)
    return weight_bytes(model) + blocks + _fitting(model, pruned, recipe)


def _fitting(model: PreTrainedModel, pruned: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the bytes that compensation holds besides weights."""
    size, shapes = model.dtype.itemsize, _shapes(pruned, recipe)
    if not shapes:
        return 0
    most_D, most_n = _widest(shapes)
    tokens = recipe.compensate_rows * segment_length(model, recipe)
    # States of both models, and of the dense one between a layer's parts; what both of a layer's projections read.
    states = tokens * size * (3 * most_D + 2 * most_n)
    held = tokens // 8 * 4 * (most_n + 2 * most_D)
    solving = 8 * (2 * most_n**2 + 3 * most_D * most_n)
    return states + held + solving


def streamed_ranking_memory(model: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the most bytes that are held while units are ranked with one layer in memory at a time.

    Args:
        model: a model without gates, on any device, including meta.
        recipe: a recipe with a criterion that ranks units.
    """
    layer, outside = _layer_and_outside(model)
    if recipe.criterion not in READS_TEXT:
        return layer
    shapes = _shapes(model, recipe)
    most_D, most_n = _widest(shapes)
    tokens = recipe.batch_size * segment_length(model, recipe)
    # Before and behind a layer, of all batches; where there are gradients, these too.
    derives = recipe.criterion in ("taylor", "second-order")
    states = (4 if derives else 2) * recipe.steps * tokens * most_D * model.dtype.itemsize
    layers = len(find_layout(model).sites(model, find_layout(model).units(model)[-1]))
    reading = _forward(model, tokens, widest=most_n)
    if derives:
        reading = max(reading, activations(model, _frozen(recipe))[0] // layers)
    if recipe.criterion in ("wanda", "flap"):
        reading = max(reading, 16 * most_D * most_n)
    if recipe.criterion in ("second-order", "reconstruction"):
        moments = len(shapes) // layers * 4 * (most_n**2 + derives * most_D**2)
        reading = moments + max(reading, _removal(most_D, most_n))
    return states + max(outside, layer + reading)


def streamed_fitting_memory(model: PreTrainedModel, pruned: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the most bytes that are held while a model is compensated with one layer in memory at a time.

    Args:
        model: the dense model, on any device, including meta.
        pruned: the model to fit.
        recipe: gives the number of rows of text to read.
    """
    (layer, outside), (cut_layer, _) = _layer_and_outside(model), _layer_and_outside(pruned)
    # The dense layer goes while a fit is solved.
    return max(outside, layer) + cut_layer + _fitting(model, pruned, recipe)


def _share(model: PreTrainedModel, recipe: PruneRecipe) -> float:
    """Return the share of the dense model's cost that may be left."""
    budget = recipe.budget
    if budget is not None and budget.kind == "memory":
        found = budget_costs(model, recipe)
        assert found is not None, "bytes are counted"
        budget = found[0]
    return 1.0 if budget is None else budget.share


def _layer_and_outside(model: PreTrainedModel) -> tuple[int, int]:
    """Return the bytes of a model's largest layer, and of everything outside the layers."""
    layers: dict[str, int] = {}
    outside = 0
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            outside += parameter.nbytes
        else:
            layer = ".".join(parts[: number + 1])
            layers[layer] = layers.get(layer, 0) + parameter.nbytes
    return max(layers.values(), default=0), outside


def writing_memory(model: PreTrainedModel, length: int) -> int:
    """Return the most bytes that are held while a model writes rows of a length."""
    rows, cache = rows_at_once(model, length, best_device())
    # Logits of a token of each, and the distribution that it is drawn from.
    return weight_bytes(model) + cache + 12 * rows * model.config.get_text_config().vocab_size


def pruned_skeleton(model: PreTrainedModel, recipe: PruneRecipe) -> PreTrainedModel:
    """Return an example of the pruned model, without weights; the dense one if only a measurement could tell."""
    if recipe.budget is None or recipe.budget.kind == "speedup":
        return model
    plan, _ = even_plan(model, asked_choices(model, recipe), recipe)
    return cut_skeleton(find_layout(model), model, plan)


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers in memory."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _shapes(model: PreTrainedModel, recipe: PruneRecipe) -> list[tuple[int, int]]:
    """Return the outputs and inputs, (D, n), of the output projections whose units may be removed."""
    layout = find_layout(model)
    unit = layout.choose_unit(model, recipe.unit, what="heads are cut by")
    hidden = has_blocks(layout, model, asked_blocks(recipe, model))
    sites = [site for site in layout.all_sites(model, unit, hidden=hidden) if site.units]
    found = [head_columns(site.output).shape for site in sites if site.output_path is not None]
    return [(width, inner) for width, inner in found]


def _widest(shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the most outputs and inputs, D and n, that a projection has."""
    return max(width for width, _ in shapes), max(inner for _, inner in shapes)


def _forward(model: PreTrainedModel, tokens: int, *, widest: int) -> int:
    """Return the working memory of one layer for a batch without gradients, and of the loss."""
    config: Any = model.config.get_text_config()
    width, words, size = config.hidden_size, config.vocab_size, model.dtype.itemsize
    # States before and behind, a norm in float32, and of the widest sublayer what goes in and comes out.
    layer = tokens * (width * (4 * size + 8) + 4 * widest * size + 4 * widest * (size < 4))
    logits = tokens * words * (size + 8) if fits_at_once(tokens, words) else 0
    return max(layer, logits)


def _with_gradients(model: PreTrainedModel, recipe: PruneRecipe) -> int:
    """Return the memory that a batch keeps for gradients between frozen weights."""
    tokens, words = recipe.batch_size * segment_length(model, recipe), model.config.get_text_config().vocab_size
    # The logits of the batch before are still there, where those of a batch are whole.
    before = tokens * words * model.dtype.itemsize if fits_at_once(tokens, words) else 0
    return activations(model, _frozen(recipe))[0] + before


def _frozen(recipe: PruneRecipe) -> PruneRecipe:
    plain = {"freeze_weights": True, "lora_rank": 0, "bf16": False, "gradient_checkpointing": False}
    return recipe.model_copy(update=plain)


def _removal(most_D: int, most_n: int) -> int:
    return 8 * (_REMOVAL * most_n**2 + 2 * most_D * most_n)


def _sizes(model: PreTrainedModel, recipe: PruneRecipe, shapes: Sequence[tuple[int, int]]) -> int:
    """Return the bytes that learning sizes holds besides the weights."""
    most_D, most_n = _widest(shapes)
    tokens = recipe.batch_size * segment_length(model, recipe)
    states = 2 * recipe.steps * tokens * most_D
    gathered = sum(4 * n**2 for _, n in shapes)
    nested = sum(4 * (n**2 + n * D) for D, n in shapes)
    share = _share(model, recipe)
    size = model.dtype.itemsize
    # Of each projection fits of three sizes, two that one lies between, and that; of the others what is left.
    fits = sum(5 * share * D * n * size for D, n in shapes)
    cost = model_cost(model)
    left = share * size * (cost.parameters - cost.embedding_parameters)
    # What the dense model says of a chunk.
    words = 12 * min(tokens * model.config.get_text_config().vocab_size, AT_ONCE)
    steps = nested + int(fits + left) + _with_gradients(model, recipe) + words
    return states + max(gathered + _removal(most_D, most_n), nested + 8 * _NESTED * most_n**2, steps)
