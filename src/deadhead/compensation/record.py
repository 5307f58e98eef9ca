"""The record of a compensation, for its caller, the model's configuration and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """The result for one output projection.

    Args:
        path: the projection's path in the model.
        fitted: whether the projection has new weights.
        reason: why it was not fitted; empty if it was.
        ridge: λ, as a share of the mean square of the projection's inputs; None if it was not fitted.
        share: the share of the dense model's residual stream in the target; the rest is the dense sublayer's output for
            the same input. None if the projection was not fitted.
        before: error on held-out text against half of each target, as a share of its power, before the fit; None if it
            could not be measured.
        after: the same error after the fit; None if the projection was not fitted.
    """

    path: str
    fitted: bool
    reason: str = ""
    ridge: float | None = None
    share: float | None = None
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class Compensation:
    """The result of a compensation.

    Args:
        layers: the result for each output projection, in the order of the model.
        measure: what `before` and `after` are: "loss" is the mean negative log-likelihood of a held-out token, in nats;
            "distance" is ‖h − g‖² / ‖g‖² from the model's last hidden states h to the dense model's g, for models that
            do not predict tokens.
        before: the measure on held-out text before the fits.
        after: the measure with all fits.
        kept: whether the fits were kept; they are taken back unless `after` is less than `before`.
        tokens: number of tokens fitted to.
        held_out: number of held-out tokens, on which the choices were made.
    """

    layers: tuple[FittedLayer, ...]
    measure: str
    before: float
    after: float
    kept: bool
    tokens: int
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """Return what a model's configuration records of the compensation, as plain JSON values."""
        return {
            "measure": self.measure,
            "before": self.before,
            "after": self.after,
            "tokens": self.tokens,
            "held_out_tokens": self.held_out,
            "fitted": sum(layer.fitted for layer in self.layers),
            "projections": len(self.layers),
        }


def taken_back(layers: Sequence[FittedLayer]) -> list[FittedLayer]:
    """Return the projections' results, given that the fits are taken back because they are not better together."""
    why = "all fits together are not better on held-out text"
    return [replace(layer, fitted=False, reason=why) if layer.fitted else layer for layer in layers]


def card_line(noted: Mapping[str, Any]) -> str:
    """Return the model card's line on a compensation, given what `to_dict` returned."""
    if not noted["fitted"]:
        return f"compensated: nothing, because no fit lowers the held-out {noted['measure']} of {noted['before']:.4g}"
    text = f"tokens of {noted['text']}" if "text" in noted else "tokens"
    return (
        f"compensated: {noted['fitted']} of {noted['projections']} output projections fitted to the dense model on "
        f"{noted['tokens']:,} {text}; held-out {noted['measure']} {noted['before']:.4g} → {noted['after']:.4g}"
    )
