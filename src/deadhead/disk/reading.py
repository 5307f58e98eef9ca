"""Read files that others may have written: at most up to a limit, and with one sentence if they are not as expected."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from deadhead.disk.places import checked_path
from deadhead.errors import InputError

# The longest file of settings, plans or configurations that is read; real ones have kilobytes. A tokenizer, which its
# own library reads, may be longer.
MOST_BYTES = 64 * 2**20


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a small file, or of a shell's pipe such as `<(jq …)`; messages call it `what`.

    Raises:
        InputError: it is missing, is a named pipe, cannot be read, is longer than 64 MiB or is not UTF-8.
    """
    checked_path(path)
    try:
        # Opening a named pipe would wait for a writer. A shell's pipe has no name in any folder.
        if stat.S_ISFIFO(path.stat().st_mode) and os.path.exists(os.path.realpath(path)):
            raise InputError(f"The {what} {path} cannot be read as text: it is a named pipe, not a file.")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise InputError(f"The {what} {path} cannot be read: it is longer than {MOST_BYTES // 2**20} MiB.")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"A {what} was expected at {path}, but there is no such file.") from None
    except OSError as error:
        raise InputError(f"The {what} {path} cannot be read as text: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"The {what} {path} cannot be read as text: byte {error.start} is not UTF-8.") from None


def read_json(path: Path, *, what: str) -> Any:
    """Return the JSON value in a small file.

    Raises:
        InputError: see `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, what=what), name=f"The {what} {path}")


def read_object(path: Path, *, what: str) -> dict[str, Any]:
    """Return the JSON object in a small file.

    Raises:
        InputError: see `read_json`, or the JSON value is not an object.
    """
    found = read_json(path, what=what)
    if not isinstance(found, dict):
        raise InputError(f"The {what} {path} must be a JSON object, but it is a {_KINDS.get(type(found), 'number')}.")
    return found


_KINDS: dict[type, str] = {list: "list", str: "string", bool: "truth value", type(None): "null"}


def parse_json(text: str | bytes, *, name: str) -> Any:
    """Return the value of JSON text in UTF-8; error messages begin with `name`.

    Raises:
        InputError: the text is not JSON, is nested too deep, has a number with thousands of digits, or names a key
            twice, which different programs would read differently.
    """

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twin = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise InputError(f"{name} names the key {shown(twin)} twice; leave one of the two out.")
        return found

    try:
        return json.loads(text, object_pairs_hook=without_twins)
    except InputError:
        raise
    except RecursionError:
        raise InputError(f"{name} is not JSON that can be read: it is nested too deep.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON: {error.msg.removesuffix(' at')} in line {error.lineno}.") from None
    except UnicodeDecodeError:
        raise InputError(f"{name} is not JSON: it is not UTF-8.") from None
    except ValueError:
        raise InputError(f"{name} has a number of too many digits.") from None


def shown(value: Any, most: int = 120) -> str:
    """Return any value as messages show it, in at most `most` characters."""
    try:
        text = repr(value).replace("\n", " ")
    except (ValueError, RecursionError):
        # Python writes no decimal number with thousands of digits, but it can read a hexadecimal one.
        return "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: most - 20]} … {text[-10:]}"
