"""Real runs in child processes that are killed at a chosen moment, compared with a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from deadhead.disk.checksums import CHECKSUMS_FILE
from deadhead.errors import InputError
from deadhead.training.recipes.reading import parse_recipe
from deadhead.training.recipes.recipe import Recipe
from deadhead.training.runs.run import Run
from deadhead.training.runs.summary import read_summary

# What Python tells of before it changes the file system.
_CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_TIMES = ("seconds", "tokens_per_second")


_RECIPE = """
name = "kills"
evaluation_tokens = 200
control = true

[data]
source = {source!r}

[model]
layers = 2
width = 32
heads = 4
persistent = 8
memory_length = 8
segment_length = 8
hidden_dropout = 0.1

[train]
steps = 12
batch_size = 2
save_every = 5
log_every = 3
learning_rate = 0.002

[prune]
steps = 14
batch_size = 2
save_every = 3
log_every = 4
eval_every = 6
learning_rate = 0.002
sparsity = 0.5
weighting = "output_difference"
start_from = "taylor"

[finetune]
steps = 8
batch_size = 2
save_every = 3
log_every = 3
distill = 0.5
learning_rate = 0.002
"""


def kills_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run of some seconds, on a text that is written to `folder`."""
    text = folder / "text.txt"
    draw = random.Random(0)
    words = ["the", "old", "cat", "sees", "a", "bird"]
    text.write_text("\n".join(" ".join(draw.choices(words, k=6)) for _ in range(300)))
    return parse_recipe(_RECIPE.format(source=str(text)), name="kills")


def attempt(
    recipe: Recipe,
    folder: Path,
    *,
    at_change: int | None = None,
    after: float | None = None,
    number: int = signal.SIGKILL,
    fill: Path | None = None,
    count_in: Path | None = None,
) -> int:
    """Start or resume a run in a child process; return its exit code, which is negative for a signal.

    Args:
        recipe: the run's.
        folder: of the run.
        at_change: number of the change to files below `folder` before which the signal is sent.
        after: seconds after which the signal is sent.
        number: the signal.
        fill: with `at_change`, no signal is sent; instead this file grows until its disk is full.
        count_in: receives the number of changes, if the run ends normally.
    """
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = _run(recipe, folder, at_change, number, fill, count_in)
        finally:
            os._exit(code)
    timer = None
    if after is not None:
        timer = threading.Timer(after, _kill, (process, number))
        timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if timer is not None:
        timer.cancel()
    return code


def _kill(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _run(
    recipe: Recipe, folder: Path, at_change: int | None, number: int, fill: Path | None, count_in: Path | None
) -> int:
    changes = 0

    def act(count: int) -> None:
        nonlocal changes
        changes = count
        if count == at_change:
            os.kill(os.getpid(), number) if fill is None else fill_disk(fill)

    before_changes(folder, act)
    # What a test or a benchmark has on the screen is not for its children to repeat.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        Run.start(recipe, folder, resume=True).execute()
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if count_in is not None:
        count_in.write_text(str(changes))
    return 0


def before_changes(folder: Path, act: Callable[[int], None]) -> None:
    """From now on, call `act` before each change that this process makes to files below `folder`, with its number.

    This cannot be undone, so call it only in child processes.
    """
    changes, root = 0, str(folder)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event == "open":
            path, _, flags = arguments
            is_change = isinstance(flags, int) and bool(flags & _WRITES)
        else:
            path, is_change = (arguments[0] if arguments else None), event in _CHANGES
        if is_change and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
            changes += 1
            act(changes)

    sys.addaudithook(watch)


def fill_disk(path: Path) -> None:
    """Let a file grow until its disk has no byte left."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while os.write(file, bytes(size)):
                    pass
    finally:
        os.close(file)


@contextmanager
def small_disk(folder: Path, *, megabytes: int = 16) -> Iterator[Path | None]:
    """Yield `folder` with its own file system in memory, or None if none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def differences(folder: Path, whole: Path) -> list[str]:
    """Return the differences between two runs, except for times: files, tensors, lines, numbers."""
    found = []
    files, expected = (
        {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} for run in (folder, whole)
    )
    # TensorBoard begins a file for each process; cards name speeds nowhere, but lists of hashes cover events.
    compared = {name for name in files | expected if not name.startswith("tensorboard/")}
    for name in sorted(compared):
        if (name in files) != (name in expected):
            found.append(f"{name} is in one only")
        elif name == "metrics.jsonl":
            found += [] if _lines(folder / name) == _lines(whole / name) else [name]
        elif name == "summary.json":
            same = without_times(read_summary(folder)) == without_times(read_summary(whole))
            found += [] if same else [name]
        elif name.endswith(".safetensors"):
            mine, theirs = load_file(folder / name), load_file(whole / name)
            same = mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine)
            found += [] if same else [name]
        elif not name.endswith(CHECKSUMS_FILE):
            found += [] if (folder / name).read_bytes() == (whole / name).read_bytes() else [name]
    return found


def _lines(path: Path) -> list[Any]:
    return [without_times(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def without_times(value: Any) -> Any:
    """Return JSON values without the fields that two runs of one recipe need not share."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in _TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def seconds_of(recipe: Recipe, folder: Path) -> float:
    """Return how long an uninterrupted run takes, from the fork of its process."""
    begin = time.perf_counter()
    code = attempt(recipe, folder, count_in=folder.with_name(folder.name + ".changes"))
    assert code == 0, f"the run failed with {code}"
    return time.perf_counter() - begin
