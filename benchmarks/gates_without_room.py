"""How much memory and time do gates take on a large model, with mapped weights and recomputed activations?

Writes a Llama of random bfloat16 weights (the shapes of Llama-3.2-1B and 3B). Then trains gates alone, on heads and
hidden units, for a few steps on random tokens, with `freeze_weights` and `gradient_checkpointing`, in a process of its
own. The system may drop memory that is mapped from files and read it again; all other memory must be there. Both are
counted beyond what the libraries take.

The floor of a step is its matrix products at this machine's speed in one large product of that precision: forward,
forward again, and the gradients of inputs, but not those of weights.

    python benchmarks/gates_without_room.py [--sizes 1B 3B] [--steps N] [--rows N] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

import deadhead
from benchmarks._all_attention import machine
from benchmarks._large_checkpoint import QUICK, write_checkpoint
from benchmarks.memory import drawn
from benchmarks.streamed_prune import speed
from deadhead.measure.cost import model_cost, skeleton
from deadhead.training import PruneRecipe
from deadhead.training.runs.training_memory import training_memory

LENGTH = 256
_CHILD = "--in-a-child"
_SPECIAL = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": True, "dtype": "bfloat16"}
SIZES = {
    "quick": QUICK,
    "1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, **_SPECIAL
    ),
    "3B": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, **_SPECIAL
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One run.

    Args:
        size: of the model.
        weights: bytes of its weights.
        mapped: peak of bytes of mapped files in memory.
        private: peak of bytes of other memory.
        formula: the estimate of `training_memory` of what is held besides the weights.
        step: median seconds of a step, the first left out.
        floor: seconds that a step's matrix products would take.
    """

    size: str
    weights: int
    mapped: int
    private: int
    formula: int
    step: float
    floor: float


def asked(steps: int, rows: int) -> PruneRecipe:
    """Return the recipe of the gates."""
    how: dict[str, Any] = {"freeze_weights": True, "gradient_checkpointing": True, "compensate": False}
    return PruneRecipe(criterion="gates", params=0.8, steps=steps, batch_size=rows, sequence_length=LENGTH, **how)


def train(source: Path, steps: int, rows: int) -> None:
    """Train in the process that is measured, and print the times of steps and the memory peak."""
    libraries, ends, over = _resident(), [], threading.Event()
    most = dict(libraries)

    def watch() -> None:
        while not over.wait(0.05):
            for name, value in _resident().items():
                most[name] = max(most[name], value)

    def progress(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
        if total == steps:
            ends.append(time.perf_counter())

    watcher = threading.Thread(target=watch, daemon=True)
    text = drawn(1000, steps * rows * LENGTH)
    watcher.start()
    # The gates stay on: a cut makes new weights.
    deadhead.prune(source, text, recipe=asked(steps, rows), cut=False, progress=progress)
    over.set()
    print(json.dumps({"ends": ends, **{name: value - libraries[name] for name, value in most.items()}}))


def _resident() -> dict[str, int]:
    """Return the bytes of this process in memory: of mapped files, and all others."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("RssAnon", "RssFile")}


def measure(size: str, steps: int, rows: int, folder: Path | None) -> Trained:
    """Train in a child process, from a checkpoint that is written first."""
    config = SIZES[size]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source = Path(temporary) / "source"
        write_checkpoint(source, config)
        given = [_CHILD, str(source), str(steps), str(rows)]
        said = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, check=True).stdout
    found = json.loads(said.splitlines()[-1])
    ends = found["ends"]
    empty = skeleton(config).to(torch.bfloat16)
    cost = model_cost(empty, length=LENGTH // 2)
    memory = training_memory(empty, asked(steps, rows))
    return Trained(
        size=size,
        weights=memory.weights,
        mapped=found["RssFile"],
        private=found["RssAnon"],
        formula=memory.total - memory.weights,
        # The first step has the moments of the optimizer made, and weights read.
        step=statistics.median(after - before for before, after in pairwise(ends[1:])),
        floor=3 * cost.flops_per_token * rows * LENGTH / speed(torch.bfloat16),
    )


def main() -> None:
    """Print a table."""
    if sys.argv[1:2] == [_CHILD]:
        train(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1B", "3B"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="folder for checkpoints")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for size in options.sizes:
        found.append(measure(size, options.steps, options.rows, options.folder))
        print(json.dumps(asdict(found[-1])), file=sys.stderr)
    table = Table("model", "weights, GB", "of files", "other", "by formula", "s a step", "floor, s", "×", box=None)
    for one in found:
        sizes = (f"{value / 1e9:.2f}" for value in (one.weights, one.mapped, one.private, one.formula))
        table.add_row(one.size, *sizes, f"{one.step:.1f}", f"{one.floor:.1f}", f"{one.step / one.floor:.2f}")
    console = Console()
    console.print(f"{machine()}; {options.rows} × {LENGTH} tokens a step, {os.cpu_count()} cores", markup=False)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
