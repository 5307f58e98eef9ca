"""Kill runs at random moments and before chosen changes to files, resume them, and compare the results.

Each run is small and real: train, gates, cut, fine-tuning and control. It must end with the same weights, plan, metrics
and summary as a run that was left alone, bit for bit. Otherwise the program prints the difference and exits with 1.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from _kills import attempt, differences, kills_recipe, seconds_of
from transformers.utils import logging


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="number of SIGKILLs at random moments")
    parser.add_argument(
        "--changes",
        type=int,
        default=0,
        help="number of runs killed before a chosen change to a file; 0: before every change",
    )
    parser.add_argument("--signals", type=int, default=20, help="number of SIGINTs and SIGTERMs at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few of each")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.kills, arguments.changes, arguments.signals = 5, 5, 3
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(_measure(Path(temporary), arguments))


def _measure(place: Path, arguments: argparse.Namespace) -> int:
    recipe, draw = kills_recipe(place), random.Random(arguments.seed)
    whole = place / "whole"
    seconds = seconds_of(recipe, whole)
    changes = int((place / "whole.changes").read_text())
    print(f"a run left alone takes {seconds:.1f} s and changes files {changes} times; torch {torch.__version__}")
    bad: list[str] = []

    def finish(folder: Path, what: str) -> None:
        if (code := attempt(recipe, folder)) != 0:
            bad.append(f"{what}: resuming failed with {code}")
        else:
            bad.extend(f"{what}: {difference}" for difference in differences(folder, whole))
        shutil.rmtree(folder)

    for name, wanted in (("SIGKILL", arguments.kills), ("SIGINT", arguments.signals), ("SIGTERM", arguments.signals)):
        codes: Counter[int] = Counter()
        runs = killed = 0
        while killed < wanted:
            folder = place / f"{name}{runs}"
            runs += 1
            # Again and again, until the run comes to its end or was killed ten times.
            for _ in range(10):
                code = attempt(recipe, folder, after=draw.uniform(0, 0.7 * seconds), number=signal.Signals[name])
                codes[code] += 1
                if code == 0:
                    break
                killed += 1
            finish(folder, f"{name}, run {runs}")
        print(f"{name}: {killed} in {runs} runs, exit codes {dict(codes)}", flush=True)
    chosen = list(range(1, changes + 1))
    if arguments.changes:
        chosen = sorted(draw.sample(chosen, min(arguments.changes, changes)))
    for change in chosen:
        folder = place / f"change{change}"
        code = attempt(recipe, folder, at_change=change)
        if code != -signal.SIGKILL:
            bad.append(f"change {change}: exit code {code}")
        finish(folder, f"killed before change {change}")
    print(f"killed before a change to a file: {len(chosen)} of {changes} changes, each in a run of its own")
    print("\n".join(bad) if bad else "all runs ended in the same weights, plan, metrics and summary, bit for bit")
    return 1 if bad else 0


if __name__ == "__main__":
    main()
