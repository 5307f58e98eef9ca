"""The contents of a run's folder, finished or not, as plain values for its page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.checkpoints.declared import PLAN_FILE
from deadhead.checkpoints.folder_cost import folder_cost
from deadhead.errors import InputError
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.report.following import MetricsFollower, PhaseMetrics, thin
from deadhead.report.tables import verdict
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.recipes.recipe import Recipe
from deadhead.training.runs.summary import METRICS_FILE, RECIPE_FILE, STAGES, SUMMARY_FILE, read_summary

# In the order of the work; the control's phases run beside those of the pruned model.
PHASES = {
    "train": "dense training",
    "prune": "training with gates",
    "finetune": "fine-tuning",
    "control_prune": "the dense control",
    "control_finetune": "the dense control",
}
_SCALARS = ("loss", "l0", "lambda", "sparsity", "block_sparsity", "budget", "eval_perplexity")
# By the names of their stages, the checkpoints in a run's folder, and those whose costs are compared.
_CHECKPOINTS = {"dense": "dense", "gated": "gated", "finetuned": "pruned"}
_COMPARED = {"dense": "dense", "finetuned": "pruned"}
# By the names that the page has for them, the models in a run's folder whose attention it shows.
ATTENTION_OF = {**_COMPARED, "model": "."}


def checkpoints_in(folder: Path, names: Mapping[str, str]) -> dict[str, Path]:
    """Return the checkpoints in a run's folder that exist; `names` maps names to their folders."""
    found = {name: folder / inner for name, inner in names.items()}
    return {name: path for name, path in found.items() if (path / "config.json").is_file()}


def plan_in(folder: Path) -> HeadPlan | None:
    """Return the head plan in a run's or a checkpoint's folder, or None if there is none yet."""
    path = folder / PLAN_FILE
    return HeadPlan.from_json(path) if path.is_file() else None


