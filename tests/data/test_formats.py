"""Files with fields are read by their fields, packed or not; what looks like one is never read as text unasked."""

from __future__ import annotations

import bz2
import gc
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deadhead.data import open_corpus
from deadhead.data.formats import found_in
from deadhead.errors import InputError, RunWarning

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [{"text": f"row {index}, of 50"} for index in range(50)]


@pytest.fixture(autouse=True)
def quiet_and_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def zstd(data: bytes) -> bytes:
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(data)
    return bytes(stream.getvalue())


def json_lines(rows: list[dict[str, object]] = ROWS) -> bytes:  # type: ignore[assignment]
    return "\n".join(map(json.dumps, rows)).encode()


def table() -> bytes:
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream)
    return bytes(stream.getvalue())


CONTENTS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": json_lines,
    "a.NDJSON": json_lines,
    "a.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "a.csv": lambda: "\n".join(["text", *(f'"{row["text"]}"' for row in ROWS)]).encode(),
    "a.tsv": lambda: "\n".join(["n\ttext", *(f"1\t{row['text']}" for row in ROWS)]).encode(),
    "a.parquet": table,
    "no_ending": table,
}
PACKING: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def train(source: Path | str, **how: object) -> list[str]:
    return list(open_corpus(str(source), valid_share=0, test_share=0, **how).documents("train"))  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("name", CONTENTS)
def test_fields_are_read(name: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKING[packing](CONTENTS[name]()))
    assert train(path) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a", "a.txt.old"])
def test_packed_text_is_text(name: str, packing: str, tmp_path: Path) -> None:
    text = "eine Zeile – mehr nicht\n" * 30_000
    (tmp_path / f"{name}{packing}").write_bytes(PACKING[packing](text.encode()))
    assert "".join(train(tmp_path / f"{name}{packing}")) == text
    # The ending does not decide.
    (tmp_path / "plain").write_bytes(PACKING[packing](text.encode()))
    assert "".join(train(tmp_path / "plain")) == text


def test_what_was_unpacked_goes_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "work"))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(json_lines() if name == "a.jsonl" else b"line\n" * 9))
        corpus = open_corpus(str(tmp_path / f"{name}.gz"))
        assert list((tmp_path / "work").iterdir()) and list(corpus.documents("train"))
        del corpus
        gc.collect()
        assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize(
    "content",
    [
        json_lines(),
        json.dumps(ROWS, indent=1).encode(),
        json.dumps(ROWS).encode(),
        b'{"key": 1}',
        b'\xef\xbb\xbf{"key": 1}\n{"key": 2}\n',
        b'\n {"a b": {"c": 1}}\n{"a b": 2}\n',
        b'{\n  "key":\n    1\n}\n',
    ],
)
@pytest.mark.parametrize("packing", PACKING)
def test_what_looks_like_json_is_read_as_what_is_asked_for(content: bytes, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKING[packing](content))
    with pytest.raises(InputError, match=r"looks like JSON; choose data_format \(--data-format\) json .* or text"):
        open_corpus(str(path))
    assert "".join(train(path, data_format="text")) == content.decode("utf-8-sig")
    if b"row 1" in content:
        assert train(path, data_format="json")[1] == "row 1, of 50"


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}\nand then prose\n',
        b"{braces} in prose\n",
        b'"quoted"\n',
        b"[1] a note\n",
        b"{'a': 1}\n",
        b"{ a: 1 }\n",
    ],
)
def test_prose_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert "".join(train(tmp_path / "a.txt")) == content.decode()


def test_data_is_read_as_it_stands_if_asked(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(CONTENTS[name]())
        assert "".join(train(tmp_path / name, data_format="text")).encode() == CONTENTS[name]()


@pytest.mark.parametrize("packing", PACKING)
def test_a_directory_with_splits(packing: str, tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        lines = json_lines([{"text": f"{split} {index}"} for index in range(3)])
        (tmp_path / f"{split}.jsonl{packing}").write_bytes(PACKING[packing](lines))
    corpus = open_corpus(str(tmp_path))
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        assert list(corpus.documents(ours)) == [f"{theirs} {index}" for index in range(3)]


def test_of_several_formats_in_a_directory_the_larger_is_read_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("What this is.\n")
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines()))
    with pytest.warns(RunWarning, match=r"is read as json; 1 of its files have another format .*such as README\.md"):
        assert len(train(tmp_path)) == 100
    (tmp_path / "README.md").write_text("What this is.\n" * 1000)
    with pytest.warns(RunWarning, match="is read as text; 2 of its files"):
        assert "".join(train(tmp_path)) == "What this is.\n" * 1000
    assert "".join(train(tmp_path, data_format="text")).count("row 7,") == 2
    # What is asked for needs no word.
    assert len(train(tmp_path, data_format="json")) == 100


