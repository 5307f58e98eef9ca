"""How near is the evaluation of All-attention layers to the time of their matrix products alone?

Runs the layers of a stack over one segment after a memory of the same length, interleaved within one run:

- ours, with keys and values of the memory cached;
- a textbook implementation of the same layers;
- the floor: their products, into memory that is already allocated;
- the softmax alone, which the floor leaves out.

Checks that ours and the textbook agree. Peak memory is that of a fresh process.

    python benchmarks/attention.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _all_attention import (
    DEMO,
    Floor,
    Shape,
    Softmax,
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
from transformers.cache_utils import DynamicCache

IMPLEMENTATIONS = ("ours", "textbook")


class Evaluation:
    """One segment after another through the layers of a stack."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        self.model = build(shape).to(dtype).eval()
        self.layers = self.model.model.layers
        self.textbook = [TextbookLayer(layer).eval() for layer in self.layers]
        self.memory = torch.randn(shape.batch, shape.length, shape.width).to(dtype)
        self.hidden = torch.randn(shape.batch, shape.length, shape.width).to(dtype)
        self.positions = self.model.model.position_table
        self.cache = DynamicCache(config=self.model.config)
        self.memories: list[Tensor] = []
        self._read_memory()

    @torch.inference_mode()
    def _read_memory(self) -> None:
        hidden = self.memory
        for layer in self.layers:
            self.memories.append(hidden)
            hidden, _ = layer(hidden, None, self.positions, None, past_key_values=self.cache)

    @torch.inference_mode()
    def ours(self) -> Tensor:
        """Return the outputs of our layers for the segment."""
        hidden = self.hidden
        for layer in self.layers:
            hidden, _ = layer(hidden, None, self.positions, None, past_key_values=self.cache)
        return hidden

    @torch.inference_mode()
    def plainly(self) -> Tensor:
        """Return the outputs of the textbook's layers."""
        hidden = self.hidden
        for layer, memory in zip(self.textbook, self.memories, strict=True):
            hidden = layer(hidden, memory, self.positions)
        return hidden


def run_once(shape: Shape, dtype: torch.dtype, name: str) -> None:
    """Run one implementation, for its peak memory."""
    evaluation = Evaluation(shape, dtype)
    evaluation.ours() if name == "ours" else evaluation.plainly()


def measure(shape: Shape, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Return the numbers of one row."""
    evaluation = Evaluation(shape, dtype)
    # Before any other call: each puts the segment's keys and values into the cache.
    ours, plainly = evaluation.ours().float(), evaluation.plainly().float()
    floor = Floor(shape, dtype, cached=True, backward=False)
    runs = {"ours": evaluation.ours, "textbook": evaluation.plainly, "floor": floor, "softmax": Softmax(shape, dtype)}
    seconds = medians(runs, repeats)
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
        "difference": float((ours - plainly).abs().max() / plainly.abs().max()),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, few repetitions: about a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    shapes = [*paper_shapes(2 if options.quick else 16), replace(DEMO, name="demo, dense, batch 16")]
    table = Table(title=f"evaluation: {machine()}")
    columns = ("ours ms", "textbook ms", "floor ms", "softmax ms", "ours/floor", "textbook/ours")
    for column in ("layers", "", *columns, "ours MB", "textbook MB", "difference"):
        table.add_column(column, justify="right")
    rows = []
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            row = measure(shape, dtype, 3 if options.quick else 15)
            rows.append(row)
            table.add_row(
                f"{row['shape']}, {row['layers']} layers",
                row["dtype"],
                *(f"{row['milliseconds'][name]:.1f}" for name in ("ours", "textbook", "floor", "softmax")),
                f"{row['over_floor']:.2f}",
                f"{row['times_textbook']:.2f}",
                *(f"{row['megabytes'][name]:.0f}" for name in IMPLEMENTATIONS),
                f"{row['difference']:.0e}",
            )
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
