"""What a run begins from: its text and tokenizer, and a dense model that was trained before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deadhead.checkpoints import checkpoint
from deadhead.data import TokenizedCorpus, TokenStream, load_text, load_tokenizer
from deadhead.disk.files import replaced_folder
from deadhead.disk.reading import read_object
from deadhead.errors import InputError
from deadhead.models import OWN_TYPES
from deadhead.training.processes import count, is_main, main_first
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe
from deadhead.training.runs.summary import SUMMARY_FILE, read_summary

# Of a configuration, what transformers notes in every one, and what comes from the tokenizer.
_NOT_COMPARED = {*PreTrainedConfig().to_dict()} - {"model_type"}
_NOT_COMPARED |= {"auto_map", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}

Data = str | Path | DataRecipe | TokenizedCorpus | TokenStream
"""A text file, a directory, "stdlib", "hf:NAME[:CONFIG]", one of these with settings, or tokens."""


def prepare_text(
    data: DataRecipe,
    folder: Path,
    *,
    tokenizer_of: str | Path | PreTrainedTokenizerBase | None,
    progress: Callable[[int, int], None],
) -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
    """Return a text in tokens and its tokenizer, both kept in `folder` to be found again there by other processes.

    Args:
        data: the text, and the tokenizer to make where there is none yet.
        folder: gets `tokens/` and `tokenizer/`.
        tokenizer_of: the checkpoint whose tokenizer to use, by folder or name, or the tokenizer; None: as `data` says.
        progress: called with the kB of text done and to do.

    Raises:
        InputError: the text or the tokenizer cannot be used.
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
            column=data.column,
            split=data.split,
            cache_dir=folder / "tokens",
            progress=progress,
        )
        if is_main() and not kept.exists():
            with replaced_folder(kept) as written:
                made.save_pretrained(str(written))
        return text, made

    return main_first(read)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a phase is given to read.

    Args:
        train: what it learns from.
        valid: what models are measured on, or None.
        sha256: of the text, or of tokens that came without one.
        tokenizer: of the text, if it is known.
    """

    train: TokenStream
    valid: TokenStream | None
    sha256: str
    tokenizer: PreTrainedTokenizerBase | None


def read_data(
    data: Data,
    folder: Path,
    *,
    tokenizer_of: str | Path | PreTrainedTokenizerBase | None,
    is_fresh: bool,
    progress: Callable[[int, int], None],
) -> Text:
    """Return a text in tokens, whatever form it was given in.

    Args:
        data: tokens, or a text to be read by the model's tokenizer.
        folder: keeps what is made of a text; see `prepare_text`.
        tokenizer_of: the model's tokenizer, or where it lies; None if nobody knows.
        is_fresh: whether the model is to be made for the tokenizer.
        progress: called with the kB of text done and to do.

    Raises:
        InputError: the text cannot be used, or there is no tokenizer for it.
    """
    if isinstance(data, (TokenizedCorpus, TokenStream)):
        known = tokenizer_of
        if isinstance(known, str | Path):
            try:
                known = load_tokenizer(known)
            except InputError:
                known = None  # It would only have been saved beside the model.
        if isinstance(data, TokenizedCorpus):
            return Text(train=data.splits["train"], valid=data.splits["valid"], sha256=data.sha256, tokenizer=known)
        return Text(train=data, valid=None, sha256=hashlib.sha256(data.tokens.tobytes()).hexdigest(), tokenizer=known)
    recipe = DataRecipe(source=str(data)) if isinstance(data, str | Path) else data
    if tokenizer_of is None and not is_fresh:
        raise InputError(
            f"A tokenizer is needed to read {recipe.source}, but this model does not say where its own lies; give it "
            "with tokenizer=, or give the text in tokens."
        )
    corpus, tokenizer = prepare_text(recipe, folder, tokenizer_of=tokenizer_of, progress=progress)
    return Text(train=corpus.splits["train"], valid=corpus.splits["valid"], sha256=corpus.sha256, tokenizer=tokenizer)


def require_named(data: Data | None, model_type: str) -> Data:
    """Return the text to read: the default one for a model of deadhead's own only.

    Raises:
        InputError: a model that was trained elsewhere needs a text to be named.
    """
    is_named = data is not None and not (isinstance(data, DataRecipe) and "source" not in data.model_fields_set)
    if not is_named and model_type not in OWN_TYPES:
        raise InputError(
            f"A text was expected for a model of type {model_type}, but none was given: the default, stdlib, is for "
            "deadhead's own models only; name one with data (--data), a text file, a directory, stdlib or "
            "hf:NAME[:CONFIG]."
        )
    return DataRecipe() if data is None else data


def fingerprint(model: PreTrainedModel) -> str:
    """Return a hash of a model's weights: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dense_folder(path: str) -> Path:
    """Return the folder of the dense model that a recipe begins from.

    Raises:
        InputError: there is no such folder, or it holds no dense model of deadhead's own.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"The recipe begins from the dense model in {path}, but there is no such folder; run the recipe that "
            "trains it first, or leave dense out."
        )
    config = read_object(folder / "config.json", what="model configuration")
    kind = config.get("model_type")
    if kind not in OWN_TYPES:
        raise InputError(
            f"The recipe begins from the dense model in {path}, which must be one of deadhead's own "
            f"({', '.join(sorted(OWN_TYPES))}), but its model type is {kind!r}; name others in [model] from."
        )
    if config.get("head_plan") is not None:
        raise InputError(
            f"The recipe begins from the dense model in {path}, but heads of that one are cut already; name the "
            "dense model that it was made of."
        )
    return folder


def require_same_training(recipe: Path, train: PhaseRecipe, sha256: str) -> None:
    """Check that a dense model was trained as this run would have trained it, where the run that did left a word of it.

    Otherwise later phases would read what it has read already, or be measured on what it was trained on.

    Args:
        recipe: of the run that trained it; it, or the summary beside it, may be missing.
        train: this run's dense phase.
        sha256: hash of this run's text.

    Raises:
        InputError: the phase, the text or the number of processes was another.
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
                f"The dense model that the recipe begins from was trained with another {what} (so say {recipe} and "
                f"{SUMMARY_FILE} beside it); use the same, or leave dense out."
            )


def load_dense(path: str, expected: PreTrainedConfig) -> PreTrainedModel:
    """Return the dense model that a recipe begins from.

    Args:
        path: its folder.
        expected: the configuration of the recipe's own model.

    Raises:
        InputError: it is not there, is no dense model of deadhead's own, or not the one that the recipe describes.
    """
    model = checkpoint.load(dense_folder(path))
    for name, value in expected.to_dict().items():
        if name not in _NOT_COMPARED and (found := getattr(model.config, name, None)) != value:
            raise InputError(
                f"The recipe's [model] makes {name} {value!r}, but the dense model in {path} has {found!r}; give the "
                "recipe the [model] of the one that trained it."
            )
    return model
