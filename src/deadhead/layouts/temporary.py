"""A site's module with fewer units for a while: what shrinking it changes is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deadhead.layouts.base import Site

_NOTHING = object()


def shrink_for_now(site: Site, units: tuple[int, ...]) -> Callable[[], None]:
    """Remove all but `units` from a site's module, whose weights do not learn; return a function that restores them.

    If several sites are shrunk at the same time, restore them in the opposite order.

    Args:
        site: whose module lies whole on one device.
        units: one at least, ascending; a module without any would have to be told what it returns.
    """
    before = [(table, dict(table)) for table in _tables(site.module)]
    with torch.no_grad():
        site.shrink(units)
    changed = [
        (table, name, values.get(name, _NOTHING))
        for table, values in before
        for name, value in table.items()
        if value is not values.get(name, _NOTHING)
    ]

    def put_back() -> None:
        for table, name, value in changed:
            if value is _NOTHING:
                del table[name]
            else:
                table[name] = value

    return put_back


def _tables(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield what a module's attributes and parameters lie in."""
    for each in module.modules():
        yield vars(each)
        yield each._parameters
