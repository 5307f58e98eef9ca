"""Names on the Hugging Face hub. If the hub does not answer, only its cache on this disk is used, within seconds.

If the user has set how long huggingface_hub should wait or retry, those settings apply instead.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_session

from deadhead.disk.places import checked_path
from deadhead.errors import InputError

# Seconds.
_PATIENCE = 1.5
# Seconds for which an answer, or its absence, is remembered.
_HOLDS = 60.0
_PATIENT = re.compile(r"HF_\w*(TIMEOUT|RETR)\w*")
_asked: dict[str, tuple[float, bool]] = {}
_lock = threading.Lock()
# The number of active blocks of `quick`, and the settings before the first.
_quick: dict[str, int] = {"inside": 0, "before": 0}


def is_name(path: str | Path) -> bool:
    """Return whether `path`, where there is no file, may be a name on the hub: NAME or ORG/NAME."""
    return not checked_path(path).exists() and bool(re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(path)))


def answers() -> bool:
    """Return whether the hub can be used: it answers within seconds, or the user wants to wait longer."""
    if constants.is_offline_mode() or any(map(_PATIENT.fullmatch, os.environ)):
        return not constants.is_offline_mode()
    place = constants.ENDPOINT
    when, found = _asked.get(place, (0.0, False))
    if not when or time.monotonic() - when > _HOLDS:
        heard = threading.Event()
        # Looking up a host cannot be stopped, so do not wait for it.
        threading.Thread(target=_ask, args=(place, heard, asked := threading.Event()), daemon=True).start()
        asked.wait(_PATIENCE)
        found = heard.is_set()
        _asked[place] = (time.monotonic(), found)
    return found


def _ask(place: str, heard: threading.Event, asked: threading.Event) -> None:
    try:
        get_session().head(place, timeout=_PATIENCE)
        heard.set()
    except Exception:  # whatever it is, there is no answer
        pass
    finally:
        asked.set()


def require_had(name: str | Path, *, kind: Literal["model", "dataset"] = "model") -> None:
    """Check that a name on the hub may be available: the hub answers, or its cache holds files of that name.

    Raises:
        InputError: it is not available.
    """
    if not is_name(name) or answers():
        return
    name = str(name)
    cached = [Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}")]
    if kind == "dataset":
        made = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
        cached.append(Path(made, name.replace("/", "___")))
    if not any(place.is_dir() for place in cached):
        why = "is switched off (HF_HUB_OFFLINE)" if constants.is_offline_mode() else "does not answer"
        raise InputError(
            f"There is no folder {name}, and the Hugging Face hub gave no {kind} of that name: it "
            f"{why}, and its cache on this machine has none; check the name, or the network."
        )


@contextmanager
def quick(name: str | Path) -> Iterator[None]:
    """Make requests in the block use only the hub's cache if the hub does not answer.

    If the name is a path on this disk, the hub is not contacted at all.
    """
    if not is_name(name):
        yield
        return
    with from_cache(not answers()):
        yield


@contextmanager
def from_cache(is_down: bool) -> Iterator[None]:
    """Make requests in the block use only the hub's cache, if the hub does not answer."""
    # Several threads may be here at the same time: the first stores the settings, the last restores them.
    with _lock:
        if not _quick["inside"]:
            _quick["before"] = constants.HF_HUB_OFFLINE
        _quick["inside"] += 1
        constants.HF_HUB_OFFLINE |= is_down
    try:
        yield
    finally:
        with _lock:
            _quick["inside"] -= 1
            if not _quick["inside"]:
                constants.HF_HUB_OFFLINE = bool(_quick["before"])
