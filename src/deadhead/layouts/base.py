"""What deadhead must know of an architecture: where its units are, and which slices of which tensors belong to them.

Units are heads (or key/value groups), and hidden units: those of a feed-forward layer, or persistent vectors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deadhead.errors import InputError
from deadhead.layouts.refusals import require_recorded
from deadhead.models.pruned.structure import keep_rows, output_dim, weight_of, wide_rows
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_plan import Layer

HEAD_GATE = "head_gate"
"""Name, in a module, of the gates of its heads."""

BLOCK_GATE = "block_gate"
"""Name, in a module, of the gates of its blocks of hidden units."""

TAGS = ("deadhead", "pruned-attention-heads", "pruned")
"""Tags of cut models on the Hugging Face hub and in model cards."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of one of a module's tensors that stays when some of its units go.

    Args:
        path: name of the parameter within the module, such as `q_proj.weight`.
        dim: dimension along which units lie.
        index: (n,), the rows along `dim` that stay, in their new order.
        per_token: whether each number of the tensor takes part in one multiply-add for each token, as in a projection.
    """

    path: str
    dim: int
    index: Tensor
    per_token: bool


@dataclass(frozen=True, kw_only=True)
class Site(ABC):
    """One module whose units (heads or hidden units) can be gated and cut.

    Args:
        layer: the layer's index, or its path if an index is not enough.
        module: the attention or feed-forward module.
        output_path: name of the output projection in `module`. Its input is the units' outputs side by side, which the
            gates multiply. None if the module reads its gate itself.
        unit_dim: E, width of one unit in that input: the width of a head, or 1 for a hidden unit.
        units: the present units, by their indices in the dense model; () if none is left.
        total: number of units in the dense model.
        is_hidden: whether the units are hidden units, which gates take in blocks, rather than heads.
        is_headless: whether the units went with the last head of their layer. A plan that keeps some is accepted
            nevertheless.
    """

    layer: Layer
    module: nn.Module
    output_path: str | None
    unit_dim: int
    units: tuple[int, ...]
    total: int
    # Whether the module itself skips the units that are closed in a draw.
    leaves_out_shut: ClassVar[bool] = False
    is_hidden: bool = False
    is_headless: bool = False

    @abstractmethod
    def selections(self, units: tuple[int, ...]) -> Sequence[Selection]:
        """Return what stays of each tensor that contains units, the output projection included, if `units` stay."""

    def observe(self) -> Callable[[], None]:
        """Begin to watch the module's next run for what `shrink` must know; return a function that ends this."""
        return lambda: None

    @torch.no_grad()
    def shrink(self, units: tuple[int, ...]) -> None:
        """Remove all units but `units` from the module, in place."""
        for part in self.selections(units):
            keep_rows(self.module, part.path, part.dim, part.index)

    def context_flops(self, length: int) -> Mapping[str, float]:
        """Return the FLOPs outside projections, by what needs them, of all units for a query after `length` tokens."""
        return {}

    def cache_values(self, length: int) -> int:
        """Return how many numbers the module keeps in the key/value cache for `length` positions."""
        return 0

    def rows(self, units: tuple[int, ...]) -> Tensor:
        """Return the indices of some units' rows among the present rows, (units · unit_dim,)."""
        place = {unit: index for index, unit in enumerate(self.units)}
        return wide_rows([place[unit] for unit in units], self.unit_dim)

    @property
    def key(self) -> UnitKey:
        """The key of the site's units."""
        return UnitKey("block" if self.is_hidden else "head", self.layer)

    @property
    def gate_name(self) -> str:
        """The name of the site's gate in the module; an attention module may have both kinds."""
        return HEAD_GATE if self.output_path is not None else BLOCK_GATE

    @property
    def output(self) -> nn.Module:
        """The output projection, if there is one."""
        assert self.output_path is not None, "units that the module itself gates have no output projection"
        return self.module.get_submodule(self.output_path)


def head_columns(output: nn.Module) -> Tensor:
    """Return an output projection's weight W_O as (D, H·E); it is a view if the module stores it transposed."""
    weight = weight_of(output)
    return weight.T if output_dim(output, heads=True) == 0 else weight


def own_config(model: PreTrainedModel) -> None:
    """Give a model and its modules a copy of their configuration, because other models may share the original."""
    memo: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, memo)
    copies = {place: value for place, value in memo.items() if isinstance(value, PreTrainedConfig)}
    for module in model.modules():
        for name, value in vars(module).items():
            # A layer that differs from the others has its own view of the shared configuration.
            view = vars(value) if type(value).__name__ == "LayerConfig" else {}
            if id(value) in copies:
                vars(module)[name] = copies[id(value)]
            elif id(view.get("shared")) in copies:
                vars(module)[name] = type(value)(copies[id(view["shared"])], view["own"])


class Layout(ABC):
    """One way in which architectures store their heads. Subclasses are listed in `deadhead.layouts`."""

    @abstractmethod
    def matches(self, model: PreTrainedModel) -> bool:
        """Return whether this layout describes `model`."""

    def units(self, model: PreTrainedModel) -> tuple[Unit, ...]:
        """Return the units that a gate of this model can open and close, the default first."""
        return ("head",)

    def choose_unit(self, model: PreTrainedModel, asked: Unit | None, *, what: str) -> Unit:
        """Return the unit asked for, or the default one.

        Raises:
            InputError: the model has no such unit; `what` ("heads are cut by", say) goes into the message.
        """
        units = self.units(model)
        if asked is not None and asked not in units:
            raise InputError(f"This model's {what} {' or '.join(units)}, but the unit {asked!r} was asked for.")
        return asked or units[0]

    @abstractmethod
    def sites(self, model: PreTrainedModel, unit: Unit) -> list[Site]:
        """Return the attention modules of `model`, one a layer, emptied ones included.

        Raises:
            UnsupportedModel: none can be pruned; the message says why.
        """

    def hidden_sites(self, model: PreTrainedModel) -> list[Site]:
        """Return the modules with hidden units that can be cut, emptied ones included; by default there are none."""
        return []

    def all_sites(self, model: PreTrainedModel, unit: Unit, *, hidden: bool) -> list[Site]:
        """Return the sites of heads, and with `hidden` those of hidden units."""
        return [*self.sites(model, unit), *(self.hidden_sites(model) if hidden else ())]

    def keeps_cache(self, model: PreTrainedModel) -> bool:
        """Return whether a model keeps keys and values while it continues a text; encoders do not."""
        return True

    def require_reloadable(self, model: PreTrainedModel) -> None:
        """Raise an UnsupportedModel if a checkpoint of the cut model could not be loaded."""
        return

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan into the model's configuration, which no other model may share, so that it reloads as it is.

        If the plan says nothing of hidden units, those that earlier cuts left are recorded.
        """
        before = self.recorded_plan(model)
        if plan.hidden_units is None and before is not None:
            plan = replace(plan, hidden_units=before.hidden_units)
        model.config.head_plan = plan.to_dict()
        model.add_model_tags([*TAGS])

    def recorded_plan(self, model: PreTrainedModel) -> HeadPlan | None:
        """Return the plan that the model was cut by, from its configuration's `head_plan`; None for a dense model.

        Raises:
            InputError: only an inner model was cut.
        """
        require_recorded(model)
        recorded = getattr(model.config, "head_plan", None)
        return None if recorded is None else HeadPlan.from_dict(recorded)
