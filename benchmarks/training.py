"""How near is a training step of All-attention layers to the time of its matrix products, and what do gates cost?

Three tables, each measured interleaved within one run, as ratios of medians:

1. forward and backward of a stack of layers with the paper's dropouts: ours, a textbook implementation of the same
   layers, and the floor (the products of forward and backward, into memory that is already allocated), with the peak
   memory of a fresh process, and the largest difference of gradients without dropout;
2. a whole step of the language model with the optimizer: without gates, with all gates open, with a share of the gates
   settled shut (their heads are skipped), and with the same heads cut;
3. the same in bfloat16 (autocast, as in the Trainer).

    python benchmarks/training.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _all_attention import (
    DEMO,
    PAPER,
    Floor,
    Shape,
    TextbookLayer,
    build,
    machine,
    medians,
    paper_shapes,
    peak_megabytes,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

import deadhead

IMPLEMENTATIONS = ("ours", "textbook")
CLOSED = (0.25, 0.5, 0.75)


class Layers:
    """Forward and backward of a stack of layers over one segment and its memory."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.model = build(shape).train()
        self.dtype = dtype
        self.layers = self.model.model.layers
        self.textbook = [TextbookLayer(layer).train() for layer in self.layers]
        size = (shape.batch, shape.length, shape.width)
        self.memory, self.hidden, self.upstream = torch.randn(size), torch.randn(size), torch.randn(size)

    def ours(self, hidden: Tensor) -> Tensor:
        """Run our layers."""
        for layer in self.layers:
            hidden, _ = layer(hidden, self.memory, self.model.model.position_table, None)
        return hidden

    def plainly(self, hidden: Tensor) -> Tensor:
        """Run the textbook's."""
        for layer in self.textbook:
            hidden = layer(hidden, self.memory, self.model.model.position_table)
        return hidden

    def step(self, run: Callable[[Tensor], Tensor]) -> None:
        """Run forward and backward into fresh gradients, as in a step after `zero_grad`."""
        self.model.zero_grad()
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            output = run(self.hidden.requires_grad_())
        output.float().backward(self.upstream)

    def difference(self) -> float:
        """Return max|Δ| / max|reference| over all gradients, without dropout."""
        self.model.eval()
        for layer in self.textbook:
            layer.eval()
        found = []
        for run in (self.ours, self.plainly):
            self.step(run)
            found.append([parameter.grad for parameter in self.layers.parameters()])
        self.model.train()
        for layer in self.textbook:
            layer.train()
        return max(
            float((ours - plainly).abs().max() / plainly.abs().max())
            for ours, plainly in zip(*found, strict=True)
            if ours is not None and plainly is not None
        )


def run_once(shape: Shape, dtype: torch.dtype, name: str) -> None:
    """Run one implementation, for its peak memory."""
    layers = Layers(shape, dtype)
    layers.step(layers.ours if name == "ours" else layers.plainly)


