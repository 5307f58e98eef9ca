"""A corpus as token ids on disk: one flat file per split, mapped into memory, made once and reused.

A folder of the cache holds `train.bin`, `valid.bin`, `test.bin` (little-endian, 16 bits an id if the vocabulary fits,
otherwise 32), `meta.json` and checksums; if only answers count, also `train.scored` and so on, one byte a token. It is
written to a temporary folder and moved as a whole, so several processes may make the same one.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from deadhead.data.chat import Chat
from deadhead.data.corpus import SPLITS, Corpus, open_corpus
from deadhead.data.encoders import Encoder, encode_answers, encode_pieces, fingerprint_of, separator_of, text_frame
from deadhead.data.formats import Format
from deadhead.data.pieces import Piece
from deadhead.data.segments import require_ids
from deadhead.data.tokenizer import EOS, build_tokenizer
from deadhead.disk.checksums import changed_file, read_checksums, write_checksums
from deadhead.disk.files import no_space_is_input_error, write_json
from deadhead.disk.reading import read_json, read_text
from deadhead.errors import InputError, require_fields, typed

_FORMAT = 2
_META = "meta.json"
_SCORED = ".scored"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStream:
    """The tokens of one split.

    Attributes:
        tokens: (n,), ids, mapped read-only from a file.
        num_bytes: size of the text in UTF-8, for bits per byte; separators between documents do not count.
        num_words: number of words, for perplexity per word; with a tokenizer of words, the number of tokens.
        prefix: the tokens that the tokenizer begins a text with, such as BOS. They are not in `tokens`: every row that
            a model without segment memory reads begins with them.
        scored: (n,), whether a token counts in training and measurement, as those of answers do; None: all count.
            `num_bytes` and `num_words` are those of the scored text.
    """

    tokens: np.ndarray
    num_bytes: int
    num_words: int
    prefix: tuple[int, ...] = ()
    scored: np.ndarray | None = None

    def __post_init__(self) -> None:
        require_fields(self)
        require_ids(self.tokens)


class TokenizedCorpus:
    """Token streams of "train", "valid" and "test" (`splits`), which may be empty, and the hash of the text.

    They are in a finished folder of the cache.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.sha256: str = meta["sha256"]
        self.splits: Mapping[str, TokenStream] = {
            name: TokenStream(
                tokens=_mapped(path, meta["dtype"]),
                num_bytes=meta["splits"][name]["bytes"],
                num_words=meta["splits"][name]["words"],
                prefix=tuple(meta["prefix"]),
                scored=_mapped(path.with_suffix(_SCORED), "?") if meta["answers_only"] else None,
            )
            for name, path in {name: folder / f"{name}.bin" for name in SPLITS}.items()
        }


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # An empty file can't be mapped.
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)


@typed
def load_text(
    source: str | Path,
    *,
    tokenizer: str | PreTrainedTokenizerBase = "byte",
    vocab_size: int | None = None,
    text_column: str | None = None,
    split: str | None = None,
    data_format: Format | None = None,
    chat_template: str | Path | None = None,
    answers_only: bool = False,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
    """Read a text and tokenise it.

    Args:
        source: a file of text, JSON, JSON Lines, CSV or Parquet, packed with gzip or zstd or not; a directory of such
            files; "stdlib" or "hf:NAME[:CONFIG]".
        tokenizer: "byte", "bpe" or "word" to make one for this text, or an existing tokenizer.
        vocab_size: size of the vocabulary of a "bpe" or "word" tokenizer.
        text_column: for data with fields: the column with the text, or with lists of messages; None takes "text",
            "messages", "prompt" and "completion", or the only column of strings.
        split: the single split of a data set to use.
        data_format: format of files: "text", "json", "csv" or "parquet"; None detects it by their endings.
        chat_template: file with the template that writes conversations; the returned tokenizer has it. None: the
            tokenizer's own template.
        answers_only: learn from, and measure on, only the answers of conversations.
        cache_dir: folder to keep tokens in and reuse them from; None keeps them as long as the result exists.
        progress: called while the text is tokenised, with the kB of text that are done and the kB in total.

    Returns:
        The train, valid and test streams, and the tokenizer.

    Raises:
        InputError: the text or the tokenizer cannot be used.
    """
    template = None if chat_template is None else read_text(Path(chat_template), what="chat template")
    chat = chat_of(tokenizer, template, answers=answers_only)
    corpus = open_corpus(source, text_column=text_column, split=split, data_format=data_format, chat=chat)
    for option, value in (("chat_template", chat_template), ("answers_only", answers_only)):
        if value and not corpus.is_chat:
            raise InputError(
                f"{option} is for conversations (messages, or prompt and completion), but {source} is text; leave it "
                "out."
            )
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, corpus, vocab_size=vocab_size)
    if template is not None:
        # The one given may be used elsewhere.
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    tokens = tokenize_corpus(corpus, tokenizer, cache_dir=cache_dir, progress=progress, answers_only=answers_only)
    return tokens, tokenizer


def chat_of(tokenizer: str | PreTrainedTokenizerBase, template: str | None, *, answers: bool) -> Chat | None:
    """Return the writer of conversations for a tokenizer, or a kind that is yet to be made; None without a template.

    A given template takes precedence over the tokenizer's own.
    """
    if isinstance(tokenizer, str):
        special, begin, tool_template = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS), "", None
    else:
        own: Any = tokenizer.chat_template
        # Some have several, by name.
        several = own if isinstance(own, Mapping) else {"default": own}
        tool_template = None if template else several.get("tool_use")
        template = template or several.get("default")
        special = dict(tokenizer.special_tokens_map)
        begin = "".join(tokenizer.convert_ids_to_tokens(list(text_frame(tokenizer)[0])))
    if template is None:
        return None
    return Chat(template, special, begin=begin, answers=answers, tool_template=tool_template)


