"""Tokenizers made from a text: bytes, byte pairs, and the words of the WikiText papers.

All three are ordinary fast tokenizers of transformers, saved and loaded by its functions. A text cannot forge an end
of document: "<eos>" within it is cut like any other text (of words, see `_word`), so byte and bpe give every string
back exactly. Once special tokens are added, each special token within a text is one id, as in other tokenizers.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from deadhead.data.corpus import Corpus
from deadhead.data.pieces import whole_words
from deadhead.disk.gguf import gguf_file, reading_gguf
from deadhead.disk.hub import quick, require_had
from deadhead.errors import InputError, first_line, typed

KINDS = ("byte", "bpe", "word")
EOS, UNK = "<eos>", "<unk>"
_BYTES = 256
_BPE_VOCABULARY = 8192


class TokenizersBackend(PreTrainedTokenizerFast):
    """A tokenizer that deadhead made; it is saved under this name, which is that of transformers' own class."""

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        if special_tokens and any(str(token) not in (EOS, UNK) for token in new_tokens):
            # Whoever adds special tokens wants them found within a text.
            self.split_special_tokens = False
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))


@typed
def build_tokenizer(kind: str, corpus: Corpus, *, vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer; if it has to learn, it learns from the training text.

    Args:
        kind: "byte" (the 256 bytes and `<eos>`), "bpe" (learned byte pairs) or "word" (runs of characters between
            whitespace; `<eos>` for each line end, `<unk>` for words that are not in the vocabulary).
        corpus: the text, which is streamed.
        vocab_size: number of tokens, including special ones. None: 8192 for bpe, every word for word. A short text
            gives fewer.

    Returns:
        The tokenizer, which is always the same for the same text. Its `<eos>` also serves as padding and as beginning.

    Raises:
        InputError: an unknown kind, a vocabulary too small for the kind, or a text without a word.
    """
    if kind == "byte":
        if vocab_size not in (None, _BYTES + 1):
            raise InputError(
                f"A byte tokenizer has {_BYTES + 1} tokens, but got vocab_size {vocab_size}; leave vocab_size out."
            )
        return byte_tokenizer()
    if kind not in KINDS:
        raise InputError(f"A kind of tokenizer was expected ({', '.join(KINDS)}), but got {kind!r}.")
    least = _BYTES + 2 if kind == "bpe" else 3
    if vocab_size is not None and vocab_size < least:
        raise InputError(f"A vocab_size of at least {least} was expected for a {kind} tokenizer, but got {vocab_size}.")
    if kind == "bpe":
        return _wrapped(_bpe(corpus, _BPE_VOCABULARY if vocab_size is None else vocab_size))
    return _wrapped(_word(corpus, vocab_size), unk_token=UNK)


# The files of tokenizers, and what the longest of them may have: those of real ones have some tens of megabytes.
_NAMES = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens", "spiece", "sentencepiece", "chat_template")
_MOST_BYTES = 2**29
# How a tokenizer was loaded, which it would write into its next configuration as if it were part of it.
_LOADED_BY = ("is_local", "local_files_only")


def has_tokenizer(path: Path) -> bool:
    """Return whether a model's folder contains its tokenizer; for GGUF files and models of the hub this is assumed."""
    return not path.is_dir() or (path / "tokenizer_config.json").exists() or gguf_file(path) is not None


@typed
def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a saved tokenizer, that of a GGUF file, or one of the hub by name.

    Raises:
        InputError: there is no tokenizer, or it cannot be loaded.
    """
    if (file := gguf_file(path)) is not None:
        with reading_gguf(file, "tokenizer") as (folder, of_gguf):
            read = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **of_gguf)
        return _without_more(read) if isinstance(read, PreTrainedTokenizerFast) else read
    files = [file for file in Path(path).glob("*") if file.name.startswith(_NAMES)]
    if Path(path).is_dir() and not files:
        raise InputError(
            f"A tokenizer was expected at {path}, but there are no files of one, such as tokenizer.json; save it "
            "there: tokenizer.save_pretrained(path)."
        )
    require_had(path)
    for file in files:
        if file.is_file() and file.stat().st_size > _MOST_BYTES:
            raise InputError(
                f"A tokenizer was expected at {path}, but {file.name} has {file.stat().st_size:,} bytes, more than any."
            )
    try:
        with quick(path):
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(
            f"A tokenizer was expected at {path}, but it could not be loaded: {first_line(error)}."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(f"A tokenizer was expected at {path}, but got {type(tokenizer).__name__}; check the folder.")
    if type(tokenizer) is PreTrainedTokenizerFast and tokenizer.split_special_tokens and tokenizer.eos_token == EOS:
        tokenizer.__class__ = TokenizersBackend
    for noted in _LOADED_BY:
        tokenizer.init_kwargs.pop(noted, None)
    return tokenizer


def _without_more(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Remove <|endoftext|>, which transformers adds to the tokens of a GGUF file, but the model has no row for it."""
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["id"] < tokenizer.vocab_size]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(written))
    return tokenizer


@typed
def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the ids of a tokenizer's special tokens, by their names in a model's configuration."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer whose ids are the bytes of UTF-8 and `<eos>`."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, EOS: _BYTES}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)


def _bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents("train"), trainer)
    return tokenizer


def _word(corpus: Corpus, vocab_size: int | None) -> Tokenizer:
    """Make a tokenizer of words, sorted by falling frequency, then alphabetically, so that an id is a rank.

    Special tokens have the ranks that their frequency gives them: `<eos>` counts line ends, `<unk>` counts the words
    that are left out. If the text has "<unk>" or "<eos>" as a word, as WikiText does, it is the special token.
    """
    counts: Counter[str] = Counter()
    for text, *_ in whole_words(corpus.pieces("train")):
        counts.update(text.split())
        counts[EOS] += text.count("\n")
    if not any(word not in (EOS, UNK) for word in counts):
        raise InputError(f"Words were expected in the training text of {corpus.name}, but it has none; use more text.")
    words = sorted((word for word in counts if word not in (EOS, UNK)), key=lambda word: (-counts[word], word))
    kept = words if vocab_size is None else words[: vocab_size - 2]
    counts[UNK] += sum(counts[word] for word in words[len(kept) :])
    ranked = sorted([*kept, EOS, UNK], key=lambda word: (-counts[word], word))
    tokenizer = Tokenizer(models.WordLevel({word: rank for rank, word in enumerate(ranked)}, unk_token=UNK))
    # Each line end is a word of its own, and the whitespace is that of `str.split`, which counts four control
    # characters in: together, text.replace("\n", " <eos> ").split().
    separators = normalizers.Replace(Regex("[\x1c-\x1f]"), " ")
    tokenizer.normalizer = normalizers.Sequence([separators, normalizers.Replace("\n", f" {EOS} ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def _wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return TokenizersBackend(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=EOS,
        split_special_tokens=True,  # special tokens within a text are not looked for
        clean_up_tokenization_spaces=False,
        **special,
    )
