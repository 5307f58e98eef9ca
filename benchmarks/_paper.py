"""One point of the paper's reproduction: a model, a way to prune it, a seed → heads, parameters, perplexities."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

import deadhead
from deadhead.data import TokenizedCorpus
from deadhead.measure.cost import model_cost
from deadhead.models import AllAttentionConfig, TransformerXLConfig
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, gate_config, train

# To be raised with whatever else changes the figures: points of another version are measured anew.
_VERSION = 1

Architecture = Literal["all-attention", "transformer-xl"]
ARCHITECTURES: tuple[Architecture, ...] = ("all-attention", "transformer-xl")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of both architectures: as many persistent vectors as the feed-forward layer is wide."""

    layers: int
    width: int
    inner: int
    length: int
    heads: int = 8
    batch_size: int = 8
    attention_dropout: float = 0.0
    dropout: float = 0.0
    learning_rate: float = 2e-3


SHAPES = {
    "small": Shape(layers=6, width=128, inner=512, length=64),
    # The paper's own.
    "paper": Shape(
        layers=16, width=512, inner=2048, length=192, attention_dropout=0.2, dropout=0.1, learning_rate=5e-4
    ),
    # Of the quick form.
    "tiny": Shape(layers=2, width=32, inner=16, length=16, heads=4, batch_size=2),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of each phase, and tokens measured: the same for all points."""

    dense: int = 2000
    prune: int = 400
    finetune: int = 200
    tokens: int = 40_000


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to make a model of some size.

    Args:
        kind: "dense" trains the dense model for as many steps as the others in total; "pruned" trains gates on it, cuts
            and fine-tunes; "scratch" trains a model with fewer heads from the beginning.
        options: fields of `PruneRecipe` that differ from the paper's.
        what: what it is, in a few words, for the tables.
    """

    kind: Literal["dense", "pruned", "scratch"]
    options: Mapping[str, Any] = field(default_factory=dict)
    what: str = ""


WAYS = {
    "dense": Way(kind="dense", what="every head, as many steps in all"),
    "paper": Way(kind="pruned", what="all three stabilisers, plain L0"),
    "no warm-up": Way(kind="pruned", options={"l0_warmup_steps": 0}, what="λ from the first step"),
    "no initialisation": Way(kind="pruned", options={"init": 0.0}, what="log_alpha starts at 0, not 2"),
    "no output scale": Way(kind="pruned", options={"output_scale": False}, what="the sum of the heads is not scaled"),
    "none of the three": Way(
        kind="pruned", options={"l0_warmup_steps": 0, "init": 0.0, "output_scale": False}, what="plain L0 alone"
    ),
    "output difference": Way(
        kind="pruned", options={"weighting": "output_difference"}, what="L0 weighted by output difference"
    ),
    "own optimizer": Way(
        kind="pruned", options={"gate_lr": None}, what="gates in an optimizer of their own, deadhead's default"
    ),
    "from scratch": Way(kind="scratch", what="fewer heads from the beginning, as many steps in all"),
}


def fresh(
    architecture: Architecture, shape: Shape, vocab_size: int, seed: int, heads: int | None = None
) -> PreTrainedModel:
    """Return an untrained model, with only the first `heads` heads of each layer if that is given."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "memory_length": shape.length,
        "segment_length": shape.length,
        "attention_dropout": shape.attention_dropout,
        "hidden_dropout": shape.dropout,
        "embedding_dropout": shape.dropout,
        "output_dropout": shape.dropout,
    }
    config = (
        AllAttentionConfig(num_persistent=shape.inner, **sizes)
        if architecture == "all-attention"
        else TransformerXLConfig(feed_forward_size=shape.inner, **sizes)
    )
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if heads is not None:
        total = dict.fromkeys(range(shape.layers), shape.heads)
        deadhead.cut(model, deadhead.HeadPlan(kept=dict.fromkeys(total, range(heads)), total=total))
    return model


def _phase(shape: Shape, steps: int, schedule: str, *, rate: float = 1.0, **values: Any) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": shape.batch_size,
        "learning_rate": rate * shape.learning_rate,
        "warmup_steps": min(50, steps // 5),
        "schedule": schedule,
        "adam_beta2": 0.99,
        "bf16": torch.cuda.is_available(),
        "save_every": 0,
        "log_every": 100,
        **values,
    }


def _train(
    model: PreTrainedModel,
    text: TokenizedCorpus,
    shape: Shape,
    steps: int,
    schedule: str,
    *,
    seed: int,
    first: int = 0,
    rate: float = 1.0,
) -> None:
    recipe = PhaseRecipe(**_phase(shape, steps, schedule, rate=rate))
    train(model, text.splits["train"], recipe, PhaseRun(seed=seed, first_segment=first))


def train_dense(
    architecture: Architecture,
    shape: Shape,
    seed: int,
    *,
    text: TokenizedCorpus,
    vocab_size: int,
    steps: int,
    folder: Path,
) -> None:
    """Train a dense model to the end of its schedule and keep it in `folder`."""
    model = fresh(architecture, shape, vocab_size, seed)
    _train(model, text, shape, steps, "cosine", seed=seed)
    deadhead.save(model, folder)


def prune_recipe(shape: Shape, budget: Budget, way: Way, l0: float) -> PruneRecipe:
    """Return the gates' phase as in the paper, except for what `way` changes.

    Gates learn in the model's Adam, ten times as fast; λ rises over the first quarter of the phase.
    """
    paper: dict[str, Any] = {
        "l0": l0,
        "l0_warmup_steps": budget.prune // 4,
        "init": 2.0,
        "output_scale": True,
        "gate_lr": 0.0,
    }
    # The rate does not fall before the fine-tuning: what gates learn in the last steps counts like the rest.
    return PruneRecipe(**_phase(shape, budget.prune, "constant", rate=0.5, **{**paper, **way.options}))


def measure_point(
    architecture: Architecture,
    shape: Shape,
    way: Way,
    amount: float,
    seed: int,
    *,
    text: TokenizedCorpus,
    vocab_size: int,
    dense: Path,
    budget: Budget,
) -> dict[str, Any]:
    """Make a model in one way and measure it.

    `amount` is λ, or the number of heads a layer of a model from scratch; the dense model ignores it.

    Returns:
        `heads` a layer, `sparsity`, `parameters` without embeddings, perplexities of the test text a token `gated`
        (gates closed, before the cut), `cut` and `after` fine-tuning (None where there is none), `steps` in all,
        `seconds`.
    """
    begun = time.perf_counter()
    total = budget.dense + budget.prune + budget.finetune
    before: dict[str, float | None] = {"gated": None, "cut": None}
    if way.kind == "scratch":
        model = fresh(architecture, shape, vocab_size, seed, heads=int(amount))
        _train(model, text, shape, total, "cosine", seed=seed)
    else:
        model = deadhead.load(dense)
        first = budget.dense
        recipe = prune_recipe(shape, budget, way, amount)
        # Each phase goes on in the text where the one before it stopped; seeds are of the gates' noise and of dropout.
        if way.kind == "dense":
            _train(model, text, shape, budget.prune, "constant", seed=seed + 1000, first=first, rate=0.5)
        else:
            gates = deadhead.attach(model, config=gate_config(recipe, model, seed))
            train(
                model,
                text.splits["train"],
                recipe,
                PhaseRun(gates=gates, seed=seed + 1000, first_segment=first),
            )
            before["gated"] = _perplexity(model, text, budget)
            deadhead.cut(model, gates.plan())
            before["cut"] = _perplexity(model, text, budget)
        first += budget.prune
        _train(model, text, shape, budget.finetune, "cosine", seed=seed + 2000, first=first, rate=0.5)
    cost = model_cost(model)
    return {
        "heads": cost.heads,
        "sparsity": 1 - sum(cost.heads) / sum(cost.total_heads),
        "parameters": cost.parameters - cost.embedding_parameters,
        "flops_per_token": cost.flops_per_token,
        **before,
        "after": _perplexity(model, text, budget),
        "steps": total,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _perplexity(model: PreTrainedModel, text: TokenizedCorpus, budget: Budget) -> float:
    return deadhead.evaluate(model, text.splits["test"], limit=budget.tokens).perplexity


def settings(shape: Shape, budget: Budget, way: Way) -> dict[str, Any]:
    """Return what a point depends on besides its name. A point with other settings is measured again."""
    return {
        "version": _VERSION,
        "shape": asdict(shape),
        "budget": asdict(budget),
        "kind": way.kind,
        "options": dict(way.options),
    }


def dense_settings(shape: Shape, budget: Budget, sha256: str) -> dict[str, Any]:
    """Return what a dense model depends on besides its architecture and seed."""
    return {"version": _VERSION, "shape": asdict(shape), "steps": budget.dense, "text": sha256}
