"""The text `self`, which a model writes before it is pruned, for users who have no text; it is kept and read again.

It is as long as the phase needs, up to a limit, beyond which rows are repeated, plus an eighth to measure on. For a
model that was pruned before, the teacher writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.data import TokenizedCorpus, TokenStream
from deadhead.data.encoders import Encoder, fingerprint_of, text_frame
from deadhead.data.turns import turns_of
from deadhead.disk.files import write_bytes
from deadhead.errors import InputError
from deadhead.measure.self_generated import write_text
from deadhead.modes import best_device, moved
from deadhead.training.phases.defaults import segment_length, with_defaults
from deadhead.training.processes import Progress, count, counted, on_main
from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe, PruneRecipe
from deadhead.training.runs.inputs import Data, Text, reads_text

SELF = "self"
FILE = "self_text.safetensors"
# The most rows that are written to learn from; one more row to measure on for each `_VALID_OF` of them; and the fewest
# rows to measure on.
_MOST_ROWS, _VALID_OF, _FEWEST_VALID = 1024, 8, 4
# Rows that a model with segment memory writes side by side, each of them one long text.
_STREAMS = 32


def is_self(data: Data | Text | None) -> bool:
    """Return whether the text is the one that a model writes itself; a file of that name is "./self".

    Raises:
        InputError: it is, but a setting for reading a text was given too.
    """
    if isinstance(data, TokenizedCorpus | TokenStream | Text | None):
        return False
    if not isinstance(data, DataRecipe):
        return str(data) == SELF
    if data.source != SELF:
        return False
    for name, value in data.reading.items():
        if value:
            raise InputError(
                f"{name} is for a text that is read, but {SELF} is text that the model writes; leave {name} out."
            )
    return True


def require_writer(phase: str, teacher: PreTrainedModel | str | Path | None) -> None:
    """Check that a phase has a model to write the text: the model before it is pruned, or else its teacher."""
    if phase == "train" or (phase == "finetune" and teacher is None):
        raise InputError(
            f"{SELF} is text that a model writes before it is pruned, but a model learns nothing from its own text; "
            "name a text file, a directory, stdlib or hf:NAME, or a teacher to write the text (--teacher, with "
            "--distill)."
        )


def rows_to_write(model: PreTrainedModel, recipe: PhaseRecipe, *, recover: int = 0) -> tuple[int, int]:
    """Return how many rows a phase learns from and how many it is measured on; the model may be on the meta device.

    Args:
        model: the model that the phase starts with.
        recipe: the recipe, with a criterion if it is for pruning.
        recover: steps of training after the cut.
    """
    recipe = with_defaults(recipe, model)
    batch = recipe.batch_size * count()
    wanted = [batch * recover, recipe.steps * batch if reads_text(recipe) else 0]
    if isinstance(recipe, PruneRecipe) and recipe.compensate:
        wanted.append(recipe.compensate_rows)
    # A model with segment memory reads a row for each of a batch side by side, and is compensated on two batches.
    rows = max(min(max(wanted), _MOST_ROWS), 2 * batch)
    return rows, max(rows // _VALID_OF, _FEWEST_VALID)


def self_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: PhaseRecipe,
    folder: Path,
    *,
    writer: PreTrainedModel | None = None,
    recover: int = 0,
    seed: int,
    begin: Callable[[], None],
    progress: Progress,
) -> Text:
    """Return the text that a model wrote before, or writes now; all processes get that of the main one.

    Args:
        model: the model that reads the text.
        tokenizer: the tokenizer of the model.
        recipe: the recipe, with a criterion if it is for pruning.
        folder: folder to keep the text in and to read it from.
        writer: the model that writes the text; None: `model`.
        recover: steps of training after the cut.
        seed: seed of the writing.
        begin: called before the text is written, but not if it was found.
        progress: called with how much is written.

    Raises:
        InputError: there is no tokenizer, or the kept text is damaged or was written for something else.
    """
    if tokenizer is None:
        raise InputError(
            f"A tokenizer is needed to write a text ({SELF}), but the one of this model is not known; give it with "
            "tokenizer=."
        )
    prefix = () if hasattr(model.config, "memory_length") else text_frame(tokenizer)[0]
    learned, measured = rows_to_write(model, recipe, recover=recover)
    length = segment_length(model, recipe)
    asked = {"rows": [learned, measured], "length": length, "seed": seed, "tokenizer": fingerprint_of(tokenizer)}

    def write() -> np.ndarray:
        path = folder / FILE
        if path.exists():
            return _kept(path, asked)
        begin()
        rows, row = learned + measured, length
        if hasattr(model.config, "memory_length"):
            # Few long texts tell a memory more than many short ones.
            rows = min(_STREAMS, rows)
            row = -(-(learned + measured) * length // rows)
        network = model if writer is None else writer
        report, before = counted(progress, "writing text, tokens"), network.device
        moved(network, best_device())
        try:
            ids = write_text(network, tokenizer, rows=rows, length=row, seed=seed, progress=report)
        except BaseException:
            moved(network, before)
            raise
        own = ids[:, len(text_frame(tokenizer)[0]) :] if prefix else ids
        tokens = own.flatten().numpy().astype(np.int32)
        noted = {"asked": json.dumps(asked), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()}
        write_bytes(path, save({"tokens": torch.from_numpy(tokens)}, metadata=noted))
        return tokens

    tokens = on_main(write)
    held = measured * (length - len(prefix))
    learning, validation = tokens[:-held], tokens[-held:]
    # The last token of a row is learned from where another follows.
    learning = np.append(learning, validation[:1])
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return Text(_stream(learning, tokenizer, prefix), _stream(validation, tokenizer, prefix), digest, tokenizer)


def _kept(path: Path, asked: dict[str, Any]) -> np.ndarray:
    """Return the kept tokens, if they are complete and match the request."""
    damaged = InputError(f"The text in {path} is damaged; delete {path.parent}, and start again without resume.")
    try:
        with safe_open(path, "np") as file:
            noted, tokens = file.metadata() or {}, file.get_tensor("tokens")
        is_whole = hashlib.sha256(tokens.tobytes()).hexdigest() == noted["sha256"]
        found = json.loads(noted["asked"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise damaged from error
    if not is_whole:
        raise damaged
    if found != asked:
        raise InputError(
            f"{path.parent} is left of a phase with other settings, another tokenizer or another number of processes; "
            "resume with those, or delete it."
        )
    return np.asarray(tokens)


def _stream(tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> TokenStream:
    """Return tokens with the bytes and words they stand for; text of the template counts, ends of texts do not."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=turns_of(tokenizer) is None))
    words = len(tokens) if Encoder(tokenizer).is_words else len(text.split())
    kind = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    return TokenStream(tokens=tokens.astype(kind), num_bytes=len(text.encode()), num_words=words, prefix=prefix)
