"""Feed-forward layers as sites of hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deadhead.layouts.base import Selection, Site
from deadhead.models.pruned.feed_forward import FeedForward, rows_of_units, shrink_feed_forward
from deadhead.plans.unit_plan import UnitPlan


@dataclass(frozen=True, kw_only=True)
class FeedForwardSite(Site):
    """A feed-forward layer with what is known of its structure."""

    feed_forward: FeedForward

    def selections(self, units: tuple[int, ...]) -> list[Selection]:
        """Return the rows of every tensor with hidden units in it."""
        hidden = self.rows(units)
        return [
            Selection(path=name, dim=dim, index=rows_of_units(self.feed_forward, name, hidden), per_token=is_matrix)
            for name, dim, is_matrix in self.feed_forward.tensors()
        ]

    def shrink(self, units: tuple[int, ...]) -> None:
        """Shrink the module as the checkpoint's own code does when it is loaded."""
        hidden = self.rows(units)
        # Our own models' layers know their width.
        if vars(self.module).get("width") == self.feed_forward.width:
            self.module.width = len(hidden)  # type: ignore[assignment]
        shrink_feed_forward(self.feed_forward, hidden)


def feed_forward_sites(found: Sequence[FeedForward], recorded: UnitPlan | None) -> list[Site]:
    """Return the sites of some feed-forward layers, whose units an earlier cut may have recorded."""
    return [
        FeedForwardSite(
            layer=layer.key,
            module=layer.module,
            output_path=layer.output_path,
            unit_dim=1,
            units=tuple(range(layer.dense_width) if recorded is None else recorded.kept[layer.key]),
            total=layer.dense_width if recorded is None else recorded.total[layer.key],
            is_hidden=True,
            feed_forward=layer,
        )
        for layer in found
        if layer.dense_width
    ]
