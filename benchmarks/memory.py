"""Does training take the memory that `training_memory` says it will, without the weights?

Each row trains gates on a CPU for a few steps, in a process of its own that has trained a tiny model of the same kind
before, so that libraries are loaded. Measured is the most memory that the process holds, less what it held before the
model was made. It is measured twice: as it is, and with an allocator that takes every larger tensor from the system and
gives it back (glibc's with a low, fixed threshold for mmap), so that nothing is lost to pieces of a heap that are free
and do not fit. The second is what tensors hold, which is what can be counted on paper.

    python benchmarks/memory.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deadhead.training import PhaseRun, PruneRecipe, attach_gates

# A process begins with the most memory that its parent ever held, so here nothing large is imported.

BATCH, LENGTH, RANK = 8, 256, 16
# Models with segment memory need most in a step that measures heads and is not the first, whose memory is empty.
STEPS, STEPS_WITH_MEMORY = 3, 11
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    },
    "GPT-2": {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8192},
    "All-attention": {
        "model_type": "deadhead_all_attention",
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_persistent": 1024,
        "memory_length": LENGTH,
        "segment_length": LENGTH,
        "attention_dropout": 0.1,
        "vocab_size": 8192,
    },
}
_TINY = {"hidden_size": 32, "n_embd": 32, "intermediate_size": 32, "num_persistent": 8}
_TINY |= {"num_hidden_layers": 1, "n_layer": 1, "vocab_size": 512}
_WHOLE_TENSORS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return what is measured: models, what learns, and settings."""
    checkpointing = {"gradient_checkpointing": True}
    if quick:
        return [{"model": "Llama", "mode": "frozen"}, {"model": "Llama", "mode": "frozen", **checkpointing}]
    found: list[dict[str, Any]] = []
    for model in MODELS:
        for mode in ("full", "lora", "frozen"):
            if mode != "lora" or model != "All-attention":
                found += [{"model": model, "mode": mode}, {"model": model, "mode": mode, **checkpointing}]
    found.append({"model": "Llama", "mode": "full", "blocks": True})
    found.append({"model": "Llama", "mode": "full", "bf16": True})
    found.append({"model": "Llama", "mode": "frozen", "dtype": "bfloat16"})
    return found


def highest() -> int:
    """Return the most memory that this process ever held, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def held() -> int:
    """Return what memory this process holds, in bytes, or the most it ever held where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else highest()


def measure(model: str, mode: Any, dtype: str = "float32", **settings: bool) -> dict[str, Any]:
    """Return what training takes on paper, what it took, in bytes, and the machine."""
    import numpy as np
    from _all_attention import machine
    from transformers import AutoConfig, AutoModelForCausalLM

    import deadhead
    from deadhead.data import TokenStream
    from deadhead.measure.memory import training_memory

    def config(**sizes: Any) -> Any:
        return AutoConfig.for_model(**{**MODELS[model], **sizes}, dtype=dtype)

    steps = STEPS_WITH_MEMORY if "memory_length" in MODELS[model] else STEPS
    recipe = PruneRecipe(
        steps=steps,
        batch_size=BATCH,
        sequence_length=LENGTH,
        sparsity=0.5,
        lora_rank=RANK if mode == "lora" else 0,
        freeze_weights=mode == "frozen",
        **settings,  # type: ignore[arg-type]
    )

    def train(**sizes: Any) -> None:
        made = AutoModelForCausalLM.from_config(config(**sizes))
        tokens = np.random.default_rng(0).integers(made.config.vocab_size, size=BATCH * LENGTH * (steps + 1))
        text = TokenStream(tokens=tokens.astype(np.uint16), num_bytes=len(tokens), num_words=len(tokens))
        deadhead.training.train(made, text, recipe, PhaseRun(gates=attach_gates(made, recipe)))

    paper = training_memory(config(), mode=mode, batch_size=BATCH, length=LENGTH, lora_rank=RANK, **settings)
    train(**{name: size for name, size in _TINY.items() if name in MODELS[model]})
    gc.collect()
    before, start = held(), time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    return {"paper": vars(paper), "measured": highest() - before, "seconds": seconds, "machine": machine()}


def in_process(row: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Measure a row in a process of its own."""
    command = [sys.executable, __file__, "--row", json.dumps(row)]
    settings = {**os.environ, **environment, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"The row {row} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _mega(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measure(**json.loads(options.row))))
        return
    found = []
    for row in rows(options.quick):
        whole, plain = in_process(row, **_WHOLE_TENSORS), in_process(row)
        found.append(
            {
                **row,
                "paper": plain["paper"],
                "tensors": whole["measured"],
                "process": plain["measured"],
                "slower": whole["seconds"] / plain["seconds"] - 1,
            }
        )
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    table = Table(title=f"MB, batch {BATCH} × {LENGTH}: {plain['machine']}", box=None)
    for name in ("model", "learns", "settings"):
        table.add_column(name)
    for name in (*parts, "tensors", "÷ total", "process", "÷ total"):
        table.add_column(name, justify="right")
    for row in found:
        total = row["paper"]["total"]
        settings = [name for name in ("gradient_checkpointing", "blocks", "bf16") if row.get(name)]
        settings += [f"in {row['dtype']}"] if "dtype" in row else []
        table.add_row(
            row["model"],
            row["mode"],
            ", ".join(settings).replace("gradient_", ""),
            *(_mega(row["paper"][part]) for part in parts),
            *(_mega(row["tensors"]), f"{row['tensors'] / total:.2f}"),
            *(_mega(row["process"]), f"{row['process'] / total:.2f}"),
        )
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
