"""The start of a single phase: its model, its text (which the model may write), and its recipe's criterion."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.checkpoints import checkpoint
from deadhead.errors import InputError, RunWarning
from deadhead.layouts.refusals import require_model, require_weights
from deadhead.training.phases.defaults import with_criterion
from deadhead.training.phases.distillation import require_same_vocabulary
from deadhead.training.processes import Progress, counted
from deadhead.training.recipes.recipe import ModelRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.runs.forecast import Part, forecast, require_memory
from deadhead.training.runs.inputs import (
    NO_TEXT,
    Data,
    Text,
    build_model,
    is_named,
    is_without_text,
    known_tokenizer,
    load_ungated,
    read_data,
    require_trainable,
    require_ungated,
)
from deadhead.training.runs.options import Options
from deadhead.training.runs.self_text import is_self, require_writer, self_text

Phase = Literal["train", "prune", "finetune"]
Model = PreTrainedModel | str | Path | ModelRecipe
"""In memory, a checkpoint's folder, its name on the hub, or the sizes of a fresh one."""


def announcing_once(options: Options) -> Options:
    """Return options that check the parts of pruning against max_memory, if it is set, before they announce them.

    Only the first parts are announced: if a text is written, the other parts were announced together with it.
    """
    if options.announce is None and options.max_memory is None:
        return options
    told: list[bool] = []

    def announce(parts: Sequence[Part]) -> None:
        if told:
            return
        told.append(True)
        if options.max_memory is not None:
            require_memory(parts, int(options.max_memory))
        if options.announce is not None:
            options.announce(parts)

    return replace(options, announce=announce)


def begin(
    phase: Phase,
    model: Model,
    data: Data | Text | None,
    options: Options,
    work: Path,
    progress: Progress,
    recipe: PhaseRecipe,
    *,
    cut: bool,
    budgets: int = 1,
) -> tuple[PreTrainedModel, Text, PhaseRecipe]:
    """Return the model, the text (None if units are ranked without one), and a recipe with a criterion.

    If the model writes the text, announce first what will be done for this number of `budgets`.
    """
    network = None
    if is_self(data):
        require_writer(phase, options.teacher)
    if isinstance(model, str | Path):
        # What can be known before the weights are loaded: the model's structure, and a text if it is needed.
        require_ungated(model)
        declared = checkpoint.load_skeleton(model)
        recipe = _for_model(recipe, declared, options)
        require_trainable(declared, recipe)
        is_without_text(declared, data, recipe)
        network = load_ungated(model, dtype=options.dtype)
    elif not isinstance(model, ModelRecipe):
        require_model(model)
        network = model
        recipe = _for_model(recipe, network, options)
    if network is not None:
        require_weights(network, "A phase")
        require_trainable(network, recipe)
    tokenizer_of = options.tokenizer or base_of(model) or (None if network is None else network.name_or_path or None)
    if network is not None and isinstance(data, Text):
        return network, data, recipe
    if network is not None and is_without_text(network, data, recipe):
        if is_named(data):
            warnings.warn(
                RunWarning(f"{type(network).__name__} has no loss on a text, so data is not read."), stacklevel=2
            )
        if options.recover:
            raise InputError(
                "recover learns from a text, but none was given; give one with data (--data), or leave recover out."
            )
        return network, Text(NO_TEXT, None, "", known_tokenizer(tokenizer_of)), recipe
    if network is not None and is_self(data):
        where = (tokenizer_of, options, work, progress)
        return network, _written(network, *where, recipe, cut=cut, budgets=budgets), recipe
    assert not isinstance(data, Text), "a text in tokens has a model that it is for"
    text = read_data(
        data,
        work,
        model_type=None if network is None else network.config.model_type,
        tokenizer_of=tokenizer_of,
        progress=counted(progress, "reading text, kB"),
    )
    if isinstance(model, ModelRecipe):
        if text.tokenizer is None:
            raise InputError("A new model needs a tokenizer, but none was given; give a text to make one from.")
        network = build_model(model, text.tokenizer, seed=options.seed)
    assert network is not None
    return network, text, recipe


def _written(
    network: PreTrainedModel,
    tokenizer_of: str | Path | PreTrainedTokenizerBase | None,
    options: Options,
    work: Path,
    progress: Progress,
    recipe: PhaseRecipe,
    *,
    cut: bool,
    budgets: int,
) -> Text:
    """Return the text that a model writes before it is pruned, or that the teacher writes if one is named."""
    writer = None
    if not isinstance(recipe, PruneRecipe):
        writer = load_ungated(options.teacher) if isinstance(options.teacher, str | Path) else options.teacher
        assert writer is not None
        require_same_vocabulary(writer, network)

    def announce() -> None:
        if options.announce is not None and isinstance(recipe, PruneRecipe):
            recover = options.recover
            options.announce(forecast(network, recipe, recover=recover, cut=cut, writes=True, budgets=budgets))

    return self_text(
        network,
        known_tokenizer(tokenizer_of),
        recipe,
        work,
        writer=writer,
        recover=options.recover,
        seed=options.seed,
        begin=announce,
        progress=progress,
    )


def _for_model(recipe: PhaseRecipe, model: PreTrainedModel, options: Options) -> PhaseRecipe:
    """Return the recipe; if it is for pruning, with a criterion."""
    return with_criterion(recipe, model, recovers=options.recover > 0) if isinstance(recipe, PruneRecipe) else recipe


def base_of(model: Model) -> str | Path | None:
    """Return the folder or name that a model was loaded from, if it was given or its folder still exists."""
    if isinstance(model, str | Path):
        return model
    name = model.name_or_path if isinstance(model, PreTrainedModel) else ""
    return name if name and Path(name).is_dir() else None
