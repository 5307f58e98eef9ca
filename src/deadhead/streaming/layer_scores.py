"""Score the units of a model with one layer's weights in memory at a time, on the whole text.

Criteria that need gradients go through the layers twice: forwards, with the hidden states before each layer kept on
disk, and backwards, where each layer runs once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from deadhead.compensation.calibration import Calibration
from deadhead.compensation.streams import Stream, first, stream_of
from deadhead.criteria.reading import Begin
from deadhead.criteria.scoring import Scoring
from deadhead.data.shares import ALONE
from deadhead.layouts import Site
from deadhead.measure.losses import SegmentLoss
from deadhead.modes import uncompiled
from deadhead.plans.kinds import READS_TEXT, OneShot
from deadhead.plans.plan import UnitKey
from deadhead.plans.scores import HeadScores
from deadhead.streaming.layer_check import NotStreamable
from deadhead.streaming.resident import ResidentLayers
from deadhead.streaming.steps import Steps

# Those for which the loss is derived.
_BY_GRADIENTS: tuple[OneShot, ...] = ("taylor", "second-order")

Batch = Mapping[str, Tensor]


class LayerReading:
    """Runs one layer over the hidden states before it; see `Reading`.

    Args:
        stream: hidden states before the layer.
        index: index of the layer.
        batches: batches of the text.
        behind: for each batch, the gradient of its loss (a mean over tokens) with respect to the layer's output; None
            computes no gradients.
    """

    def __init__(self, stream: Stream, index: int, batches: Sequence[Batch], behind: Sequence[Tensor] | None) -> None:
        self.model, self.batches, self.shares = stream.model, batches, ALONE
        self._stream, self._index, self._behind = stream, index, behind
        self._at = 0
        # For each batch: the hidden states behind the layer, and the gradient before it.
        self.after: list[Tensor] = []
        self.before: list[Tensor] = []

    def over(self, begin: Begin = lambda inputs: None) -> Iterator[tuple[Tensor, Batch]]:
        """Run the layer; see `Reading`."""
        self.after, self.before = [], []
        if self._behind is not None:
            states = cast(list[Tensor], self._stream.states)
            self._stream.states = [state.detach().requires_grad_() for state in states]
        calls = self._stream.inputs(self._index)
        for at, ((args, kwargs), inputs) in enumerate(zip(calls, self.batches, strict=True)):
            self._at = at
            begin(inputs)
            state = first(self._stream.layers[self._index](*args, **kwargs))
            self.after.append(state.detach())
            yield state, inputs

    def gradients(self, made: Tensor, of: Sequence[Tensor], count: int) -> Sequence[Tensor]:
        """Return gradients of the losses; see `Reading`."""
        assert self._behind is not None, "the gradient behind the layer is not known"
        before = cast(Tensor, self._stream.states[self._at])
        *found, gradient = torch.autograd.grad(made, [*of, before], grad_outputs=self._behind[self._at])
        self.before.append(gradient)
        return [each * count for each in found]


@torch.no_grad()
def score_layers(
    model: ResidentLayers,
    scoring: Scoring,
    batches: Sequence[Batch],
    work: Path,
    *,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> HeadScores:
    """Score the units of a model layer by layer, as `score_heads` would score it whole.

    Args:
        model: a language model without segment memory.
        scoring: the scoring of the model.
        batches: batches of text; none if the criterion reads no text.
        work: folder of finished work, from which a stopped pass continues.
        seed: seed of "random".
        progress: called with the current work, how many layers are done, and how many there are.

    Raises:
        NotStreamable: the model's layers compute something else alone than within the model.
    """
    criterion = scoring.criterion
    if criterion == "random":
        return scoring.scores(scoring.of_units(scoring.sites, None, seed))
    by_layer = _by_layer(model, scoring.sites)
    steps = Steps(work / "scores")
    count = len(model.layers)
    if criterion not in READS_TEXT:
        for index in range(steps.done, count):
            model.load(index)
            steps.keep(index, _named(scoring.of_units(by_layer[index], None, seed)), {}, {})
            progress("scoring layers", index + 1, count)
        return _gathered(scoring, steps, count)
    with uncompiled():
        stream = layered_stream(model, batches)
        if criterion in _BY_GRADIENTS:
            _backwards(model, scoring, by_layer, batches, stream, work, steps, seed, progress)
            return _gathered(scoring, steps, count)
        if steps.done:
            stream.states = list(steps.states(steps.done)["dense"])
        for index in range(steps.done, count):
            model.load(index)
            reading = LayerReading(stream, index, batches, None)
            found = scoring.of_units(by_layer[index], reading, seed)
            if reading.after:
                stream.states = list(reading.after)
            else:
                stream.advance(index)
            steps.keep(index, _named(found), {}, {"dense": cast(list[Tensor], stream.states)})
            progress("scoring layers", index + 1, count)
    return _gathered(scoring, steps, count)


def _backwards(
    model: ResidentLayers,
    scoring: Scoring,
    by_layer: Sequence[list[Site]],
    batches: Sequence[Batch],
    stream: Stream,
    work: Path,
    steps: Steps,
    seed: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Score layers from the last to the first, after a forward pass; kept steps are numbered in that order."""
    count = len(model.layers)
    forward = Steps(work / "forward", keeps_states=True)
    first_states = stream.states
    for index in range(forward.done, count):
        if index:
            stream.states = list(forward.states(index)["dense"])
        stream.advance(index)
        forward.keep(index, {}, {}, {"dense": cast(list[Tensor], stream.states)})
        progress("running layers", index + 1, count)
    done = steps.done
    if done:
        behind = steps.states(done)["gradient"]
    else:
        with model.outside():
            behind = _gradients_at_the_end(stream, batches, forward.states(count)["dense"])
    for step in range(done, count):
        index = count - 1 - step
        model.load(index)
        stream.states = list(forward.states(index)["dense"]) if index else first_states
        reading = LayerReading(stream, index, batches, behind)
        with torch.enable_grad():
            found = scoring.of_units(by_layer[index], reading, seed)
            if not by_layer[index]:
                for made, _ in reading.over():
                    reading.gradients(made, [], 0)
        behind = reading.before
        steps.keep(step, _named(found), {}, {"gradient": behind})
        progress("scoring layers", step + 1, count)


