"""What a run and a single phase do alike: train in a folder, choose units, say what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deadhead.data import TokenStream
from deadhead.gates.gates import HeadGates
from deadhead.measure.costs import Cost
from deadhead.measure.evaluation import Evaluation
from deadhead.measure.latency import Latency
from deadhead.training.phases.choosing import attach_gates, close_to_budget, latency_in, reached
from deadhead.training.phases.one_shot import rank
from deadhead.training.phases.phase import PhaseRun, train
from deadhead.training.phases.rolling_back import rolled_back
from deadhead.training.processes import is_main, on_main
from deadhead.training.recipes.recipe import PhaseRecipe, PruneRecipe
from deadhead.training.runs.summary import METRICS_FILE

Progress = Callable[[str, int, int, dict[str, Any]], None]
"""Told of the name of what goes on, how much is done, how much there is, and the last numbers."""


def told(progress: Progress | None) -> Progress:
    """Return whom to tell what goes on: nobody but in the main process."""
    return progress if progress is not None and is_main() else lambda *_: None


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a phase works, and with what.

    Args:
        phase: its name, in the metrics and for trackers.
        folder: gets `checkpoints/`, `tensorboard/`, `metrics.jsonl` and `latency.json`.
        within: the folder of the phase's own inside `checkpoints/` and `tensorboard/`; "" for none.
        name: of the run, for trackers.
        text: what it learns from.
        valid: what it is validated on, or None.
        seed: of everything random.
        first_segment: where in the text it begins; see `PhaseRun`.
        teacher: loads the model to distil from, where the recipe asks for one.
        progress: told of what goes on.
        report_to: trackers.
        resume: go on from checkpoints that are there.
    """

    phase: str
    folder: Path
    within: str = ""
    name: str
    text: TokenStream
    valid: TokenStream | None
    seed: int
    first_segment: int = 0
    teacher: Callable[[], PreTrainedModel] | None = None
    progress: Progress
    report_to: Sequence[str] = ()
    resume: bool

    @property
    def checkpoints(self) -> Path:
        """Where the phase's checkpoints lie."""
        return self.folder / "checkpoints" / self.within

    def train(
        self,
        model: PreTrainedModel,
        recipe: PhaseRecipe,
        *,
        gates: HeadGates | None = None,
        latency: Latency | None = None,
    ) -> None:
        """Train a model for a phase, in place; see `deadhead.training.train`."""
        run = PhaseRun(
            folder=self.checkpoints,
            phase=self.phase,
            seed=self.seed,
            first_segment=self.first_segment,
            gates=gates,
            latency=latency,
            teacher=self.teacher() if recipe.distill and self.teacher is not None else None,
            metrics=self.folder / METRICS_FILE,
            tensorboard=self.folder / "tensorboard" / self.within,
            report_to=self.report_to,
            run_name=f"{self.name} {self.phase}",
            valid=self.valid,
            report=partial(self.progress, self.phase),
            resume=self.resume,
        )
        train(model, self.text, recipe, run)

    def rolled_back(self) -> dict[str, Any] | None:
        """Return how the phase rolled back, or None if it never did."""
        return rolled_back(self.checkpoints)

    def choose_units(self, model: PreTrainedModel, recipe: PruneRecipe) -> tuple[HeadGates, dict[str, Any] | None]:
        """Attach gates and close those of the units that go: they learn which, or units are ranked.

        Args:
            model: without gates.
            recipe: how units are chosen.

        Returns:
            The gates, and the recipe's budget with what was asked for and reached; None without a budget.
        """
        budget, seed, first_segment = recipe.budget, self.seed, self.first_segment
        latency = on_main(lambda: latency_in(self.folder, model, recipe, report=self._measuring))
        if recipe.is_one_shot:
            ranked = partial(rank, seed=seed, first_segment=first_segment, latency=latency)
            plan = on_main(lambda: ranked(model, self.text, recipe))
            gates = attach_gates(model, recipe, seed)
            gates.set_plan(plan)
            found: float | None = on_main(lambda: reached(model, recipe, plan))
        else:
            gates = attach_gates(model, recipe, seed)
            self.train(model, recipe, gates=gates, latency=latency)
            found = close_to_budget(model, gates, recipe, latency=latency)
        return gates, None if budget is None else {"kind": budget.kind, "asked": budget.value, "reached": found}

    def _measuring(self, done: int, total: int) -> None:
        self.progress("measuring latency", done, total, {})


def measured_values(cost: Cost, measured: Evaluation | None, *, steps: int) -> dict[str, Any]:
    """Return what a run's summary and a phase's result say of a model, as plain JSON values."""
    values = {"heads": cost.heads, "parameters": cost.parameters, "flops_per_token": cost.flops_per_token}
    if measured is not None:
        names = ("perplexity", "word_perplexity", "bits_per_byte", "tokens_per_second")
        values |= {name: getattr(measured, name) for name in names}
    return values | {"steps": steps}
