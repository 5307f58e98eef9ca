"""A corpus as token ids on disk: one flat file a split, mapped into memory, made once and used again.

A folder of the cache holds `train.bin`, `valid.bin`, `test.bin` (little-endian, 16 bits an id if the vocabulary fits,
else 32), `meta.json` and checksums; where answers alone count, also `train.scored` and so on, a byte a token. It is
written beside and moved in whole: several processes may make the same one.
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
        tokens: (n,), mapped from a file, not to be written to.
        num_bytes: of the text in UTF-8, for bits per byte. Separators between documents are no text.
        num_words: of the text, for perplexity per word; with a tokenizer of words the number of tokens.
        prefix: the tokens that the tokenizer begins a text with, such as BOS. They are not in `tokens`: every row that
            a model without segment memory reads begins with them.
        scored: (n,), whether a token is learned from and measured on, as answers are; None: all are. Bytes and words
            are those of what is scored.
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

    They lie in a finished folder of the cache.
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
    """Read a text and turn it into tokens.

    Args:
        source: a file of text, JSON, JSON Lines, CSV or Parquet, packed with gzip or zstd or not; a directory of such
            files; "stdlib" or "hf:NAME[:CONFIG]".
        tokenizer: "byte", "bpe" or "word" to make one for this text, or a tokenizer that exists.
        vocab_size: of a "bpe" or "word" tokenizer.
        text_column: of data with fields: the column with the text, or with lists of messages; None takes "text",
            "messages", "prompt" and "completion", or the only one of strings.
        split: the one split of a data set to use.
        data_format: of files: "text", "json", "csv" or "parquet"; None tells by their endings.
        chat_template: a file with the template that conversations are written by; the tokenizer returned has it. None:
            the tokenizer's own.
        answers_only: learn from, and measure on, the answers of conversations alone.
        cache_dir: where tokens are kept on disk to be used again; None keeps them as long as the result lives.
        progress: called with the kB of text done and to do, while it is tokenised.

    Returns:
        The train, valid and test streams, and the tokenizer.

    Raises:
        InputError: the text or the tokenizer cannot be used; the message says why.
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
    """Return what writes conversations for a tokenizer, or one of a kind that is not made yet; None without template.

    A template that is given goes before the tokenizer's own.
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
    """Turn a corpus into token ids, streaming, unless the cache has them. Tokenizers of subwords use all cores.

    Where a split has several documents, each is followed by the token that ends a text, if the tokenizer has one.
    Without a cache the ids lie in a temporary folder, which goes with the object returned. `progress` is called with
    the kB of text done and to do. With `answers_only` it is noted which tokens are of answers, which the corpus tells.

    Raises:
        InputError: the text can't be read, or the folder can't be written; then nothing half-written is left.
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
    """Write the files of all splits; return the numbers of tokens, bytes and words of each."""
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
    """Write the ids of a split; yield how many, some at a time, and count its bytes and words."""
    with path.open("wb") as file:
        for ids in encode_pieces(encoder, _counted(pieces, count), separator):
            file.write(ids.astype(dtype).data)  # unlike ndarray.tofile, this says why it fails
            yield len(ids)


def _write_answers(
    path: Path, pieces: Iterable[Piece], encoder: Encoder, separator: int | None, dtype: str, count: dict[str, int]
) -> Iterator[int]:
    """Write the ids of a split of conversations as `_write_text` does, and beside them which are of answers."""
    with path.open("wb") as file, path.with_suffix(_SCORED).open("wb") as marks:
        for ids, scored in encode_answers(encoder, _counted(pieces, count), separator):
            file.write(ids.astype(dtype).data)
            marks.write(scored.data)
            yield len(ids)


def _move_in(temporary: Path, folder: Path, fingerprint: str) -> None:
    """Give a finished folder its place, unless another process was first or the place holds something damaged."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _usable(folder, fingerprint) is None:
            shutil.rmtree(folder)
            temporary.rename(folder)


def _usable(folder: Path, fingerprint: str) -> TokenizedCorpus | None:
    """What a folder of the cache holds, if it is whole and of this text and tokenizer."""
    with suppress(InputError, OSError, KeyError, TypeError, ValueError):
        # The text itself is hashed at each start too, so this takes no longer than that.
        if read_checksums(folder) and changed_file(folder) is None:
            meta = read_json(folder / _META, what="description of token files")
            return TokenizedCorpus(folder, meta) if meta["fingerprint"] == fingerprint else None
    return None


def _counted(pieces: Iterable[Piece], count: dict[str, int]) -> Iterator[Piece]:
    """Count bytes and words of pieces that pass through; a word cut in two by a piece's end counts once.

    Where it is known what answers are, they alone count.
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
