"""The layout of our own models: projections, position biases and, where there are any, persistent vectors of heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from transformers import PreTrainedModel

from deadhead.layouts.base import Layout, Selection, Site
from deadhead.layouts.feed_forward import feed_forward_sites
from deadhead.models import OWN_TYPES
from deadhead.models.all_attention.layer import AllAttention
from deadhead.models.all_attention.modeling import AllAttentionModel
from deadhead.models.pruned.feed_forward import FeedForward
from deadhead.models.pruned.structure import leave_bias
from deadhead.plans.plan import HeadPlan, Unit

_PERSISTENT = ("persistent_k", "persistent_v")


@dataclass(frozen=True, kw_only=True)
class HeadSite(Site):
    """The heads of a layer. A persistent vector's row belongs to a head and to a vector: it goes with either."""

    module: AllAttention
    leaves_out_shut: ClassVar[bool] = True

    def selections(self, units: tuple[int, ...]) -> list[Selection]:
        """Return rows of q, k, v, r and their biases, u, v and persistent vectors, and columns of W_O."""
        names = {name for name, _ in self.module.named_parameters()}
        local = torch.tensor([self.units.index(head) for head in units], dtype=torch.long)
        wide = self.rows(units)
        # W_R is applied once a pass to the table of positions, not to tokens.
        rows = ["r_proj.weight", *(f"{letter}_proj.bias" for letter in "qkvr")]
        single = ["content_bias", "position_bias", *_PERSISTENT]
        projections = [(f"{letter}_proj.weight", 0) for letter in "qkv"] + [("o_proj.weight", 1)]
        return [
            *(Selection(path=name, dim=dim, index=wide, per_token=True) for name, dim in projections),
            *(Selection(path=name, dim=0, index=wide, per_token=False) for name in rows if name in names),
            *(Selection(path=name, dim=0, index=local, per_token=False) for name in single if name in names),
        ]

    def shrink(self, units: tuple[int, ...]) -> None:
        """Select the rows that are left; a layer without any keeps nothing but the bias b_O."""
        super().shrink(units)
        module = self.module
        module.heads = units
        if units:
            return
        leave_bias(module, "o_proj")
        for name, _ in [*module.named_children(), *module.named_parameters(recurse=False)]:
            if name != "o_proj":
                delattr(module, name)
        module.num_persistent = 0

    def context_flops(self, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums: 2 FLOPs a multiply-add, twice for content, once more for positions."""
        config = self.module.config
        width, window = config.head_dim * len(self.module.heads), min(length, config.memory_length) + 1
        # Positions are scored for the whole window before those outside the text are left out.
        position = 0 if config.position == "rotary" else 2 * (config.memory_length + 1) * width
        return {"context": 4.0 * window * width, "position": float(position), **_persistent_flops(self.module)}

    def cache_values(self, length: int) -> int:
        """Count keys and values of at most M positions."""
        return 2 * self.unit_dim * len(self.units) * min(length, self.module.config.memory_length)


@dataclass(frozen=True, kw_only=True)
class PersistentSite(Site):
    """The persistent vectors of a layer: unit j is the j-th of them in every head that is left.

    A layer without heads has no persistent vectors, whatever a plan says of them.
    """

    module: AllAttention

    def selections(self, units: tuple[int, ...]) -> list[Selection]:
        """Return what is left of m^k and m^v."""
        index, names = self.rows(units), self.module._parameters
        return [Selection(path=path, dim=1, index=index, per_token=False) for path in _PERSISTENT if path in names]

    def shrink(self, units: tuple[int, ...]) -> None:
        """Select the vectors that are left. A module that has lost its heads has none anyway."""
        super().shrink(units)
        if self.module.heads:
            self.module.num_persistent = len(units)
            for path in _PERSISTENT if not units else ():
                delattr(self.module, path)

    def context_flops(self, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums."""
        return _persistent_flops(self.module)


def _persistent_flops(module: AllAttention) -> dict[str, float]:
    persistent_k = module._parameters.get("persistent_k")
    return {"persistent": 0.0 if persistent_k is None else 4.0 * persistent_k.numel()}


class AllAttentionLayout(Layout):
    """Heads of `models.all_attention`."""

    def matches(self, model: PreTrainedModel) -> bool:
        """Return whether `model` is our All-attention Transformer or Transformer-XL, with or without output layer."""
        # By name, not by class: a checkpoint loaded with remote code brings its own copy of the class.
        return getattr(getattr(model, "config", None), "model_type", None) in OWN_TYPES

    def sites(self, model: PreTrainedModel, unit: Unit) -> list[Site]:
        """Return the attention module of every layer."""
        return [
            HeadSite(
                layer=index,
                module=layer.attention,
                output_path="o_proj",
                unit_dim=model.config.head_dim,
                units=layer.attention.heads,
                total=model.config.num_attention_heads,
            )
            for index, layer in enumerate(_layers(model))
        ]

    def hidden_sites(self, model: PreTrainedModel) -> list[Site]:
        """Return the feed-forward layers of a Transformer-XL, or the persistent vectors of every layer."""
        plan = self.recorded_plan(model)
        recorded = None if plan is None else plan.hidden_units
        layers, dense = _layers(model), model.config.num_persistent
        if model.config.feed_forward_size:
            inner = [layer.feed_forward for layer in layers]
            found = [
                FeedForward(index, f"layers.{index}.feed_forward", module, ("up_proj",), "down_proj", module.width, 1)
                for index, module in enumerate(inner)
            ]
            return feed_forward_sites(found, recorded)
        # A checkpoint's own code that is older than these gates would not read them.
        if not dense or not all(hasattr(layer.attention, "num_persistent") for layer in layers):
            return []
        every = dict.fromkeys(range(len(layers)), range(dense)) if recorded is None else recorded.kept
        return [
            PersistentSite(
                layer=index,
                module=layer.attention,
                output_path=None,
                unit_dim=1,
                units=tuple(every[index]) if layer.attention.heads else (),
                total=dense,
                is_hidden=True,
                is_headless=not layer.attention.heads,
            )
            for index, layer in enumerate(layers)
        ]

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan under `head_plan` of the configuration.

        Persistent vectors are gone with the heads of their layer, so there none are left, whatever the plan says.
        """
        super().record_plan(model, plan)
        found = model.config.head_plan.get("hidden_units")
        if found is not None and not model.config.feed_forward_size:
            found["kept"] = {layer: kept if plan.kept[int(layer)] else "" for layer, kept in found["kept"].items()}


def _layers(model: PreTrainedModel) -> list[Any]:
    # Any, and casts elsewhere, not checks: a checkpoint loaded with remote code brings its own copies of the classes.
    return list(cast(AllAttentionModel, model.base_model).layers)
