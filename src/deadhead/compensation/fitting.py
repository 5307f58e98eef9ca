"""The projections of one layer, fitted one after the other: each on what those before it now give."""

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

# A fit must take away this share of the target's power at least; less is rounding.
_LEAST_GAIN = 1e-5


@dataclass(frozen=True)
class LayerFits:
    """What became of a layer's projections.

    Args:
        layers: by their paths, in the order in which they run.
        tokens: that were fitted to, and held out; None where nothing was gathered.
        advance: lets the cut model's stream go on to the next layer.
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
    """Fit the projections of one layer of a cut model, in place; the dense model's stream goes on to the next.

    Args:
        stream: of the cut model, before the layer.
        dense: of the dense model, before the layer.
        index: of the layer.
        sublayers: of the whole model.
        calibration: the text.
        report: called with how many of the layer's projections are done.
        needed: while what it returns is entered, the dense layer's weights must be there; solving needs memory, not
            them.
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
            # Nothing reads it again.
            passed.residuals[place].clear()
        if moments is not None:
            tokens = moments[0].tokens, moments[1].tokens
        found[sublayer.path] = _fitted(output, sublayer.path, moments, calibration.shares)
        # They are large, and those of the next projection are gathered first and named then.
        del moments
        report(place + 1)
    return LayerFits(found, tokens, layer.advance)


def never_run(sublayers: Iterable[Sublayer], run: Collection[str]) -> list[FittedLayer]:
    """Return what becomes of projections that no layer ran, given the paths of those that one did."""
    return [FittedLayer(path=s.path, fitted=False, reason="it did not run") for s in sublayers if s.path not in run]


def _on_cpu(fit: Fit | None) -> Fit | None:
    # Other processes know no tensor on this one's GPU.
    return None if fit is None else replace(fit, weight_DN=fit.weight_DN.cpu())


def _fitted(
    output: nn.Module, path: str, moments: tuple[Moments, Moments | HeldRows] | None, shares: Shares
) -> FittedLayer:
    """Fit one projection, unless that would gain nothing; all processes get the main one's fit, to the bit."""
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
