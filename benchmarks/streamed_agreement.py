"""Does pruning layer by layer give what pruning in memory gives, on a real model, and are budgets in bytes met?

For each criterion the model is pruned to 80 % of its blocks' parameters in memory and layer by layer, both compensated.
The table says whether the plans are equal, how many tensors are equal to the bit, and the largest relative difference
of a tensor. Then it is pruned layer by layer to each size in bytes.

    python benchmarks/streamed_agreement.py --model FOLDER --data TEXT [--criteria flap …] [--sizes 480MB 400MB]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

import deadhead
from benchmarks._all_attention import machine
from deadhead.plans.memory_sizes import in_bytes


def agreement(criterion: str, model: Path, data: Path, length: int) -> list[str]:
    """Return a row: the criterion, equal plans, tensors equal to the bit, largest difference, seconds of the two."""
    how: dict[str, Any] = {"params": 0.8, "of": "blocks", "steps": 4, "batch_size": 4, "sequence_length": length}
    how |= {"compensate_rows": 32, "criterion": criterion}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        begun = time.perf_counter()
        whole = deadhead.prune(model, str(data), out=folder / "whole", evaluation_tokens=512, **how)
        between = time.perf_counter()
        streamed = deadhead.prune_checkpoint(model, str(data), out=folder / "streamed", **how)
        seconds = between - begun, time.perf_counter() - between
        ones, others = (load_file(folder / name / "model.safetensors") for name in ("whole", "streamed"))
    if ones.keys() != others.keys():
        raise SystemExit(f"{criterion}: the two checkpoints have tensors of other names")
    equal = sum(torch.equal(ones[name], others[name]) for name in ones)
    worst = max(float((ones[name] - others[name]).norm() / ones[name].norm().clamp(min=1e-30)) for name in ones)
    same = "yes" if whole.plan == streamed.plan else "no"
    return [criterion, same, f"{equal} of {len(ones)}", f"{worst:.1e}", *(f"{each:.0f}" for each in seconds)]


def budget(size: str, model: Path, data: Path, length: int) -> list[str]:
    """Return a row: the size that was asked for, bytes reached, and their share of what was asked for."""
    how: dict[str, Any] = {"criterion": "flap", "compensate": False, "steps": 2, "batch_size": 2}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        found = deadhead.prune_checkpoint(model, str(data), out=out, memory=size, sequence_length=length, **how)
    reached = found.budget["reached"]
    return [size, f"{reached:,.0f}", f"{reached / in_bytes(size):.2%}"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder")
    parser.add_argument("--data", type=Path, help="text file")
    parser.add_argument("--criteria", nargs="*", default=["flap"])
    parser.add_argument("--sizes", nargs="*", default=["480MB", "400MB"])
    parser.add_argument("--quick", action="store_true", help="a tiny random Llama")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.quick:
            from tests.small_runs import save_small_llama, write_prose

            options.data = write_prose(Path(temporary))
            options.model = Path(temporary) / "llama"
            save_small_llama(options.model, options.data)
            options.sizes = ["170kB"]
        elif options.model is None or options.data is None:
            parser.error("--model and --data are needed")
        length = 24 if options.quick else 256
        table = Table("criterion", "same plan", "tensors equal to the bit", "difference", "in memory, s", "streamed, s")
        for criterion in options.criteria:
            table.add_row(*agreement(criterion, options.model, options.data, length))
        sizes = Table("asked for", "bytes reached", "of that")
        for size in options.sizes:
            sizes.add_row(*budget(size, options.model, options.data, length))
    console = Console()
    console.print(machine(), markup=False)
    console.print(table, sizes)


if __name__ == "__main__":
    main()
