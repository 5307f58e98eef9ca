"""The path of data: a corpus, a tokenizer, token ids on disk, and segments in the order of the text."""

from deadhead.data.corpus import Corpus, open_corpus
from deadhead.data.segments import RowDataset, SegmentDataset
from deadhead.data.tokenizer import build_tokenizer, has_tokenizer, load_tokenizer, special_token_ids
from deadhead.data.tokens import TokenizedCorpus, TokenStream, load_text, tokenize_corpus

__all__ = [
    "Corpus",
    "RowDataset",
    "SegmentDataset",
    "TokenStream",
    "TokenizedCorpus",
    "build_tokenizer",
    "has_tokenizer",
    "load_text",
    "load_tokenizer",
    "open_corpus",
    "special_token_ids",
    "tokenize_corpus",
]
