"""Pieces of text: nothing lost, nothing longer than asked, cut where it does no harm."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadhead.data import pieces
from deadhead.data.pieces import Document, Documents, Piece, whole_words
from deadhead.errors import InputError

TEXTS = st.text(alphabet=st.sampled_from("ab \n\r\t\x1cé€😀\u3000"), max_size=200)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)
    monkeypatch.setattr(pieces, "_SCAN_BYTES", 8)
    return 16


def text_document(label: str, text: str) -> Document:
    data = text.encode()
    return Document(label=label, open=lambda: BytesIO(data), stop=len(data))


def texts(document: Document) -> list[str]:
    return [piece.text for piece in document.pieces()]


@given(TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", 16)
        parts = texts(text_document("a text", text))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 16 for part in parts)


def test_pieces_end_at_line_ends(small_pieces: int) -> None:
    parts = texts(text_document("a text", "one two\nthree\nfour five six\nseven"))
    assert parts == ["one two\nthree\n", "four five six\n", "seven"]


def test_characters_stay_whole_in_a_line_longer_than_a_piece(small_pieces: int) -> None:
    parts = texts(text_document("a text", "€" * 20))
    assert "".join(parts) == "€" * 20
    assert len(parts) == 4  # five characters of three bytes, and one byte that finds no room


@given(TEXTS, st.floats(0, 0.4), st.floats(0, 0.4))
def test_cut_in_three_loses_nothing(text: str, valid: float, test: float) -> None:
    parts = text_document("a text", text).cut(valid, test)
    assert "".join("".join(texts(part)) for part in parts) == text


def test_cut_in_three_is_at_line_ends_near_the_shares() -> None:
    text = "".join(f"line {index}\n" for index in range(1000))
    train, valid, test = ("".join(texts(part)) for part in text_document("a text", text).cut(0.05, 0.1))
    assert train.endswith("\n")
    assert valid.endswith("\n")
    assert len(valid) == pytest.approx(0.05 * len(text), abs=10)
    assert len(test) == pytest.approx(0.1 * len(text), abs=10)


def test_cut_falls_back_on_a_line_end_before_and_then_on_characters() -> None:
    train, _, _ = text_document("a text", "a" * 60 + "\n" + "b" * 40).cut(0.05, 0.05)
    assert "".join(texts(train)) == "a" * 60 + "\n"
    parts = ["".join(texts(part)) for part in text_document("a text", "é" * 100).cut(0.05, 0.05)]
    assert parts == ["é" * 90, "é" * 5, "é" * 5]


def test_the_offset_of_a_bad_byte_counts_from_the_beginning_of_the_file(small_pieces: int) -> None:
    data = b"a line\n" * 5 + b"b\xffc"
    document = Document(label="notes.txt", open=lambda: BytesIO(data), stop=len(data), start=7)
    with pytest.raises(InputError, match=r"notes\.txt, but byte 36 cannot be decoded"):
        texts(document)


def test_a_character_cut_off_by_the_end_of_the_file_is_an_error() -> None:
    data = "a€".encode()[:-1]
    with pytest.raises(InputError, match="byte 1 cannot be decoded"):
        texts(Document(label="x", open=lambda: BytesIO(data), stop=len(data)))


def test_bytes_that_begin_no_character_end_in_an_error_not_in_a_loop(small_pieces: int) -> None:
    data = b"\x80" * 100
    with pytest.raises(InputError, match="byte 0 cannot be decoded"):
        texts(Document(label="x", open=lambda: BytesIO(data), stop=len(data)))


def test_only_the_last_piece_of_a_document_ends_it(small_pieces: int) -> None:
    documents = Documents([text_document("1", "a\n" * 12), text_document("2", "b")])
    assert [piece.ends_document for piece in documents.pieces()] == [False, True, True]
    assert not any(piece.ends_document for piece in documents.select([0]).pieces())


@given(st.lists(st.tuples(TEXTS, st.booleans()), max_size=8))
def test_whole_words_moves_cuts_to_whitespace(parts: list[tuple[str, bool]]) -> None:
    given_pieces = [Piece(*part) for part in parts]
    moved = list(whole_words(given_pieces))

    def documents(some: list[Piece]) -> list[str]:
        text = "".join(piece.text.replace("\0", "") + ("\0" if piece.ends_document else "") for piece in some)
        return text.split("\0")

    assert documents(moved) == documents(given_pieces)
    words = [piece.text.split() for piece in moved]
    assert [word for some in words for word in some] == " ".join(documents(given_pieces)).split()
