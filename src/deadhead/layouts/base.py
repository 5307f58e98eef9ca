"""What deadhead must know of an architecture: where its heads are, and which slices of which tensors they own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.plan import HeadPlan, Layer, Unit


@dataclass(frozen=True, kw_only=True)
class HeadSlice:
    """Part of one tensor that belongs to the heads of an attention module.

    Args:
        path: name of the parameter, from the attention module, such as ``q_proj.weight``.
        dim: the dimension along which heads lie.
        rows: (H, n) indices along `dim`: row h holds those of head h, in the order the module expects.
        per_token: whether every number in it takes part in one multiply-add for each token, as a projection's do.
    """

    path: str
    dim: int
    rows: Tensor
    per_token: bool


def contiguous(path: str, dim: int, num_heads: int, size: int, *, per_token: bool = False) -> HeadSlice:
    """Return the slice of a tensor in which each head owns `size` neighbouring rows, head after head."""
    rows = torch.arange(num_heads * size).view(num_heads, size)
    return HeadSlice(path=path, dim=dim, rows=rows, per_token=per_token)


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention module with heads that can be gated and cut.

    Args:
        layer: the plan's key.
        module: the attention module.
        output_path: name of the output projection in `module`; its input is the heads' outputs side by side.
        head_dim: E, width of one gated unit in that input.
        heads: indices, in the original dense model, of the heads there are now; () for an emptied layer.
        total: heads of the original dense model.
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

    @property
    def output_weight(self) -> Tensor:
        """W_O, (D, H·E)."""
        weight = self.output.weight
        assert isinstance(weight, Tensor)
        return weight


class Layout(ABC):
    """One way in which architectures keep their heads. A subclass is registered in `deadhead.layouts`."""

    unit: Unit = "head"

    @abstractmethod
    def matches(self, model: PreTrainedModel) -> bool:
        """Tell whether this layout describes `model`."""

    @abstractmethod
    def sites(self, model: PreTrainedModel) -> list[AttentionSite]:
        """Return the attention modules of `model`, one a layer, emptied ones included."""

    @abstractmethod
    def slices(self, site: AttentionSite) -> Sequence[HeadSlice]:
        """Return every part of every tensor that belongs to the heads, the output projection's columns included."""

    @abstractmethod
    def after_cut(self, site: AttentionSite, heads: tuple[int, ...]) -> None:
        """Tell the module which heads of the dense model it has left, when its tensors have shrunk."""

    @abstractmethod
    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan into the model's configuration, so that the model reloads as it is."""

    @abstractmethod
    def recorded_plan(self, model: PreTrainedModel) -> HeadPlan | None:
        """Return the plan the model was cut by, or None for a dense model."""

    @abstractmethod
    def context_flops(self, site: AttentionSite, length: int) -> Mapping[str, float]:
        """Return the FLOPs one head spends for one query outside its projections, by the part that spends them.

        Args:
            site: the attention module.
            length: positions before the query in the text.
        """

    @abstractmethod
    def cache_values(self, site: AttentionSite, length: int) -> int:
        """Return how many numbers one head keeps in the key/value cache after `length` positions."""
