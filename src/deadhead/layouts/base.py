"""What deadhead must know of an architecture: where its heads are, and which slices of which tensors they own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.models.pruned.structure import output_dim, weight_of
from deadhead.plan import HeadPlan, Layer, Unit


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is left of one tensor of an attention module when some of its heads go.

    Args:
        path: name of the parameter, from the attention module, such as ``q_proj.weight``.
        dim: the dimension along which heads lie.
        index: (n,) the rows along `dim` that stay, in their new order.
        per_token: whether every number in it takes part in one multiply-add for each token, as a projection's do.
    """

    path: str
    dim: int
    index: Tensor
    per_token: bool


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention module with heads that can be gated and cut.

    Args:
        layer: the plan's key.
        module: the attention module.
        output_path: name of the output projection in `module`; its input is the heads' outputs side by side.
        head_dim: E, width of one gated unit in that input.
        heads: indices, in the original dense model, of the units there are now; () for an emptied layer.
        total: units of the original dense model.
    """

    layer: Layer
    module: nn.Module
    output_path: str
    head_dim: int
    heads: tuple[int, ...]
    total: int

    @property
    def output(self) -> nn.Module:
        """The output projection."""
        return self.module.get_submodule(self.output_path)


def head_columns(output: nn.Module) -> Tensor:
    """Return an output projection's weight W_O as (D, H·E), a view where the module keeps it the other way round."""
    weight = weight_of(output)
    return weight.T if output_dim(output, heads=True) == 0 else weight


class Layout(ABC):
    """One way in which architectures keep their heads. A subclass is registered in `deadhead.layouts`."""

    @abstractmethod
    def matches(self, model: PreTrainedModel) -> bool:
        """Tell whether this layout describes `model`."""

    def units(self, model: PreTrainedModel) -> tuple[Unit, ...]:
        """Return what a gate of this model can open and close, the default first."""
        return ("head",)

    def choose_unit(self, model: PreTrainedModel, asked: Unit | None, *, what: str) -> Unit:
        """Return the unit that was asked for, or the default one.

        Args:
            model: it.
            asked: "head", "kv_group" or None.
            what: for the message, what is done by units, such as "gates open and close".

        Raises:
            InputError: the model has no such unit.
        """
        units = self.units(model)
        if asked is not None and asked not in units:
            raise InputError(f"This model's {what} {' or '.join(units)}, but the unit {asked!r} was asked for.")
        return asked or units[0]

    def repeats_keys(self, model: PreTrainedModel) -> bool:
        """Tell whether cutting single query heads may leave copies of the key/value head that they share."""
        return False

    @abstractmethod
    def sites(self, model: PreTrainedModel, unit: Unit) -> list[AttentionSite]:
        """Return the attention modules of `model`, one a layer, emptied ones included.

        Raises:
            UnsupportedModel: none can be pruned; the message says why.
        """

    @abstractmethod
    def selections(self, site: AttentionSite, heads: tuple[int, ...]) -> Sequence[Selection]:
        """Return what is left of every tensor with heads in it, the output projection included, if `heads` stay."""

    def observe(self, site: AttentionSite) -> Callable[[], None]:
        """Begin to watch a module that is about to run, for what `shrink` must know; return what ends it."""
        return lambda: None

    @abstractmethod
    def shrink(self, site: AttentionSite, heads: tuple[int, ...]) -> None:
        """Take all but `heads` out of the module, in place."""

    @abstractmethod
    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan into the model's configuration, so that the model reloads as it is."""

    @abstractmethod
    def recorded_plan(self, model: PreTrainedModel) -> HeadPlan | None:
        """Return the plan the model was cut by, or None for a dense model."""

    @abstractmethod
    def context_flops(self, site: AttentionSite, length: int) -> Mapping[str, float]:
        """Return the FLOPs all heads spend for one query outside their projections, by the part that spends them.

        Args:
            site: the attention module.
            length: positions before the query in the text.
        """

    @abstractmethod
    def cache_values(self, site: AttentionSite, length: int) -> int:
        """Return how many numbers the module keeps in the key/value cache after `length` positions."""
