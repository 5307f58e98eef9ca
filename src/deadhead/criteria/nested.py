"""A sublayer of any size: its units go in a given order, and its output projection makes up for those that are gone.

With W the projection's weight and C the second moments of what it reads, the units S that are left come nearest to the
whole sublayer's output, in squares weighed as C is, with

    W_S = (W C_:S + λ W_:S) (C_SS + λ)⁻¹,    λ = ridge · mean diag C_SS,

drawn to the weight that there is. Between two sizes the weight lies on the straight line from one fit to the other: a
function of the size that is continuous and has a gradient. Units that neither of the two has are not computed.

Dimensions: D model width, n width of what the output projection reads, S columns of the units that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from deadhead.criteria.second_order import exact, solve
from deadhead.layouts import Site, head_columns
from deadhead.layouts.temporary import shrink_for_now
from deadhead.models.pruned.structure import weight_of

RIDGE = 0.1


class NestedSublayer:
    """One site whose units go in an order.

    Args:
        site: with an output projection.
        inputs_nn: C, (n, n), on the projection's device.
        choices: the units that go or stay together, (units of each), the first to go first.
        ridge: λ, as a share of the mean of C's diagonal.
    """

    def __init__(
        self, site: Site, inputs_nn: Tensor, choices: Sequence[Sequence[int]], *, ridge: float = RIDGE
    ) -> None:
        self.site, self.inputs_nn, self.choices, self.ridge = site, inputs_nn, choices, ridge
        self.weight_Dn = head_columns(site.output).detach()
        # Units that are left with 0, 1, … choices.
        self.counts = [0]
        for choice in reversed(choices):
            self.counts.append(self.counts[-1] + len(choice))
        self._fits: dict[int, Tensor] = {}

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.counts[-1]

    def kept(self, count: int) -> tuple[int, ...]:
        """Return the units of the last so many choices, ascending."""
        return tuple(sorted(unit for choice in self.choices[len(self.choices) - count :] for unit in choice))

    def fit(self, count: int) -> Tensor:
        """Return the weight with so many choices left, (D, S): the columns of their units."""
        if count == len(self.choices):
            return self.weight_Dn
        if count not in self._fits:
            # Those of the two sizes that the last one lay between may be wanted again.
            for old in [*self._fits][:-2]:
                del self._fits[old]
            self._fits[count] = self._solved(count)
        return self._fits[count]

    def _solved(self, count: int) -> Tensor:
        columns_S = self._columns(count)
        weight_DS = self.weight_Dn[:, columns_S]
        across_nS = self.inputs_nn[:, columns_S]
        inner_SS = exact(across_nS[columns_S])
        ridge = self.ridge * inner_SS.diagonal().mean()
        if not bool(ridge > 0):
            # Nothing is left, or nothing that ever does anything.
            return torch.zeros_like(weight_DS)
        right_DS = exact(self.weight_Dn.to(across_nS) @ across_nS) + ridge * exact(weight_DS)
        inner_SS.diagonal().add_(ridge)
        return solve(inner_SS, right_DS.T).T.to(weight_DS)

    def _columns(self, count: int) -> Tensor:
        return self.site.rows(self.kept(count)).to(self.weight_Dn.device)

    def at(self, size: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """Return the units that are computed at a size, ascending, and the weight of their columns, with a gradient.

        Args:
            size: units that are left, 0-dimensional, a fraction too; from 0 to all.
        """
        wanted = float(size.detach())
        below = max(place for place, units in enumerate(self.counts[:-1]) if not place or units <= wanted)
        share = (size - self.counts[below]) / (self.counts[below + 1] - self.counts[below])
        more_DS = self.fit(below + 1)
        less_DS = torch.zeros_like(more_DS)
        less_DS[:, torch.isin(self._columns(below + 1), self._columns(below))] = self.fit(below)
        return self.kept(below + 1), torch.lerp(less_DS, more_DS, share.to(more_DS))


@contextmanager
def resized(sublayers: Sequence[NestedSublayer], sizes: Sequence[Tensor]) -> Iterator[None]:
    """Let sublayers, whose own weights do not learn, have some sizes while the block runs."""
    with ExitStack() as stack:
        for sublayer, size in zip(sublayers, sizes, strict=True):
            units, weight_DS = sublayer.at(size)
            if len(units) < sublayer.units:
                stack.callback(shrink_for_now(sublayer.site, units))
            stack.enter_context(_weight_in_place(sublayer.site.output, weight_DS))
        yield


@contextmanager
def _weight_in_place(output: nn.Module, weight_Dn: Tensor) -> Iterator[None]:
    """Let a projection multiply by a weight that is a function of others, which no parameter can be."""
    is_view = head_columns(output) is not weight_of(output)
    # An attribute of the object itself is found before its parameters, which stay as they are.
    vars(output)["weight"] = weight_Dn.T if is_view else weight_Dn
    try:
        yield
    finally:
        del vars(output)["weight"]
