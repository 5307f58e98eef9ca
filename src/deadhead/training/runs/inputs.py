"""The inputs of a run: its text, tokenizer and model (new or trained before), and checks that they fit together."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from deadhead.attaching import gates_of, unwrapped
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.declared import has_gates
from deadhead.data import TokenizedCorpus, TokenStream, load_text, load_tokenizer, special_token_ids
from deadhead.disk.files import replaced_folder
from deadhead.disk.places import checked_path
from deadhead.disk.reading import read_object
from deadhead.errors import InputError, own_sentence
from deadhead.layouts import find_layout
from deadhead.layouts.refusals import require_gradients
from deadhead.measure.cost import require_cache, skeleton
from deadhead.measure.losses import require_language_model
from deadhead.measure.timing import require_timed
from deadhead.models import OWN_TYPES, AllAttentionConfig, TransformerXLConfig
from deadhead.plans.kinds import ONE_SHOT, READS_TEXT
from deadhead.training.phases.choosing import attach_gates, budget_costs, budget_length
from deadhead.training.phases.compensating import dense_copy
from deadhead.training.phases.defaults import segments
from deadhead.training.phases.learning import learner
from deadhead.training.processes import count, is_main, main_first
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, Recipe
from deadhead.training.runs.summary import SUMMARY_FILE, read_summary

# Of a configuration, what transformers notes in every one, and what comes from the tokenizer.
_NOT_COMPARED = {*PreTrainedConfig().to_dict()} - {"model_type"}
_NOT_COMPARED |= {"auto_map", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}

# Of a model's recipe, what its configuration has under other names.
_NAMED_OTHERWISE = {"from_", "architecture", "layers", "width", "heads", "persistent", "feed_forward"}

Data = str | Path | DataRecipe | TokenizedCorpus | TokenStream
"""A text file, a directory, "stdlib", "hf:NAME[:CONFIG]", "self", one of these with settings, or tokens."""


def prepare_text(
    data: DataRecipe,
    folder: Path,
    *,
    tokenizer_of: str | Path | PreTrainedTokenizerBase | None,
    progress: Callable[[int, int], None],
) -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
    """Return a text in tokens and its tokenizer; both are kept in `folder`, where other processes find them.

    The tokenizer is the one given, that of a checkpoint, the one kept in `folder`, or a new one made as `data` says.
    `progress` is called with the kB of text that are done and the kB in total.
    """
    kept = folder / "tokenizer"

    def read() -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
        tokenizer: str | PreTrainedTokenizerBase = data.tokenizer
        if isinstance(tokenizer_of, PreTrainedTokenizerBase):
            tokenizer = tokenizer_of
        elif tokenizer_of is not None or kept.exists():
            tokenizer = load_tokenizer(tokenizer_of or kept)
        text, made = load_text(
            data.source,
            tokenizer=tokenizer,
            vocab_size=data.vocab_size,
            **data.reading,
            cache_dir=folder / "tokens",
            progress=progress,
        )
        if is_main() and not kept.exists():
            with replaced_folder(kept) as written:
                made.save_pretrained(str(written))
        return text, made

    return main_first(read)


class Text(NamedTuple):
    """The texts of a phase: to learn from and, if any, to measure models on; with the tokenizer, if it is known."""

    train: TokenStream
    valid: TokenStream | None
    sha256: str
    tokenizer: PreTrainedTokenizerBase | None


def require_default_text(model_type: str | None) -> None:
    """Check that the default text, stdlib, suits a model of this type, or one that is yet to be made."""
    if model_type is not None and model_type not in OWN_TYPES:
        raise InputError(
            f"A text was expected for a model of type {model_type}, but none was given; name one with data (--data): a "
            "text file, a directory, stdlib (the default of deadhead's own models only), hf:NAME[:CONFIG], or self, "
            "to prune with text that the model writes."
        )


def is_named(data: Data | Text | None) -> bool:
    """Return whether a text was given rather than left to the default."""
    return data is not None and not (isinstance(data, DataRecipe) and "source" not in data.model_fields_set)


NO_TEXT = TokenStream(tokens=np.zeros(0, np.uint16), num_bytes=0, num_words=0)


def known_tokenizer(tokenizer_of: str | Path | PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer to save with a model, or None if it is not known."""
    if tokenizer_of is None or isinstance(tokenizer_of, PreTrainedTokenizerBase):
        return tokenizer_of
    try:
        return load_tokenizer(tokenizer_of)
    except InputError:
        return None


