"""Show which units of a real language model go: by rankings, and by gates and sizes of `benchmarks/llm.py`.

    python benchmarks/which_units.py --valid wikitext2-valid.txt [--share 0.8] [--picture docs/llm_units.png]

It prints Markdown. For each pair of a method and a criterion, it prints the chance that a unit that stayed scores above
a unit that went: 0.5 if the two are unrelated, 1 if they choose alike. Of the KV groups with the strongest induction
heads, it prints how many stayed. The strength of a head is its mean attention from a random token that occurred before
to the token after its first occurrence. The picture shows what each method leaves of each layer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import deadhead
from benchmarks.llm import LEARNED, Point, Setting, batches, choose, copied, prepared, rows_of
from deadhead.criteria.scoring import score_heads
from deadhead.plans.kinds import OneShot
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.scores import HeadScores

CRITERIA: tuple[OneShot, ...] = ("taylor", "flap", "output-difference", "reconstruction")
RANKINGS = ("reconstruction", "flap")
# Rows that criteria read.
ROWS = 40
# Groups that count as those with induction heads, and tokens of a row of random ones.
STRONGEST, LENGTH = 10, 64
# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {"gates": "#0072b2", "sizes": "#e69f00", "reconstruction": "#009e73", "flap": "#cc79a7"}


def learned_plans(folder: Path, share: float) -> dict[str, HeadPlan]:
    """Return the learned plans for a share of the blocks, by method."""
    found: dict[str, HeadPlan] = {}
    for method in LEARNED:
        path = folder / "points" / Point(share=share, criterion=method).file
        if path.exists() and "plan" in (point := json.loads(path.read_text(encoding="utf-8"))):
            found[method] = HeadPlan.from_dict(point["plan"])
    return found


def chance_above(stayed: Tensor, gone: Tensor) -> float:
    """Return the chance that one of `stayed` is above one of `gone`; ties count half."""
    ordered = gone.sort().values
    below = torch.searchsorted(ordered, stayed, right=False).double()
    alike = torch.searchsorted(ordered, stayed, right=True).double() - below
    return float((below + alike / 2).mean() / max(len(gone), 1))


def agreement(plan: HeadPlan, scores: Mapping[UnitKey, Tensor], kind: str) -> float | None:
    """Return the chance that a unit of a kind that stayed scores above one that went; None if all or none did."""
    stayed, gone = [], []
    for key, values in scores.items():
        if key.kind == kind:
            stays = torch.zeros(len(values), dtype=torch.bool)
            stays[[*plan.units[key]]] = True
            stayed.append(values[stays])
            gone.append(values[~stays])
    parts = torch.cat(stayed), torch.cat(gone)
    return chance_above(*parts) if all(map(len, parts)) else None


def by_unit(scores: HeadScores) -> dict[UnitKey, Tensor]:
    """Return scores of single units in the units' order, (units,) by key."""
    found: dict[UnitKey, Tensor] = {}
    for key, values in scores.scores.items():
        places = torch.tensor([unit for (unit,) in scores.choices.members[key]])
        found[key] = torch.empty_like(values).index_copy(0, places, values)
    return found


