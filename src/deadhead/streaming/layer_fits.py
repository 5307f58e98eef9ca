"""Compensate a model with only one layer of the dense and of the cut model in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deadhead.compensation.calibration import Calibration, divided, held_out_loss
from deadhead.compensation.fitting import fit_layer, never_run
from deadhead.compensation.record import Compensation, FittedLayer, taken_back
from deadhead.compensation.streams import Stream
from deadhead.compensation.sublayers import Sublayer, find_sublayers
from deadhead.layouts import find_layout
from deadhead.modes import seeded, uncompiled
from deadhead.streaming.layer_scores import Batch, required_layered
from deadhead.streaming.resident import ResidentLayers
from deadhead.streaming.steps import Steps


@torch.no_grad()
def fit_layers(
    dense: ResidentLayers,
    cut: ResidentLayers,
    batches: Sequence[Batch],
    work: Path,
    *,
    progress: Callable[[str, int, int], None],
) -> tuple[Compensation, dict[str, Path]]:
    """Fit the output projections of a cut model layer by layer, as `compensate` does in memory.

    Args:
        dense: the model before the cut.
        cut: the model after it.
        batches: batches of text.
        work: folder of finished work, from which a stopped pass continues.
        progress: called with the current work, how many layers are done, and how many there are.

    Returns:
        What was done, and for each parameter with new values, by its name in memory, the file that holds them.

    Raises:
        InputError: there are fewer than two rows of text.
        NotStreamable: the layers of one model compute something else alone than within the model.
    """
    steps, count = Steps(work / "fits"), len(cut.layers)
    with uncompiled(), seeded():
        calibration = divided(dense.model, batches)
        with _outputs_of_emptied(dense.model, cut.model):
            other = required_layered(dense, calibration)
        stream = required_layered(cut, calibration)
        sublayers = find_sublayers(cut.model, dense.model)
        held = [place for place, is_held in enumerate(calibration.is_held) if is_held]
        # What the cut model gives without any fit, for the text that is held out.
        plain = stream.of(held)
        streams = {"dense": other, "cut": stream, "plain": plain}
        if steps.done:
            for name, kept in steps.states(steps.done).items():
                streams[name].states = list(kept)
        for index in range(steps.done, count):
            cut.load(index)
            plain.advance(index)
            fits = fit_layer(stream, other, index, sublayers, calibration, needed=partial(dense.loaded, index))
            fits.advance()
            words = {"layers": json.dumps([asdict(layer) for layer in fits.layers.values()])}
            words["tokens"] = json.dumps(fits.tokens)
            states = {name: cast(list[Tensor], each.states) for name, each in streams.items()}
            steps.keep(index, _fitted(cut, fits.layers), words, states)
            progress("compensating layers", index + 1, count)
        cut.release()
        with cut.outside():
            before, after = (_loss(each, calibration) for each in (plain, stream.of(held)))
    return _gathered(steps, count, sublayers, before, after)


@contextmanager
def _outputs_of_emptied(dense: PreTrainedModel, cut: PreTrainedModel) -> Iterator[None]:
    """Watch how many values attention modules return while the dense model runs; emptied ones will return as many."""
    layout = find_layout(dense)
    sites = layout.sites(dense, layout.units(dense)[0])
    with ExitStack() as watching:
        for site in sites:
            watching.callback(site.observe())
        yield
    seen = [count for site in sites for count in getattr(site, "outputs", ())]
    for module in cut.modules():
        if seen and hasattr(module, "num_outputs"):
            module.num_outputs = seen[-1]


def _fitted(cut: ResidentLayers, layers: Mapping[str, FittedLayer]) -> dict[str, Tensor]:
    """Return the parameters of projections that were fitted, by their names."""
    return {
        f"{path}.{name}": parameter.detach()
        for path, layer in layers.items()
        if layer.fitted
        for name, parameter in cut.model.get_submodule(path).named_parameters(recurse=False)
    }


def _loss(stream: Stream, calibration: Calibration) -> float:
    """Return the held-out loss of a model whose last hidden states, of the text that is held out, are these."""
    with stream.ending() as ending:

        def begin(batch: int, row: int) -> None:
            state = stream.states[batch]
            assert state is not None
            ending.states = state[row:]

        return held_out_loss(stream.model, calibration, begin)


def _gathered(
    steps: Steps, count: int, sublayers: Sequence[Sublayer], before: float, after: float
) -> tuple[Compensation, dict[str, Path]]:
    """Return what all steps found."""
    layers: list[FittedLayer] = []
    tokens = (0, 0)
    fitted: dict[str, Path] = {}
    for step in range(count):
        values, words = steps.found(step)
        layers += [FittedLayer(**layer) for layer in json.loads(words["layers"])]
        tokens = tuple(json.loads(words["tokens"]) or tokens)
        fitted |= dict.fromkeys(values, steps.path(step))
    layers += never_run(sublayers, {layer.path for layer in layers})
    kept = after < before
    if not kept:
        layers, fitted = taken_back(layers), {}
    found = Compensation(
        layers=tuple(layers),
        measure="loss",
        before=before,
        after=after,
        kept=kept,
        tokens=tokens[0],
        held_out=tokens[1],
    )
    return found, fitted
