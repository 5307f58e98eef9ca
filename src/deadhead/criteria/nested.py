"""A sublayer of any size: its units go in a given order, and its output projection makes up for those that are gone.

With W the projection's weight and C the second moments of its inputs, the units S that are left come nearest to the
whole sublayer's output, in squared error weighted as C is, with

    W_S = (W C_:S + λ W_:S) (C_SS + λ)⁻¹,    λ = ridge · mean diag C,

which is drawn to the present weight. Here the units that stay longest come first, so that S is always a beginning of
the order: with L Lᵀ = C + λ and L z = (W C + λ W)ᵀ, computed once for all sizes, L_SSᵀ W_Sᵀ = z_S.

Between two sizes the weight lies on the straight line from one fit to the other: a function of the size that is
continuous and has a gradient. Units that neither of the two has are not computed.

Dimensions: D model width, n width of what the output projection reads, S columns of the units that are left.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from deadhead.criteria.second_order import cholesky, exact
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
        self.site, self.choices = site, choices
        self.weight_Dn = head_columns(site.output).detach()
        # Units that are left with 0, 1, … choices.
        self.counts = [0]
        for choice in reversed(choices):
            self.counts.append(self.counts[-1] + len(choice))
        # Those that stay longest first.
        self._columns_n = site.rows(tuple(unit for choice in reversed(choices) for unit in choice))
        self._factor_nn, self._half_nD = self._solved(inputs_nn, ridge)
        self._fits: dict[int, Tensor] = {}

    def _solved(self, inputs_nn: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Return L and z of all units."""
        columns_n = self._columns_n.to(inputs_nn.device)
        moments_nn = exact(inputs_nn[columns_n[:, None], columns_n])
        weight_Dn = exact(self.weight_Dn[:, columns_n.to(self.weight_Dn.device)])
        added = ridge * moments_nn.diagonal().mean()
        if not bool(added > 0):
            # Nothing ever does anything: every fit is 0.
            added = torch.ones_like(added)
            weight_Dn = torch.zeros_like(weight_Dn)
        right_Dn = weight_Dn @ moments_nn + added * weight_Dn
        moments_nn.diagonal().add_(added)
        factor_nn = cholesky(moments_nn)
        half_nD = torch.linalg.solve_triangular(factor_nn, right_Dn.T, upper=False)
        device, wide = self.weight_Dn.device, torch.promote_types(self.weight_Dn.dtype, torch.float32)
        return factor_nn.to(device, wide), half_nD.to(device, wide)

    @property
    def units(self) -> int:
        """The number of units."""
        return self.counts[-1]

    def kept(self, count: int) -> tuple[int, ...]:
        """Return the units of the given number of choices that stay longest, ascending."""
        return tuple(sorted(unit for choice in self.choices[len(self.choices) - count :] for unit in choice))

    def fit(self, count: int) -> Tensor:
        """Return the weight for a given number of choices left, (D, S): the columns of their units."""
        if count == len(self.choices):
            return self.weight_Dn
        if count not in self._fits:
            # Those of the two sizes that the last one lay between may be wanted again.
            for old in [*self._fits][:-2]:
                del self._fits[old]
            width = self.counts[count] * self.site.unit_dim
            found_SD = torch.linalg.solve_triangular(
                self._factor_nn[:width, :width].T, self._half_nD[:width], upper=True
            )
            order_S = self._columns_n[:width].argsort().to(found_SD.device)
            self._fits[count] = found_SD[order_S].T.to(self.weight_Dn)
        return self._fits[count]

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
        less_DS[:, torch.isin(self._columns(below + 1), self._columns(below)).to(less_DS.device)] = self.fit(below)
        return self.kept(below + 1), torch.lerp(less_DS, more_DS, share.to(more_DS))

    def _columns(self, count: int) -> Tensor:
        return self._columns_n[: self.counts[count] * self.site.unit_dim].sort().values


@contextmanager
def resized(sublayers: Sequence[NestedSublayer], sizes: Sequence[Tensor]) -> Iterator[None]:
    """Give sublayers, whose own weights do not learn, certain sizes while the block runs."""
    with ExitStack() as stack:
        for sublayer, size in zip(sublayers, sizes, strict=True):
            units, weight_DS = sublayer.at(size)
            if len(units) < sublayer.units:
                stack.callback(shrink_for_now(sublayer.site, units))
            stack.enter_context(_weight_in_place(sublayer.site.output, weight_DS))
        yield


@contextmanager
def _weight_in_place(output: nn.Module, weight_Dn: Tensor) -> Iterator[None]:
    """Make a projection use a weight that is a function of other tensors, which no parameter can be."""
    is_view = head_columns(output) is not weight_of(output)
    # An attribute of the object itself is found before its parameters, which stay as they are.
    vars(output)["weight"] = weight_Dn.T if is_view else weight_Dn
    try:
        yield
    finally:
        del vars(output)["weight"]
