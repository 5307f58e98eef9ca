"""Tables of a real language model: measured cells, in Markdown and as a picture.

`benchmarks/llm_table.py` measures the cells.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks._llm_metrics import accuracy, difference, perplexity
from benchmarks.llm import METHODS, OTHERS

DENSE = "dense"
# What is compared with the best of others; named before anything was measured.
OURS = "sizes"
# Ours first, and of ours the default.
ORDER = (OURS, *(method for method in METHODS if method != OURS), *OTHERS)
# What a reader sees, where it is not "deadhead, NAME".
NAMES = {
    DENSE: "dense",
    OURS: "deadhead, learned sizes (default)",
    "flap-as-shipped": "FLAP",
    "flap+grail": "FLAP + GRAIL",
    "wanda-sp": "Wanda-sp",
    "llm-pruner": "LLM-Pruner",
    "llm-pruner-everywhere": "LLM-Pruner, all layers",
    "torch-pruning": "Torch-Pruning",
    "whole-layers": "whole layers by influence",
}


@dataclass(frozen=True, order=True, kw_only=True)
class Cell:
    """A method at a size: the share left of the blocks' parameters, or of the KV groups alone.

    Args:
        draw: which draw of the calibration text.
        recovered: steps of recovery.
    """

    method: str
    share: float = 1.0
    draw: int = 0
    heads_only: bool = False
    recovered: int = 0

    @property
    def name(self) -> str:
        """Name of the cell's file among the results."""
        parts = [self.method, f"{round(100 * self.share)}", *["heads"] * self.heads_only]
        parts += [f"draw{self.draw}"] * bool(self.draw) + [f"recovered{self.recovered}"] * bool(self.recovered)
        return "-".join(parts)


def found_in(results: Path) -> dict[Cell, dict[str, Any]]:
    """Return the measurements by cell; the cost of a recovered cell includes its pruning."""
    cells: dict[Cell, dict[str, Any]] = {}
    for path in sorted(results.glob("*.json")):
        known = json.loads(path.read_text(encoding="utf-8"))
        cells[Cell(**{name: known[name] for name in Cell.__dataclass_fields__})] = known
    for cell, known in cells.items():
        if cell.recovered and (pruned := cells.get(replace(cell, recovered=0))) is not None:
            known["seconds"] = {name: value + pruned["seconds"][name] for name, value in known["seconds"].items()}
            known["peak_bytes"] = max(known["peak_bytes"], pruned["peak_bytes"])
    return cells


def table(found: dict[Cell, dict[str, Any]]) -> str:
    """Return Markdown: a table for each size, kind of units and length of recovery."""
    dense = found.get(Cell(method=DENSE))
    if dense is None:
        return ""
    groups = sorted({(cell.heads_only, -cell.share, cell.recovered) for cell in found if cell.method != DENSE})
    lines = []
    for heads_only, share, recovered in groups:
        group = (heads_only, share, recovered)
        here = {cell: each for cell, each in found.items() if (cell.heads_only, -cell.share, cell.recovered) == group}
        left = f"{-share:.0%} of the {'groups of heads' if heads_only else 'blocks’ parameters'} left"
        lines += [f"### {left}{_recovery(recovered)}", "", *_rows(here, dense), ""]
    return "\n".join(lines)


def _label(method: str, recovered: int = 0) -> str:
    return NAMES.get(method, f"deadhead, {method}") + _recovery(recovered)


def _recovery(steps: int) -> str:
    return f", {steps} steps of recovery" * bool(steps)


def _rows(here: dict[Cell, dict[str, Any]], dense: dict[str, Any]) -> list[str]:
    heads = (
        "method",
        "WikiText-2",
        "of 1,024",
        "books",
        "BLiMP",
        "parameters",
        "core-minutes",
        "peak with the model, GB",
    )
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1), _row("dense", dense, dense)]
    for method in ORDER:
        mine = sorted(cell for cell in here if cell.method == method)
        rows += [_row(_label(method) + f", draw {cell.draw + 1}" * (len(mine) > 1), here[cell], dense) for cell in mine]
    others = [each for cell, each in here.items() if cell.method in OTHERS and cell.draw == 0]
    ours = next((each for cell, each in here.items() if cell.method == OURS and cell.draw == 0), None)
    if ours is not None and others:
        best = min(others, key=lambda each: perplexity(each["losses"]["wikitext2"]))
        mean, error = difference(ours["losses"]["wikitext2"], best["losses"]["wikitext2"])
        own, other, none = (perplexity(each["losses"]["wikitext2"]) for each in (ours, best, dense))
        rows += [
            "",
            f"On the same rows of WikiText-2, learned sizes and {_label(best['method'])}, the best of the others here, "
            f"are {mean:+.3f} ± {error:.3f} nats a token apart. The excess over dense is {own - none:.1f} against "
            f"{other - none:.1f}, {(own - none) / (other - none) - 1:+.0%}.",
        ]
    return rows


