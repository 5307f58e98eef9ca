"""What each of one or several processes makes of a text that they share out: plans, fitted weights, and failures.

    torchrun --nproc-per-node 2 -m tests.training.sharing FOLDER

Each writes what it found, and its weights, into files of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import deadhead
from deadhead.data import TokenStream
from deadhead.data.shares import Shares
from deadhead.errors import InputError
from deadhead.plans.kinds import READS_TEXT
from deadhead.training import PruneRecipe
from deadhead.training.phases.compensating import Compensating
from deadhead.training.phases.ranking import rank_together
from deadhead.training.phases.starting import start_of
from deadhead.training.processes import together
from tests.compensation.small_pairs import VOCABULARY, cut_by_hand, dense_model, text_of

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
KINDS = ("llama", "gpt2")
# Another measure of what was lost, and a memory of the segment before.
COMPENSATED = (*KINDS, "bert", "all-attention")
ROWS, LENGTH, BATCHES = 3, 12, 3


def text() -> TokenStream:
    """Return random tokens of which two thirds count."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(VOCABULARY, size=600).astype(np.uint16)
    return TokenStream(tokens=tokens, num_bytes=600, num_words=200, scored=generator.random(600) < 2 / 3)


def recipe(**values: Any) -> PruneRecipe:
    """Return a phase that looks at three batches."""
    rows: dict[str, Any] = {"batch_size": ROWS, "sequence_length": LENGTH, "params": 0.7}
    return PruneRecipe(**{**rows, "steps": BATCHES, **values})


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """Note how many tokens a model embeds each time."""
    noted: list[int] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        noted.append(args[0].numel())

    with model.get_input_embeddings().register_forward_hook(note):
        yield noted


def ranked(kind: str, criterion: Any) -> dict[str, Any]:
    """Return the plan of a criterion, and how many batches this process read for it."""
    model = dense_model(kind)
    told: list[Any] = []
    where: dict[str, Any] = {"seed": 0, "first_segment": 0, "latency": None}
    with counted_tokens(model) as noted:
        plan = rank_together(
            model, text(), recipe(criterion=criterion), **where, progress=lambda *what: told.append(what[:3])
        )
    return {"plan": plan.to_dict(), "read": noted.count(ROWS * LENGTH), "told": told}


def ranked_with_memory() -> dict[str, Any]:
    """Return what a model chooses by batches that go on where those before them ended."""
    stream = text()
    stream = TokenStream(tokens=stream.tokens, num_bytes=600, num_words=200)
    asked = PruneRecipe(criterion="taylor", sparsity=0.5, batch_size=ROWS, steps=BATCHES)
    where: dict[str, Any] = {"seed": 0, "first_segment": 0, "latency": None}
    plan = rank_together(dense_model("all-attention"), stream, asked, **where, progress=lambda *_: None)
    return {"plan": plan.to_dict()}


def leaning(kind: str) -> dict[str, Any]:
    """Return where gates begin."""
    asked = recipe(start_from="reconstruction", start_batches=BATCHES, block_size=4)
    start = start_of(dense_model(kind), text(), asked, seed=0)
    scores = {str(key): values.tolist() for key, values in start.scores.items()}
    return {"scores": scores, "blocks": {str(layer): units for layer, units in start.blocks.items()}}


def compensated(kind: str, rows: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what compensation says it did, how many tokens the dense model embedded, and the weights that it left."""
    dense = dense_model(kind)
    model = cut_by_hand(dense, emptied=kind != "all-attention")
    compensating = Compensating(dense, text_of(dense, rows=rows), "its own")
    with counted_tokens(dense) as noted:
        found = compensating.of(model, lambda *_: None, consume=False)
    tensors = {f"{kind} {rows}/{name}": value.detach() for name, value in model.state_dict().items()}
    return {"record": asdict(found), "config": model.config.compensation, "read": sum(noted)}, tensors


def pruned() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the one call prunes."""
    model = dense_model("llama")
    # Of random tokens nothing would be learned.
    tokens = torch.cat([batch["input_ids"].flatten() for batch in text_of(model)]).numpy().astype(np.uint16)
    stream = TokenStream(tokens=tokens, num_bytes=len(tokens), num_words=len(tokens))
    found = deadhead.prune(model, stream, recipe=recipe(criterion="wanda"))
    assert found.compensation is not None and found.compensation.kept
    tensors = {f"pruned/{name}": value.detach() for name, value in found.model.state_dict().items()}
    return {"plan": found.plan.to_dict(), "after": found.compensation.after}, tensors


def failed(failing: int, error: Exception, where: str) -> list[str]:
    """Return how a work ends of which one process fails, before or after something is added up, or in `of_main`."""

    def fail(shares: Shares) -> float:
        def raising() -> float:
            raise error

        if where == "in the main one":
            return shares.of_main(raising)
        if failing == RANK and where == "before":
            raising()
        total = torch.ones(())
        shares.total(total)
        if failing == RANK:
            raising()
        shares.total(total)
        return float(total)

    try:
        return [str(together(fail))]
    except Exception as found:
        return [type(found).__name__, str(found), type(found.__cause__).__name__]


FAILURES: dict[str, Callable[[], list[str]]] = {
    f"{type(error).__name__} of {rank} {where}": partial(failed, rank, error, where)
    for error in (InputError("Bad."), OSError("Gone."))
    for rank, where in ((0, "before"), (1, "before"), (1, "after"), (0, "in the main one"))
}


def run(folder: Path) -> None:
    """Find everything, and write it."""
    found: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for kind in KINDS:
        for criterion in READS_TEXT:
            found[f"{kind} {criterion}"] = ranked(kind, criterion)
        found[f"{kind} leaning"] = leaning(kind)
    found["memory"] = ranked_with_memory()
    for kind, rows in [*((kind, 48) for kind in COMPENSATED), ("llama", 2)]:
        found[f"{kind} {rows} compensated"], weights = compensated(kind, rows)
        tensors |= weights
    found["pruned"], weights = pruned()
    tensors |= weights
    if COUNT > 1:
        found["failures"] = {name: fail() for name, fail in FAILURES.items()}
        found["goes on"] = together(lambda shares: shares.count)
    (folder / f"rank{RANK} of {COUNT}.json").write_text(json.dumps(found))
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        folder / f"rank{RANK} of {COUNT}.safetensors",
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]))