def test_a_directory_of_files_that_look_like_json_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(json_lines())
    with pytest.raises(InputError, match=r"a\.txt, but it looks like JSON"):
        open_corpus(str(tmp_path))
    assert len(train(tmp_path, data_format="json")) == 100


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "JSON was expected in .* could not be read: .*; repair it"),
        ("a.parquet", b"PAR1 but cut short", "PARQUET was expected in .* could not be read"),
        ("a.json", b"", "the file is empty"),
        ("a.json", b"[]", "could not be read: it has no rows"),
        ("a.csv", b"text\n", "could not be read: it has no rows"),
        ("a.jsonl", '{"text": "Größe"}\n'.encode("latin-1") * 60, "UTF-8 text was expected .* convert it to UTF-8"),
        ("a.jsonl", '{"text": "Größe"}\n'.encode("latin-1"), "UTF-8 text was expected .* convert it to UTF-8"),
        ("a.csv", "text\nGröße\n".encode("latin-1"), "UTF-8 text was expected .* has another encoding"),
        ("a.csv", b"text\nwell, not quoted\n", "CSV was expected .* could not be read: Length of header"),
        ("a.csv", b"text,n\nwell,1\nwell, not quoted,1\n", "CSV was expected .* could not be read: .*saw 3"),
        ("a.jsonl", b'{"text": null}\n' * 3, "column text of .* it holds nothing but nulls; make"),
        ("a.json", b'{"data": [{"text": "a"}]}', "its columns are data"),
        ("a.jsonl", json_lines([{"a": 1, "b": "x", "c": "y"}]), "its columns are a, b, c; name one with text_column"),
        ("a.csv", b"n\n1\n2\n", "its first line names n; name one with text_column"),
        ("a.json", '[{"text": "Größe"}]'.encode("latin-1"), "UTF-8 text was expected .* has another encoding"),
        ("a.csv", "text\nGröße\n".encode("utf-16"), "begins as UTF-16 does; convert it to UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "looks binary"),
        ("a.jsonl", json_lines([{"text": 1}, {"text": 2}]), "column text of .* holds values of type int64; make"),
        ("a.jsonl", json_lines([{"text": "a"}, {"text": 2}]), "column text of .* holds values of several types; make"),
        ("a.jsonl", json_lines([{"text": 1, "n": "x"}]), r"name one with text_column \(--text-column\) of n\."),
        ("a.jsonl", json_lines([{"text": {"a": "b"}}]), "column text of .* holds objects; make them strings"),
        ("a.json", json_lines([{"text": ["a", "b"]}]), "column text of .* holds lists of something else; make"),
        ("a.csv", b"the first row\nthe second\n", r"first line names the first row; name one .*line of names before"),
        ("a.csv", b"1,first row\n2,second\n", r"first line names 1, first row; name one .*line of names before"),
        ("a.tsv", b"review\tlabel\ngood\t1\n", r"its first line names review, label; .*\(--text-column\), or, if"),
        ("a.txt.gz", b"not packed\n", r"A \.gz file was expected, but .* is not packed; take \.gz off"),
        ("a.jsonl.zst", json_lines(), r"A \.zst file was expected, but .* is not packed; take \.zst off"),
        ("a.gz", b"", "the file is empty"),
        ("a.zst", zstd(b""), "the file is empty"),
        ("a.txt", b"\xef\xbb\xbf", "the file is empty"),
        ("a.zst", b"\x28\xb5\x2f\xfd", r"A complete \.zst file was expected, but .* is damaged"),
        ("a.gz", gzip.compress(b"text\n" * 99, mtime=0)[:3], r"A complete \.gz file .* is damaged or truncated"),
        ("a.gz", gzip.compress(b"text\n" * 99, mtime=0)[:-9], r"A complete \.gz file .* is damaged or truncated"),
        ("a.zst", zstd(bytes(range(256)) * 9)[:-9], r"A complete \.zst file was expected, but .* is damaged"),
        ("a.zip", b"PK\x03\x04\0\0", "is packed with zip; unpack it first"),
        ("a.jsonl.bz2", bz2.compress(json_lines()), "is packed with bzip2; unpack it first"),
        ("a.bin", b"\x7fELF\0\0", "looks binary"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(str(tmp_path / name))
    assert len(str(caught.value)) <= 300 + len(str(tmp_path))


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deadhead.errors.find_spec", lambda name: None)
    (tmp_path / "a.jsonl").write_bytes(json_lines())
    with pytest.raises(InputError, match=r"by its fields needs datasets; .*deadhead\[data\]"):
        open_corpus(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.zst").write_bytes(zstd(b"text\n"))
    with pytest.raises(InputError, match=r"Unpacking a\.zst needs pyarrow; .*deadhead\[data\]"):
        open_corpus(str(tmp_path / "a.zst"))


@pytest.mark.parametrize("rows", [["None", "NA", "nan"], ["1", "2", "03"], ["True", "1.50"], ["2020-01-01", "7"]])
def test_what_a_csv_file_holds_is_text(rows: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["text", *rows]))
    assert train(tmp_path / "a.csv") == rows


@pytest.mark.parametrize("last", ["", "x", "1.5"])
def test_a_blank_after_many_numbers_is_no_fault(last: str, tmp_path: Path) -> None:
    lines = [f"{index},row {index}" for index in range(10_050)]  # more than are parsed at once
    (tmp_path / "a.csv").write_text("\n".join(["n,text", *lines, f"{last},last"]))
    texts = train(tmp_path / "a.csv")
    assert (len(texts), texts[0], texts[-1]) == (10_051, "row 0", "last")


def test_blanks_behind_separators_are_none_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\nid, text, n\n1, "a, b", 2\n2, c, 3\n')
    assert train(tmp_path / "a.csv") == ["a, b", "c"]


@pytest.mark.parametrize("content", [b"the first row\nthe second\n", b"n\n1\n2\n"])
def test_a_csv_file_without_names_loses_no_row_in_a_data_set_either(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match="A column named text was expected in hf:.*, but its first line names"):
        open_corpus(f"hf:{tmp_path}")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_the_mark_of_utf_8_is_no_text(name: str, tmp_path: Path) -> None:
    content = {"a.txt": "line\n", "a.csv": "text\nline\n", "a.jsonl": '{"text": "line"}\n'}[name]
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert "".join(train(tmp_path / name)).strip("\n") == "line"


@pytest.mark.parametrize("separator", [",", ";", "|", "\t"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_columns_are_parted_as_the_first_line_says(separator: str, ending: str, tmp_path: Path) -> None:
    lines = [["n", "text", "m"], ["1", '"a, b; c"', "2"], ["3", "d", "4"]]
    (tmp_path / f"a.{ending}").write_text("\n".join(map(separator.join, lines)))
    assert train(tmp_path / f"a.{ending}") == ["a, b; c", "d"]


def test_a_single_column_has_no_separator(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\nwell, a comma\n")
    assert train(tmp_path / "a.tsv") == ["well, a comma"]
    (tmp_path / "a.csv").write_text("text\nwell; a semicolon\n")
    assert train(tmp_path / "a.csv") == ["well; a semicolon"]


def test_data_format_is_for_files(tmp_path: Path) -> None:
    for source in ("stdlib", f"hf:{tmp_path}"):
        with pytest.raises(InputError, match="data_format is for files, but"):
            open_corpus(source, data_format="json")


def test_a_file_names_itself_as_the_user_did(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines()))
    found = found_in(tmp_path / "a.jsonl.gz", pytest.importorskip("deadhead.data.formats").Unpacked)
    assert (found.label, found.format, found.path.name) == (str(tmp_path / "a.jsonl.gz"), "json", "a.jsonl")


def test_a_path_is_no_pattern(tmp_path: Path) -> None:
    for name in ("run[1]", "run1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(json_lines([{"text": f"of {name} {index}"} for index in range(50)]))
    assert all("of run[1]" in text for text in train(tmp_path / "run[1]" / "a.jsonl"))


def test_a_packed_text_of_a_directory_that_cannot_be_unpacked_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n" * 20)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"text\n" * 99)[:-9])
    with pytest.raises(InputError, match="b.txt.gz is damaged or truncated"):
        open_corpus(str(tmp_path))
