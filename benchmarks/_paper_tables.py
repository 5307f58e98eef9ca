"""Tables and figures of the paper's reproduction, from the points measured so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks._paper import ARCHITECTURES, WAYS

Points = Sequence[dict[str, Any]]
# Shares of the dense model's parameters at which the architectures are compared.
_SIZES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def select(found: Points, architecture: str, way: str) -> list[dict[str, Any]]:
    """Return the points of an architecture and a way, by amount and seed."""
    here = [p for p in found if p["architecture"] == architecture and p["way"] == way]
    return sorted(here, key=lambda p: (p["amount"], p["seed"]))


def interpolated(found: Points, architecture: str, seed: int, key: str, at: float, way: str = "paper") -> float | None:
    """Return the perplexity at `key` = `at` on a seed's curve of pruned models and its dense model.

    The logarithm of the perplexity is linear between two points; beyond the ends of the curve there is no value. The
    dense model replaces a pruned model that lost no head.
    """
    pruned = [p for p in select(found, architecture, way) if p["sparsity"] > 0]
    here = [p for p in (*select(found, architecture, "dense"), *pruned) if p["seed"] == seed]
    curve = sorted((p[key], math.log(p["after"])) for p in here)
    for (left, low), (right, high) in pairwise(curve):
        if left <= at <= right:
            return math.exp(low if left == right else low + (high - low) * (at - left) / (right - left))
    return None


def seeds(found: Points) -> list[int]:
    """Return the seeds of which a dense model was measured."""
    return sorted({p["seed"] for p in found if p["way"] == "dense"})


def spread(values: Iterable[float | None], form: str = ".3f") -> str:
    """Write the mean and standard deviation of the values that exist, and their number if it is not three."""
    here = [value for value in values if value is not None]
    if not here:
        return "–"
    deviation = f" ± {statistics.stdev(here):{form.lstrip('+')}}" if len(here) > 1 else ""
    return f"{statistics.mean(here):{form}}{deviation}" + (f" ({len(here)})" if len(here) != 3 else "")


def _dense(found: Points, architecture: str, seed: int) -> float | None:
    here = [p["after"] for p in select(found, architecture, "dense") if p["seed"] == seed]
    return here[0] if here else None


def _above(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else 100 * (value / reference - 1)


def curve_table(found: Points) -> str:
    """By architecture and λ: heads removed, parameters left, perplexities."""
    lines = [
        "| | λ | heads gone, % | parameters, thousand | gates closed | fine-tuned | above dense, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        for way in ("dense", "paper"):
            here = select(found, architecture, way)
            for amount in sorted({p["amount"] for p in here}):
                row = [p for p in here if p["amount"] == amount]
                above = (_above(p["after"], _dense(found, architecture, p["seed"])) for p in row)
                lines.append(
                    f"| {architecture} | {'dense' if way == 'dense' else f'{amount:g}'} | "
                    f"{spread((100 * p['sparsity'] for p in row), '.0f')} | "
                    f"{spread((p['parameters'] / 1e3 for p in row), '.0f')} | "
                    f"{spread((p['gated'] for p in row), '.2f')} | {spread(p['after'] for p in row)} | "
                    f"{'' if way == 'dense' else spread(above, '+.1f')} |"
                )
    return "\n".join(lines)


def size_table(found: Points) -> str:
    """By size: perplexity of both architectures, interpolated on each seed's curve."""
    dense = select(found, "all-attention", "dense")
    if not dense:
        return "No dense model was measured yet."
    full = dense[0]["parameters"]
    lines = [
        "| parameters, % of dense | All-attention | Transformer-XL | All-attention against it, % |",
        "|---|---|---|---|",
    ]
    for share in _SIZES:
        values = {
            a: [interpolated(found, a, seed, "parameters", share * _full(found, a, full)) for seed in seeds(found)]
            for a in ARCHITECTURES
        }
        ours, theirs = _of_both(*values.values())
        both = [_above(a, b) for a, b in zip(ours, theirs, strict=True)]
        lines.append(f"| {share:.0%} | {spread(ours)} | {spread(theirs)} | {spread(both, '+.1f')} |")
    return "\n".join(lines)


