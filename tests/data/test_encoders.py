"""Looking ids up must give what the tokenizer gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deadhead.data import Corpus, build_tokenizer
from deadhead.data.encoders import (
    ByteEncoder,
    GeneralEncoder,
    WordEncoder,
    encode_pieces,
    encoder_of,
    fingerprint_of,
)
from deadhead.data.pieces import Piece

UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.lists(
    st.sampled_from(
        ["a", "b", "zz", "<unk>", "<eos>", " ", "\n", "\r", "\x0b", "\x1c", "\x1f", "\x85", "\u200b", "\u2028"]
    )
).map("".join)


def corpus_of(*texts: str) -> Corpus:
    pieces = [Piece(text, False) for text in texts]
    return Corpus(name="made up", readers={name: lambda: iter(pieces) for name in ("train", "valid", "test")})


@pytest.fixture(scope="module")
def make() -> Callable[[str], PreTrainedTokenizerFast]:
    made = {kind: build_tokenizer(kind, corpus_of("a b zzz a\n"), vocab_size=None) for kind in ("byte", "bpe", "word")}
    return made.__getitem__


@pytest.mark.parametrize(("kind", "encoder_class"), [("byte", ByteEncoder), ("word", WordEncoder)])
def test_looked_up_ids_are_the_tokenizers(
    make: Callable[[str], PreTrainedTokenizerFast], kind: str, encoder_class: type
) -> None:
    tokenizer = make(kind)
    encoder, slow = encoder_of(tokenizer), GeneralEncoder(tokenizer)
    assert isinstance(encoder, encoder_class)
    assert slow.tokens_are_words == encoder.tokens_are_words == (kind == "word")

    @settings(max_examples=150)
    @given(UNICODE | WORDS)
    def check(text: str) -> None:
        np.testing.assert_array_equal(encoder([text])[0], slow([text])[0])

    check()


def test_every_whitespace_character_of_unicode_splits_alike(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    text = "".join(
        f"a{chr(code)}" for code in range(0x110000) if chr(code).isspace() or code in (0x200B, 0xFEFF, 0x180E)
    )
    np.testing.assert_array_equal(encoder_of(make("word"))([text])[0], GeneralEncoder(make("word"))([text])[0])


def test_other_tokenizers_are_run(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    assert isinstance(encoder_of(make("bpe")), GeneralEncoder)
    changed = build_tokenizer("byte", corpus_of("a"))
    changed.add_tokens(["hello"])
    assert isinstance(encoder_of(changed), GeneralEncoder)
    looked_for = build_tokenizer("byte", corpus_of("a"))
    looked_for.backend_tokenizer.encode_special_tokens = False
    assert isinstance(encoder_of(looked_for), GeneralEncoder)


@pytest.mark.parametrize("kind", ["byte", "word"])
@given(parts=st.lists(UNICODE | WORDS, max_size=6))
def test_ids_do_not_depend_on_where_pieces_are_cut(
    make: Callable[[str], PreTrainedTokenizerFast], kind: str, parts: list[str]
) -> None:
    encoder = encoder_of(make(kind))
    whole = encoder(["".join(parts)])[0]
    cut = list(encode_pieces(encoder, [Piece(part, False) for part in parts], None))
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, dtype=np.uint32), *cut]), whole)


def test_documents_are_separated_once(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    pieces = [Piece("a", False), Piece("b", True), Piece("", True), Piece("a\n", True), Piece("b", False)]
    byte = np.concatenate(list(encode_pieces(encoder_of(make("byte")), pieces, 256)))
    assert byte.tolist() == [97, 98, 256, 256, 97, 10, 256, 98]
    word = make("word")
    tokens = np.concatenate(list(encode_pieces(encoder_of(word), pieces, word.eos_token_id)))
    # The line end gives the third document its <eos>; "ab" is one word, which the vocabulary lacks.
    assert word.convert_ids_to_tokens(tokens.tolist()) == "<unk> <eos> <eos> a <eos> b".split()  # noqa: SIM905


def test_fingerprints_tell_tokenizers_apart(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    prints = {fingerprint_of(make(kind)) for kind in ("byte", "bpe", "word")}
    assert len(prints) == 3
    assert fingerprint_of(build_tokenizer("byte", corpus_of("b"))) == fingerprint_of(make("byte"))
    assert fingerprint_of(build_tokenizer("word", corpus_of("other words"))) not in prints
