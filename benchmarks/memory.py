"""Does training take the memory that `training_memory` says it will?

Each row trains gates on a CPU. Measured is the peak of what tensors hold, by torch's profiler. A process takes more, as
libraries and its allocator need some.

    python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from deadhead.data import TokenStream
from deadhead.measure.cost import skeleton
from deadhead.training import PhaseRun, PruneRecipe, attach_gates, train
from deadhead.training.runs.dry_run import TrainingMemory, training_memory

MODELS = ("Llama", "GPT-2", "All-attention")
# Layers, width, words, rows, tokens of a row.
SHAPES = ((4, 256, 4096, 8, 256), (2, 128, 1024, 4, 64))
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"bf16": True},
    {"lora_rank": 16},
    {"freeze_weights": True},
)


def configuration(model: str, layers: int, width: int, words: int, length: int) -> PreTrainedConfig:
    """Return the configuration of one of the models."""
    special: dict[str, Any] = {"vocab_size": words, "bos_token_id": 0, "eos_token_id": 1}
    if model == "GPT-2":
        return AutoConfig.for_model("gpt2", n_embd=width, n_layer=layers, n_head=8, **special)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8, **special}
    if model == "Llama":
        return AutoConfig.for_model("llama", **sizes, num_key_value_heads=4, intermediate_size=11 * width // 4)
    lengths = {"memory_length": length, "segment_length": length, "num_persistent": 2 * width}
    return AutoConfig.for_model("deadhead_all_attention", **sizes, **lengths, attention_dropout=0.1)


def compare(
    model: str, layers: int, width: int, words: int, rows: int, length: int, **settings: Any
) -> tuple[TrainingMemory, int]:
    """Train gates for two steps, and return what the formula says, and the measured peak in bytes."""
    config = configuration(model, layers, width, words, length)
    recipe = PruneRecipe(steps=2, batch_size=rows, sequence_length=length, sparsity=0.5, blocks=False, **settings)
    tokens = np.random.default_rng(0).integers(words, size=3 * rows * length + 1).astype(np.uint16)
    text = TokenStream(tokens=tokens, num_bytes=len(tokens), num_words=len(tokens))
    formula = training_memory(skeleton(config), recipe)
    # What was there before must not go away meanwhile.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = AutoModelForCausalLM.from_config(config)
        train(made, text, recipe, PhaseRun(gates=attach_gates(made, recipe)))
    results: Any = profiler.profiler
    calls = (event for event in results.kineto_results.events() if event.name() == "[memory]")
    changes = torch.tensor([event.nbytes() for event in sorted(calls, key=lambda event: event.start_ns())])
    return formula, int(changes.cumsum(0).max())


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller shape alone")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    table = Table(title="MB of tensors", box=None)
    for name in ("model", "layers, width, words, rows, tokens", "settings"):
        table.add_column(name)
    for name in ("formula", "measured", "ratio"):
        table.add_column(name, justify="right")
    found = []
    for model in MODELS:
        for shape in SHAPES[options.quick :]:
            for settings in SETTINGS:
                if model == "All-attention" and "lora_rank" in settings:
                    continue
                formula, measured = compare(model, *shape, **settings)
                found.append({"model": model, "shape": shape, **settings, "measured": measured, **vars(formula)})
                sizes = (f"{formula.total / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{formula.total / measured:.2f}")
                table.add_row(model, ", ".join(map(str, shape)), ", ".join(settings), *sizes)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