def _of_both(first: Sequence[float | None], second: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Return the values of the seeds that have both, so that two means are of the same seeds."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _full(found: Points, architecture: str, otherwise: float) -> float:
    dense = select(found, architecture, "dense")
    return float(dense[0]["parameters"]) if dense else otherwise


def equal_quality(found: Points) -> str:
    """The paper's claim: All-attention without 43 % of its heads equals a Transformer-XL without 25 % of its."""
    values = {
        (architecture, sparsity): [interpolated(found, architecture, s, "sparsity", sparsity) for s in seeds(found)]
        for architecture, sparsity in (("all-attention", 0.43), ("transformer-xl", 0.25))
    }
    ours, theirs = _of_both(*values.values())
    against = [_above(a, b) for a, b in zip(ours, theirs, strict=True)]
    return (
        f"All-attention with 43 % of its heads gone: {spread(ours)}; Transformer-XL with 25 % gone: {spread(theirs)}; "
        f"the first against the second, %: {spread(against, '+.1f')} (the paper: equal)."
    )


def ablation_table(found: Points) -> str:
    """By way to prune and λ: sparsity, perplexity, and its excess over the paper's way at the same sparsity."""
    lines = [
        "| gates | λ | heads gone, % | gates closed | fine-tuned | against all three, at equal sparsity, % |",
        "|---|---|---|---|---|---|",
    ]
    for way, how in WAYS.items():
        here = select(found, "all-attention", way) if how.kind == "pruned" else []
        compared = {p["amount"] for w in WAYS if w != "paper" for p in select(found, "all-attention", w)}
        for amount in sorted({p["amount"] for p in here}):
            if way == "paper" and amount not in compared:
                continue
            row = [p for p in here if p["amount"] == amount]
            against = [
                _above(p["after"], interpolated(found, "all-attention", p["seed"], "sparsity", p["sparsity"]))
                for p in row
            ]
            lines.append(
                f"| {way} | {amount:g} | {spread((100 * p['sparsity'] for p in row), '.0f')} | "
                f"{spread((p['gated'] for p in row), '.2f')} | {spread(p['after'] for p in row)} | "
                f"{'' if way == 'paper' else spread(against, '+.1f')} |"
            )
    return "\n".join(lines)


def scratch_table(found: Points) -> str:
    """By size: a model trained small from the beginning, and a pruned one of as many parameters."""
    lines = [
        "| | heads a layer | parameters, thousand | from scratch | pruned to that size | pruned against it, % |",
        "|---|---|---|---|---|---|",
    ]
    for architecture in ARCHITECTURES:
        here = select(found, architecture, "from scratch")
        for amount in sorted({p["amount"] for p in here}, reverse=True):
            row = [p for p in here if p["amount"] == amount]
            at_size = [interpolated(found, architecture, p["seed"], "parameters", p["parameters"]) for p in row]
            pruned, scratch = _of_both(at_size, [p["after"] for p in row])
            against = [_above(value, reference) for value, reference in zip(pruned, scratch, strict=True)]
            lines.append(
                f"| {architecture} | {amount:g} | {row[0]['parameters'] / 1e3:.0f} | "
                f"{spread(p['after'] for p in row)} | {spread(pruned)} | {spread(against, '+.1f')} |"
            )
    return "\n".join(lines)


def same_function(found: Points) -> str:
    """The largest change of perplexity by a cut: models with closed gates and cut models compute the same."""
    differences = [abs(p["cut"] / p["gated"] - 1) for p in found if p["cut"] is not None]
    if not differences:
        return "No model was cut yet."
    return (
        f"Closed gates against cut, {len(differences)} models: perplexities differ by {max(differences):.0e} at most."
    )


def report(found: Points) -> str:
    """All tables, as Markdown."""
    parts = {
        "The curve": curve_table(found) + "\n\n" + same_function(found),
        "At equal size": size_table(found) + "\n\n" + equal_quality(found),
        "The stabilisers": ablation_table(found),
        "Against small from scratch": scratch_table(found),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def draw(found: Points, folder: Path, name: str) -> None:
    """Draw the curve to `folder`/`name`_curve.png and the ablation to `folder`/`name`_ablation.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    lines = {
        ("all-attention", "paper"): ("All-attention, pruned", "-", "tab:green"),
        ("transformer-xl", "paper"): ("Transformer-XL, pruned", "-", "tab:blue"),
        ("all-attention", "from scratch"): ("All-attention, small from scratch", ":", "tab:gray"),
    }
    for (architecture, way), (label, style, colour) in lines.items():
        # A model from scratch has another schedule than the dense one that was trained on, so the two are not joined.
        here = select(found, architecture, way) + (select(found, architecture, "dense") if way == "paper" else [])
        if here:
            _line(axes, here, lambda p: p["parameters"] / 1e3, label=label, linestyle=style, color=colour)
    axes.set(xlabel="parameters without embeddings, thousand", ylabel="test perplexity, fine-tuned")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / f"{name}_curve.png", dpi=110)
    pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    colours = iter(pyplot.get_cmap("tab10").colors)
    for way, how in WAYS.items():
        here = select(found, "all-attention", way) if how.kind == "pruned" else []
        if here:
            wide = 2.2 if way == "paper" else 1.0
            _line(axes, here, lambda p: 100 * p["sparsity"], label=way, linewidth=wide, color=next(colours))
    axes.set(xlabel="heads gone, %", ylabel="test perplexity, fine-tuned", title="All-attention")
    if curve := select(found, "all-attention", "paper"):
        # Ways by which nearly all heads go would leave no room for the others.
        axes.set(
            xlim=(0, 100 * max(p["sparsity"] for p in curve) + 5), ylim=(None, 1.05 * max(p["after"] for p in curve))
        )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(folder / f"{name}_ablation.png", dpi=110)
    pyplot.close(figure)


def _line(axes: Any, here: Points, x: Callable[[dict[str, Any]], float], **style: Any) -> None:
    """Draw the mean of the seeds at each amount, with their spread in both directions."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for point in here:
        groups.setdefault((point["way"], point["amount"]), []).append(point)
    rows = sorted(
        (
            statistics.mean(map(x, group)),
            statistics.mean(p["after"] for p in group),
            statistics.stdev(map(x, group)) if len(group) > 1 else 0.0,
            statistics.stdev(p["after"] for p in group) if len(group) > 1 else 0.0,
        )
        for group in groups.values()
    )
    places, means, beside, above = zip(*rows, strict=True)
    axes.errorbar(places, means, xerr=beside, yerr=above, marker="o", markersize=4, capsize=2, **style)
