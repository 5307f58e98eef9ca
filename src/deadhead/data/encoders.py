"""From pieces of text to token ids, by the shortest way that gives the tokenizer's own ids.

A tokenizer of bytes is a table of 256 entries, and one of words a dictionary: looking ids up is many times as fast
as running the tokenizer, and tests hold the two equal. Any other tokenizer is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, Protocol

import numpy as np
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from deadhead.data.pieces import Piece, whole_words
from deadhead.data.tokenizer import EOS, UNK, byte_characters, word_normalizer

_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 4096


class Encoder(Protocol):
    """Gives the ids of texts.

    Attributes:
        whole_words: whether texts must not be cut within a word.
        tokens_are_words: whether each token counts as a word, as in the WikiText papers, where a line end is one.
    """

    whole_words: bool
    tokens_are_words: bool

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, without special tokens around it."""
        ...


class ByteEncoder:
    """A table from bytes to ids, (256,)."""

    whole_words = False
    tokens_are_words = False

    def __init__(self, table: np.ndarray) -> None:
        self._table = table

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Look each byte up."""
        return [self._table[np.frombuffer(text.encode(), dtype=np.uint8)] for text in texts]


class WordEncoder:
    """A dictionary from words to ids."""

    whole_words = True
    tokens_are_words = True

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self._vocabulary = vocabulary

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Look each word up."""
        get, unknown = self._vocabulary.get, repeat(self._vocabulary[UNK])
        words = (text.replace("\n", f" {EOS} ").split() for text in texts)
        return [np.fromiter(map(get, part, unknown), dtype=np.uint32, count=len(part)) for part in words]


class GeneralEncoder:
    """The tokenizer itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.tokens_are_words = isinstance(getattr(_backend(tokenizer), "model", None), models.WordLevel)
        self.whole_words = self.tokens_are_words

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Run the tokenizer."""
        # verbose=False: a text longer than the model's context is no matter for a warning here, it will be cut.
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded["input_ids"]]


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The fastest encoder that gives exactly the tokenizer's ids."""
    backend = _backend(tokenizer)
    plain = backend is not None and backend.encode_special_tokens and _adds_nothing(backend)
    if plain and isinstance(backend.model, models.BPE) and len(tokenizer) < 1024 and _is_bytes(backend):
        vocabulary = tokenizer.get_vocab()
        return ByteEncoder(np.array([vocabulary[character] for character in byte_characters()], dtype=np.uint32))
    if plain and isinstance(backend.model, models.WordLevel) and _is_words(backend):
        return WordEncoder(tokenizer.get_vocab())
    return GeneralEncoder(tokenizer)


def encode_pieces(encoder: Encoder, pieces: Iterable[Piece], separator: int | None) -> Iterator[np.ndarray]:
    """Yield the ids of a text, some at a time.

    Args:
        encoder: gives the ids.
        pieces: the text.
        separator: the id put where a document ends, unless its last token is that already: a line that ends in a line
            end has its `<eos>` from a tokenizer of words.
    """
    last: int | None = None  # the last token of the document so far
    for batch in _batches(whole_words(pieces) if encoder.whole_words else pieces):
        parts: list[np.ndarray] = []
        for ids, piece in zip(encoder([piece.text for piece in batch]), batch, strict=True):
            parts.append(ids)
            if len(ids):
                last = int(ids[-1])
            if piece.ends_document:
                if separator is not None and last != separator:
                    parts.append(np.array([separator], dtype=np.uint32))
                last = None
        yield np.concatenate(parts)


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides about a tokenizer's ids."""
    backend = _backend(tokenizer)
    if backend is not None:
        content = backend.to_str() + str(backend.encode_special_tokens)
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(f"{content}\n{tokenizer.eos_token_id}".encode()).hexdigest()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer of the tokenizers library within, if it is one of those."""
    return getattr(tokenizer, "backend_tokenizer", None)


def _state(component: Any) -> Any:
    """The settings of a component of a tokenizer."""
    return None if component is None else json.loads(component.__getstate__())


def _adds_nothing(backend: Any) -> bool:
    """Whether all tokens that were added are special, and so are not looked for in a text."""
    return all(token.special for token in backend.get_added_tokens_decoder().values())


def _is_bytes(backend: Any) -> bool:
    """Whether each byte is one token: no merges, no change of the text before."""
    content = json.loads(backend.to_str())
    model, before = content["model"], content["pre_tokenizer"]
    return (
        not model["merges"]
        and not model["continuing_subword_prefix"]
        and not model["end_of_word_suffix"]
        and content["normalizer"] is None
        and before is not None
        and before["type"] == "ByteLevel"
        and not before["add_prefix_space"]
        and set(byte_characters()) <= set(model["vocab"])
    )


def _is_words(backend: Any) -> bool:
    """Whether the text is cut as by `build_tokenizer("word", …)`."""
    return (
        _state(backend.normalizer) == _state(word_normalizer())
        and _state(backend.pre_tokenizer) == _state(pre_tokenizers.WhitespaceSplit())
        and backend.model.unk_token == UNK
        and {EOS, UNK} <= set(backend.get_vocab())
    )
