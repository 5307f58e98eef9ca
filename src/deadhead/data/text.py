"""From what a user names to token streams and a tokenizer, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from deadhead.data.corpus import open_corpus
from deadhead.data.tokenizer import build_tokenizer
from deadhead.data.tokens import TokenizedCorpus, tokenize_corpus


def load_text(
    source: str,
    *,
    tokenizer: str | PreTrainedTokenizerBase = "byte",
    vocab_size: int | None = None,
    column: str | None = None,
    split: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TokenizedCorpus, PreTrainedTokenizerBase]:
    """Read a text and turn it into tokens.

    Args:
        source: a text file, a directory, "stdlib" or "hf:NAME[:CONFIG]".
        tokenizer: "byte", "bpe" or "word" to make one for this text, or a tokenizer that exists.
        vocab_size: of a "bpe" or "word" tokenizer.
        column: the text column of a data set.
        split: the one split of a data set to use.
        cache_dir: where tokens are kept on disk to be used again; None keeps them as long as the result lives.
        progress: called with the kB of text done and to do, while it is tokenised.

    Returns:
        The train, valid and test streams, and the tokenizer.

    Raises:
        InputError: the text or the tokenizer cannot be used; the message says why.
    """
    corpus = open_corpus(source, column=column, split=split)
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer, corpus, vocab_size=vocab_size)
    folder = None if cache_dir is None else Path(cache_dir)
    return tokenize_corpus(corpus, tokenizer, cache_dir=folder, progress=progress), tokenizer
