"""What deadhead must know of an architecture: where its units are, and which slices of which tensors they own.

Units are heads (or key/value groups), and hidden units: a feed-forward layer's, or persistent vectors.
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

TAGS = ("deadhead", "pruned-attention-heads")
"""Tags of cut models on the Hugging Face hub and in model cards."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is left of one tensor of a module when some of its units go."""

    path: str  # name of the parameter, from the module, such as q_proj.weight
    dim: int  # along which units lie
    index: Tensor  # (n,) the rows along `dim` that stay, in their new order
    per_token: bool  # whether every number in it takes part in one multiply-add for each token, as a projection's do


@dataclass(frozen=True, kw_only=True)
class Site(ABC):
    """One module with units, heads or hidden units, that can be gated and cut."""

    layer: Layer
    module: nn.Module
    # Name of the output projection in `module`; its input is the units' outputs side by side, which the gates multiply.
    # None where the module reads its gate itself.
    output_path: str | None
    unit_dim: int  # E, width of one unit in that input: of a head; 1 of a hidden unit
    units: tuple[int, ...]  # indices, in the dense model, of the units there are now; () for an emptied one
    total: int  # units of the dense model
    # Whether the module itself leaves out what a gate shuts in a draw.
    leaves_out_shut: ClassVar[bool] = False
    is_hidden: bool = False  # whether its units are hidden units, which gates take in blocks, not heads
    # Whether its units went with the last head of its layer. A plan that keeps some is obeyed all the same.
    is_headless: bool = False

    @abstractmethod
    def selections(self, units: tuple[int, ...]) -> Sequence[Selection]:
        """Return what is left of every tensor with units in it, the output projection included, if `units` stay."""

    def observe(self) -> Callable[[], None]:
        """Begin to watch the module, which is about to run, for what `shrink` must know; return what ends it."""
        return lambda: None

    @torch.no_grad()
    def shrink(self, units: tuple[int, ...]) -> None:
        """Take all but `units` out of the module, in place."""
        for part in self.selections(units):
            keep_rows(self.module, part.path, part.dim, part.index)

    def context_flops(self, length: int) -> Mapping[str, float]:
        """Return the FLOPs of all units outside their projections, by what spends them, for a query behind `length`."""
        return {}

    def cache_values(self, length: int) -> int:
        """Return how many numbers of keys and values `length` positions have, as a key/value cache keeps them."""
        return 0

    def rows(self, units: tuple[int, ...]) -> Tensor:
        """Return the places that some units' rows have among those there are now, (units · unit_dim,)."""
        place = {unit: index for index, unit in enumerate(self.units)}
        return wide_rows([place[unit] for unit in units], self.unit_dim)

    @property
    def key(self) -> UnitKey:
        """The key of its units."""
        return UnitKey("block" if self.is_hidden else "head", self.layer)

    @property
    def gate_name(self) -> str:
        """The name that its gate has in the module; an attention module may have one of each."""
        return HEAD_GATE if self.output_path is not None else BLOCK_GATE

    @property
    def output(self) -> nn.Module:
        """The output projection, where there is one."""
        assert self.output_path is not None, "units that the module itself gates have no output projection"
        return self.module.get_submodule(self.output_path)


def head_columns(output: nn.Module) -> Tensor:
    """Return an output projection's weight W_O as (D, H·E), a view where the module keeps it the other way round."""
    weight = weight_of(output)
    return weight.T if output_dim(output, heads=True) == 0 else weight


def own_config(model: PreTrainedModel) -> None:
    """Give a model and its modules a copy of their configuration, which other models may share."""
    memo: dict[int, Any] = {}
    model.config = copy.deepcopy(model.config, memo)
    copies = {place: value for place, value in memo.items() if isinstance(value, PreTrainedConfig)}
    for module in model.modules():
        for name, value in vars(module).items():
            # A layer with heads of its own has a view of the shared configuration.
            view = vars(value) if type(value).__name__ == "LayerConfig" else {}
            if id(value) in copies:
                vars(module)[name] = copies[id(value)]
            elif id(view.get("shared")) in copies:
                vars(module)[name] = type(value)(copies[id(view["shared"])], view["own"])


class Layout(ABC):
    """One way in which architectures keep their heads. A subclass is listed in `deadhead.layouts`."""

    @abstractmethod
    def matches(self, model: PreTrainedModel) -> bool:
        """Tell whether this layout describes `model`."""

    def units(self, model: PreTrainedModel) -> tuple[Unit, ...]:
        """Return what a gate of this model can open and close, the default first."""
        return ("head",)

    def choose_unit(self, model: PreTrainedModel, asked: Unit | None, *, what: str) -> Unit:
        """Return the unit asked for, or the default one; an InputError says `what` units do ("heads are cut by")."""
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
        """Return the modules of `model` with hidden units that can be cut, emptied ones included; none by default."""
        return []

    def all_sites(self, model: PreTrainedModel, unit: Unit, *, hidden: bool) -> list[Site]:
        """Return the sites of heads, and those of hidden units if asked."""
        return [*self.sites(model, unit), *(self.hidden_sites(model) if hidden else ())]

    def keeps_cache(self, model: PreTrainedModel) -> bool:
        """Tell whether a model keeps keys and values of a text that goes on; encoders do not."""
        return True

    def require_reloadable(self, model: PreTrainedModel) -> None:
        """Check that a checkpoint of the cut model could be loaded; UnsupportedModel if not."""
        return

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan into the model's configuration, its own by then, so that the model reloads as it is.

        Where it says nothing of hidden units, those are recorded that earlier cuts left.
        """
        before = self.recorded_plan(model)
        if plan.hidden_units is None and before is not None:
            plan = replace(plan, hidden_units=before.hidden_units)
        model.config.head_plan = plan.to_dict()
        model.add_model_tags([*TAGS])

    def recorded_plan(self, model: PreTrainedModel) -> HeadPlan | None:
        """Return the plan the model was cut by, which is its configuration's `head_plan`; None for a dense model.

        Raises:
            InputError: only a model inside of it was cut.
        """
        require_recorded(model)
        recorded = getattr(model.config, "head_plan", None)
        return None if recorded is None else HeadPlan.from_dict(recorded)
