"""Does pruning take as much memory as `training_memory` and `part_memory` estimate?

Each row trains gates on a CPU or, with `--parts`, ranks units, fits what is left, or recovers. The measured value is
the peak of memory that tensors hold, by torch's profiler. A process takes more, because libraries and its allocator
need some.

    python benchmarks/memory.py [--quick] [--json FILE]
    python benchmarks/memory.py --parts [--sizes 135M 500M …] [--only flap …] [--dtype bfloat16] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

import deadhead
from deadhead.data import TokenStream
from deadhead.measure.cost import skeleton
from deadhead.plans.kinds import ONE_SHOT, READS_TEXT
from deadhead.training import PhaseRun, PruneRecipe, attach_gates, train
from deadhead.training.phases.choosing import asked_choices, even_plan
from deadhead.training.phases.compensating import Compensating, calibration_of, dense_copy
from deadhead.training.phases.defaults import recovery
from deadhead.training.phases.ranking import rank
from deadhead.training.runs.part_memory import (
    fitting_memory,
    pruned_skeleton,
    ranking_memory,
    recovery_memory,
    weight_bytes,
)
from deadhead.training.runs.training_memory import TrainingMemory, training_memory


def _llama(width: int, hidden: int, layers: int, heads: int, groups: int, words: int) -> dict[str, int]:
    shape = {"hidden_size": width, "intermediate_size": hidden, "num_hidden_layers": layers, "vocab_size": words}
    return {**shape, "num_attention_heads": heads, "num_key_value_heads": groups}


MODELS = ("Llama", "GPT-2", "All-attention")
# Layers, width, words, rows, tokens of a row.
SHAPES = ((4, 256, 4096, 8, 256), (2, 128, 1024, 4, 64))
# Models in the manner of Llama, by about how many parameters they have.
SIZES = {
    "tiny": _llama(256, 704, 4, 8, 4, 4096),
    "135M": _llama(576, 1536, 30, 9, 3, 49152),
    "360M": _llama(960, 2560, 32, 15, 5, 49152),
    "500M": _llama(896, 4864, 24, 14, 2, 151936),
    "1.2B": _llama(2048, 8192, 16, 32, 8, 128256),
    "1.5B": _llama(1536, 8960, 28, 12, 2, 151936),
}
PARTS = (*READS_TEXT, "sizes", "fit", "recover", "recover with LoRA")
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


def peak_of(work: Callable[[], object]) -> int:
    """Return the peak of bytes that tensors hold while a function runs, beyond those held before."""
    # What was there before must not go away meanwhile.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    calls = (event for event in results.kineto_results.events() if event.name() == "[memory]")
    changes = torch.tensor([event.nbytes() for event in sorted(calls, key=lambda event: event.start_ns())])
    return int(changes.cumsum(0).max())


def compare(
    model: str, layers: int, width: int, words: int, rows: int, length: int, **settings: Any
) -> tuple[TrainingMemory, int]:
    """Train gates for two steps, and return the estimated and the measured peak in bytes."""
    config = configuration(model, layers, width, words, length)
    recipe = PruneRecipe(steps=2, batch_size=rows, sequence_length=length, sparsity=0.5, blocks=False, **settings)
    text = drawn(words, 3 * rows * length)
    formula = training_memory(skeleton(config), recipe)

    def work() -> None:
        made = AutoModelForCausalLM.from_config(config)
        train(made, text, recipe, PhaseRun(gates=attach_gates(made, recipe)))

    return formula, peak_of(work)


def drawn(words: int, count: int) -> TokenStream:
    """Return a text of random tokens."""
    tokens = np.random.default_rng(0).integers(words, size=count + 1).astype(np.uint16 if words < 2**16 else np.uint32)
    return TokenStream(tokens=tokens, num_bytes=len(tokens), num_words=len(tokens))


def compare_part(
    part: str, config: PreTrainedConfig, dtype: torch.dtype, *, rows: int = 4, length: int = 256, fitted: int = 64
) -> tuple[int, int]:
    """Run one part of pruning a model, and return the estimated and the measured peak in bytes.

    Args:
        part: a criterion that ranks units, "sizes", "fit", "recover" or "recover with LoRA".
        config: of the model, whose weights are random.
        dtype: of its weights.
        rows: of a batch.
        length: of a row.
        fitted: rows that compensation reads.
    """
    config.dtype = dtype
    criterion = part if part == "sizes" or part in ONE_SHOT else "magnitude"
    how: dict[str, Any] = {"lora_rank": 16} if part.endswith("LoRA") else {}
    recipe = PruneRecipe(params=0.8, criterion=criterion, steps=3, batch_size=rows, sequence_length=length, **how)
    recipe = recipe.model_copy(update={"compensate_rows": fitted})
    text = drawn(config.get_text_config().vocab_size, max(3 * rows, fitted) * length)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # What the measurement finds there already.
    there = weight_bytes(model)
    empty = skeleton(config).to(dtype)
    if criterion == part:
        return ranking_memory(empty, recipe), there + peak_of(lambda: rank(model, text, recipe))
    plan, _ = even_plan(model, asked_choices(model, recipe), recipe)
    pruned = pruned_skeleton(empty, recipe)
    if part == "fit":
        batches = calibration_of(model, text, recipe, seed=0)
        dense = dense_copy(model, recipe)
        deadhead.cut(model, plan)
        there = sum(each.nbytes for each in {*model.parameters(), *dense.parameters()})
        fitting = Compensating(dense, batches, "random")
        return fitting_memory(empty, pruned, recipe), there + peak_of(lambda: fitting.of(model, lambda *_: None))
    teacher = copy.deepcopy(model)
    deadhead.cut(model, plan)
    there = weight_bytes(model) + weight_bytes(teacher)
    phase = recovery(recipe, 2, model)
    found = peak_of(lambda: train(model, text, phase, PhaseRun(teacher=teacher)))
    return recovery_memory(empty, pruned, phase), there + found


def compare_parts(sizes: Sequence[str], parts: Sequence[str], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return the estimated and the measured peak for each size and part, each in a process of its own."""
    found = []
    for size in sizes:
        for part in parts:
            config = LlamaConfig(**SIZES[size], tie_word_embeddings=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                formula, measured = process.submit(compare_part, part, config, dtype).result()
            found.append({"size": size, "part": part, "formula": formula, "measured": measured})
            print(json.dumps(found[-1]), file=sys.stderr)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smaller shape only")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--parts", action="store_true", help="measure the parts of pruning, instead of training gates")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["135M"], help="sizes of the models, for --parts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of the weights, for --parts")
    options = parser.parse_args()
    if options.parts:
        found = compare_parts(["tiny"] if options.quick else options.sizes, options.only, getattr(torch, options.dtype))
        table = Table(
            "model", "part", "formula", "measured", "ratio", title=f"GB of tensors, {options.dtype}", box=None
        )
        for one in found:
            sizes = (f"{one['formula'] / 1e9:.2f}", f"{one['measured'] / 1e9:.2f}")
            table.add_row(one["size"], one["part"], *sizes, f"{one['formula'] / one['measured']:.2f}")
        Console(width=120).print(table)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return
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
