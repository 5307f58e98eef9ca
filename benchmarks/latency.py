"""How well is a pruned model's speed predicted before the model is made?

Measures the cost model of this machine for a Llama-like model (see `deadhead.measure.latency`). Then cuts random plans
of heads and hidden units, with different numbers in each layer, times them interleaved with the dense model, and
compares the times with the predictions.

    python benchmarks/latency.py [--quick] [--workload prefill|decode] [--plans N]
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import torch
from _all_attention import machine
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import deadhead
from deadhead.cutting import pruned_copy
from deadhead.measure.latency import measure_latency
from deadhead.measure.timing import bench

SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
QUICK = {**SIZES, "vocab_size": 1024, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}


def random_plan(gates: deadhead.HeadGates, draw: random.Random) -> deadhead.HeadPlan:
    """Return a plan that keeps about a third, half or two thirds of the units, with different shares in each layer."""
    share = draw.choice([1 / 3, 1 / 2, 2 / 3])
    kept = {}
    for key, units in gates.choices.units.items():
        count = round(len(units) * (share + draw.uniform(-0.3, 0.3)))
        kept[key] = sorted(draw.sample(units, min(max(count, 0), len(units))))
    return gates.choices.plan_of(kept)


def main() -> None:
    """Measure, predict, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and three plans")
    parser.add_argument("--workload", choices=("prefill", "decode", "train"), default="prefill")
    parser.add_argument("--plans", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    config: Any = LlamaConfig
    sizes = QUICK if args.quick else SIZES
    model = LlamaForCausalLM(config(**sizes)).eval()
    how: dict[str, Any] = {"workload": args.workload, "batch_size": 4, "length": 128, "new_tokens": 8}
    begun = time.perf_counter()
    latency = measure_latency(model, hidden=True, **how)
    took = time.perf_counter() - begun
    draw = random.Random(0)
    gates = deadhead.attach(model, blocks=True)
    plans = {f"plan {index}": random_plan(gates, draw) for index in range(3 if args.quick else args.plans)}
    deadhead.detach(model)
    models = {"dense": pruned_copy(model)} | {name: pruned_copy(model, plan) for name, plan in plans.items()}
    timings = bench(models, repeats=10, **how)
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine())
    console.print(f"Llama {sizes}, float32, {how}; measured in {took:.0f} s, dense {latency.dense * 1e3:.1f} ms")
    table = Table(box=None)
    for column in ("", "heads", "hidden units", "predicted", "measured", "error"):
        table.add_column(column, justify="right")
    errors = []
    for name, plan in plans.items():
        predicted, measured = latency.speedup(plan), timings["dense"].seconds / timings[name].seconds
        errors.append(predicted / measured - 1)
        hidden = 0 if plan.hidden_units is None else sum(plan.hidden_units.counts)
        table.add_row(
            name, str(sum(plan.heads)), str(hidden), f"{predicted:.2f}", f"{measured:.2f}", f"{errors[-1]:+.1%}"
        )
    console.print(table)
    console.print(f"median error {statistics.median(map(abs, errors)):.1%}, largest {max(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()
