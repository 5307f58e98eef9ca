"""Files of others are read within a bound, and what is wrong with them is told in one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deadhead.disk.files import write_json
from deadhead.disk.reading import MOST_BYTES, parse_json, read_json, read_object, read_text, shown
from deadhead.errors import InputError


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "ü"}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json", what="value") == value


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "A plan was expected at .*, but there is no such file"),
        (lambda path: path.write_bytes(b"{"), "The plan .* is not JSON: .* in line 1"),
        (lambda path: path.write_bytes(b"{}\n{}"), "The plan .* is not JSON: .* in line 2"),
        (lambda path: path.write_bytes(b""), "The plan .* is not JSON"),
        (lambda path: path.write_bytes(b"\xff"), "The plan .* cannot be read as text: byte 0 is not UTF-8"),
        (lambda path: path.write_bytes("{}".encode("utf-16")), "byte 0 is not UTF-8"),
        (lambda path: path.write_text("[" * 100_000), "nested too deep"),
        (lambda path: path.write_text('{"a": ' * 100_000), "nested too deep"),
        (lambda path: path.write_text(f'{{"a": {"9" * 5000}}}'), "a number of too many digits"),
        (lambda path: path.write_text('{"a": 1, "b": 2, "a": 1}'), "names the key 'a' twice"),
        (lambda path: path.write_text('[{"a": {"\\n": 1, "\\n": 1}}]'), r"names the key '\\n' twice"),
        (lambda path: path.write_text("[1]"), "must be a JSON object, but it is a list"),
        (lambda path: path.write_text('"all"'), "must be a JSON object, but it is a string"),
        (lambda path: path.write_text("null"), "must be a JSON object, but it is a null"),
        (lambda path: path.write_text("1e999"), "must be a JSON object, but it is a number"),
        (_sparse, "longer than 64 MiB"),
        (os.mkfifo, "is a named pipe"),
        (lambda path: path.mkdir(), "cannot be read as text: Is a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "longer than 64 MiB"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_object_is_told_in_one_sentence(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        read_object(path, what="plan")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="null"):
        read_text(tmp_path / "a\0b", what="plan")
    with pytest.raises(InputError, match="too long"):
        read_text(tmp_path / ("a" * 5000), what="plan")


def test_the_bound_itself_is_read(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b" " * MOST_BYTES)
    assert len(read_text(path, what="text")) == MOST_BYTES
    with path.open("ab") as file:
        file.write(b" ")
    with pytest.raises(InputError, match="longer than"):
        read_text(path, what="text")


def test_a_pipe_of_a_shell_is_read() -> None:
    """As in `--plan <(jq … plan.json)`."""
    reader, writer = os.pipe()
    os.write(writer, b'{"a": 1}')
    os.close(writer)
    try:
        assert read_json(Path(f"/dev/fd/{reader}"), what="plan") == {"a": 1}
    finally:
        os.close(reader)


def test_json_of_bytes() -> None:
    assert parse_json(b'{"a": 1}', name="The request") == {"a": 1}
    with pytest.raises(InputError, match="The request is not JSON: it is not UTF-8"):
        parse_json(b'"\xff"', name="The request")


def test_values_are_shown_short() -> None:
    assert shown([1, 2]) == "[1, 2]"
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 10**6).startswith("'xxx")
    assert len(shown("x" * 10**6)) < 120
    assert shown(16**9000) == "a number of thousands of digits"
    assert shown([16**9000]) == "a list"
