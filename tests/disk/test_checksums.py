"""Lists of checksums: what sha256sum writes and reads, what changed since, and lists that are damaged or hostile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deadhead import InputError
from deadhead.disk.checksums import changed_file, read_checksums, sha256_of, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    for name, text in {"a b.txt": "one", "below/c": "two", "empty": ""}.items():
        (tmp_path / name).write_text(text)
    write_checksums(tmp_path)
    return tmp_path


def test_the_list_is_the_one_of_sha256sum(folder: Path) -> None:
    names = ["a b.txt", "below/c", "empty"]
    theirs = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, text=True, check=True).stdout
    assert (folder / "SHA256SUMS").read_text() == theirs
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    assert list(read_checksums(folder)) == names


def test_changes_are_found_and_named(folder: Path) -> None:
    assert changed_file(folder) is None
    (folder / "new").write_text("not in the list")
    assert changed_file(folder) is None
    (folder / "below" / "c").write_text("twp")
    assert changed_file(folder) == "below/c"
    assert changed_file(folder, among=["a b.txt"]) is None
    (folder / "a b.txt").unlink()
    assert changed_file(folder) == "a b.txt"
    # Where only some are looked at, those that are gone are for others to miss.
    assert changed_file(folder, among=["a b.txt"]) is None


def test_hashes_that_are_known_are_taken(folder: Path) -> None:
    known = {"empty": sha256_of(folder / "below" / "c")}
    write_checksums(folder, known)
    assert read_checksums(folder)["empty"] == known["empty"]
    assert changed_file(folder) == "empty"


def test_a_folder_without_a_list(tmp_path: Path) -> None:
    assert read_checksums(tmp_path) == {}
    assert changed_file(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"abc  a\n", b"0" * 64 + b" a\n", b"0" * 64 + b"  ../a\n", b"0" * 64 + b"  /etc/passwd\n", b"\n"],
)
def test_a_damaged_or_hostile_list(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with pytest.raises(InputError, match="The list of checksums .*SHA256SUMS (is damaged in line 1|cannot be read)"):
        changed_file(tmp_path)
