"""Budgets asked for against budgets reached, and their cost in perplexity.

Three small language models (our All-attention Transformer, a GPT-2, a Llama with grouped queries) are trained once on
the source of the Python standard library as bytes, and kept. For each budget, gates are trained under it, and the model
is cut and fine-tuned. "Reached" is counted on the cut model. A speedup is measured again afterwards, interleaved with
the dense model. --table prints the results so far; --layers compares heads alone, blocks alone and both at equal FLOPs.

    python benchmarks/budgets.py [--quick] [--out DIR] [--models …] [--budgets params=0.5 …] [--table]

Every point is a file in DIR/points, so a stopped sweep continues where it was. Speedups are measured after all other
points, with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import deadhead
from benchmarks._all_attention import machine
from benchmarks._sweep import run_all
from deadhead.data import TokenizedCorpus, load_text
from deadhead.disk.files import write_json
from deadhead.measure.costs import Cost
from deadhead.measure.timing import bench
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, attach_gates, close_to_budget

MODELS = ("all-attention", "gpt2", "llama-gqa")
BUDGETS = ("sparsity=0.5", "params=0.75", "params=0.5", "flops=0.5", "kv_cache=0.5", "speedup=1.5", "speedup=2")
# The same FLOPs by heads alone and by heads and blocks: what cutting heads alone can reach.
LAYERS = ("flops=0.85 heads", "flops=0.85 both", "flops=0.75 heads", "flops=0.75 both")
_LENGTH, _BATCH = 128, 8
# To be raised with whatever else changes the figures: points of another version are measured anew.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Steps of every phase, and tokens measured."""

    dense: int = 2000
    gates: int = 200
    finetune: int = 200
    tokens: int = 40_000
    timed: int = 40


QUICK = Steps(dense=20, gates=6, finetune=4, tokens=1000, timed=3)


def fresh(name: str, vocab_size: int) -> PreTrainedModel:
    """Return an untrained model of 4 layers with 8 heads, or 4 groups of 2 query heads, each."""
    set_seed(0)
    if name == "all-attention":
        return deadhead.models.AllAttentionForCausalLM(
            deadhead.models.AllAttentionConfig(
                vocab_size=vocab_size,
                hidden_size=256,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_persistent=512,
                memory_length=64,
                segment_length=64,
            )
        )
    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        sizes = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 256}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0))
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )


def phase(name: str, **values: Any) -> dict[str, Any]:
    """Return the fields of a phase's recipe: 512 tokens a batch for every model."""
    rows = {"batch_size": 8} if name == "all-attention" else {"batch_size": 4, "sequence_length": _LENGTH}
    return {**rows, "adam_beta2": 0.99, "save_every": 0, "log_every": 100, **values}


def _text(out: Path) -> tuple[TokenizedCorpus, int]:
    text, tokenizer = load_text("stdlib", tokenizer="byte", cache_dir=out / "tokens")
    return text, len(tokenizer)