def _row(name: str, each: dict[str, Any], dense: dict[str, Any]) -> str:
    cells = [name]
    for text in ("wikitext2", "long", "books"):
        own, none = perplexity(each["losses"][text]), perplexity(dense["losses"][text])
        cells.append(f"{own:.1f}" + (f" ({own / none - 1:+.0%})" if each is not dense else ""))
    cells.append(f"{accuracy(each['blimp']):.1%}" if each["blimp"] else "–")
    cells.append(f"{each['parameters'] / 1e6:.1f} M")
    cells += ["", ""] if each is dense else [f"{each['seconds']['cores'] / 60:.1f}", f"{each['peak_bytes'] / 1e9:.1f}"]
    return "| " + " | ".join(cells) + " |"


def short_table(found: dict[Cell, dict[str, Any]]) -> str:
    """Return Markdown: perplexity of WikiText-2 at the sizes where ours was measured, and BLiMP at the largest size."""
    plain = [cell for cell in found if cell.method != DENSE and not cell.heads_only and not cell.draw]
    dense = found.get(Cell(method=DENSE))
    shares = sorted({cell.share for cell in plain if cell.method == OURS}, reverse=True)
    if not shares or dense is None:
        return ""
    titles = [f"{1 - share:.0%} gone" for share in shares] + [f"BLiMP, {1 - shares[0]:.0%} gone"]
    lines = ["| perplexity of WikiText-2 | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    lines.append(_short_row("dense", [dense] * len(shares), dense))
    for steps in sorted({cell.recovered for cell in plain}):
        for method in ORDER:
            mine = [found.get(Cell(method=method, share=share, recovered=steps)) for share in shares]
            if any(mine):
                lines.append(_short_row(_label(method, steps), mine, mine[0]))
    return "\n".join(lines)


def _short_row(name: str, by_share: Sequence[dict[str, Any] | None], first: dict[str, Any] | None) -> str:
    cells = ["–" if each is None else f"{perplexity(each['losses']['wikitext2']):.1f}" for each in by_share]
    cells.append(f"{accuracy(first['blimp']):.1%}" if first is not None and first["blimp"] else "–")
    return "| " + " | ".join([name, *cells]) + " |"


def draw(found: dict[Cell, dict[str, Any]], file: Path) -> None:
    """Draw perplexity against the share of the blocks' parameters removed, with one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    none = perplexity(found[Cell(method=DENSE)]["losses"]["wikitext2"])
    plain = [cell for cell in found if not cell.heads_only and not cell.draw and cell.method != DENSE]
    for method in sorted({cell.method for cell in plain}, key=ORDER.index):
        marker, line, width = ("o", "-", 2) if method in METHODS else ("s", "--", 1)
        color = axes.plot([], [], marker=marker, linestyle=line, label=_label(method))[0].get_color()
        for steps in sorted({cell.recovered for cell in plain if cell.method == method}):
            mine = sorted(
                (100 * (1 - cell.share), perplexity(found[cell]["losses"]["wikitext2"]))
                for cell in plain
                if (cell.method, cell.recovered) == (method, steps)
            )
            places, values = zip(*mine if steps else [(0.0, none), *mine], strict=True)
            look: dict[str, Any] = {"color": color, "marker": marker, "linestyle": line, "linewidth": width}
            if steps:
                look |= {"markerfacecolor": "white", "linestyle": ":", "label": _label(method, steps)}
            axes.plot(places, values, **look)
    axes.set(xlabel="share of the blocks' parameters removed, %", ylabel="perplexity, WikiText-2 test", yscale="log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
