"""Data sets, from local folders: their splits, their columns, their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deadhead.data import open_corpus, tables
from deadhead.errors import InputError

datasets = pytest.importorskip("datasets")
SPLITS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def quiet_and_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def saved(path: Path, **splits: dict[str, list[object]]) -> str:
    parts = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(str(path))
    return f"hf:{path}"


def test_json_lines_with_their_own_splits(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        rows = [{"id": index, "text": f"{name} {index}"} for index in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = open_corpus(f"hf:{tmp_path}")
    assert list(corpus.documents("train")) == ["train 0", "train 1", "train 2"]
    assert list(corpus.documents("valid")) == ["validation 0", "validation 1", "validation 2"]
    assert list(corpus.documents("test")) == ["test 0", "test 1", "test 2"]
    assert all(piece.ends_document for piece in corpus.pieces("train"))


def test_many_rows_of_one_split_are_divided_like_files(tmp_path: Path) -> None:
    source = saved(tmp_path / "d", train={"body": [f"{index}" for index in range(60)], "n": list(range(60))})
    corpus = open_corpus(source)  # the only column of strings
    assert list(corpus.documents("valid")) == ["9", "29", "49"]
    assert list(corpus.documents("test")) == ["19", "39", "59"]
    assert len(list(corpus.documents("train"))) == 54


def test_few_rows_are_each_cut_in_three(tmp_path: Path) -> None:
    source = saved(tmp_path / "d", train={"text": ["a\n" * 100, None, "", "b\n" * 100]})
    corpus = open_corpus(source)
    assert list(corpus.documents("train")) == ["a\n" * 90, "b\n" * 90]
    assert list(corpus.documents("test")) == ["a\n" * 5, "b\n" * 5]


def test_a_missing_split_is_taken_from_training(tmp_path: Path) -> None:
    source = saved(tmp_path / "d", train={"text": ["t"] * 100}, validation={"text": ["v", None, ""]})
    corpus = open_corpus(source)
    assert [len(list(corpus.documents(split))) for split in SPLITS] == [95, 2, 5]
    assert list(corpus.documents("valid")) == ["v", ""]


def test_one_split_can_be_picked(tmp_path: Path) -> None:
    source = saved(tmp_path / "d", train={"text": ["t"]}, extra={"text": ["e"] * 100})
    assert set(open_corpus(source, split="extra").documents("train")) == {"e"}
    with pytest.raises(InputError, match=r"\(extra, train\), but got 'test'"):
        open_corpus(source, split="test")
    unnamed = saved(tmp_path / "u", en={"text": ["e"]}, de={"text": ["d"]})
    with pytest.raises(InputError, match="it has de, en; choose one with split"):
        open_corpus(unnamed)


def test_columns(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"a": ["A"], "b": ["B"], "n": [1]}
    source = saved(tmp_path / "d", train=columns)
    assert list(open_corpus(source, text_column="b", valid_share=0, test_share=0).documents("train")) == ["B"]
    with pytest.raises(InputError, match="columns are a, b, n; name one with text_column"):
        open_corpus(source)
    with pytest.raises(InputError, match="or of messages named c was expected .* columns are a, b, n"):
        open_corpus(source, text_column="c")
    with pytest.raises(InputError, match="in column n of .* holds values of type int64; .* of a, b"):
        open_corpus(source, text_column="n")


def test_a_long_row_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "PIECE_BYTES", 64)
    monkeypatch.setattr("deadhead.data.pieces.PIECE_BYTES", 64)
    source = saved(tmp_path / "d", train={"text": ["word " * 30, "b"]}, test={"text": ["c"]})
    pieces = list(open_corpus(source, valid_share=0).pieces("train"))
    assert "".join(piece.text for piece in pieces) == "word " * 30 + "b"
    assert [piece.ends_document for piece in pieces] == [False, False, True, True]


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"The data set hf:.*empty could not be loaded: [^\n]+\.$"):
        open_corpus(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(InputError, match="Text was expected in .* its split train has none"):
        open_corpus(saved(tmp_path / "d", train={"text": ["", None]}))


@pytest.mark.parametrize("source", ["hf:", "hf::config", "hf:name:config:more", "hf:name:"])
def test_other_forms_are_refused(source: str) -> None:
    with pytest.raises(InputError, match="hf:NAME or hf:NAME:CONFIG was expected"):
        open_corpus(source)
