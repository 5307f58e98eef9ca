"""Files and folders are complete or absent, and what goes wrong is told in one sentence."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from deadhead.disk.files import (
    no_space_is_input_error,
    remove_folder,
    remove_left_overs,
    replaced_folder,
    require_replaceable,
    write_bytes,
    write_json,
    write_text,
)
from deadhead.errors import InputError


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_text_is_written_into_folders_that_are_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "text.txt"
    write_text(path, "größer\n")
    write_text(path, "new\n")
    assert contents(tmp_path) == {"a/b/text.txt": "new\n"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    data = bytes(range(256)) + b"\r\n"
    write_bytes(tmp_path / "new" / "data.bin", data)
    assert (tmp_path / "new" / "data.bin").read_bytes() == data
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.bin"]


def test_a_write_that_fails_leaves_the_old_file_and_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space is left on the device while writing .*value.json"):
        write_json(path, {"a": 2})
    assert contents(tmp_path) == {"value.json": '{\n  "a": 1\n}\n'}


def test_a_folder_half_removed_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that says whose it is goes last."""
    for name in ("a", "mark", "z"):
        (tmp_path / "run" / f"{name} folder").mkdir(parents=True)
        (tmp_path / "run" / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(tmp_path / "run", last="mark")
    assert (tmp_path / "run" / "mark").exists()
    remove_folder(tmp_path / "run", last="mark")
    assert not (tmp_path / "run").exists()


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with replaced_folder(path) as folder:
        (folder / "one").write_text("1")
        assert not path.exists()
        assert folder.parent == path.parent, "a rename must not cross file systems"
    assert contents(tmp_path) == {"deep/out/one": "1"}
    with replaced_folder(path) as folder:
        assert not list(folder.iterdir())
        (folder / "two").write_text("2")
        assert contents(path) == {"one": "1"}
    assert contents(tmp_path) == {"deep/out/two": "2"}
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_folder_and_no_trace(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "out"
    for existed in (False, True):
        with pytest.raises(type(error)), replaced_folder(path) as folder:
            (folder / "half").write_text("")
            raise error
        assert contents(tmp_path) == ({"out/one": "1"} if existed else {})
        path.mkdir(exist_ok=True)
        (path / "one").write_text("1")
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_move_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    path.mkdir()
    (path / "one").write_text("1")
    replace = os.replace

    def fail_on_second(source: str | Path, target: str | Path, calls: list[Any] = []) -> None:  # noqa: B006
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_second)
    with pytest.raises(OSError, match="input/output error"), replaced_folder(path) as folder:
        (folder / "two").write_text("2")
    assert contents(tmp_path) == {"out/one": "1"}
    assert sorted(os.listdir(tmp_path)) == ["out"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "full"), "No space is left on the device while writing here"),
        (OSError(errno.EDQUOT, "quota"), "No space is left on the device while writing here"),
        (OSError("19200 requested and 11936 written"), "No space is left on the device while writing here"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space is left"),
        (PermissionError(errno.EACCES, "Permission denied"), "here cannot be written: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), "here cannot be written: Read-only"),
        (NotADirectoryError(errno.ENOTDIR, "no"), "here cannot be made a folder"),
    ],
)
def test_the_systems_errors_become_sentences(error: Exception, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught, no_space_is_input_error(Path("here")):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), RuntimeError("other"), KeyError("x")])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, no_space_is_input_error(Path("here")):
        raise error
    assert caught.value is error


def test_a_file_in_the_way_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a folder"):
        write_text(tmp_path / "file" / "text", "")


def test_only_what_is_ours_may_be_replaced(tmp_path: Path) -> None:
    markers = ("config.json", "summary.json")
    require_replaceable(tmp_path / "absent", markers)
    (tmp_path / "empty").mkdir()
    require_replaceable(tmp_path / "empty", markers)
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "summary.json").write_text(json.dumps({}))
    require_replaceable(ours, markers)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"was not written by deadhead \(it has none of config.json, summary.json\)"):
        require_replaceable(theirs, markers)
    with pytest.raises(InputError, match="is a file, but a folder is to be written there"):
        require_replaceable(theirs / "thesis.txt", markers)
    (tmp_path / "link").symlink_to(ours)
    with pytest.raises(InputError, match="choose another place"):
        require_replaceable(tmp_path / "link", markers)


def test_left_overs_of_a_killed_process(tmp_path: Path) -> None:
    """They don't make a folder foreign, and can be removed by the names they were to get."""
    (tmp_path / ".recipe.toml.x1abcdef").write_text("half")
    require_replaceable(tmp_path, ("recipe.toml",))
    (tmp_path / ".dense.x2_bcdef").mkdir()
    (tmp_path / ".dense.x2_bcdef" / "model.safetensors").write_text("half")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("not ours")
    (tmp_path / ".pruned.x3abcdef.old").mkdir()
    (tmp_path / ".pruned.x3abcdef.old" / "config.json").write_text("{}")
    (tmp_path / ".pruned.x3abcdef").mkdir()
    remove_left_overs(tmp_path, "recipe.toml")
    assert not (tmp_path / ".recipe.toml.x1abcdef").exists() and (tmp_path / ".dense.x2_bcdef").exists()
    remove_left_overs(tmp_path)
    # What had been moved aside for a new one that never came is back.
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".gitignore", "pruned"]
    assert (tmp_path / "pruned" / "config.json").exists()
    (tmp_path / "pruned").rename(tmp_path / "other")
    with pytest.raises(InputError, match="was not written by deadhead"):
        require_replaceable(tmp_path, ("recipe.toml",))
