"""What compensation did to a model, as its caller, its configuration and its card are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FittedLayer:
    """What became of one output projection.

    Args:
        path: of the projection in the model.
        fitted: whether it has new numbers.
        reason: why not; empty if it has.
        ridge: λ, as a share of the mean square of the projection's inputs; None if it was not fitted.
        share: how much of the target was what the dense model's residual stream has, the rest being what the dense
            sublayer makes of the same input; None if it was not fitted.
        before: error on held-out text against half of each target, as a share of its power; None where it could not be
            measured.
        after: the same of the fit; None if it was not fitted.
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
    """What compensation did to a model.

    Args:
        layers: for each output projection, in the order of the model.
        measure: what `before` and `after` are: "loss", the mean negative log-likelihood of a held-out token, or
            "distance", ‖h − g‖² / ‖g‖² of last hidden states to the dense model's, for models that predict no token.
        before: on held-out text, of the model as it came.
        after: of the model with all fits.
        kept: whether the fits stayed: they are taken back unless `after` is less than `before`.
        tokens: that were fitted to.
        held_out: tokens that decided.
    """

    layers: tuple[FittedLayer, ...]
    measure: str
    before: float
    after: float
    kept: bool
    tokens: int
    held_out: int

    def to_dict(self) -> dict[str, Any]:
        """Return what a model's configuration says of it, as plain JSON values."""
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
    """Return what becomes of projections where all fits together are not better."""
    why = "all fits together are not better on held-out text"
    return [replace(layer, fitted=False, reason=why) if layer.fitted else layer for layer in layers]


def card_line(noted: Mapping[str, Any]) -> str:
    """Return what a model's card says of what its configuration notes under `compensation`, or of what was in vain."""
    if not noted["fitted"]:
        return f"compensated: nothing, as no fit lowers the held-out {noted['measure']} of {noted['before']:.4g}"
    text = f"tokens of {noted['text']}" if "text" in noted else "tokens"
    return (
        f"compensated: {noted['fitted']} of {noted['projections']} output projections fitted to the dense model on "
        f"{noted['tokens']:,} {text}; held-out {noted['measure']} {noted['before']:.4g} → {noted['after']:.4g}"
    )
