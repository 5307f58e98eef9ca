"""Does a Llama get as much faster as the removed FLOPs allow, with heads alone, blocks alone, or both cut?

Cutting heads leaves the feed-forward layers, which are most of the cost. Cutting blocks of their hidden units lowers
the cost of whole layers. The program times a whole Llama-like model with grouped queries, dense and cut, interleaved
within one run. For each cut it prints the share of parameters and FLOPs left, the measured speedup, the speedup that
the FLOPs allow, and their ratio, the efficiency.

    python benchmarks/proportionality.py [--quick] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from _all_attention import machine
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from deadhead.measure.timing import WORKLOADS, Workload, bench, efficiency

LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
QUICK = {**LLAMA, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2}
KINDS = ("heads", "blocks", "both")
KEPT = (0.75, 0.5, 0.25, 0.0)
BATCH, LENGTH, NEW_TOKENS = 4, 256, 8


def build(sizes: dict[str, int]) -> PreTrainedModel:
    """Return a random model of these sizes."""
    config: Any = LlamaConfig
    return LlamaForCausalLM(config(**sizes)).eval()


def cut_to(model: PreTrainedModel, kind: str, kept: float) -> PreTrainedModel:
    """Return a copy that keeps a share of the groups of every layer, of its blocks, or of both."""
    small = copy.deepcopy(model)
    gates = deadhead.attach(small, blocks=kind != "heads")
    units = {
        key: heads[: round(kept * len(heads))] if kind != "blocks" or key.kind == "block" else heads
        for key, heads in gates.choices.units.items()
    }
    return deadhead.cut(small, gates.choices.plan_of(units))


def measure(model: PreTrainedModel, workload: Workload, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each model that was cut."""
    models = {"dense": model}
    models |= {f"{kind} {kept}": cut_to(model, kind, kept) for kind in KINDS for kept in KEPT}
    timings = bench(models, workload=workload, batch_size=BATCH, length=LENGTH, new_tokens=NEW_TOKENS, repeats=repeats)
    # Without a past every query sees half the text on average.
    length = LENGTH if workload == "decode" else LENGTH // 2
    costs = {name: deadhead.model_cost(found, length=length) for name, found in models.items()}
    dense, seconds = costs["dense"], timings["dense"].seconds
    rows = []
    for name, cost in costs.items():
        kind, _, kept = name.partition(" ")
        if kind != "dense":
            rows.append(
                {
                    "workload": workload,
                    "cut": kind,
                    "kept": float(kept),
                    "parameters_left": cost.parameters / dense.parameters,
                    "flops_left": cost.flops_per_token / dense.flops_per_token,
                    "milliseconds": timings[name].seconds * 1e3,
                    "speedup": seconds / timings[name].seconds,
                    "allowed": dense.flops_per_token / cost.flops_per_token,
                    "efficiency": efficiency(
                        seconds, timings[name].seconds, dense.flops_per_token, cost.flops_per_token
                    ),
                }
            )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few repetitions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    sizes = QUICK if args.quick else LLAMA
    model = build(sizes)
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(f"Llama {sizes}, float32, batch {BATCH}, length {LENGTH}, {NEW_TOKENS} new tokens in decode")
    rows: list[dict[str, Any]] = []
    for workload in WORKLOADS:
        found = measure(model, workload, 3 if args.quick else args.repeats)
        rows += found
        table = Table(title=workload, box=None)
        for column in ("cut", "kept", "parameters", "FLOPs", "ms", "speedup", "allowed", "efficiency"):
            table.add_column(column, justify="right")
        for row in found:
            table.add_row(
                row["cut"],
                f"{row['kept']:.0%}",
                f"{row['parameters_left']:.0%}",
                f"{row['flops_left']:.0%}",
                f"{row['milliseconds']:.1f}",
                f"{row['speedup']:.2f}",
                f"{row['allowed']:.2f}",
                f"{row['efficiency']:.2f}",
            )
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
