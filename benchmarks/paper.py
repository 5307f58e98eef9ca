"""The paper's experiments without a GPU: its curve, its ablation of the stabilisers, and small models from scratch.

For each seed, a dense All-attention Transformer and a dense Transformer-XL with as many parameters are trained and
kept. Each is then pruned at several λ as in the paper, cut, and fine-tuned. The dense model is trained for as many more
steps. The program measures each model's perplexity per token of the test text, and its parameters.

    python benchmarks/paper.py [--quick] [--data FILE] [--out DIR] [--figures DIR] [--seeds 0 1 2] [--l0 …] [--ways …]

Every point is a file in DIR/points, so a stopped sweep continues where it was. --table measures nothing and prints the
results so far. Points of other settings (shape, steps, text) are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console

from benchmarks._all_attention import machine
from benchmarks._paper import (
    ARCHITECTURES,
    SHAPES,
    WAYS,
    Architecture,
    Budget,
    dense_settings,
    measure_point,
    settings,
    train_dense,
)
from benchmarks._paper_tables import draw, report
from benchmarks._sweep import run_all
from deadhead.data import load_text
from deadhead.disk.files import write_json
from deadhead.errors import InputError

# λ of each curve. The paper's 0.01 to 0.02 close heads of a Transformer-XL of this size, and none of All-attention: its
# heads, which hold what is a feed-forward layer there, are worth more.
L0: dict[Architecture, tuple[float, ...]] = {
    "all-attention": (0.02, 0.04, 0.05, 0.06, 0.07, 0.08, 0.12),
    "transformer-xl": (0.01, 0.02, 0.04, 0.06, 0.08),
}
# λ at which ways to prune are compared; those whose gates begin at the threshold close nearly all of them at that one.
ABLATION_L0 = 0.06
COLLAPSED_L0 = 0.01
HEADS = (8, 6, 4, 2)
QUICK = Budget(dense=20, prune=10, finetune=5, tokens=1000)
QUICK_L0 = (0.05,)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The settings of all points of a sweep."""

    shape: str
    budget: Budget
    data: str
    out: Path

    def dense(self, architecture: str, seed: int, sha256: str) -> Path:
        """Return the folder of a dense model, which names all that it depends on."""
        depends = dense_settings(SHAPES[self.shape], self.budget, sha256)
        digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        return self.out / "dense" / f"{_slug(self.data)}-{self.shape}-{architecture}-{digest}-seed{seed}"

    def text(self) -> tuple[Any, int]:
        """Return the text and the size of its vocabulary."""
        text, tokenizer = load_text(self.data, tokenizer="byte", cache_dir=self.out / "tokens" / _slug(self.data))
        return text, len(tokenizer)


@dataclass(frozen=True, order=True)
class Point:
    """One measurement. Points are ordered by importance, so that a sweep that is cut short has the first ones."""

    rank: int
    seed: int
    architecture: Architecture
    way: str
    amount: float

    def file(self, sweep: Sweep) -> Path:
        """Return the point's file."""
        name = f"{sweep.data} {sweep.shape} {self.architecture} {self.way} {self.amount:g}"
        return sweep.out / "points" / f"{_slug(name)}-seed{self.seed}.json"


