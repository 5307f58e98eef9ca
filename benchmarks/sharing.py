"""How long do ranking and compensation take with one process, and with two that share the text?

A small Llama with random weights reads random tokens, with one thread for each process and gloo. If two processes do
not have two cores to themselves, wall-clock time says little; the CPU time of each process shows its work. The floor is
a criterion that reads no text: two processes gain nothing there.

    python benchmarks/sharing.py [--quick] [--json FILE]
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROWS, LENGTH, VOCABULARY = 8, 128, 512
CRITERIA = ("magnitude", "taylor", "flap", "reconstruction", "second-order")


def measure(folder: Path, batches: int) -> None:
    """Time everything in this process, one of those that the launcher started; all begin together."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    import deadhead
    from deadhead.data import TokenStream
    from deadhead.training import PruneRecipe
    from deadhead.training.phases.compensating import Compensating, calibration_of
    from deadhead.training.phases.ranking import rank_together
    from deadhead.training.processes import on_main

    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, num_attention_heads=8)).eval()
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=batches * ROWS * LENGTH + 1).astype(np.uint16)
    text = TokenStream(tokens=tokens, num_bytes=len(tokens), num_words=len(tokens))

    def recipe(criterion: Any) -> PruneRecipe:
        rows = {"batch_size": ROWS, "sequence_length": LENGTH, "compensate_rows": batches * ROWS}
        return PruneRecipe(criterion=criterion, params=0.7, steps=batches, **rows)

    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        on_main(lambda: None)
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        found[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        return result

    where: dict[str, Any] = {"seed": 0, "first_segment": 0, "latency": None, "progress": lambda *_: None}
    for criterion in CRITERIA:
        plan = timed(criterion, lambda criterion=criterion: rank_together(model, text, recipe(criterion), **where))
    cut = deadhead.cut(copy.deepcopy(model), plan)
    compensating = Compensating(model, calibration_of(model, text, recipe("taylor"), seed=0), "random tokens")
    timed("compensation", lambda: compensating.of(cut, lambda *_: None))
    (folder / f"{rank} of {count}.json").write_text(json.dumps(found))


def run(batches: int) -> dict[str, list[dict[str, Any]]]:
    """Measure with one process and with two; return each process's times."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            program = [__file__, "--folder", folder, "--batches", str(batches)]
            subprocess.run([*launch, *program], check=True, env=environment, stderr=subprocess.DEVNULL)
            ranks = [Path(folder) / f"{rank} of {count}.json" for rank in range(count)]
            found[str(count)] = [json.loads(path.read_text()) for path in ranks]
    return found


def main() -> None:
    """Print the times of one and of two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few batches")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, default=32)
    options = parser.parse_args()
    if options.folder is not None:
        measure(options.folder, options.batches)
        return
    from _all_attention import machine

    batches = 4 if options.quick else options.batches
    found = run(batches)
    console = Console()
    console.print(machine())
    console.print(
        f"Llama, {found['1'][0]['parameters']:,} parameters, float32; {batches} batches of {ROWS} × {LENGTH} tokens; "
        f"one thread a process; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    table = Table("", "1 process, s", "CPU, s", "2 processes, s", "CPU of each, s")
    for name in (*CRITERIA, "compensation"):
        alone, both = found["1"][0][name], [each[name] for each in found["2"]]
        wall, cpu = max(each["wall"] for each in both), ", ".join(f"{each['cpu']:.1f}" for each in both)
        table.add_row(name, f"{alone['wall']:.1f}", f"{alone['cpu']:.1f}", f"{wall:.1f}", cpu)
    console.print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