def load_ungated(path: str | Path, **how: Any) -> PreTrainedModel:
    """Load a model to start with or to learn from; it must have no gates, because they would be lost."""
    require_ungated(path)
    return checkpoint.load(path, **how)


def require_ungated(path: str | Path) -> None:
    """Check that a checkpoint was not saved with its gates on."""
    if has_gates(path):
        raise InputError(
            f"The checkpoint {path} has gates that are still on and would be lost here; cut it first: "
            "model, gates = deadhead.load_gated(path); deadhead.cut(model, gates.plan())."
        )


def require_trainable(model: PreTrainedModel, recipe: PhaseRecipe) -> None:
    """Check that a phase can start on a model: it has no gates, and a loss on text unless ranking needs no text.

    Raises:
        InputError: the model has gates, or too few positions for the texts that a speedup is measured on.
        UnsupportedModel: the model's heads are not known, or it has no such loss.
    """
    if gates_of(unwrapped(model)) is not None:
        raise InputError(
            "The model has gates already, but the phase attaches its own or none; remove them with "
            "deadhead.detach(model), or cut by them with deadhead.cut(model, gates.plan())."
        )
    layout = find_layout(unwrapped(model))
    layout.sites(unwrapped(model), layout.units(unwrapped(model))[0])
    budget = recipe.budget if isinstance(recipe, PruneRecipe) else None
    if budget is not None and budget.kind == "kv_cache":
        require_cache(unwrapped(model))
    if isinstance(recipe, PruneRecipe) and budget is not None and budget.kind == "speedup":
        require_timed(unwrapped(model), recipe.budget_workload, budget_length(unwrapped(model), recipe))
    if reads_text(recipe):
        require_language_model(model, "Training on a text")
    if not (isinstance(recipe, PruneRecipe) and recipe.criterion in ONE_SHOT):
        require_gradients(model, "A model")


def reads_text(recipe: PhaseRecipe) -> bool:
    """Return whether a phase learns from a text or ranks units by one; some criteria need only the weights."""
    return not isinstance(recipe, PruneRecipe) or recipe.criterion not in ONE_SHOT or recipe.criterion in READS_TEXT


def is_without_text(model: PreTrainedModel, data: Data | Text | None, recipe: PhaseRecipe) -> bool:
    """Return whether a phase runs without a text: none is given and none is needed, or the model has no loss on text.

    Raises:
        InputError: no text is given, but the phase needs one, and a model of its kind has no default.
    """
    if not model.can_generate():
        return True
    if is_named(data) or model.config.model_type in OWN_TYPES:
        return False
    if reads_text(recipe):
        require_default_text(model.config.model_type)
    return True


def read_data(
    data: Data | None,
    folder: Path,
    *,
    model_type: str | None,
    tokenizer_of: str | Path | PreTrainedTokenizerBase | None,
    progress: Callable[[int, int], None],
) -> Text:
    """Return a text in tokens from any form of `data`; see `prepare_text`.

    A model without a type is yet to be made for the tokenizer. For other models the tokenizer must be known, and only
    deadhead's own models have a default text.
    """
    if not is_named(data):
        require_default_text(model_type)
    data = DataRecipe() if data is None else data
    tokenizer: PreTrainedTokenizerBase | None = None
    if isinstance(data, str | Path | DataRecipe):
        recipe = data if isinstance(data, DataRecipe) else DataRecipe(source=str(data))
        checked_path(recipe.source)
        if tokenizer_of is None and model_type is not None:
            raise InputError(
                f"A tokenizer is needed to read {recipe.source}, but the one of this model is not known; give it with "
                "tokenizer=, or give the text in tokens."
            )
        data, tokenizer = prepare_text(recipe, folder, tokenizer_of=tokenizer_of, progress=progress)
    else:
        tokenizer = known_tokenizer(tokenizer_of)
    if isinstance(data, TokenStream):
        return Text(data, None, hashlib.sha256(data.tokens.tobytes()).hexdigest(), tokenizer)
    return Text(data.splits["train"], data.splits["valid"], data.sha256, tokenizer)


def model_config(recipe: ModelRecipe, vocab_size: int, **special_tokens: Any) -> AllAttentionConfig:
    """Return the configuration of a recipe's model for a vocabulary; raise InputError if its sizes do not fit."""
    make: Any = AllAttentionConfig
    inner: dict[str, int] = {"num_persistent": recipe.persistent or 128}
    if recipe.architecture == "transformer_xl":
        make, inner = TransformerXLConfig, {"feed_forward_size": recipe.feed_forward or 4 * recipe.width}
    try:
        return make(
            vocab_size=vocab_size,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            **inner,
            **recipe.model_dump(exclude=_NAMED_OTHERWISE, by_alias=False),
            **special_tokens,
        )
    except ValueError as error:
        raise InputError(f"The recipe's model does not fit together: {own_sentence(error)}") from None


