"""Fitting the projections of one layer in order: each fit sees the outputs of the fitted projections before it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import nn

from deadhead.compensation.calibration import Calibration
from deadhead.compensation.gathering import CutLayer, pass_dense
from deadhead.compensation.moments import HeldRows, Moments
from deadhead.compensation.record import FittedLayer
from deadhead.compensation.solving import Fit, best_fit
from deadhead.compensation.streams import Stream
from deadhead.compensation.sublayers import Sublayer, install, projection
from deadhead.data.shares import Shares

# A fit must remove at least this share of the target's power; less is rounding.
_LEAST_GAIN = 1e-5


@dataclass(frozen=True)
class LayerFits:
    """The results for a layer's projections.

    Args:
        layers: results by path, in the order in which the projections run.
        tokens: numbers of tokens fitted to and held out; None if nothing was gathered.
        advance: moves the cut model's stream to the next layer.
    """

    layers: dict[str, FittedLayer]
    tokens: tuple[int, int] | None
    advance: Callable[[], None]


def fit_layer(
    stream: Stream,
    dense: Stream,
    index: int,
    sublayers: Sequence[Sublayer],
    calibration: Calibration,
    report: Callable[[int], None] = lambda done: None,
    *,
    needed: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> LayerFits:
    """Fit the projections of one layer of a cut model, in place, and move the dense model's stream to the next layer.

    Args:
        stream: the cut model's stream before the layer.
        dense: the dense model's stream before the layer.
        index: index of the layer.
        sublayers: the sublayers of the whole model.
        calibration: the text.
        report: called with the number of the layer's projections that are done.
        needed: returns a context in which the dense layer's weights must be in memory; solving happens outside of it,
            because it needs the memory but not the weights.
    """
    within = [sublayer for sublayer in sublayers if sublayer.is_within(stream.paths[index])]
    with needed():
        passed = pass_dense(dense, index, within, calibration.shares)
    layer = CutLayer(stream, index, passed, dense.model, calibration)
    found: dict[str, FittedLayer] = {}
    tokens: tuple[int, int] | None = None
    for place, sublayer in enumerate(passed.order):
        output = stream.model.get_submodule(sublayer.path)
        with needed():
            moments = layer.moments(place) if projection(output).numel() else None
        if passed.residuals is not None:
            # Nothing reads it afterwards.
            passed.residuals[place].clear()
        if moments is not None:
            tokens = moments[0].tokens, moments[1].tokens
        found[sublayer.path] = _fitted(output, sublayer.path, moments, calibration.shares)
        # They are large, and would otherwise be kept while those of the next projection are gathered.
        del moments
        report(place + 1)
    return LayerFits(found, tokens, layer.advance)


def never_run(sublayers: Iterable[Sublayer], run: Collection[str]) -> list[FittedLayer]:
    """Return the results for projections that no layer ran, given the paths of those that were run."""
    return [FittedLayer(path=s.path, fitted=False, reason="it did not run") for s in sublayers if s.path not in run]


def _on_cpu(fit: Fit | None) -> Fit | None:
    # Other processes cannot use a tensor on this process's GPU.
    return None if fit is None else replace(fit, weight_DN=fit.weight_DN.cpu())


def _fitted(
    output: nn.Module, path: str, moments: tuple[Moments, Moments | HeldRows] | None, shares: Shares
) -> FittedLayer:
    """Fit one projection, unless that gains nothing; all processes get the main process's fit, bit for bit."""
    if moments is None:
        return FittedLayer(path=path, fitted=False, reason="nothing is left of it that could be fitted")
    fitted, held = moments
    fit = shares.of_main(lambda: _on_cpu(best_fit(fitted, held, projection(output))))
    if fit is None:
        return FittedLayer(path=path, fitted=False, reason="no fit is better on held-out text")
    if fit.before - fit.after < _LEAST_GAIN:
        return FittedLayer(path=path, fitted=False, reason="there is nothing to gain", before=fit.before)
    if not install(output, fit.weight_DN):
        return FittedLayer(path=path, fitted=False, reason="its dtype cannot hold the fit", before=fit.before)
    return FittedLayer(path=path, fitted=True, ridge=fit.ridge, share=fit.share, before=fit.before, after=fit.after)