def points(
    architectures: Sequence[Architecture],
    ways: Sequence[str],
    l0: Sequence[float] | None,
    seeds: Sequence[int],
    heads: int,
) -> list[Point]:
    """Return the points to measure: first the curve, then the ablation and the models from scratch.

    The Transformer-XL has points of the curve only. Without `l0` each curve has its own.
    """
    # As in the small shape, in proportion.
    smaller = sorted({max(1, heads * count // 8) for count in HEADS}, reverse=True)

    def amounts(architecture: Architecture, way: str) -> Iterator[tuple[int, float]]:
        if way == "dense":
            yield 0, 0.0
        elif way == "paper":
            yield from ((0, value) for value in l0 or L0[architecture])
        elif architecture != "all-attention":
            return
        elif way == "from scratch":
            yield from ((2, float(count)) for count in smaller)
        elif l0:
            yield from ((1, value) for value in l0)
        else:
            yield 1, ABLATION_L0
            if WAYS[way].options.get("init") == 0:
                yield 1, COLLAPSED_L0

    return sorted(
        Point(rank, seed, architecture, way, amount)
        for architecture in architectures
        for way in ways
        for seed in seeds
        for rank, amount in amounts(architecture, way)
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", Path(name).name.lower()).strip("-")


def _train(architecture: Architecture, seed: int, sweep: Sweep) -> None:
    text, vocab_size = sweep.text()
    folder = sweep.dense(architecture, seed, text.sha256)
    steps = sweep.budget.dense
    train_dense(architecture, SHAPES[sweep.shape], seed, text=text, vocab_size=vocab_size, steps=steps, folder=folder)


def _measure(point: Point, sweep: Sweep) -> None:
    text, vocab_size = sweep.text()
    shape, way = SHAPES[sweep.shape], WAYS[point.way]
    found = measure_point(
        point.architecture,
        shape,
        way,
        point.amount,
        point.seed,
        text=text,
        vocab_size=vocab_size,
        dense=sweep.dense(point.architecture, point.seed, text.sha256),
        budget=sweep.budget,
    )
    names = {"architecture": point.architecture, "way": point.way, "amount": point.amount, "seed": point.seed}
    depends = {**settings(shape, sweep.budget, way), "text": text.sha256}
    write_json(point.file(sweep), {**names, **found, "settings": depends})


def _kept(point: Point, sweep: Sweep, sha256: str) -> dict[str, Any] | None:
    """Return a point that was measured with these settings, or None."""
    path = point.file(sweep)
    if not path.exists():
        return None
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = {**settings(SHAPES[sweep.shape], sweep.budget, WAYS[point.way]), "text": sha256}
    return kept if kept["settings"] == json.loads(json.dumps(wanted)) else None


def measure(todo: Sequence[Point], sweep: Sweep, jobs: int, threads: int, console: Console) -> None:
    """Train the missing dense models, then measure the missing points."""
    (sweep.out / "points").mkdir(parents=True, exist_ok=True)
    text, _ = sweep.text()
    missing = [point for point in todo if _kept(point, sweep, text.sha256) is None]
    needed = {(p.architecture, p.seed) for p in missing if WAYS[p.way].kind != "scratch"}
    models = sorted(
        (seed, name) for name, seed in needed if not (sweep.dense(name, seed, text.sha256) / "config.json").exists()
    )
    how: dict[str, Any] = {"jobs": jobs, "threads": threads, "console": console}
    run_all(_train, [(name, seed, sweep) for seed, name in models], what="dense models", **how)
    run_all(_measure, [(point, sweep) for point in missing], what="points", **how)


def main() -> None:
    """Measure the missing points, print the tables, and draw the requested figures."""
    parser = argparse.ArgumentParser(description="The paper's curve and ablations.")
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model, to see that it works")
    parser.add_argument("--data", default="stdlib", help="a text file, a directory, 'stdlib', or hf:NAME[:CONFIG]")
    parser.add_argument("--shape", choices=[name for name in SHAPES if name != "tiny"], default="small")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder for models and points")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--l0", nargs="+", type=float, help="λ of the points, for all curves")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    for name, value in vars(Budget()).items():
        what = "tokens measured" if name == "tokens" else f"steps of the phase {name}"
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} ({value})")
    parser.add_argument("--jobs", type=int, help="processes (default: one per core, or one with a GPU)")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results so far")
    parser.add_argument("--figures", type=Path, help="draw figures to this folder")
    options = parser.parse_args()
    console = Console()
    cores = os.cpu_count() or 1
    jobs = options.jobs or (1 if torch.cuda.is_available() else cores)
    with tempfile.TemporaryDirectory() as temporary:
        budget = Budget(**{name: getattr(options, name) for name in vars(Budget())})
        sweep = Sweep(shape=options.shape, budget=budget, data=options.data, out=options.out)
        wanted = (options.architectures, options.ways, options.l0, options.seeds)
        if options.quick:
            sweep = Sweep(shape="tiny", budget=QUICK, data=options.data, out=Path(temporary))
            wanted = (ARCHITECTURES, ("dense", "paper", "none of the three", "from scratch"), QUICK_L0, (0,))
        todo = points(*wanted, heads=SHAPES[sweep.shape].heads)
        try:
            text, _ = sweep.text()
        except InputError as error:
            parser.error(str(error))
        if not options.table:
            measure(todo, sweep, jobs, max(1, cores // jobs), console)
            console.print(f"{machine()}; {jobs} processes, float32 but for bfloat16 on a GPU", markup=False)
        found = [kept for point in todo if (kept := _kept(point, sweep, text.sha256)) is not None]
        console.print(f"{len(found)} of {len(todo)} points; {options.data}, hash {text.sha256[:12]}; {sweep.shape}")
        console.print(report(found), markup=False, soft_wrap=True)
        if options.figures:
            draw(found, options.figures, "paper")


if __name__ == "__main__":
    main()
