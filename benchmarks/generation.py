"""How near is generating a token to the time of reading the weights once?

Generates token by token after a context that fills the memory, interleaved within one run: a dense All-attention model
and cut ones, for batches of 1, 4 and 16. The floor is the time in which this machine moves as many bytes as the weights
have, at the bandwidth of a plain copy in the same run (bytes read and bytes written). `generate` is transformers' own
loop around the same steps. For larger batches the products take longer than reading, so the time of the products alone
is their floor.

    python benchmarks/generation.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _all_attention import DEMO, PAPER, Shape, build, machine, medians
from rich.console import Console
from rich.table import Table
from torch import Tensor

import deadhead

BATCHES = (1, 4, 16)
KEPT = (8, 4, 2)
# Tokens of one timed run, so that a timer's call does not count.
TOKENS = 8
# Much more than any cache holds.
COPIED_BYTES = 2**28


class Generation:
    """Token-by-token generation with keys and values in a cache."""

    def __init__(self, model: deadhead.models.AllAttentionForCausalLM, batch: int) -> None:
        self.model = model.eval()
        length = model.config.memory_length
        self.ids = torch.randint(model.config.vocab_size, (batch, length + 1))
        with torch.inference_mode():
            self.cache = model(input_ids=self.ids[:, :-1], use_cache=True).past_key_values

    @torch.inference_mode()
    def step(self) -> None:
        """Read some tokens, one at a time."""
        for _ in range(TOKENS):
            self.model(input_ids=self.ids[:, -1:], past_key_values=self.cache, use_cache=True)

    def generate(self) -> Tensor:
        """Generate as many tokens by transformers' own loop."""
        prompt = self.ids[:, :1]
        return self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0
        )


class Copy:
    """A copy from memory to memory."""

    def __init__(self) -> None:
        self.source = torch.zeros(COPIED_BYTES, dtype=torch.uint8)
        self.target = torch.ones_like(self.source)

    def __call__(self) -> None:
        """Copy."""
        self.target.copy_(self.source)


class Products:
    """The products of one token's rows with every weight matrix of a model, and nothing else."""

    def __init__(self, model: deadhead.models.AllAttentionForCausalLM, batch: int) -> None:
        self.pairs = []
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or any(part in name for part in ("r_proj", "position", "content_bias")):
                continue
            matrices = weight.detach() if weight.ndim == 3 else weight.detach()[None]
            if name.endswith("persistent_v"):
                matrices = matrices.transpose(1, 2)
            self.pairs.append((matrices, torch.randn(len(matrices), matrices.shape[2], max(batch, 2))))

    @torch.inference_mode()
    def __call__(self) -> None:
        """Multiply."""
        for matrices, columns in self.pairs:
            torch.bmm(matrices, columns)


def read_bytes(model: deadhead.models.AllAttentionForCausalLM) -> int:
    """Return the bytes of the weights that a token needs: W_R p is kept, so W_R and p are not read again."""
    left_out = ("r_proj", "position_table")
    return sum(p.nbytes for name, p in model.named_parameters() if not any(part in name for part in left_out))


def measure(shape: Shape, batch: int, repeats: int) -> list[dict[str, Any]]:
    """Return the numbers of dense and cut models at one batch."""
    dense = build(shape)
    layers = range(len(shape.heads))
    models = {}
    for kept in KEPT:
        plan = deadhead.HeadPlan(kept={layer: range(kept) for layer in layers}, total=dict.fromkeys(layers, 8))
        models[kept] = deadhead.cut(copy.deepcopy(dense), plan) if kept < 8 else dense
    generations = {kept: Generation(model, batch) for kept, model in models.items()}
    runs: dict[str, Any] = {"copy": Copy()}
    for kept, generation in generations.items():
        runs |= {f"{kept} step": generation.step, f"{kept} generate": generation.generate}
        runs[f"{kept} products"] = Products(models[kept], batch)
    seconds = medians(runs, repeats)
    bandwidth = 2 * COPIED_BYTES / seconds["copy"]
    rows = []
    for kept, model in models.items():
        step, reading = seconds[f"{kept} step"] / TOKENS, read_bytes(model) / bandwidth
        flops = [deadhead.model_cost(models[key]).flops_per_token for key in (8, kept)]
        speedup = seconds["8 step"] / TOKENS / step
        rows.append(
            {
                "shape": shape.name,
                "batch": batch,
                "kept": kept,
                "megabytes": read_bytes(model) / 1e6,
                "gigabytes_per_second": bandwidth / 1e9,
                "milliseconds": step * 1e3,
                "generate_milliseconds": seconds[f"{kept} generate"] / TOKENS * 1e3,
                "reading_milliseconds": reading * 1e3,
                "products_milliseconds": seconds[f"{kept} products"] * 1e3,
                "over_reading": step / reading,
                "over_products": step / seconds[f"{kept} products"],
                "efficiency": speedup / (flops[0] / flops[1]),
            }
        )
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four layers, few repetitions: about a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    shapes = [
        replace(PAPER, name="paper", heads=(8,) * (4 if options.quick else 16)),
        replace(DEMO, name="demo"),
    ]
    table = Table(title=f"a token, float32: {machine()}")
    columns = (
        "batch",
        "heads",
        "MB read",
        "ms",
        "generate ms",
        "reading ms",
        "products ms",
        "ms/reading",
        "ms/products",
    )
    for column in ("model", *columns, "efficiency"):
        table.add_column(column, justify="right")
    rows = []
    for shape in shapes:
        for batch in BATCHES:
            for row in measure(shape, batch, 5 if options.quick else 15):
                rows.append(row)
                table.add_row(
                    row["shape"],
                    str(batch),
                    f"{row['kept']}/8",
                    f"{row['megabytes']:.1f}",
                    *(f"{row[name]:.2f}" for name in ("milliseconds", "generate_milliseconds")),
                    *(f"{row[name]:.2f}" for name in ("reading_milliseconds", "products_milliseconds")),
                    *(f"{row[name]:.2f}" for name in ("over_reading", "over_products", "efficiency")),
                )
    console = Console(width=150)
    console.print(table)
    console.print(f"A copy moves {rows[0]['gigabytes_per_second']:.1f} GB/s, read and written.")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
