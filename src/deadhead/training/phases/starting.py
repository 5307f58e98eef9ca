"""Initial state of gates: log_alpha by a criterion's scores, and blocks of hidden units with similar scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.data import TokenStream
from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json
from deadhead.gates.gates import HeadGates
from deadhead.measure.latency import Latency
from deadhead.plans.blocks import Blocks
from deadhead.plans.plan import UnitKey
from deadhead.plans.scores import HeadScores
from deadhead.plans.unit_plan import layer_key
from deadhead.training.phases.ranking import for_cost, score_together
from deadhead.training.processes import Progress, on_main
from deadhead.training.recipes.recipe import PruneRecipe

_START_FILE = "start.json"

# How far apart gates begin that lean: about two of five are then open to doubt, within 2.2 of where draws are even.
_LEAN = 3.0


@dataclass(frozen=True, kw_only=True)
class Start:
    """Initial state of gates.

    Args:
        scores: the score of each gate, (H,), by key; divided by the cost of its units if a budget defines a cost and
            the scores can be compared that way.
        blocks: the hidden units of each gate, by layer; empty if hidden units have no gates.
    """

    scores: dict[UnitKey, Tensor]
    blocks: Blocks

    def lean(self, gates: HeadGates) -> None:
        """Initialise gates in the order of the scores."""
        gates.lean(HeadScores(scores=self.scores, choices=gates.choices), spread=_LEAN)


def start_of(
    model: PreTrainedModel,
    text: TokenStream,
    recipe: PruneRecipe,
    *,
    seed: int,
    first_segment: int = 0,
    latency: Latency | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> Start:
    """Score a model's units by the criterion that initialises a recipe's gates; all processes call this.

    If the model has no gates yet, hidden units with similar scores are grouped into blocks; existing gates keep theirs.

    Args:
        model: the model; it is not changed.
        text: the text, of which `recipe.start_batches` batches are read.
        recipe: a recipe with `start_from`.
        seed: seed of the choice of batches.
        first_segment: where in the text to begin, for a model with segment memory.
        latency: latency of this model on this machine, for a recipe with a speedup; None measures it.
        folder: folder to keep the scores in; None keeps none.
        resume: use the scores that were kept, so that a resumed phase has the same gates on any machine.
        progress: called with how much of the text is read.
    """
    path = None if folder is None else folder / _START_FILE
    if (kept := on_main(lambda: _read(path) if resume and path is not None and path.exists() else None)) is not None:
        return kept
    scores = score_together(model, text, recipe, seed=seed, first_segment=first_segment, progress=progress)
    return on_main(lambda: _noted(for_cost(model, scores, recipe, latency=latency), path))


def _noted(scores: HeadScores, path: Path | None) -> Start:
    """Return the initial state of gates for given scores, and keep it."""
    blocks = {key.layer: members for key, members in scores.choices.hidden.items()}
    start = Start(scores={key: values.double() for key, values in scores.scores.items()}, blocks=blocks)
    # What is not finite is told when gates lean by it.
    if path is not None and all(bool(values.isfinite().all()) for values in start.scores.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, start)
    return start


def _write(path: Path, start: Start) -> None:
    values = {str(key): scores.tolist() for key, scores in start.scores.items()}
    write_json(path, {"scores": values, "blocks": {str(layer): blocks for layer, blocks in start.blocks.items()}})


def _read(path: Path) -> Start:
    found = read_json(path, what="scores that gates began by")
    scores = {UnitKey.parse(key): torch.tensor(values, dtype=torch.float64) for key, values in found["scores"].items()}
    return Start(
        scores=scores,
        blocks={layer_key(layer): blocks for layer, blocks in found["blocks"].items()},
    )
