"""Encoders must give what the tokenizer gives when it is called."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deadhead.data import Corpus, build_tokenizer
from deadhead.data.encoders import Encoder, encode_pieces, fingerprint_of, separator_of, text_frame
from deadhead.data.pieces import Piece
from tests.small_runs import framed_tokenizer

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


def called(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", ["byte", "bpe", "word"])
def test_ids_are_the_tokenizers(make: Callable[[str], PreTrainedTokenizerFast], kind: str) -> None:
    tokenizer = make(kind)
    encoder = Encoder(tokenizer)
    assert (encoder.is_bytes, encoder.is_words) == (kind == "byte", kind == "word")

    @settings(max_examples=150)
    @given(UNICODE | WORDS)
    def check(text: str) -> None:
        assert encoder([text])[0].tolist() == called(tokenizer, text)

    check()


@given(UNICODE | WORDS)
def test_words_are_those_of_a_split(make: Callable[[str], PreTrainedTokenizerFast], text: str) -> None:
    tokenizer = make("word")
    expected = tokenizer.convert_tokens_to_ids(text.replace("\n", " <eos> ").split())
    assert Encoder(tokenizer)([text])[0].tolist() == expected


def test_every_whitespace_character_of_unicode_splits_alike(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    text = "".join(
        f"a{chr(code)}" for code in range(0x110000) if chr(code).isspace() or code in (0x200B, 0xFEFF, 0x180E)
    )
    tokenizer = make("word")
    expected = tokenizer.convert_tokens_to_ids(text.replace("\n", " <eos> ").split())
    assert Encoder(tokenizer)([text])[0].tolist() == expected


def test_other_tokenizers_are_run() -> None:
    changed = build_tokenizer("byte", corpus_of("a"))
    changed.add_tokens(["hello"])
    assert not Encoder(changed).is_bytes
    assert Encoder(changed)(["hello"])[0].tolist() == called(changed, "hello") == [257]
    looked_for = build_tokenizer("byte", corpus_of("a"))
    looked_for.split_special_tokens = False
    assert not Encoder(looked_for).is_bytes
    assert Encoder(looked_for)(["a<eos>"])[0].tolist() == called(looked_for, "a<eos>") == [97, 256]


def test_a_limit_of_the_tokenizer_does_not_cut_the_text() -> None:
    limited = build_tokenizer("bpe", corpus_of("a b"))
    expected = called(limited, "a b c d")
    limited.backend_tokenizer.enable_truncation(2)
    limited.backend_tokenizer.enable_padding(length=9)
    assert Encoder(limited)(["a b c d"])[0].tolist() == expected


@pytest.mark.parametrize("kind", ["byte", "word"])
@given(parts=st.lists(UNICODE | WORDS, max_size=6))
def test_ids_do_not_depend_on_where_pieces_are_cut(
    make: Callable[[str], PreTrainedTokenizerFast], kind: str, parts: list[str]
) -> None:
    encoder = Encoder(make(kind))
    whole = encoder(["".join(parts)])[0]
    cut = list(encode_pieces(encoder, [Piece(part, False) for part in parts], None))
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, dtype=np.uint32), *cut]), whole)


def test_documents_are_separated_once(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    pieces = [Piece("a", False), Piece("b", True), Piece("", True), Piece("a\n", True), Piece("b", False)]
    byte = np.concatenate(list(encode_pieces(Encoder(make("byte")), pieces, 256)))
    assert byte.tolist() == [97, 98, 256, 256, 97, 10, 256, 98]
    word = make("word")
    tokens = np.concatenate(list(encode_pieces(Encoder(word), pieces, word.eos_token_id)))
    # The line end gives the third document its <eos>; "ab" is one word, which the vocabulary lacks.
    assert word.convert_ids_to_tokens(tokens.tolist()) == "<unk> <eos> <eos> a <eos> b".split()  # noqa: SIM905


def test_fingerprints_tell_tokenizers_apart(make: Callable[[str], PreTrainedTokenizerFast]) -> None:
    prints = {fingerprint_of(make(kind)) for kind in ("byte", "bpe", "word")}
    assert len(prints) == 3
    assert fingerprint_of(build_tokenizer("byte", corpus_of("b"))) == fingerprint_of(make("byte"))
    assert fingerprint_of(build_tokenizer("word", corpus_of("other words"))) not in prints


@pytest.mark.parametrize(
    ("frame", "before", "behind"), [("bos", ["<bos>"], []), ("cls and sep", ["<cls>"], ["<sep>"]), ("none", [], [])]
)
def test_what_stands_around_a_text(frame: str, before: list[str], behind: list[str]) -> None:
    tokenizer = framed_tokenizer(frame)
    assert text_frame(tokenizer) == tuple(tuple(tokenizer.convert_tokens_to_ids(part)) for part in (before, behind))
    assert separator_of(tokenizer) == tokenizer.eos_token_id
    without = framed_tokenizer(frame, eos=False)
    assert separator_of(without) == (without.sep_token_id if behind else None)


@pytest.mark.parametrize("kind", ["byte", "bpe", "word"])
def test_our_own_tokenizers_put_nothing_around_a_text(
    make: Callable[[str], PreTrainedTokenizerFast], kind: str
) -> None:
    assert text_frame(make(kind)) == ((), ())


def test_a_tokenizer_that_began_to_frame_its_texts_is_another() -> None:
    assert len({fingerprint_of(framed_tokenizer(frame)) for frame in ("bos", "cls and sep", "none")}) == 3
