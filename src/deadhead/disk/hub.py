"""Names on the Hugging Face hub. Where it does not answer, only its cache on this disk is asked: a no takes seconds.

Whoever has set how long huggingface_hub is to wait, or to retry, is not helped to a quick no.
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
# Seconds for which an answer, or none, is taken to hold.
_HOLDS = 60.0
_PATIENT = re.compile(r"HF_\w*(TIMEOUT|RETR)\w*")
_asked: dict[str, tuple[float, bool]] = {}
_lock = threading.Lock()
# How many blocks of `quick` there are now, and what was set before the first.
_quick: dict[str, int] = {"inside": 0, "before": 0}


def is_name(path: str | Path) -> bool:
    """Tell whether `path`, where nothing lies, may be a name on the hub: NAME or ORG/NAME."""
    return not checked_path(path).exists() and bool(re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(path)))


def answers() -> bool:
    """Tell whether the hub can be asked: whether it answers within seconds, or the user wants to wait longer."""
    if constants.is_offline_mode() or any(map(_PATIENT.fullmatch, os.environ)):
        return not constants.is_offline_mode()
    place = constants.ENDPOINT
    when, found = _asked.get(place, (0.0, False))
    if not when or time.monotonic() - when > _HOLDS:
        heard = threading.Event()
        # Looking a host up cannot be stopped, so it is not waited for.
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
    """Check that what a name on the hub stands for may be had: the hub answers, or its cache holds something of it.

    Raises:
        InputError: it cannot.
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
    """Let what the block asks of the hub come from its cache alone where the hub does not answer.

    For what lies on this disk under that name the hub is not asked at all.
    """
    if not is_name(name):
        yield
        return
    with from_cache(not answers()):
        yield


@contextmanager
def from_cache(is_down: bool) -> Iterator[None]:
    """Let what the block asks of the hub come from its cache alone, if the hub does not answer."""
    # Threads may be in here at the same time: the first notes what was set, the last puts it back.
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
