"""What does a loss cost in time and memory if its logits are computed a chunk at a time?

Three tables, each measured interleaved within one run:

1. the output layer alone, forward and backward: all logits at once, in chunks, PyTorch's own `linear_cross_entropy`
   where there is one, and the floor (the three products of logits and both gradients, into memory that is already
   allocated);
2. forward and backward of a whole model, with the peak memory of a fresh process: a Llama of SmolLM2-135M's sizes with
   random weights, or `--model`;
3. the same for a model with a vocabulary of some hundreds, which has few logits: both ways are the same, and equally
   fast.

    python benchmarks/loss.py [--quick] [--model FOLDER_OR_FILE.gguf] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _all_attention import machine, medians, peak_megabytes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from deadhead.measure import chunks
from deadhead.measure.last_states import nll
from deadhead.measure.losses import SegmentLoss

WORDS, WIDTH = 49_152, 576
SIZES = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL = SIZES | {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH = 256
# Logits that are held at once.
WAYS = {"at once": 2**62, "in chunks": chunks.AT_ONCE}


@contextmanager
def way(name: str) -> Iterator[None]:
    """While the block runs, compute losses in one of the two ways."""
    chunks.AT_ONCE = WAYS[name]
    try:
        yield
    finally:
        chunks.AT_ONCE = WAYS["in chunks"]


class OutputLayer:
    """Forward and backward of one output layer on random states."""

    def __init__(self, tokens: int) -> None:
        self.states = torch.randn(tokens, WIDTH, requires_grad=True)
        self.weight = (torch.randn(WORDS, WIDTH) / WIDTH**0.5).requires_grad_()
        self.wanted = torch.randint(WORDS, (tokens,))
        self.logits = torch.empty(tokens, WORDS)
        self.gradients = torch.empty_like(self.states), torch.empty_like(self.weight)

    def learn(self, loss: Tensor) -> None:
        """Compute the gradients."""
        torch.autograd.grad(loss, (self.states, self.weight))

    def sums(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Return the loss of some tokens."""
        return nll(functional.linear(states, self.weight), wanted)[None]

    def run(self, name: str) -> None:
        """Compute loss and gradients one way."""
        with way(name):
            weights = (self.weight,)
            self.learn(chunks.sum_in_chunks(self.sums, self.states, (self.wanted,), width=WORDS, weights=weights)[0])

    def run_torch(self) -> None:
        """Compute them as PyTorch does."""
        options: Any = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
        fused: Any = functional.linear_cross_entropy  # type: ignore[attr-defined]
        self.learn(fused(self.states, self.weight, self.wanted, reduction="sum", options=options))

    def floor(self) -> None:
        """Multiply only."""
        with torch.no_grad():
            torch.mm(self.states, self.weight.T, out=self.logits)
            torch.mm(self.logits, self.weight, out=self.gradients[0])
            torch.mm(self.logits.T, self.states, out=self.gradients[1])


def output_layer(tokens: int, repeats: int) -> dict[str, float]:
    """Return the seconds of each way."""
    layer = OutputLayer(tokens)
    runs: dict[str, Callable[[], None]] = {name: lambda name=name: layer.run(name) for name in WAYS}
    if hasattr(functional, "linear_cross_entropy"):
        runs["torch's own"] = layer.run_torch
    return medians(runs | {"floor": layer.floor}, repeats)


def build(source: str | None, *, small: bool = False) -> PreTrainedModel:
    """Return the model whose steps are measured."""
    if source is not None:
        return deadhead.load(source).float().train()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SMALL if small else SIZES))).train()


class Step:
    """Forward and backward, into gradients that are already allocated."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model = model
        self.loss = {name: SegmentLoss(model) for name in WAYS}
        self.inputs = {"input_ids": torch.randint(model.config.vocab_size, (rows, LENGTH))}

    def __call__(self, name: str) -> None:
        """Take a step."""
        with way(name):
            self.loss[name](self.model, self.inputs).loss.backward()


def run_once(source: str | None, rows: int, name: str) -> None:
    """Take two steps, for their peak memory: in the second step gradients are already allocated."""
    step = Step(build(source), rows)
    for _ in range(2):
        step(name)


def whole_step(source: str | None, rows: int, repeats: int, *, small: bool = False) -> dict[str, Any]:
    """Return the seconds and the peak of both ways."""
    step = Step(build(source, small=small), rows)
    seconds = medians({name: lambda name=name: step(name) for name in WAYS}, repeats)
    found: dict[str, Any] = {"tokens": rows * LENGTH, "words": step.model.config.vocab_size, "seconds": seconds}
    if not small:
        found["megabytes"] = {name: peak_megabytes(run_once, source, rows, name) for name in WAYS}
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few tokens, few repetitions")
    parser.add_argument("--model", help="measure the steps of this model")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    console, repeats, rows = Console(width=120), 3 if options.quick else 7, 2 if options.quick else 8
    layer = output_layer(rows * LENGTH, repeats)
    table = Table(title=f"output layer, {rows * LENGTH:,} tokens × {WORDS:,} words, float32: {machine()}")
    for column in layer:
        table.add_column(f"{column} ms", justify="right")
    table.add_row(*(f"{seconds * 1e3:.0f}" for seconds in layer.values()))
    table.add_row(*(f"{seconds / layer['floor']:.2f} × floor" for seconds in layer.values()))
    console.print(table)
    steps = {
        options.model or "Llama, 134.5 M": whole_step(options.model, rows, max(1, repeats // 3)),
        "small Llama": whole_step(None, 4, 10 * repeats, small=True),
    }
    table = Table(title="forward and backward of a model")
    for column in ("model", "tokens × words", *(f"{name} ms" for name in WAYS), "ratio", *(f"{n} MB" for n in WAYS)):
        table.add_column(column, justify="right")
    for name, found in steps.items():
        at_once, in_chunks = found["seconds"].values()
        table.add_row(
            name,
            f"{found['tokens']:,} × {found['words']:,}",
            f"{at_once * 1e3:.1f}",
            f"{in_chunks * 1e3:.1f}",
            f"{at_once / in_chunks:.3f}",
            *(f"{value:.0f}" for value in found.get("megabytes", {}).values()),
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"layer": layer, "steps": steps}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
