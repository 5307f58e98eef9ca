"""How long does a step take in which gates learn on frozen weights, compared with what it cannot do without?

Measures in one process, interleaved:

- the floor: forward and backward of a language model to its activations alone, under the text's own loss;
- a step with all gates open, on the dense model's distribution;
- the same with half of the gates open;
- the dense model's own forward pass, which is a part of both steps.

The model is a Llama of SmolLM2-135M's sizes with random weights, or `--model`. It reads four rows of 256 tokens. Memory
is what a fresh process takes beyond the loaded model.

    python benchmarks/frozen_step.py [--quick] [--model FOLDER_OR_FILE.gguf]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks._all_attention import in_fresh_process, machine, medians, status
from benchmarks.loss import LENGTH, build
from deadhead.measure.losses import SegmentLoss
from deadhead.training import PruneRecipe
from deadhead.training.phases.choosing import attach_gates
from deadhead.training.phases.compensating import dense_copy
from deadhead.training.phases.defaults import with_defaults
from deadhead.training.phases.distillation import Distillation

# Far from where a draw could close a gate, or open it.
SURE = 20.0
RECIPE = PruneRecipe(params=0.8, freeze_weights=True, block_size=32, distill=1.0)


class Floor:
    """Forward and backward to the activations, under the text's loss."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.model = model.train().requires_grad_(False)
        self.losses = SegmentLoss(model)
        self.losses.try_out()
        self.inputs = {"input_ids": ids}

    def __call__(self) -> None:
        """Take a step."""
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *parts: parts[2].requires_grad_())
        try:
            self.losses(self.model, self.inputs).loss.backward()
        finally:
            hook.remove()


class Gated:
    """The same, with gradients of the gates for the distance from the dense model; a share of the gates is shut."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, shut: float) -> None:
        self.model = model.requires_grad_(False)
        self.teacher = dense_copy(model, RECIPE)
        self.gates = attach_gates(model, with_defaults(RECIPE, model))
        for index, gate in enumerate(self.gates.gates.values()):
            value = torch.full((gate.num_heads,), SURE)
            # Of three groups one is shut, and two in the next layer.
            value[: (math.floor if index % 4 < 2 else math.ceil)(shut * gate.num_heads)] = -SURE
            gate.log_alpha_bias.data.copy_(value / gate.config.lr_scale)
            gate.log_alpha_bias.requires_grad_()
        model.train()
        self.losses = SegmentLoss(model)
        self.losses.try_out()
        self.distillation = Distillation(self.teacher, weight=1.0, temperature=1.0)
        self.inputs = {"input_ids": ids}

    def __call__(self) -> None:
        """Take a step."""
        self.gates.draw()
        self.distillation.loss(self.losses(self.model, self.inputs), self.inputs).backward()

    def dense(self) -> None:
        """Let the dense model read the text."""
        self.distillation._read(self.inputs)


def steps(source: str | None, small: bool) -> dict[str, Callable[[], None]]:
    """Return what is timed. Each has a model of its own, because gates are attached to it."""
    model, *others = (build(source, small=small) for _ in range(3))
    ids = torch.randint(model.config.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    gated = Gated(others[0], ids, 0.0)
    return {
        "floor": Floor(model, ids),
        "gates, all open": gated,
        "gates, half shut": Gated(others[1], ids, 0.5),
        "the dense model alone": gated.dense,
    }


def rise(source: str | None, small: bool, is_gated: bool) -> float:
    """Return the growth of this fresh process's memory beyond the loaded model in two steps, in MB."""
    model = build(source, small=small)
    ids = torch.randint(model.config.vocab_size, (4, LENGTH))
    before = status("VmRSS")
    step = Gated(model, ids, 0.0) if is_gated else Floor(model, ids)
    step()
    step()
    return (status("VmHWM") - before) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few repetitions")
    parser.add_argument("--model", help="measure the steps of this model")
    options = parser.parse_args()
    seconds = medians(steps(options.model, options.quick), 3 if options.quick else 7)
    table = Table(title=f"steps of 4 × {LENGTH} tokens, float32: {machine()}")
    for column in ("step", "s", "× floor"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{value / seconds['floor']:.2f}")
    console = Console(width=100)
    console.print(table)
    floor, gated = (in_fresh_process(rise, options.model, options.quick, is_gated) for is_gated in (False, True))
    console.print(
        f"Memory beyond the loaded model: {floor:.0f} MB, with gates {gated:.0f} MB, {gated / floor:.2f} times."
    )


if __name__ == "__main__":
    main()
