"""Feed-forward layers as sites: their hidden units in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deadhead.layouts.base import Selection, Site
from deadhead.models.pruned.feed_forward import FeedForward, block_rows, rows_of_units
from deadhead.plans.block_size import choose_block_size
from deadhead.plans.plan import BlockPlan


@dataclass(frozen=True, kw_only=True)
class FeedForwardSite(Site):
    """A feed-forward layer with what is known of its structure."""

    feed_forward: FeedForward

    def present(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Return the places that blocks have among those there are now."""
        return tuple(self.units.index(block) for block in blocks)


def feed_forward_sites(
    found: Sequence[FeedForward], size: int | None, recorded: BlockPlan | None
) -> list[FeedForwardSite]:
    """Return the sites of some feed-forward layers, in blocks of a size that was asked for or recorded by a cut.

    Raises:
        InputError: the size is not one that these layers can have.
    """
    found = [feed_forward for feed_forward in found if feed_forward.dense_width]
    if not found:
        return []
    size = choose_block_size([feed_forward.dense_width for feed_forward in found], size, recorded)
    sites = []
    for feed_forward in found:
        total = feed_forward.dense_width // size
        blocks = tuple(range(total)) if recorded is None else tuple(recorded.kept[feed_forward.key])
        sites.append(
            FeedForwardSite(
                layer=feed_forward.key,
                module=feed_forward.module,
                output_path=feed_forward.output_path,
                unit_dim=size,
                units=blocks,
                total=total,
                has_blocks=True,
                feed_forward=feed_forward,
            )
        )
    return sites


def feed_forward_selections(site: FeedForwardSite, blocks: tuple[int, ...]) -> list[Selection]:
    """Return what is left of every tensor with hidden units in it if `blocks` stay."""
    units = block_rows(site.present(blocks), site.unit_dim)
    return [
        Selection(path=name, dim=dim, index=rows_of_units(site.feed_forward, name, units), per_token=is_matrix)
        for name, dim, is_matrix in site.feed_forward.tensors()
    ]
