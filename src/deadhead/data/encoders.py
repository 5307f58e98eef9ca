"""Encoding of pieces of text as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import models
from transformers import PreTrainedTokenizerBase

from deadhead.data.pieces import Piece, whole_words
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.errors import InputError

_BATCH_CHARACTERS = 1 << 21
_BATCH_PIECES = 4096


class Encoder:
    """Encodes texts by a tokenizer, without adding special tokens; those of a chat template are in the text already.

    For the tokenizer of `build_tokenizer("byte", …)` (`is_bytes`), the ids are the bytes themselves, which takes a
    thirtieth of the time of running it. If each token is a word (`is_words`), texts must not be cut within a word, and
    tokens are counted as words, as in the WikiText papers, where a line end counts as one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, is_chat: bool = False) -> None:
        self._tokenizer = tokenizer
        backend = self._backend = _backend(tokenizer)
        self.is_bytes = self.is_words = False
        if backend is not None:
            # As transformers sets them for a call without truncation and padding.
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = tokenizer.split_special_tokens and not is_chat
            self.is_bytes = backend.encode_special_tokens and backend.to_str() == _backend(byte_tokenizer()).to_str()
            self.is_words = isinstance(backend.model, models.WordLevel)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        if self.is_bytes:
            return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) for text in texts]
        if self._backend is not None:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]
        # verbose=False: no warning that a text is longer than the model's context; it will be cut.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [np.asarray(ids, dtype=np.uint32) for ids in encoded["input_ids"]]

    def located(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ids of a text, and the characters at which each begins and ends."""
        if self._backend is None:
            raise InputError(
                "answers_only needs a fast tokenizer, but got a slow one; leave answers_only out to learn from the "
                "whole text."
            )
        encoding = self._backend.encode(text, add_special_tokens=False)
        places = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoding.ids, dtype=np.uint32), places[:, 0], places[:, 1]


def encode_pieces(encoder: Encoder, pieces: Iterable[Piece], separator: int | None) -> Iterator[np.ndarray]:
    """Yield the ids of a text, some at a time.

    The separator follows each document, unless the document already ends with that token: a tokenizer of words gives
    `<eos>` for a line end.
    """
    last: int | None = None  # the last token of the document so far
    for batch in _batches(whole_words(pieces) if encoder.is_words else pieces):
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


def encode_answers(
    encoder: Encoder, pieces: Iterable[Piece], separator: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the ids of each conversation, and for each id whether it belongs to an answer or ends one."""
    for piece in pieces:
        ids, starts, stops = encoder.located(piece.text)
        scored = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in piece.answers or ():
            scored |= (starts < stop) & (stops > start)
        if piece.ends_document and separator is not None and not (len(ids) and ids[-1] == separator):
            ids, scored = np.append(ids, np.uint32(separator)), np.append(scored, scored[-1:])
        yield ids, scored


def text_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that a tokenizer puts before a text, and those that it puts after it."""
    whole, own = (tokenizer("a", add_special_tokens=framed, verbose=False)["input_ids"] for framed in (True, False))
    for start in range(len(whole) - len(own), -1, -1):
        if own and whole[start : start + len(own)] == own:
            return tuple(whole[:start]), tuple(whole[start + len(own) :])
    return (), ()


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that separates documents: a tokenizer's end of text, or the token it puts after a text."""
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    return next(iter(text_frame(tokenizer)[1]), None)


def fingerprint_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines a tokenizer's ids and the tokens it puts around a text."""
    backend = _backend(tokenizer)
    if backend is not None:
        content = backend.to_str() + str(backend.encode_special_tokens)
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(f"{content}\n{separator_of(tokenizer)}{text_frame(tokenizer)}".encode()).hexdigest()


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
    """Return the underlying tokenizer of the tokenizers library, if there is one."""
    return getattr(tokenizer, "backend_tokenizer", None)
