"""Feed-forward layers as sites: their hidden units in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deadhead.layouts.base import Selection, Site
from deadhead.models.pruned.feed_forward import FeedForward, rows_of_units, shrink_feed_forward
from deadhead.plans.plan import BlockPlan, choose_block_size


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


def feed_forward_sites(found: Sequence[FeedForward], size: int | None, recorded: BlockPlan | None) -> list[Site]:
    """Return the sites of some feed-forward layers, in blocks of a size that was asked for or recorded by a cut."""
    found = [layer for layer in found if layer.dense_width]
    size = choose_block_size([layer.dense_width for layer in found], size, recorded) if found else 1
    return [
        FeedForwardSite(
            layer=layer.key,
            module=layer.module,
            output_path=layer.output_path,
            unit_dim=size,
            units=tuple(range(layer.dense_width // size) if recorded is None else recorded.kept[layer.key]),
            total=layer.dense_width // size,
            has_blocks=True,
            feed_forward=layer,
        )
        for layer in found
    ]
