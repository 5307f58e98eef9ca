"""Does a cut model get as much faster as the FLOPs that were removed allow?

Times dense and cut All-attention models in turn within one run, for shares of heads kept, and the floor: the same
matrix products and nothing else. Prints medians, speedups and efficiency (measured speedup ÷ speedup the FLOPs allow).

    python benchmarks/cut_speed.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import deadhead
from deadhead.timing import WORKLOADS, bench, efficiency

SHAPES = {
    "demo": {"hidden_size": 192, "num_hidden_layers": 4, "num_persistent": 128, "segment": 64, "batch": 16},
    "paper, 4 of its 16 layers": {
        "hidden_size": 512,
        "num_hidden_layers": 4,
        "num_persistent": 2048,
        "segment": 192,
        "batch": 4,
    },
}
KEPT = (8, 6, 4, 2)


def build(shape: dict[str, int]) -> deadhead.AllAttentionForCausalLM:
    """Return a dense model of a shape, 8 heads a layer."""
    torch.manual_seed(0)
    config = deadhead.AllAttentionConfig(
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["num_hidden_layers"],
        num_persistent=shape["num_persistent"],
        segment_length=shape["segment"],
        memory_length=shape["segment"],
    )
    return deadhead.AllAttentionForCausalLM(config).eval()


def cut_to(model: deadhead.AllAttentionForCausalLM, kept: int) -> deadhead.AllAttentionForCausalLM:
    """Return a copy with the first `kept` heads of every layer."""
    layers = range(model.config.num_hidden_layers)
    plan = deadhead.HeadPlan(kept={layer: range(kept) for layer in layers}, total=dict.fromkeys(layers, 8))
    return deadhead.cut(copy.deepcopy(model), plan)


def floor_seconds(shape: dict[str, int], kept: int, repeats: int) -> float:
    """Time the matrix products of a forward over one segment without memory, and nothing else."""
    width, tokens, batch = shape["hidden_size"], shape["segment"], shape["batch"]
    head, persistent = width // 8, shape["num_persistent"]
    rows = batch * tokens
    x, inner = torch.randn(rows, width), torch.randn(rows, kept * head)
    project, output = torch.randn(width, kept * head), torch.randn(kept * head, width)
    q, k = torch.randn(batch * kept, tokens, head), torch.randn(batch * kept, head, tokens)
    r = torch.randn(batch * kept, head, tokens + 1)
    scores = torch.randn(batch * kept, tokens, tokens)
    q_rows, m = torch.randn(kept, rows, head), torch.randn(kept, head, persistent)
    weights, values = torch.randn(kept, rows, persistent), torch.randn(kept, persistent, head)
    vocabulary = torch.randn(width, 257)

    def products() -> None:
        for _ in range(shape["num_hidden_layers"]):
            for _ in range(3):
                x @ project
            inner @ output
            q @ k
            q @ r
            scores @ k.transpose(-1, -2)
            q_rows @ m
            weights @ values
        x @ vocabulary

    seconds = []
    for repetition in range(repeats + 1):
        begin = time.perf_counter()
        products()
        if repetition:
            seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, about a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    repeats = 5 if options.quick else 30
    console = Console(width=120)
    console.print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, float32, medians of {repeats}"
    )
    rows = []
    for name, shape in SHAPES.items():
        dense = build(shape)
        models = {str(kept): cut_to(dense, kept) if kept < 8 else dense for kept in KEPT}
        # Without memory every query sees half a segment on average, so the count is taken there.
        flops = {
            key: deadhead.model_cost(model, length=shape["segment"] // 2).flops_per_token
            for key, model in models.items()
        }
        table = Table(title=f"{name}: {shape['batch']} × {shape['segment']} tokens")
        columns = (
            "workload",
            "heads kept",
            "FLOPs removed",
            "ms",
            "speedup",
            "FLOPs allow",
            "efficiency",
            "time/floor",
        )
        for column in columns:
            table.add_column(column, justify="right")
        for workload in WORKLOADS:
            timings = bench(
                models, workload=workload, batch_size=shape["batch"], length=shape["segment"], repeats=repeats
            )
            for key, timing in timings.items():
                floor = floor_seconds(shape, int(key), repeats) if workload == "prefill" else None
                seconds = timings["8"].seconds, timing.seconds
                row = {
                    "shape": name,
                    "workload": workload,
                    "kept": int(key),
                    "flops_removed": 1 - flops[key] / flops["8"],
                    "milliseconds": timing.seconds * 1e3,
                    "speedup": seconds[0] / seconds[1],
                    "allowed": flops["8"] / flops[key],
                    "efficiency": efficiency(*seconds, flops["8"], flops[key]),
                    "over_floor": None if floor is None else timing.seconds / floor,
                }
                rows.append(row)
                table.add_row(
                    workload,
                    f"{key}/8",
                    f"{row['flops_removed']:.0%}",
                    f"{row['milliseconds']:.1f}",
                    f"{row['speedup']:.2f}",
                    f"{row['allowed']:.2f}",
                    f"{row['efficiency']:.2f}",
                    "" if floor is None else f"{row['over_floor']:.2f}",
                )
        console.print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
