"""Does a cut model get as much faster as the removed FLOPs allow?

Times dense and cut models, interleaved within one run, for several shares of heads kept: whole All-attention models,
and the attention modules of a 12-layer Llama with grouped queries (without its feed-forward layers, which are not cut).
Prints medians, speedups and efficiency (measured speedup ÷ speedup that the FLOPs allow). Decoding with one text is
bound by reading weights and by the calls themselves rather than by FLOPs.

    python benchmarks/cut_speed.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _all_attention import DEMO, PAPER, Shape, build, machine, medians
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

import deadhead
from deadhead.measure.timing import WORKLOADS, Workload, bench, efficiency

KEPT = (8, 6, 4, 2)
LLAMA = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 12}
# Batch and length of prefill and training; decoding goes on after as long a text.
LLAMA_BATCH, LLAMA_LENGTH, NEW_TOKENS = 4, 256, 8


def cut_to(model: PreTrainedModel, kept: int) -> PreTrainedModel:
    """Return a copy with the first `kept` of the 8 heads or key/value groups of every layer."""
    if kept == 8:
        return model
    layers = range(model.config.num_hidden_layers)
    unit: Any = "kv_group" if isinstance(model, LlamaForCausalLM) else "head"
    plan = deadhead.HeadPlan(kept=dict.fromkeys(layers, range(kept)), total=dict.fromkeys(layers, 8), unit=unit)
    return deadhead.cut(copy.deepcopy(model), plan)


def rows(
    name: str, workload: str, seconds: dict[int, float], flops: dict[int, float]
) -> Iterable[dict[str, str | float]]:
    """Yield the numbers of each share of heads kept."""
    for kept, value in seconds.items():
        yield {
            "shape": name,
            "workload": workload,
            "kept": kept,
            "flops_removed": 1 - flops[kept] / flops[8],
            "milliseconds": value * 1e3,
            "speedup": seconds[8] / value,
            "allowed": flops[8] / flops[kept],
            "efficiency": efficiency(seconds[8], value, flops[8], flops[kept]),
        }


def all_attention(shape: Shape, repeats: int) -> Iterable[dict[str, str | float]]:
    """Yield the rows of whole All-attention models."""
    dense = build(shape).eval()
    models = {str(kept): cut_to(dense, kept) for kept in KEPT}
    for workload in WORKLOADS:
        timings = bench(models, workload=workload, batch_size=shape.batch, length=shape.length, repeats=repeats)
        # Without a past every query sees half a segment on average, so the count is taken there.
        past = shape.length if workload == "decode" else shape.length // 2
        flops = {kept: deadhead.model_cost(models[str(kept)], length=past).flops_per_token for kept in KEPT}
        yield from rows(shape.name, workload, {kept: timings[str(kept)].seconds for kept in KEPT}, flops)


class Attention:
    """The attention modules of a Llama, one after the other, on random hidden states."""

    def __init__(self, model: PreTrainedModel, workload: Workload, batch: int) -> None:
        self.stack, self.workload = model.model, workload
        self.length = 1 if workload == "decode" else LLAMA_LENGTH
        self.hidden = torch.randn(batch, self.length, model.config.hidden_size)
        self.batch = batch
        self.cache: DynamicCache | None = None

    def forward(self, hidden: Tensor, start: int) -> Tensor:
        """Return the sum of what the modules return."""
        positions = torch.arange(start, start + hidden.shape[1])[None]
        embeddings = self.stack.rotary_emb(hidden, positions)
        outputs = [
            layer.self_attn(hidden, position_embeddings=embeddings, attention_mask=None, past_key_values=self.cache)[0]
            for layer in self.stack.layers
        ]
        return torch.stack(outputs).sum(0)

    def __call__(self) -> None:
        """Run the workload once."""
        if self.workload == "train":
            modules = [layer.self_attn for layer in self.stack.layers]
            parameters = [parameter for module in modules for parameter in module.parameters()]
            torch.autograd.grad(self.forward(self.hidden, 0).sum(), parameters)
            return
        with torch.inference_mode():
            if self.workload == "prefill":
                self.forward(self.hidden, 0)
                return
            for token in range(NEW_TOKENS):
                self.forward(self.hidden, LLAMA_LENGTH + token)

    def prepare(self) -> None:
        """Fill a cache before decoding."""
        if self.workload == "decode":
            self.cache = DynamicCache()
            with torch.inference_mode():
                self.forward(self.hidden.expand(-1, LLAMA_LENGTH, -1), 0)


def llama(repeats: int) -> Iterable[dict[str, str | float]]:
    """Yield the rows of a Llama's attention."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**LLAMA, intermediate_size=64, vocab_size=64)).eval()
    models = {kept: cut_to(dense, kept) for kept in KEPT}
    kinds: list[tuple[Workload, int]] = [
        ("prefill", LLAMA_BATCH),
        ("decode", 1),
        ("decode", 16),
        ("train", LLAMA_BATCH),
    ]
    for workload, batch in kinds:
        runs = {kept: Attention(model, workload, batch) for kept, model in models.items()}
        past = LLAMA_LENGTH if workload == "decode" else LLAMA_LENGTH // 2
        flops = {kept: deadhead.model_cost(m, length=past).attention_flops_per_token for kept, m in models.items()}
        names: dict[str, Callable[[], Any]] = {str(kept): run for kept, run in runs.items()}
        prepare: dict[str, Callable[[], Any]] = {str(kept): run.prepare for kept, run in runs.items()}
        seconds = medians(names, repeats, prepare)
        name = f"Llama's attention, batch {batch}"
        yield from rows(name, workload, {int(key): value for key, value in seconds.items()}, flops)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, about a minute")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    repeats = 5 if options.quick else 20
    table = Table(title=f"cut models, float32, medians of {repeats}: {machine()}")
    columns = ("workload", "heads kept", "FLOPs removed", "ms", "speedup", "FLOPs allow", "efficiency")
    for column in ("model", *columns):
        table.add_column(column, justify="right")
    shapes = [
        replace(DEMO, name="demo"),
        replace(PAPER, name="paper, 4 of its 16 layers", heads=(8,) * 4, attention_dropout=0.0, hidden_dropout=0.0),
    ]
    found = [row for shape in shapes for row in all_attention(shape, repeats)]
    found += llama(repeats)
    for row in found:
        table.add_row(
            str(row["shape"]),
            str(row["workload"]),
            f"{row['kept']}/8",
            f"{row['flops_removed']:.0%}",
            f"{row['milliseconds']:.1f}",
            *(f"{row[name]:.2f}" for name in ("speedup", "allowed", "efficiency")),
        )
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