def measure_layers(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Return the numbers of one row of the first table."""
    layers = Layers(shape, dtype)
    difference = layers.difference()
    floor = Floor(shape, dtype, cached=False, backward=True)
    seconds = medians(
        {
            "ours": lambda: layers.step(layers.ours),
            "textbook": lambda: layers.step(layers.plainly),
            "floor": floor,
        },
        repeats,
    )
    memory = {name: peak_megabytes(run_once, shape, dtype, name) for name in IMPLEMENTATIONS}
    return {
        "shape": shape.name,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": len(shape.heads),
        "milliseconds": {name: value * 1e3 for name, value in seconds.items()},
        "over_floor": seconds["ours"] / seconds["floor"],
        "times_textbook": seconds["textbook"] / seconds["ours"],
        "floor_gflops": floor.flops / seconds["floor"] / 1e9,
        "megabytes": memory,
        "memory_ratio": memory["ours"] / memory["textbook"],
        "difference": difference,
    }


class Step:
    """A training step of a language model: forward, backward, Adam."""

    def __init__(self, model: deadhead.models.AllAttentionForCausalLM, shape: Shape) -> None:
        self.model = model.train()
        self.gates = deadhead.gates_of(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        self.ids = torch.randint(model.config.vocab_size, (shape.batch, shape.length + 1))
        size = (shape.batch, shape.length, shape.width)
        self.memory = tuple(torch.randn(size) for _ in shape.heads)
        self.steps = 0

    def __call__(self) -> None:
        """Take a step."""
        if self.gates is not None:
            self.gates.begin_step(self.steps)
        self.steps += 1
        ids, labels = self.ids[:, :-1], self.ids[:, 1:]
        outputs = self.model(input_ids=ids, labels=labels, shift_labels=labels, use_cache=False, memory=self.memory)
        outputs.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure_step(shape: Shape, repeats: int) -> dict[str, Any]:
    """Return the seconds of each kind of step, by name."""
    dense = build(shape)
    steps = {"dense": Step(copy.deepcopy(dense), shape)}
    layers = range(len(shape.heads))
    for share in (0.0, *CLOSED):
        model = copy.deepcopy(dense)
        gates = deadhead.attach(model)
        gates.track_difference()
        kept = round(8 * (1 - share))
        plan = deadhead.HeadPlan(kept={layer: range(kept) for layer in layers}, total=dict.fromkeys(layers, 8))
        for key, gate in gates:
            # Settled: such a gate opens once in 3000 draws.
            gate.set_log_alpha(torch.tensor([8.0 if head in plan.kept[key.layer] else -8.0 for head in range(8)]))
        steps[f"{share:.0%} closed"] = Step(model, shape)
        if share:
            steps[f"{share:.0%} cut"] = Step(deadhead.cut(copy.deepcopy(dense), plan), shape)
    seconds = medians(steps, repeats)
    return {"shape": shape.name, "layers": len(shape.heads), "seconds": seconds}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, few shapes, few repetitions")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    console = Console(width=150)
    repeats = 3 if options.quick else 7
    shapes = paper_shapes(2)[:1] if options.quick else paper_shapes(16)
    table = Table(title=f"forward and backward of the layers: {machine()}")
    columns = ("ours ms", "textbook ms", "floor ms", "ours/floor", "textbook/ours", "ours MB", "textbook MB", "ratio")
    for column in ("layers", "", *columns, "difference"):
        table.add_column(column, justify="right")
    rows = []
    for shape in [*shapes, replace(DEMO, name="demo, dense, batch 16")]:
        for dtype in (torch.float32, torch.bfloat16):
            row = measure_layers(shape, dtype, repeats)
            rows.append(row)
            table.add_row(
                f"{row['shape']}, {row['layers']} layers",
                row["dtype"],
                *(f"{row['milliseconds'][name]:.1f}" for name in ("ours", "textbook", "floor")),
                f"{row['over_floor']:.2f}",
                f"{row['times_textbook']:.2f}",
                *(f"{row['megabytes'][name]:.0f}" for name in IMPLEMENTATIONS),
                f"{row['memory_ratio']:.2f}",
                f"{row['difference']:.0e}",
            )
    console.print(table)
    table = Table(title="a whole step with Adam, as a share of the dense model's without gates (float32)")
    steps = []
    for shape in (replace(PAPER, name="paper, batch 4", heads=(8,) * (2 if options.quick else 16)), DEMO):
        found = measure_step(shape, 5 if options.quick else 15 if shape is not DEMO else 60)
        steps.append(found)
        if not table.columns:
            for column in ("model", "dense ms", *list(found["seconds"])[1:]):
                table.add_column(column, justify="right")
        dense, *others = found["seconds"].values()
        ratios = [f"{seconds / dense:.3f}" for seconds in others]
        table.add_row(f"{found['shape']}, {found['layers']} layers", f"{dense * 1e3:.1f}", *ratios)
    console.print(table)
    if options.json:
        values = {"layers": rows, "steps": steps}
        options.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
