"""Is a checkpoint larger than memory pruned in little memory, and how near to the time of the necessary computation?

Writes a Llama of random bfloat16 weights in shards (7 billion parameters, 13.5 GB; `--layers` writes fewer of its
layers). Prunes it layer by layer to 80 % of its blocks' parameters, on random tokens, in a process of its own, and
measures the peak of that process. The floor is the necessary computation at this machine's speed in one large product
of that precision, and the necessary reading and writing at the speed of a copy:

- for the scores, the forward pass of the text;
- for compensation, that pass again, the cut model's pass, the moments of what output projections read and should give,
  each pair once, and the solutions.

    python benchmarks/streamed_prune.py [--layers N] [--tokens N] [--criteria flap …] [--compensate] [--folder DIR]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

import deadhead
from benchmarks._all_attention import machine
from benchmarks._large_checkpoint import QUICK, SEVEN_BILLION, size_of, write_checkpoint
from benchmarks.streaming_cut import forget
from deadhead.compensation.solving import JUDGES, RIDGES
from deadhead.data import TokenStream

LENGTH, BATCH = 256, 4
SHARE = 0.8
_CHILD = "--in-a-child"


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """One run.

    Args:
        seconds: of the run, including the start of Python.
        scoring: seconds until the last layer had its scores.
        compensating: seconds until the last layer was fitted.
        peak_bytes: the most memory that the process held.
        floor: seconds of the necessary computation, reading and writing.
    """

    criterion: str
    compensated: bool
    seconds: float
    scoring: float
    compensating: float
    peak_bytes: int
    floor: float


def prune(source: Path, out: Path, criterion: str, tokens: int, *, compensate: bool) -> None:
    """Prune in the process that is measured, and print when each part ended."""
    begun, ends = time.perf_counter(), {}

    def progress(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
        if done == total:
            ends[name] = time.perf_counter() - begun

    drawn = np.random.default_rng(0).integers(1000, size=tokens + 1).astype(np.uint16)
    text = TokenStream(tokens=drawn, num_bytes=len(drawn), num_words=len(drawn))
    rows = tokens // LENGTH
    how: dict[str, Any] = {"steps": rows // BATCH, "batch_size": BATCH, "sequence_length": LENGTH}
    how |= {"params": SHARE, "of": "blocks", "compensate": compensate, "compensate_rows": rows}
    deadhead.prune_checkpoint(source, text, out=out, criterion=criterion, progress=progress, **how)
    print(json.dumps(ends))


def measure(source: Path, config: LlamaConfig, criterion: str, tokens: int, *, compensate: bool) -> Pruned:
    """Prune in a child process, from a source that is not in the page cache."""
    forget(source)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        given = [_CHILD, str(source), str(Path(folder) / "out"), criterion, str(tokens), str(int(compensate))]
        begun = time.perf_counter()
        with subprocess.Popen([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            said = child.stdout.read()
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begun
        if child.returncode:
            raise SystemExit(f"pruning ended with {child.returncode}")
        ends = json.loads(said.splitlines()[-1])
        scoring = ends["scoring layers"]
        return Pruned(
            criterion=criterion,
            compensated=compensate,
            seconds=seconds,
            scoring=scoring,
            compensating=ends.get("compensating layers", scoring) - scoring,
            peak_bytes=used.ru_maxrss * 1024,
            floor=floor(config, tokens, source.parent, compensate=compensate),
        )


def speed(dtype: torch.dtype) -> float:
    """Return the FLOPs a second of this machine in one large product."""
    left, right = torch.ones(1024, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - begun)
    return 2 * 1024 * 4096**2 / min(times)


def copy_speed(folder: Path) -> float:
    """Return the bytes a second at which a file is read, or written and sent to the disk."""
    path, data = folder / "speed", os.urandom(1 << 28)
    begun = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return len(data) / seconds


def floor(config: LlamaConfig, tokens: int, folder: Path, *, compensate: bool) -> float:
    """Return the seconds of everything that must be done, at this machine's speeds."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    inside = 4 * width**2 + 3 * width * hidden
    forward = 2.0 * inside * tokens * layers
    size = size_of(config)
    read, half, single, double = float(size), forward, 0.0, 0.0
    if compensate:
        half += forward * (1 + SHARE)
        read += size * (1 + SHARE)
        for inputs in (SHARE * width, SHARE * hidden):
            single += layers * tokens * (inputs**2 + 2 * 2 * width * inputs)
            judged = min(width, JUDGES)
            again = 2 * inputs**2 * width if width > JUDGES else 0.0
            double += layers * (len(RIDGES) * (inputs**3 / 3 + 2 * inputs**2 * 2 * judged) + again)
    work = half / speed(torch.bfloat16) + single / speed(torch.float32) + double / speed(torch.float64)
    return work + (read + SHARE * size) / copy_speed(folder)


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == [_CHILD]:
        source, out, criterion, tokens, compensate = sys.argv[2:]
        prune(Path(source), Path(out), criterion, int(tokens), compensate=bool(int(compensate)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="layers to write, of the 32")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--criteria", nargs="+", default=["flap"])
    parser.add_argument("--compensate", action="store_true", help="also compensate")
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 0.2 GB and 1,024 tokens")
    options = parser.parse_args()
    config = copy.deepcopy(QUICK if options.quick else SEVEN_BILLION)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    tokens = 1024 if options.quick else options.tokens
    found = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        source = Path(temporary) / "source"
        write_checkpoint(source, config)
        for criterion in options.criteria:
            for compensate in (False, True) if options.compensate else (False,):
                found.append(measure(source, config, criterion, tokens, compensate=compensate))
                print(json.dumps(asdict(found[-1])), file=sys.stderr)
    table = Table("criterion", "compensated", "s", "scoring", "compensating", "floor, s", "×", "peak, GiB")
    for one in found:
        numbers = f"{one.seconds:.0f}", f"{one.scoring:.0f}", f"{one.compensating:.0f}", f"{one.floor:.0f}"
        ratio, peak = f"{one.seconds / one.floor:.2f}", f"{one.peak_bytes / 2**30:.2f}"
        table.add_row(one.criterion, "yes" if one.compensated else "no", *numbers, ratio, peak)
    console = Console()
    console.print(f"{machine()}; {size_of(config) / 1e9:.1f} GB, {tokens:,} tokens", markup=False)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
