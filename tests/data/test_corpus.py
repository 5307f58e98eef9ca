"""Corpora of files, directories and the standard library: what is read, how it is divided, what is refused."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from deadhead.data import Corpus, local, open_corpus
from deadhead.errors import InputError, RunWarning

SPLITS = ("train", "valid", "test")


def text_of(corpus: Corpus, split: str) -> str:
    return "".join(corpus.documents(split))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_file_is_cut_90_5_5_and_kept_as_it_is(tmp_path: Path) -> None:
    text = "".join(f"Zeile {index} – mit Ümlaut\r\n" for index in range(400))
    corpus = open_corpus(str(write(tmp_path / "a.txt", text)))
    parts = [text_of(corpus, split) for split in SPLITS]
    assert "".join(parts) == text
    assert [round(len(part) / len(text), 2) for part in parts] == [0.9, 0.05, 0.05]
    assert parts[0].endswith("\r\n")
    assert not any(piece.ends_document for piece in corpus.pieces("train"))


def test_a_long_file_comes_in_pieces(tmp_path: Path) -> None:
    text = "some words on a line\n" * 100_000
    corpus = open_corpus(str(write(tmp_path / "a.txt", text)))
    pieces = list(corpus.documents("train"))
    assert len(pieces) > 1
    assert all(len(piece) <= 1 << 20 and piece.endswith("\n") for piece in pieces)


def test_shares_of_nothing_leave_all_to_training(tmp_path: Path) -> None:
    corpus = open_corpus(str(write(tmp_path / "a.txt", "all of it\n")), valid_share=0, test_share=0)
    assert [text_of(corpus, split) for split in SPLITS] == ["all of it\n", "", ""]


def test_a_directory_is_read_in_order_without_hidden_binary_or_repeated_files(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "B")
    write(tmp_path / "a" / "z.txt", "Z")
    write(tmp_path / ".hidden" / "x.txt", "hidden")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / "empty.txt", "")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(RunWarning, match=r"^2 of the files below .* are left out, such as picture\.png; convert"):
        corpus = open_corpus(str(tmp_path), valid_share=0, test_share=0)
    assert list(corpus.documents("train")) == ["Z", "B"]
    assert all(piece.ends_document for piece in corpus.pieces("train"))


def test_of_forty_documents_every_20th_is_valid_and_every_20th_test(tmp_path: Path) -> None:
    for index in range(45):
        write(tmp_path / f"{index:02}.txt", f"{index}")
    corpus = open_corpus(str(tmp_path))
    assert list(corpus.documents("valid")) == ["9", "29"]
    assert list(corpus.documents("test")) == ["19", "39"]
    assert len(list(corpus.documents("train"))) == 41


def test_other_shares_give_other_numbers_of_documents(tmp_path: Path) -> None:
    for index in range(100):
        write(tmp_path / f"{index:02}.txt", f"{index}")
    corpus = open_corpus(str(tmp_path), valid_share=0.4, test_share=0.2)
    assert [len(list(corpus.documents(split))) for split in SPLITS] == [40, 40, 20]
    only_test = open_corpus(str(tmp_path), valid_share=0, test_share=0.1)
    assert [len(list(only_test.documents(split))) for split in SPLITS] == [90, 0, 10]


def test_few_documents_are_each_cut_in_three(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.txt", f"{name} line\n" * 200)
    corpus = open_corpus(str(tmp_path))
    for split in SPLITS:
        pieces = list(corpus.pieces(split))
        assert [piece.text[0] for piece in pieces] == ["a", "b"]
        assert all(piece.ends_document for piece in pieces)


def test_a_directory_with_splits_uses_them(tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path / f"wiki.{split}.tokens", f"{split} text\n" * 20)
    write(tmp_path / "LICENSE", "not a part of the text")
    corpus = open_corpus(str(tmp_path))
    assert [text_of(corpus, split) for split in SPLITS] == [f"{split} text\n" * 20 for split in SPLITS]


def test_a_split_that_a_directory_lacks_is_taken_from_training(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.txt", "train\n" * 1000)
    write(tmp_path / "dev.txt", "dev\n" * 10)
    corpus = open_corpus(str(tmp_path))
    assert text_of(corpus, "valid") == "dev\n" * 10
    assert text_of(corpus, "test") == "train\n" * 50
    assert text_of(corpus, "train") == "train\n" * 950


def test_names_that_look_like_splits_by_accident_do_not_count(tmp_path: Path) -> None:
    write(tmp_path / "train.txt", "How to ride a train.\n")
    write(tmp_path / "test.txt", "How to sit a test.\n")
    write(tmp_path / "restaurant.txt", "How to eat out, at length.\n" * 10)
    corpus = open_corpus(str(tmp_path), valid_share=0, test_share=0)
    assert len(list(corpus.documents("train"))) == 3


def test_stdlib_is_source_without_tests() -> None:
    corpus = open_corpus("stdlib")
    sizes = {split: sum(len(text.encode()) for text in corpus.documents(split)) for split in SPLITS}
    assert 8e6 < sum(sizes.values()) < 14e6
    assert 0.02 < sizes["valid"] / sum(sizes.values()) < 0.1
    labels = [Path(document.label) for document in local.stdlib_documents()]
    assert labels == sorted(set(labels), key=str)
    assert not any({"test", "tests", "site-packages", "idlelib"} & set(path.parts[-3:]) for path in labels)
    assert {"argparse.py", "typing.py"} <= {path.name for path in labels}


def test_stdlib_without_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="standard library's source was expected"):
        open_corpus("stdlib")


def test_the_hash_tells_texts_and_divisions_apart(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.txt", "line\n" * 100))
    corpus = open_corpus(path)
    assert corpus.sha256() == open_corpus(path).sha256()
    assert corpus.sha256() != open_corpus(path, test_share=0.1).sha256()
    expected = hashlib.sha256()
    for split in SPLITS:
        expected.update(b"\xfe" + split.encode() + text_of(corpus, split).encode())
    assert corpus.sha256() == expected.hexdigest()
    for name, text in (("1/a", "xy"), ("1/b", "z"), ("2/a", "x"), ("2/b", "yz")):
        write(tmp_path / name, text)
    folders = [open_corpus(str(tmp_path / name), valid_share=0, test_share=0) for name in "12"]
    assert text_of(folders[0], "train") == text_of(folders[1], "train")
    assert folders[0].sha256() != folders[1].sha256()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\x7fELF\0\0", "looks binary"),
        (b"0123456789\xe9", "byte 10 cannot be decoded"),
        ("text".encode("utf-16"), "begins as UTF-16 does"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        open_corpus(str(path))


def test_a_bad_byte_far_down_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line\n" * 300_000 + b"\xff")
    with pytest.raises(InputError, match="byte 2100000 cannot be decoded"):
        open_corpus(str(path))


def test_a_missing_path_names_its_nearest_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shakespeare.txt", "text")
    with pytest.raises(InputError, match=r"but .*shakespear\.txt does not exist; did you mean .*shakespeare\.txt\?"):
        open_corpus(str(tmp_path / "shakespear.txt"))
    with pytest.raises(InputError, match="check the path"):
        open_corpus(str(tmp_path / "no" / "such" / "folder"))
    with pytest.raises(InputError, match="check the path"):
        open_corpus(str(tmp_path / "shakespeare.txt" / "below"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"did you mean stdlib\?"):
        open_corpus("stdlb")


def test_what_is_neither_file_nor_directory_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is neither"):
        open_corpus(str(tmp_path / "pipe"))
    with pytest.raises(InputError, match="but got nothing"):
        open_corpus("")
    with pytest.raises(InputError, match="cannot be used: it holds a null character"):
        open_corpus("a\0b")


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no files that are not hidden"):
        open_corpus(str(tmp_path))
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"none of its 1 files, such as a\.bin, holds UTF-8 text"):
        open_corpus(str(tmp_path))


def test_no_permission_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "text")

    def refused(self: Path, mode: str) -> BinaryIO:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)  # a superuser may read everything, so no mode of the file will do
    with pytest.raises(InputError, match=r"a\.txt, but it cannot be read: Permission denied\."):
        open_corpus(str(path))

    def unlistable(path: Path) -> Iterator[os.DirEntry[str]]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", unlistable)
    with pytest.raises(InputError, match="directory .* cannot be read: Permission denied"):
        open_corpus(str(tmp_path))


def test_a_file_that_goes_or_spoils_after_opening_is_an_input_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "line\n" * 100)
    corpus = open_corpus(str(path))
    path.write_bytes(b"\xff" * 500)
    with pytest.raises(InputError, match="byte 0 cannot be decoded"):
        list(corpus.documents("train"))
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        list(corpus.documents("train"))


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.txt", "text"))
    with pytest.raises(InputError, match="column is for data with fields"):
        open_corpus(path, text_column="text")
    with pytest.raises(InputError, match="split is for data sets"):
        open_corpus("stdlib", split="train")
    for shares in ((0.5, 0.5), (-0.1, 0.1), (float("nan"), 0.1)):
        with pytest.raises(InputError, match="together less than 1"):
            open_corpus(path, valid_share=shares[0], test_share=shares[1])
    with pytest.raises(InputError, match="train, valid, test"):
        open_corpus(path).pieces("dev")