def _gradients_at_the_end(stream: Stream, batches: Sequence[Batch], states: Sequence[Tensor]) -> list[Tensor]:
    """Return for each batch the gradient of its loss, a mean over tokens, with respect to the last layer's output."""
    losses = SegmentLoss(stream.model)
    losses.try_out()
    found = []
    with stream.ending() as ending, torch.enable_grad():
        for batch, state in zip(batches, states, strict=True):
            rows: list[Tensor] = []
            counted = 0
            for row in range(len(state)):
                # One by one: logits of all of them take much memory.
                ending.states = state[row : row + 1].detach().requires_grad_()
                part = {name: value[row : row + 1] for name, value in batch.items()}
                outputs = losses(stream.model, part)
                count = int(outputs.count)
                # The loss of a row without tokens that count is no number.
                loss = outputs.loss * count if count else 0 * ending.states.sum()
                rows += torch.autograd.grad(loss, [ending.states])
                counted += count
            found.append(torch.cat(rows) / max(counted, 1))
    return found


def layered_stream(model: ResidentLayers, batches: Sequence[Batch]) -> Stream:
    """Return the hidden states before the first layer, and how the layers are called.

    Raises:
        NotStreamable: layers compute something else alone than within the model.
    """
    given = [dict(batch) for batch in batches]
    calibration = Calibration(batches=given, is_held=[False] * len(given), has_memory=False)
    return required_layered(model, calibration)


def required_layered(model: ResidentLayers, calibration: Calibration) -> Stream:
    """Return a model's hidden states before the first layer; see `layered_stream`."""
    with model.outside():
        stream = stream_of(model.model, calibration, model.path)
    if stream.is_whole:
        raise NotStreamable("its layers compute something else alone than within the model")
    return stream


def _by_layer(model: ResidentLayers, sites: Sequence[Site]) -> list[list[Site]]:
    """Return the sites of each layer."""
    owner = {id(module): index for index, layer in enumerate(model.layers) for module in layer.modules()}
    found: list[list[Site]] = [[] for _ in model.layers]
    for site in sites:
        if id(site.module) not in owner:
            raise NotStreamable(f"its layer {site.layer} is not a separate entry of a list of layers")
        found[owner[id(site.module)]].append(site)
    return found


def _named(found: Mapping[UnitKey, Tensor]) -> dict[str, Tensor]:
    return {f"{key.kind} {key.layer}": values for key, values in found.items()}


def _gathered(scoring: Scoring, steps: Steps, count: int) -> HeadScores:
    """Return the scores of all layers, in the order of the sites."""
    kept: dict[str, Tensor] = {}
    for step in range(count):
        kept |= steps.found(step)[0]
    return scoring.scores({site.key: kept[f"{site.key.kind} {site.key.layer}"] for site in scoring.sites})
