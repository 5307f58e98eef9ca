"""Quality at equal size: learned gates beside the methods that people would use instead.

Three small language models (our All-attention Transformer, a GPT-2, a Llama with grouped queries) are trained once on
the source of the Python standard library as bytes, and kept. For each sparsity and seed, heads are chosen by every
method, and the model is cut, measured, fine-tuned and measured again. All methods spend the same number of steps after
the dense training: gates learn in some of them, and a one-shot criterion leaves all of them to fine-tuning. A small
model from scratch has the steps of the dense training too. Settings were chosen on the validation text; the figures are
of the test text.

    python benchmarks/quality.py [--quick] [--out DIR] [--figure FILE] [--models …] [--methods …] [--seeds 0 1 2]

Every point is a file in DIR/points, so a stopped sweep continues where it was; --table prints the results so far.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console

from benchmarks._all_attention import machine
from benchmarks._quality import METHODS, MODELS, Budget, measure_point, settings, train_dense
from benchmarks._sweep import run_all
from deadhead.data import load_text
from deadhead.disk.files import write_json

SPARSITIES = (0.25, 0.5, 0.75)
# By how much points of a sparsity come after those of half of the heads.
_LATER = {0.75: 1, 0.25: 4}
QUICK = Budget(dense=30, after=10, gates=6, looked_at=2, tokens=2000)


@dataclass(frozen=True, order=True)
class Point:
    """One measurement. Points are ordered by importance, so that a sweep that is cut short has the first ones."""

    rank: int
    seed: int
    model: str
    sparsity: float
    method: str

    @property
    def file(self) -> str:
        """Name of the point's file."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.model} {self.method}".lower()).strip("-")
        return f"{name}-{round(100 * self.sparsity)}-seed{self.seed}.json"


def points(
    models: Sequence[str], methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]
) -> list[Point]:
    """Return the points to measure, the most important ones first; the dense model has no sparsity."""
    return sorted(
        Point(
            rank=-1 if METHODS[method].kind == "dense" else 2 * METHODS[method].rank + _LATER.get(sparsity, 0),
            seed=seed,
            model=model,
            sparsity=0.0 if METHODS[method].kind == "dense" else sparsity,
            method=method,
        )
        for model in models
        for method in methods
        for seed in seeds
        for sparsity in (sparsities[:1] if METHODS[method].kind == "dense" else sparsities)
        if not (METHODS[method].kind == "torch-pruning" and model == "all-attention")
    )


def _text(out: Path) -> tuple[Any, int]:
    text, tokenizer = load_text("stdlib", tokenizer="byte", cache_dir=out / "tokens")
    return text, len(tokenizer)


def _train(model: str, seed: int, budget: Budget, out: Path) -> None:
    text, vocab_size = _text(out)
    train_dense(model, seed, text, vocab_size, budget.dense, _dense(out, model, seed))


def _dense(out: Path, model: str, seed: int) -> Path:
    return out / "dense" / f"{model}-seed{seed}"


def _measure(point: Point, budget: Budget, out: Path) -> None:
    text, vocab_size = _text(out)
    found = measure_point(
        point.model,
        METHODS[point.method],
        point.sparsity,
        point.seed,
        text=text,
        vocab_size=vocab_size,
        dense=_dense(out, point.model, point.seed),
        budget=budget,
    )
    names = {"model": point.model, "method": point.method, "sparsity": point.sparsity, "seed": point.seed}
    write_json(out / "points" / point.file, {**names, **found, **settings(budget, METHODS[point.method])})


def _is_measured(point: Point, budget: Budget, out: Path) -> bool:
    path = out / "points" / point.file
    if not path.exists():
        return False
    kept = json.loads(path.read_text(encoding="utf-8"))
    return all(kept.get(name) == value for name, value in settings(budget, METHODS[point.method]).items())


def sweep(todo: Sequence[Point], budget: Budget, out: Path, jobs: int, console: Console) -> None:
    """Train the missing dense models, then measure the missing points."""
    (out / "points").mkdir(parents=True, exist_ok=True)
    _text(out)
    missing = [point for point in todo if not _is_measured(point, budget, out)]
    models = sorted({(point.seed, point.model) for point in missing})
    models = [(seed, model) for seed, model in models if not (_dense(out, model, seed) / "config.json").exists()]
    dense = [(model, seed, budget, out) for seed, model in models]
    run_all(_train, dense, jobs=jobs, what="dense models", console=console)
    run_all(_measure, [(point, budget, out) for point in missing], jobs=jobs, what="points", console=console)


def read_points(out: Path) -> list[dict[str, Any]]:
    """Return the points measured so far."""
    points_here = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "points").glob("*.json"))]
    return [p for p in points_here if p["method"] in METHODS]