def build_model(recipe: ModelRecipe, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Return a new model for a tokenizer's vocabulary."""
    config = model_config(recipe, len(tokenizer), **special_token_ids(tokenizer))
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dense_folder(path: str) -> Path:
    """Return the folder of the dense model that a recipe starts from, which must be one of deadhead's own."""
    folder = checked_path(path)
    if not folder.is_dir():
        raise InputError(
            f"The recipe starts from the dense model in {path}, but there is no such folder; first run the recipe that "
            "trains it, or leave dense out."
        )
    config = read_object(folder / "config.json", what="model configuration")
    kind = config.get("model_type")
    if kind not in OWN_TYPES:
        raise InputError(
            f"The recipe starts from the dense model in {path}, which must be one of deadhead's own "
            f"({', '.join(sorted(OWN_TYPES))}), but its model type is {kind!r}; name others in [model] from."
        )
    if config.get("head_plan") is not None:
        raise InputError(
            f"The recipe starts from the dense model in {path}, but heads of that model are already cut; name the "
            "dense model that it was made from."
        )
    return folder


def require_same_training(recipe: Path, train: PhaseRecipe, sha256: str) -> None:
    """Check that a dense model was trained as this run would have trained it, if the other run's records exist.

    Otherwise, later phases would read text that the model has read already, or would be measured on text that it was
    trained on. `train` and `sha256` are this run's dense phase and the hash of its text.
    """
    noted = read_summary(recipe.parent)
    if not recipe.is_file() or not noted:
        return
    same = {
        "text": noted.get("data", {}).get("sha256") == sha256,
        "[train]": load_recipe(recipe).train == train,
        "number of processes": noted.get("processes", 1) == count(),
    }
    for what, is_same in same.items():
        if not is_same:
            raise InputError(
                f"The dense model that the recipe starts from was trained with another {what} (according to {recipe} "
                f"and {SUMMARY_FILE} beside it); use the same, or leave dense out."
            )


def load_dense(path: str, expected: PreTrainedConfig) -> PreTrainedModel:
    """Return the dense model that a recipe starts from; its configuration must match the recipe's [model]."""
    model = checkpoint.load(dense_folder(path))
    for name, value in expected.to_dict().items():
        if name not in _NOT_COMPARED and (found := getattr(model.config, name, None)) != value:
            raise InputError(
                f"The recipe's [model] sets {name} to {value!r}, but the dense model in {path} has {found!r}; copy the "
                "[model] of the recipe that trained it."
            )
    return model


def require_fitting(recipe: Recipe, config: PreTrainedConfig, text: TokenStream) -> None:
    """Check on a model without weights that every phase of a run can start, before hours of training.

    Whether a speedup can be reached is known only later, when it is measured.
    """
    model = skeleton(config)
    require_language_model(model, "A run")
    for phase in filter(None, (recipe.dense_phase, recipe.prune, recipe.finetune)):
        segments(model, text, phase, rows=phase.batch_size * count())
        with learner(model, phase):
            pass
    if recipe.dense_phase is not None and recipe.dense_phase.distill:
        raise InputError(
            "[train] has no teacher to learn from, because it makes the dense model itself; leave its distill out."
        )
    attach_gates(model, recipe.prune)
    if recipe.prune.budget is not None and recipe.prune.budget.kind != "speedup":
        budget_costs(model, recipe.prune)


def teacher_of(
    teacher: PreTrainedModel | str | Path | None,
    dense: PreTrainedModel | str | Path | None,
    network: PreTrainedModel,
    recipe: PhaseRecipe,
) -> PreTrainedModel | None:
    """Return the model to distil from: the teacher asked for, or the dense model if the phase has one.

    A model that will be changed is copied; weights that stay unchanged are shared with the copy.
    """
    if not recipe.distill or not recipe.training_steps:
        return None
    if teacher is None and dense is not None and isinstance(recipe, PruneRecipe) and recipe.freeze_weights:
        return dense_copy(network, recipe)
    teacher = dense if teacher is None else teacher
    if teacher is network:
        return copy.deepcopy(network)
    if isinstance(teacher, str | Path):
        return load_ungated(teacher)
    if isinstance(teacher, PreTrainedModel):
        return teacher
    raise InputError(
        "distill needs a teacher to learn from, but none was given; name one as teacher, for instance the dense model."
    )