def train_dense(name: str, steps: Steps, out: Path) -> None:
    """Train and keep a dense model, and record its perplexity after as many more steps as pruned models take."""
    text, vocab_size = _text(out)
    model = fresh(name, vocab_size)
    rate = 2e-3 if name == "all-attention" else 1e-3
    first = phase(name, steps=steps.dense, learning_rate=rate, warmup_steps=steps.dense // 10, schedule="cosine")
    deadhead.training.train(model, text.splits["train"], PhaseRecipe(**first))
    deadhead.save(model, out / "dense" / name)
    further = _further(name, steps, steps.gates + steps.finetune)
    deadhead.training.train(model, text.splits["train"], further, PhaseRun(seed=2, first_segment=steps.dense))
    write_json(out / f"dense-{name}.json", {"perplexity": _perplexity(model, text, steps), "version": _VERSION})


def _further(name: str, steps: Steps, count: int) -> PhaseRecipe:
    values = phase(name, steps=count, learning_rate=5e-4, warmup_steps=min(20, count // 4), schedule="cosine")
    return PhaseRecipe(**values)


def _perplexity(model: PreTrainedModel, text: TokenizedCorpus, steps: Steps) -> float:
    window = None if hasattr(model.config, "memory_length") else _LENGTH
    return deadhead.evaluate(model, text.splits["test"], limit=steps.tokens, window=window).perplexity


def measure(name: str, budget: str, steps: Steps, out: Path) -> None:
    """Prune a model under a budget, cut, measure, fine-tune, measure, and write the point."""
    begun = time.perf_counter()
    text, _ = _text(out)
    train = text.splits["train"]
    asked, _, units = budget.partition(" ")
    kind, _, value = asked.partition("=")
    choice: dict[str, Any] = {kind: float(value), "budget_length": _LENGTH, "budget_batch_size": _BATCH}
    if units:
        choice["blocks"] = units == "both"
    recipe = PruneRecipe(**phase(name, steps=steps.gates, learning_rate=5e-4, **choice))
    model = deadhead.load(out / "dense" / name)
    dense_cost = deadhead.model_cost(model, length=_LENGTH)
    gates = attach_gates(model, recipe)
    deadhead.training.train(model, train, recipe, PhaseRun(gates=gates, seed=1, first_segment=steps.dense))
    found = close_to_budget(model, gates, recipe)
    deadhead.cut(model, gates.plan())
    cost = deadhead.model_cost(model, length=_LENGTH)
    before = _perplexity(model, text, steps)
    further = _further(name, steps, steps.finetune)
    deadhead.training.train(model, train, further, PhaseRun(seed=2, first_segment=steps.dense + steps.gates))
    point = {
        "model": name,
        "budget": budget,
        "kind": kind,
        "asked": float(value),
        "said": found,
        "reached": _reached(kind, model, dense_cost, cost, name, steps, out),
        "heads": cost.heads,
        "total_heads": cost.total_heads,
        "hidden_units": cost.hidden_units,
        "total_hidden_units": cost.total_hidden_units,
        "parameters": cost.parameters / dense_cost.parameters,
        "flops": cost.flops_per_token / dense_cost.flops_per_token,
        "before": before,
        "after": _perplexity(model, text, steps),
        "seconds": round(time.perf_counter() - begun, 1),
        **_settings(steps),
    }
    write_json(_file(out, name, budget), point)


def _reached(
    kind: str,
    model: PreTrainedModel,
    dense: Cost,
    cost: Cost,
    name: str,
    steps: Steps,
    out: Path,
) -> float:
    if kind == "speedup":
        models = {"dense": deadhead.load(out / "dense" / name), "pruned": model}
        timings = bench(models, batch_size=_BATCH, length=_LENGTH, repeats=steps.timed)
        return timings["dense"].seconds / timings["pruned"].seconds
    return {
        "sparsity": 1 - sum(cost.heads) / sum(cost.total_heads),
        "params": cost.parameters / dense.parameters,
        "flops": cost.flops_per_token / dense.flops_per_token,
        "kv_cache": cost.kv_cache_bytes / dense.kv_cache_bytes,
    }[kind]


def _settings(steps: Steps) -> dict[str, Any]:
    return {"version": _VERSION, "steps": asdict(steps)}


def _file(out: Path, name: str, budget: str) -> Path:
    return out / "points" / f"{name} {budget}.json".replace(" ", "-").replace("=", "-")


def _is_measured(path: Path, steps: Steps) -> bool:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return all(kept.get(key) == value for key, value in _settings(steps).items())


def sweep(models: Sequence[str], budgets: Sequence[str], steps: Steps, out: Path, jobs: int, console: Console) -> None:
    """Train the missing dense models, then measure the missing points; timed points come last, one at a time."""
    (out / "points").mkdir(parents=True, exist_ok=True)
    _text(out)
    dense = [(name, steps, out) for name in models if not (out / f"dense-{name}.json").exists()]
    run_all(train_dense, dense, jobs=jobs, what="dense models", console=console)
    todo = [
        (name, budget, steps, out)
        for budget in budgets
        for name in models
        if not _is_measured(_file(out, name, budget), steps)
    ]
    timed = [call for call in todo if call[1].startswith("speedup")]
    run_all(measure, [call for call in todo if call not in timed], jobs=jobs, what="points", console=console)
    run_all(measure, timed, jobs=1, what="timed points", console=console, threads=os.cpu_count() or 1)


def table(out: Path) -> str:
    """Return Markdown: by model and budget, what was asked, reached and left, and perplexity against dense."""
    points = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "points").glob("*.json"))]
    lines = []
    for name in MODELS:
        here = {point["budget"]: point for point in points if point["model"] == name}
        path = out / f"dense-{name}.json"
        if not here or not path.exists():
            continue
        dense = json.loads(path.read_text(encoding="utf-8"))["perplexity"]
        lines += [
            f"### {name}: dense {dense:.3f}",
            "",
            "| asked | reached | heads left | hidden units left | parameters | FLOPs | perplexity | against dense |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for budget in [b for b in (*BUDGETS, *LAYERS) if b in here]:
            point = here[budget]
            # Only heads have gates in the All-attention model unless blocks are asked for.
            has_hidden = point["hidden_units"] and name != "all-attention"
            hidden = f"{sum(point['hidden_units'])}/{sum(point['total_hidden_units'])}" if has_hidden else ""
            cells = (
                budget,
                f"{point['reached']:.3f}",
                f"{sum(point['heads'])}/{sum(point['total_heads'])}",
                hidden,
                f"{point['parameters']:.0%}",
                f"{point['flops']:.0%}",
                f"{point['before']:.3f} → {point['after']:.3f}",
                f"{point['after'] / dense - 1:+.1%}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if points:
        counted = [p["reached"] - p["asked"] for p in points if p["kind"] in ("params", "flops", "kv_cache")]
        timed = [p["reached"] / p["asked"] for p in points if p["kind"] == "speedup"]
        if counted:
            lines.append(f"Counted budgets: reached − asked from {min(counted):+.4f} to {max(counted):+.4f}.")
        if timed:
            lines.append(
                f"Speedups: reached ÷ asked from {min(timed):.3f} to {max(timed):.3f}, median "
                f"{statistics.median(timed):.3f}."
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of two budgets, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/budgets"), help="folder for models and points")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS, help="KIND=VALUE, followed by ' heads' or ' both'")
    parser.add_argument(
        "--layers",
        action="store_true",
        help="measure heads alone and both, at equal FLOPs, for gpt2 and llama",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with one thread each")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results so far")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        out, steps = (Path(temporary), QUICK) if options.quick else (options.out, Steps())
        models, budgets = options.models, options.budgets
        if options.layers:
            models, budgets = [name for name in models if name != "all-attention"], LAYERS
        if options.quick:
            models, budgets = ("all-attention", "llama-gqa"), ("params=0.5", "speedup=1.2")
        if not options.table:
            sweep(models, budgets, steps, out, options.jobs, console)
            console.print(f"{machine()}; float32; {steps}", markup=False)
        console.print(table(out) or "Nothing was measured yet.", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