def rows(found: Sequence[dict[str, Any]], model: str) -> Iterator[tuple[str, dict[float, list[dict[str, Any]]]]]:
    """Yield for each method, in order, its points by sparsity."""
    for method in METHODS:
        here = [p for p in found if p["model"] == model and p["method"] == method]
        if here:
            yield method, {s: [p for p in here if p["sparsity"] == s] for s in (0.0, *SPARSITIES)}


def relative(
    points_here: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], key: str, split: str = "test"
) -> list[float]:
    """Return for each seed the per cent of perplexity above the dense model after as many steps."""
    dense = {(p["model"], p["seed"]): p["after"][split] for p in found if p["method"] == "dense"}
    return [
        100 * (p[key][split] / dense[p["model"], p["seed"]] - 1)
        for p in points_here
        if p.get(key) is not None and (p["model"], p["seed"]) in dense
    ]


def table(found: Sequence[dict[str, Any]], split: str = "test") -> str:
    """Return Markdown: by model and method, per cent above the dense model, right after the cut → at the end."""
    lines = []
    for model in MODELS:
        dense = [p["after"][split] for p in found if p["model"] == model and p["method"] == "dense"]
        if not dense:
            continue
        lines += [
            f"### {model}: dense {statistics.mean(dense):.3f} ({len(dense)} seeds)",
            "",
            "| heads chosen by | 25 % of the heads gone | 50 % | 75 % |",
            "|---|---|---|---|",
        ]
        best = {}
        for sparsity in SPARSITIES:
            values = [relative(by[sparsity], found, "after", split) for _, by in rows(found, model)]
            # One seed can be lucky: the best is one of those with the most.
            most = max(map(len, values))
            best[sparsity] = min(statistics.mean(v) for v in values if len(v) == most) if most else None
        for method, by in rows(found, model):
            if method != "dense":
                lines.append(
                    f"| {method} | " + " | ".join(_cell(by[s], found, best[s], split) for s in SPARSITIES) + " |"
                )
        lines.append("")
    return "\n".join(lines)


def _cell(here: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]], best: float | None, split: str) -> str:
    after = relative(here, found, "after", split)
    if not after:
        return "cannot" if any("cannot" in p for p in here) else "–"
    before = relative(here, found, "before", split)
    mean = statistics.mean(after)
    spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
    shown = f"{mean:+.1f}{spread}"
    if mean == best:
        shown = f"**{shown}**"
    return f"{statistics.mean(before):+.0f} → {shown}" if before else shown


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw per cent above the dense model against the share of heads gone, right after the cut and at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = [model for model in MODELS if any(p["model"] == model and p["method"] == "dense" for p in found)]
    figure, grid = pyplot.subplots(2, len(models), figsize=(4.2 * len(models), 7), layout="constrained", squeeze=False)
    colours = dict(zip(METHODS, pyplot.get_cmap("tab20").colors, strict=False))
    for column, model in enumerate(models):
        for row, key in enumerate(("before", "after")):
            axes = grid[row][column]
            for method, by in rows(found, model):
                means = {s: relative(by[s], found, key) for s in SPARSITIES}
                curve = {100 * s: statistics.mean(values) for s, values in means.items() if values}
                if curve and method != "dense":
                    ours = METHODS[method].kind == "learned"
                    axes.plot(
                        list(curve),
                        list(curve.values()),
                        marker="o",
                        color=colours[method],
                        linewidth=2.2 if ours else 1.0,
                        linestyle="-" if ours else "--",
                        label=method,
                    )
            axes.set_yscale("symlog", linthresh=5)
            axes.set(title=f"{model}, {'right after the cut' if key == 'before' else 'fine-tuned'}")
            axes.set(xlabel="heads gone, %", ylabel="perplexity above the dense model, %")
            axes.grid(alpha=0.3)
    grid[1][-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Measure the missing points, print the table, and draw the requested figure."""
    parser = argparse.ArgumentParser(description="Quality at equal size, by ways to choose heads.")
    parser.add_argument("--quick", action="store_true", help="a few steps of two methods, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for models and points")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with one thread each")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results so far")
    parser.add_argument(
        "--split", choices=("test", "valid"), default="test", help="split of the text that the table reports"
    )
    parser.add_argument("--figure", type=Path, help="draw the figure to this file (.png or .svg)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        out, budget = options.out, Budget()
        wanted = (options.models, options.methods, options.sparsities, options.seeds)
        if options.quick:
            out, budget = Path(temporary), QUICK
            wanted = (("all-attention", "llama-gqa"), ("dense", "gates", "taylor"), (0.5,), (0,))
        if not options.table:
            sweep(points(*wanted), budget, out, options.jobs, console)
        found = read_points(out)
        if not options.table:
            console.print(f"{machine()}; {options.jobs} processes of one thread, float32", markup=False)
        console.print(table(found, options.split) or "No dense model was measured yet.", markup=False)
        if options.figure:
            draw(found, options.figure)


if __name__ == "__main__":
    main()