class RunFacts:
    """The facts of a run, of a checkpoint that a single phase wrote, or of the `.work` folder of a running phase.

    Files are read again only if they have changed.

    Attributes:
        facts: the result of the last `update`, as JSON values; numbers may be infinite or NaN. `recipe` (TOML),
            `summary`, `verdict`, `phases` (name, title, first step, steps done and planned, scalars as [steps,
            values]), `gates` (steps, and for each layer's heads or blocks the total, those kept, the open probability
            at these steps as bytes in base64 and the last output difference), `unit`, `costs` and `points`.

    Raises:
        InputError: the folder is none of these.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"The folder of a run was expected at {folder}, but it does not exist; check the path.")
        if not any((folder / name).is_file() for name in (RECIPE_FILE, METRICS_FILE)):
            raise InputError(
                f"{folder} is not the folder of a run: it has neither {RECIPE_FILE} nor {METRICS_FILE}; name one that "
                "deadhead demo, run, train, prune or finetune made."
            )
        self.folder = folder
        self._metrics = MetricsFollower(folder / METRICS_FILE)
        self._seen: tuple[Any, ...] | None = None
        self.facts: dict[str, Any] = {}

    def update(self) -> bool:
        """Read what has changed; return whether anything has."""
        changed = self._metrics.update()
        names = (RECIPE_FILE, SUMMARY_FILE, PLAN_FILE)
        seen = (*(_modified(self.folder / name) for name in names), *checkpoints_in(self.folder, _CHECKPOINTS))
        if not changed and seen == self._seen:
            return False
        self.facts, self._seen = self._read(), seen
        return True

    def _read(self) -> dict[str, Any]:
        name, path = self.folder.resolve().name, self.folder / RECIPE_FILE
        recipe = None
        # A single phase has none; one of another version says less, but its numbers can be shown.
        with suppress(InputError):
            recipe = load_recipe(path)
        plan, summary = plan_in(self.folder), read_summary(self.folder)
        return {
            "name": name,
            "finished": all(stage in summary for stage in (*STAGES, "samples")),
            "recipe": path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "",
            "summary": summary,
            "verdict": verdict(summary) if "finetuned" in summary and "dense" in summary else "",
            "phases": self._phases(recipe),
            "unit": "head" if plan is None else plan.unit,
            "gates": self._gates(plan),
            "costs": {
                stage: _kept_costs(path, _modified(path / "config.json"))
                for stage, path in checkpoints_in(self.folder, _COMPARED).items()
            },
            "points": size_points(name, summary, is_this=True),
        }

    def _phases(self, recipe: Recipe | None) -> list[dict[str, Any]]:
        planned, begins = {}, {}
        if recipe is not None:
            planned = recipe.planned_steps
            dense = 0 if recipe.dense_phase is None else recipe.dense_phase.steps
            begins = {"prune": dense, "finetune": dense + planned["prune"]}
            begins |= {f"control_{name}": begin for name, begin in begins.items()}
        names = [*PHASES, *(name for name in self._metrics.phases if name not in PHASES)]
        phases = []
        for name in names:
            found = self._metrics.phases.get(name, PhaseMetrics())
            done = found.steps[-1] if found.steps else 0
            if not found.steps and not planned.get(name):
                continue
            phases.append(
                {
                    "name": name,
                    "title": PHASES.get(name, name),
                    "begin": begins.get(name, 0),
                    "done": done,
                    "steps": planned.get(name) or done,
                    "scalars": {key: thin(found.steps, found.scalars[key]) for key in _SCALARS if key in found.scalars},
                }
            )
        return phases

    def _gates(self, plan: HeadPlan | None) -> dict[str, Any]:
        found = self._metrics.phases.get("prune", PhaseMetrics())
        totals: dict[str, int] = {}
        kept: dict[str, Sequence[int]] = {}
        steps = [step for step, _ in found.open_probability.kept]
        frames = [frame for _, frame in found.open_probability.kept]
        if plan is not None:
            totals = {str(layer): count for layer, count in plan.total.items()}
            kept = {str(layer): units for layer, units in plan.kept.items()}
            # Of hidden units the blocks are shown that gates learned with; a ranking alone has none.
            hidden = {} if plan.hidden_units is None else plan.hidden_units.total
            for layer, total in hidden.items():
                units = UnitKey("block", layer)
                if count := len(frames[-1].get(str(units), ())) if frames else 0:
                    totals[str(units)] = count
                    kept |= _kept_runs(str(units), plan.units[units], total, frames[-1][str(units)])
        for key, row in (frames[-1] if frames else {}).items():
            totals.setdefault(key, len(row))
        layers = []
        for key, total in totals.items():
            unit = UnitKey.parse(key)
            rows = [frame.get(key, ()) for frame in frames]
            # Of gates on something else than the plan counts there is nothing to show.
            rows = rows if all(len(row) == total for row in rows) else []
            layers.append(
                {
                    "key": key,
                    "layer": str(unit.layer),
                    "what": unit.kind,
                    "total": total,
                    "kept": list(kept[key]) if key in kept else None,
                    "open": packed(np.array(rows)) if rows else "",
                    "difference": found.difference.get(key, []),
                }
            )
        return {"steps": steps, "layers": layers}


def _kept_runs(key: str, units: Sequence[int], total: int, last: Sequence[float]) -> dict[str, Sequence[int]]:
    """Return the blocks that a plan keeps, by `key`, if they are runs of equal size as in the last draw.

    Otherwise (for a model that was cut before, or blocks of other units), the last draw itself is shown.
    """
    size, stays = max(1, total // len(last)), set(units)
    kept = [place for place in range(len(last)) if set(range(place * size, (place + 1) * size)) <= stays]
    is_so = len(kept) * size == len(stays) and kept == [place for place, chance in enumerate(last) if chance >= 0.5]
    return {key: kept} if is_so else {}


def size_points(name: str, summary: dict[str, Any], *, is_this: bool) -> list[dict[str, Any]]:
    """Return a run's models (dense, pruned and the dense control) as points of a plot of perplexity against size."""
    kept = ("parameters", "flops_per_token", "perplexity", "steps")
    return [
        {"run": name, "stage": stage, "this": is_this, **{key: summary[stage][key] for key in kept}}
        for stage in ("dense", "cut", "finetuned", "control")
        if stage in summary and all(key in summary[stage] for key in kept)
    ]


def sibling_points(facts: RunFacts, others: Sequence[Path] | None = None) -> list[dict[str, Any]]:
    """Return the points of other runs that can be compared with this one: same text, same number of tokens.

    Raises:
        InputError: one of `others` is not the folder of a run.
    """
    here, text = facts.folder.resolve(), facts.facts["summary"].get("data", {})
    if others is None:
        found = [path for path in here.parent.iterdir() if path != here and (path / SUMMARY_FILE).is_file()]
    else:
        found = [RunFacts(path).folder for path in others]
    points = []
    for path in sorted(found):
        # Of those beside it the ones that are damaged are left out.
        with suppress(InputError) if others is None else nullcontext():
            summary = read_summary(path)
            data = summary.get("data", {})
            if text and all(text.get(key) == data.get(key) for key in ("sha256", "tokens")):
                points += size_points(path.resolve().name, summary, is_this=False)
    return points


def packed(shares: np.ndarray) -> str:
    """Return numbers in [0, 1] as one byte each in base64, where 255 stands for 1; a page shows no finer steps."""
    steps = np.rint(np.nan_to_num(shares).clip(0, 1) * 255).astype(np.uint8)
    return base64.b64encode(steps.tobytes()).decode("ascii")


@lru_cache(maxsize=64)
def _kept_costs(folder: Path, modified: int | None) -> dict[str, Any]:
    """Return the cost of a checkpoint on paper; it is counted again only if its configuration was modified."""
    found = folder_cost(folder)
    if found is None:
        # These load torch.
        from deadhead.checkpoints.checkpoint import load_config
        from deadhead.measure.cost import config_cost

        found = config_cost(load_config(folder)), None
    return {key: getattr(found[0], key) for key in ("parameters", "flops_per_token", "kv_cache_bytes")}


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
