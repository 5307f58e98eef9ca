"""What a run begins from: its text and tokenizer, and a dense model that was trained before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from deadhead.checkpoints import checkpoint
from deadhead.data import TokenizedCorpus, load_text, load_tokenizer
from deadhead.errors import InputError
from deadhead.disk.files import replaced_folder
from deadhead.models import OWN_TYPES
from deadhead.disk.reading import read_object
from deadhead.training.processes import count, is_main, main_first
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe
from deadhead.training.runs.summary import SUMMARY_FILE, read_summary

# Of a configuration, what transformers notes in every one, and what comes from the tokenizer.
_NOT_COMPARED = {*PreTrainedConfig().to_dict()} - {"model_type"}
_NOT_COMPARED |= {"auto_map", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}


def prepare_text(
    data: DataRecipe, folder: Path, *, tokenizer_of: Path | None, progress: Callable[[int, int], None]
) -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
    """Return a text in tokens and its tokenizer, both kept in `folder` to be found again there by other processes.

    Args:
        data: the text, and the tokenizer to make where there is none yet.
        folder: gets `tokens/` and `tokenizer/`.
        tokenizer_of: the checkpoint whose tokenizer to use, or None.
        progress: called with the kB of text done and to do.

    Raises:
        InputError: the text or the tokenizer cannot be used.
    """
    kept = folder / "tokenizer"

    def read() -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
        tokenizer: str | PreTrainedTokenizerBase = data.tokenizer
        if tokenizer_of is not None or kept.exists():
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
            f"({', '.join(sorted(OWN_TYPES))}), but its model type is {kind!r}; prune others with deadhead prune."
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
