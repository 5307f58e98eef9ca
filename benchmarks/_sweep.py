"""Sweeps over many short trainings: one process per core, results in files, so that a stopped sweep continues."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar, set_verbosity_error


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    disable_progress_bar()
    set_verbosity_error()


def run_all(
    function: Callable[..., None],
    calls: Sequence[tuple[Any, ...]],
    *,
    jobs: int,
    what: str,
    console: Console,
    threads: int = 1,
    calls_each: int | None = None,
) -> None:
    """Call `function` with each of `calls` in `jobs` processes, in order, and show progress.

    One process per core is best if models gain little from two cores. With one job, `threads` may be more. `calls_each`
    is the number of calls that a process serves before it is replaced; with 1, each call sees its own peak of memory.
    """
    if not calls:
        return
    begun = time.perf_counter()
    # Not forked: torch's threads would not be there in the child.
    with ProcessPoolExecutor(
        jobs,
        mp_context=get_context("spawn"),
        initializer=partial(_prepare, threads),
        max_tasks_per_child=calls_each,
    ) as pool:
        running = {pool.submit(function, *call) for call in calls}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                if (error := future.exception()) is not None:
                    # What is running ends and is kept; nothing more begins.
                    pool.shutdown(cancel_futures=True)
                    raise error
            seconds = time.perf_counter() - begun
            left = seconds / (len(calls) - len(running)) * len(running)
            console.print(
                f"[dim]{len(calls) - len(running)} of {len(calls)} {what}, {seconds:.0f} s, "
                f"about {left / 60:.0f} min left[/dim]"
            )