@typed
def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cache_dir: str | Path | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    answers_only: bool = False,
) -> TokenizedCorpus:
    """Stream a corpus into token ids, unless the cache has them. Tokenizers of subwords use all cores.

    If a split has several documents, each is followed by the token that ends a text, if the tokenizer has one. Without
    a cache, the ids are in a temporary folder, which is deleted with the returned object. `progress` is called with the
    kB of text that are done and the kB in total. With `answers_only`, the tokens of answers are marked; the corpus must
    give the answers.

    Raises:
        InputError: the text cannot be read, or the folder cannot be written; no incomplete files are left.
    """
    if cache_dir is None:
        temporary = Path(tempfile.mkdtemp(prefix="deadhead-"))
        try:
            made = tokenize_corpus(corpus, tokenizer, cache_dir=temporary, progress=progress, answers_only=answers_only)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # Not tempfile.TemporaryDirectory, which warns when it is left to be collected.
        weakref.finalize(made, shutil.rmtree, temporary, ignore_errors=True)
        return made
    sha256 = corpus.sha256()
    fingerprint = hashlib.sha256(
        f"{_FORMAT}\n{sha256}\n{fingerprint_of(tokenizer)}{corpus.is_chat}{answers_only}".encode()
    ).hexdigest()
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    prefix = text_frame(tokenizer)[0]
    meta = {"format": _FORMAT, "fingerprint": fingerprint, "sha256": sha256, "dtype": dtype, "prefix": prefix}
    meta["answers_only"] = answers_only
    folder = Path(cache_dir) / fingerprint[:16]
    if (found := _usable(folder, fingerprint)) is not None:
        return found
    with no_space_is_input_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            temporary.chmod(0o755)
            meta["splits"] = _write_splits(temporary, corpus, tokenizer, dtype, progress, answers_only)
            write_json(temporary / _META, meta)
            write_checksums(temporary)
            _move_in(temporary, folder, fingerprint)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return TokenizedCorpus(folder, meta)


def _write_splits(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    progress: Callable[[int, int], None],
    answers_only: bool,
) -> dict[str, dict[str, int]]:
    """Write the files of all splits; return the number of tokens, bytes and words of each."""
    encoder, separator = Encoder(tokenizer, is_chat=corpus.is_chat), separator_of(tokenizer)
    write = _write_answers if answers_only else _write_text
    counts = {name: {"tokens": 0, "bytes": 0, "words": 0} for name in SPLITS}
    for name, count in counts.items():
        for size in write(folder / f"{name}.bin", corpus.pieces(name), encoder, separator, dtype, count):
            count["tokens"] += size
            progress(sum(each["bytes"] for each in counts.values()) // 1000, corpus.num_bytes // 1000)
        if encoder.is_words:
            count["words"] = count["tokens"]
    return counts


def _write_text(
    path: Path, pieces: Iterable[Piece], encoder: Encoder, separator: int | None, dtype: str, count: dict[str, int]
) -> Iterator[int]:
    """Write the ids of a split and count its bytes and words; yield the number of ids written, some at a time."""
    with path.open("wb") as file:
        for ids in encode_pieces(encoder, _counted(pieces, count), separator):
            file.write(ids.astype(dtype).data)  # unlike ndarray.tofile, this says why it fails
            yield len(ids)


def _write_answers(
    path: Path, pieces: Iterable[Piece], encoder: Encoder, separator: int | None, dtype: str, count: dict[str, int]
) -> Iterator[int]:
    """Write the ids of a split of conversations as `_write_text` does, and mark those of answers in a second file."""
    with path.open("wb") as file, path.with_suffix(_SCORED).open("wb") as marks:
        for ids, scored in encode_answers(encoder, _counted(pieces, count), separator):
            file.write(ids.astype(dtype).data)
            marks.write(scored.data)
            yield len(ids)


def _move_in(temporary: Path, folder: Path, fingerprint: str) -> None:
    """Move a finished folder to its place, unless another process was first; replace a damaged one."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _usable(folder, fingerprint) is None:
            shutil.rmtree(folder)
            temporary.rename(folder)


def _usable(folder: Path, fingerprint: str) -> TokenizedCorpus | None:
    """Return the contents of a folder of the cache, if it is complete and belongs to this text and tokenizer."""
    with suppress(InputError, OSError, KeyError, TypeError, ValueError):
        # The text itself is hashed at each start too, so this takes no longer than that.
        if read_checksums(folder) and changed_file(folder) is None:
            meta = read_json(folder / _META, what="description of token files")
            return TokenizedCorpus(folder, meta) if meta["fingerprint"] == fingerprint else None
    return None


def _counted(pieces: Iterable[Piece], count: dict[str, int]) -> Iterator[Piece]:
    """Count the bytes and words of pieces that pass through; a word that is split between two pieces counts once.

    If the answers are known, only they count.
    """
    is_within_word = False
    for piece in pieces:
        text = piece.text
        if piece.answers is not None:
            text = " ".join(text[start:stop] for start, stop in piece.answers)
            count["bytes"] -= max(len(piece.answers) - 1, 0)  # the spaces between them
        if text:
            count["bytes"] += len(text.encode())
            count["words"] += len(text.split()) - (is_within_word and not text[0].isspace())
            is_within_word = not text[-1].isspace()
        if piece.ends_document:
            is_within_word = False
        yield piece