@torch.no_grad()
def induction(folder: Path) -> dict[UnitKey, Tensor]:
    """Return for each key/value group the largest of its heads' mean attention to where induction looks, (groups,)."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    ids = copied(LENGTH, model.config.vocab_size)
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    found: dict[UnitKey, Tensor] = {}
    for layer, weights_BHTT in enumerate(attentions):
        # From the token at t of the second time to the one behind its first, at t − length + 1.
        looked_at_BHT = weights_BHTT.diagonal(offset=1 - LENGTH, dim1=-2, dim2=-1)
        heads_H = looked_at_BHT.mean((0, 2))
        found[UnitKey("head", layer)] = heads_H.unflatten(0, (model.config.num_key_value_heads, -1)).amax(1)
    return found


def table(plans: Mapping[str, HeadPlan], scores: Mapping[str, Mapping[UnitKey, Tensor]]) -> str:
    """Return Markdown: the shares that stayed, and their agreement with criteria."""
    lines = [
        "| stayed by | left: groups, hidden units | " + " | ".join(f"`{name}`" for name in scores) + " |",
        "|---|---|" + "---|" * len(scores),
    ]
    for method, plan in plans.items():
        left = [_left(plan, kind) for kind in ("head", "block")]
        cells = []
        for of_criterion in scores.values():
            found = [agreement(plan, of_criterion, kind) for kind in ("head", "block")]
            cells.append(", ".join("–" if value is None else f"{value:.2f}" for value in found))
        lines.append(f"| `{method}` | {left[0]:.0%}, {left[1]:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _left(plan: HeadPlan, kind: str) -> float:
    return sum(len(units) for key, units in plan.units.items() if key.kind == kind) / sum(_total(plan, kind).values())


def _total(plan: HeadPlan, kind: str) -> Mapping[Any, int]:
    """Return the units of a kind that the dense model has, by layer."""
    if kind == "head":
        return plan.total
    assert plan.hidden_units is not None
    return plan.hidden_units.total


def induction_table(plans: Mapping[str, HeadPlan], attention: Mapping[UnitKey, Tensor]) -> str:
    """Return Markdown: how many of the groups with the strongest induction heads stayed."""
    ranked = sorted(
        ((float(value), key, group) for key, values in attention.items() for group, value in enumerate(values)),
        reverse=True,
    )[:STRONGEST]
    weights = ", ".join(f"{key.layer}.{group} ({value:.2f})" for value, key, group in ranked)
    lines = [f"Strongest, layer.group (attention): {weights}", ""]
    for method, plan in plans.items():
        stayed = sum(group in plan.units[key] for _, key, group in ranked)
        lines.append(f"- `{method}`: {stayed} of {len(ranked)} stayed")
    return "\n".join(lines)


def draw(plans: Mapping[str, HeadPlan], path: Path, share: float) -> None:
    """Draw what each method leaves of each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3.4), sharey=True)
    for axis, kind, name in zip(axes, ("head", "block"), ("key/value groups", "hidden units"), strict=True):
        for method, plan in plans.items():
            left = [
                len(plan.units[UnitKey(kind, layer)]) / total  # type: ignore[arg-type]
                for layer, total in _total(plan, kind).items()
            ]
            axis.plot(range(len(left)), left, marker="o", markersize=3, label=method, color=COLOURS.get(method))
        axis.set(title=f"{name} left, {share:.0%} of the blocks' parameters", xlabel="layer", ylim=(0, 1.05))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description="Show which units of a real language model go.")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/llm"), help="folder in which benchmarks/llm.py kept its points"
    )
    parser.add_argument("--valid", type=Path, required=True, help="text that criteria read")
    parser.add_argument("--share", type=float, default=0.8, help="share of the blocks' parameters left")
    parser.add_argument("--picture", type=Path, help="draw what is left of each layer to this file")
    options = parser.parse_args()
    folder = prepared(None, options.out)
    model, rows = deadhead.load(folder), rows_of(options.valid, folder, 0, ROWS)
    setting = Setting(model=folder, valid=options.valid, test=None, scored=ROWS)
    plans = learned_plans(options.out, options.share)
    for name in RANKINGS:
        plans[name] = choose(model, Point(share=options.share, criterion=name), rows, setting)
    text = batches(rows)
    # Units one by one: blocks of one criterion are not those of another.
    scores = {name: by_unit(score_heads(model, name, text, blocks=1)) for name in CRITERIA}
    print(table(plans, scores), "\n")
    print(induction_table(plans, induction(folder)))
    if options.picture is not None:
        draw(plans, options.picture, options.share)


if __name__ == "__main__":
    main()
