"""Persistent vectors of the All-attention Transformer as sites: in blocks, each of all heads of a layer."""

from __future__ import annotations

from collections.abc import Sequence

from deadhead.layouts.base import Selection, Site
from deadhead.models.all_attention.layer import AllAttention
from deadhead.models.pruned.feed_forward import block_rows
from deadhead.plans.block_size import choose_block_size
from deadhead.plans.plan import BlockPlan

# Names of a module's parameters.
PERSISTENT = ("persistent_k", "persistent_v")


class PersistentSite(Site):
    """The persistent vectors of a layer: block j is the j-th run of `unit_dim` of them in every head that is left.

    A layer without heads has no persistent vectors and so no blocks, whatever a plan says of them.
    """


def persistent_sites(
    attentions: Sequence[AllAttention], size: int | None, recorded: BlockPlan | None
) -> list[PersistentSite]:
    """Return the sites of all layers' persistent vectors, in blocks of a size that was asked for or recorded by a cut.

    There are none where the dense model had none.

    Raises:
        InputError: the size is not one that these layers can have.
    """
    dense = attentions[0].config.num_persistent
    # A checkpoint's own code that is older than these gates would not read them.
    if not dense or not all(hasattr(attention, "num_persistent") for attention in attentions):
        return []
    size = choose_block_size([dense] * len(attentions), size, recorded)
    sites = []
    for layer, attention in enumerate(attentions):
        blocks = tuple(range(dense // size)) if recorded is None else tuple(recorded.kept[layer])
        sites.append(
            PersistentSite(
                layer=layer,
                module=attention,
                output_path=None,
                unit_dim=size,
                units=blocks if attention.heads else (),
                total=dense // size,
                has_blocks=True,
                is_headless=not attention.heads,
            )
        )
    return sites


def persistent_selections(site: PersistentSite, blocks: tuple[int, ...]) -> list[Selection]:
    """Return what is left of m^k and m^v if `blocks` stay."""
    names = {name for name, _ in site.module.named_parameters(recurse=False)}
    index = block_rows([site.units.index(block) for block in blocks], site.unit_dim)
    return [Selection(path=path, dim=1, index=index, per_token=False) for path in PERSISTENT if path in names]
