"""The command line. Exit codes: 0 done, 2 bad input (one sentence), 1 a bug of ours, 130 interrupted, 143 terminated.

Commands import what they need when they run: torch and transformers take seconds, and help and wrong options need
neither.
"""

from __future__ import annotations

import errno
import gc
import os
import re
import signal
import sys
import time
import warnings
from itertools import pairwise
from typing import Any

_LONGEST_SENTENCE = 2000
# Errors of a path that the user named, not of the program.
_OF_PLACES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENXIO)
_RESUMABLE = "complete checkpoints are kept, and --resume continues from the last one"
# The option, and what typer expects of its value.
_WRONG_VALUE = re.compile(r"Invalid value for '(-[\w-]+)[^']*': Input should be ([^;]+?)(?:, unable to .*)?$")
# Seconds that a process waits before it reports an error: a launcher ends the others within one second of the first.
_WAIT_OF_MAIN, _WAIT_OF_OTHERS = 2.0, 4.0


def main() -> None:
    """Run the command line and exit."""
    # The libraries read these when they are imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # The bars of transformers' reader of GGUF files.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Torch and transformers make a million objects that stay. Looking through them takes half a second while they
    # load, and a second at the end.
    gc.set_threshold(100_000)
    signal.signal(signal.SIGTERM, _terminate)
    code = execute(sys.argv[1:])
    gc.freeze()
    sys.exit(code)


def _terminate(*_: Any) -> None:
    # Blocks are left as after Ctrl-C, so that nothing half-written stays.
    raise SystemExit(128 + signal.SIGTERM)


def execute(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        return _execute(arguments)
    except KeyboardInterrupt as error:
        return _fail(f"Interrupted; {_RESUMABLE}", 130, error)
    except SystemExit as error:
        if error.code != 128 + signal.SIGTERM:
            raise
        # It has a cause if it ended the wait of `_speaks`.
        reason = "Another process of this training failed" if error.__cause__ else "Terminated"
        return _fail(f"{reason}; {_RESUMABLE}", 128 + signal.SIGTERM, error)


def _execute(arguments: list[str]) -> int:
    # Imported here, so that Ctrl-C while it loads is caught too.
    import typer

    from deadhead.cli.app import app
    from deadhead.errors import DivergenceError, ExportError, InputError, RunWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", RunWarning)
            warnings.showwarning = _show  # type: ignore[assignment]
            code = app(arguments, prog_name="deadhead", standalone_mode=False)
        if code == 130:
            # Newer versions of typer make an exit code of Ctrl-C themselves, without a word.
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except typer.Abort:
        raise KeyboardInterrupt from None
    except (InputError, DivergenceError, ExportError) as error:
        return _fail(str(error).rstrip("."), 1 if isinstance(error, ExportError) else 2, error)
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; the interpreter must not try to flush it again.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except Exception as error:
        # A wrong command or option. Some versions of typer raise click's own exceptions, others a private copy.
        if hasattr(error, "format_message"):
            return _fail(_with_value(error.format_message().rstrip("."), arguments), 2, error)
        if isinstance(error, OSError) and error.filename and error.errno in _OF_PLACES:
            return _fail(f"{error.filename} cannot be used: {error.strerror}; choose another path", 2, error)
        if _is_out_of_memory(error):
            return _fail("This machine has too little memory for that; use fewer rows or tokens", 2, error)
        if _speaks(error, _WAIT_OF_MAIN):
            raise
        return 1


def _with_value(message: str, arguments: list[str]) -> str:
    """Return what typer says of a wrong value, with the value that was given."""
    found = _WRONG_VALUE.match(message)
    if found is None:
        return message
    option, rule = found.groups()
    given = [after for before, after in pairwise(arguments) if before == option]
    given += [each.partition("=")[2] for each in arguments if each.startswith(f"{option}=")]
    return f"Invalid value for '{option}': it must be {rule}" + (f", but got {given[-1]!r}" if given else "")


def _is_out_of_memory(error: Exception) -> bool:
    # For a full GPU torch has a class of exceptions; for a CPU it only has a message.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator: can't allocate" in str(error)


def _show(message: Warning, *_: Any) -> None:
    """Print a warning that is meant for the user; only the main process of several prints it."""
    from deadhead.errors import RunWarning

    if isinstance(message, RunWarning) and os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"deadhead: {message}\n")


def _fail(sentence: str, code: int, error: BaseException) -> int:
    if _speaks(error):
        end = "" if sentence.endswith(("?", "!")) else "."
        sys.stderr.write(f"deadhead: {_one_line(sentence)}{end}\n")
    return code


def _one_line(sentence: str) -> str:
    """Return a sentence that is safe for a terminal: names and values in it come from outside and may hold anything."""
    plain = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in sentence)
    return plain if len(plain) <= _LONGEST_SENTENCE else f"{plain[: _LONGEST_SENTENCE - 100]} … {plain[-90:]}"


def _speaks(error: BaseException, wait_of_main: float = 0.0) -> bool:
    """Return whether this process reports the error: of several processes that train together, one does.

    One fault often fails all of them, and those that wait for a process that is gone fail too. Each process waits here
    before it reports, the main process for a shorter time than the others. The launcher sends SIGTERM to the others
    when the first process ends, so only that one reports. A SystemExit while this one waits means that another process
    has ended; `error` becomes its cause.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from deadhead.errors import FailedElsewhere

    is_main = os.environ.get("RANK", "0") == "0"
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        # A launcher passes the same signal on once more.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # A process that was still starting reports nothing; the one that failed does.
        begun = "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()
        return is_main and (begun or isinstance(error, KeyboardInterrupt))
    try:
        time.sleep(wait_of_main if is_main else _WAIT_OF_OTHERS)
    except SystemExit as end:
        raise end from error
    return not isinstance(error, FailedElsewhere) and not isinstance(error.__cause__, FailedElsewhere)
