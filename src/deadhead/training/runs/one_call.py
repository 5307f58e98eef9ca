"""`deadhead.prune` and `deadhead.finetune`: a phase in one call."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.inputs import Data
from deadhead.training.runs.results import Pruned, Trained
from deadhead.training.runs.single import Options, run_single

_OPTIONS = {field.name for field in fields(Options)}

R = TypeVar("R", bound=PhaseRecipe)


def prune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PruneRecipe | None = None,
    cut: bool = True,
    **settings: Any,
) -> Pruned:
    """Choose the units of a model that matter least, by gates or a criterion, and cut them off.

        pruned = deadhead.prune("gpt2", "my.txt", params=0.8, steps=500)
        pruned.model, pruned.plan, pruned.costs.after.parameters, pruned.measured.after.perplexity

    It does what `deadhead prune` does. How much goes is one budget, in shares of the model as it is, or learned under
    `l0`.

    Args:
        model: in memory, and changed in place; or a checkpoint folder, or a name on the Hugging Face hub.
        data: a `TokenizedCorpus` or `TokenStream`; or a text file, a directory, "stdlib" or "hf:NAME[:CONFIG]", read
            by the model's tokenizer. None takes "stdlib" for a model of deadhead's own.
        recipe: settings that are not given by themselves; None: the defaults.
        cut: False keeps the gates on the model.
        settings: fields of `PruneRecipe`, such as `params`, `sparsity`, `criterion`, `steps`, `batch_size`, and of
            `Options`: `tokenizer`, `teacher`, `seed`, `out`, `resume`, `progress`, `report_to`, `device`, `dtype`,
            `evaluation_tokens`.

    Raises:
        InputError: something given cannot be used; an unknown setting is told with the nearest that there is.
        UnsupportedModel: the model has no heads that could be cut.
        DivergenceError: training diverged.
    """
    asked, options = _divided(_of_kind(recipe, PruneRecipe), settings)
    return cast(Pruned, run_single("prune", asked, model, data, options, cut=cut))


def finetune(
    model: PreTrainedModel | str | Path,
    data: Data | None = None,
    *,
    recipe: PhaseRecipe | None = None,
    **settings: Any,
) -> Trained:
    """Train a model, to recover what a cut cost or for any other reason.

        tuned = deadhead.finetune(pruned.model, "my.txt", steps=500, teacher="gpt2", distill=0.5)

    Args:
        model: as for `prune`.
        data: as for `prune`.
        recipe: settings that are not given by themselves; None: the defaults.
        settings: fields of `PhaseRecipe`, such as `steps`, `learning_rate`, `lora_rank`, and of `Options`.

    Raises:
        InputError: something given cannot be used; an unknown setting is told with the nearest that there is.
        DivergenceError: training diverged.
    """
    asked, options = _divided(_of_kind(recipe, PhaseRecipe), settings)
    return run_single("finetune", asked, model, data, options)


def _of_kind(recipe: R | None, kind: type[R]) -> R:
    """Return the recipe that was given, or the defaults.

    Raises:
        InputError: it is none of this kind of phase.
    """
    if recipe is not None and type(recipe) is not kind:
        raise InputError(
            f"The recipe of this phase must be a {kind.__name__} of deadhead.training, but a {type(recipe).__name__} "
            "was given."
        )
    return recipe or kind()


def _divided(recipe: R, settings: dict[str, Any]) -> tuple[R, Options]:
    """Return a recipe with the settings that are its own, and the others."""
    others = {name: value for name, value in settings.items() if name in _OPTIONS}
    own = {name: value for name, value in settings.items() if name not in _OPTIONS}
    known = {*type(recipe).model_fields, *_OPTIONS, *(["cut"] if isinstance(recipe, PruneRecipe) else [])}
    for name in own.keys() - known:
        near = get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"see help(deadhead.training.{type(recipe).__name__})"
        raise InputError(f"The call has an unknown key {name!r}; {hint}")
    return changed(recipe, **own), Options(**others)
