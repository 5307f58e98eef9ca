"""The layout of our own models: projections, position biases and, where there are any, persistent vectors of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from deadhead.layouts.base import Layout, Selection, Site, head_columns
from deadhead.layouts.feed_forward import FeedForwardSite, feed_forward_selections, feed_forward_sites
from deadhead.layouts.persistent import PERSISTENT, PersistentSite, persistent_selections, persistent_sites
from deadhead.models import OWN_TYPES
from deadhead.models.all_attention.layer import AllAttention, OutputBias
from deadhead.models.all_attention.layer import FeedForward as FeedForwardLayer
from deadhead.models.all_attention.modeling import AllAttentionModel
from deadhead.models.pruned.feed_forward import FeedForward
from deadhead.models.pruned.structure import keep_rows
from deadhead.plans.plan import HeadPlan, Unit


class AllAttentionLayout(Layout):
    """Heads of `models.all_attention`."""

    def matches(self, model: PreTrainedModel) -> bool:
        """Tell whether `model` is an All-attention Transformer or our Transformer-XL, with or without output layer."""
        # By name, not by class: a checkpoint loaded with remote code brings its own copy of the class.
        return model.config.model_type in OWN_TYPES

    def sites(self, model: PreTrainedModel, unit: Unit) -> list[Site]:
        """Return the attention module of every layer."""
        return [
            Site(
                layer=index,
                module=attention,
                output_path="o_proj",
                unit_dim=model.config.head_dim,
                units=attention.heads,
                total=model.config.num_attention_heads,
            )
            for index, attention in enumerate(_attentions(model))
        ]

    def block_sites(self, model: PreTrainedModel, size: int | None = None) -> list[Site]:
        """Return the feed-forward layers of a Transformer-XL, or the persistent vectors of every layer."""
        plan = self.recorded_plan(model)
        recorded = None if plan is None else plan.blocks
        if not model.config.feed_forward_size:
            return [*persistent_sites(_attentions(model), size, recorded)]
        found = [
            FeedForward(
                key=index,
                path=f"layers.{index}.feed_forward",
                module=layer.feed_forward,
                inputs=("up_proj",),
                output_path="down_proj",
                width=layer.feed_forward.width,
                copies=1,
            )
            for index, layer in enumerate(_layers(model))
        ]
        return [*feed_forward_sites(found, size, recorded)]

    def selections(self, site: Site, units: tuple[int, ...]) -> Sequence[Selection]:
        """Return rows of q, k, v, r and their biases, u, v and persistent vectors, and columns of W_O.

        Persistent vectors belong to their head and to their block: they go with either.
        """
        if isinstance(site, FeedForwardSite):
            return feed_forward_selections(site, units)
        if isinstance(site, PersistentSite):
            return persistent_selections(site, units)
        names = {name for name, _ in site.module.named_parameters()}
        width = site.unit_dim
        local = torch.tensor([site.units.index(head) for head in units], dtype=torch.long)
        wide = (local[:, None] * width + torch.arange(width)).flatten()
        # W_R is applied once a pass to the table of positions, not to tokens.
        rows = ["r_proj.weight", *(f"{letter}_proj.bias" for letter in "qkvr")]
        single = ["content_bias", "position_bias", "persistent_k", "persistent_v"]
        projections = [(f"{letter}_proj.weight", 0) for letter in "qkv"] + [("o_proj.weight", 1)]
        return [
            *(Selection(path=name, dim=dim, index=wide, per_token=True) for name, dim in projections),
            *(Selection(path=name, dim=0, index=wide, per_token=False) for name in rows if name in names),
            *(Selection(path=name, dim=0, index=local, per_token=False) for name in single if name in names),
        ]

    @torch.no_grad()
    def shrink(self, site: Site, units: tuple[int, ...]) -> None:
        """Select the rows that are left; a layer without any keeps nothing but the bias b_O."""
        for part in self.selections(site, units):
            keep_rows(site.module, part.path, part.dim, part.index)
        module = cast(AllAttention, site.module)
        if isinstance(site, PersistentSite):
            # A module that has lost its heads has no such vectors anyway.
            if module.heads:
                module.num_persistent = len(units) * site.unit_dim
                for path in PERSISTENT if not units else ():
                    delattr(module, path)
            return
        output_bias = OutputBias(head_columns(site.output).shape[0])
        output_bias.bias = site.output.bias  # type: ignore[assignment]
        if isinstance(site, FeedForwardSite):
            inner = cast(FeedForwardLayer, site.module)
            inner.width = len(units) * site.unit_dim
            if not units:
                del inner.up_proj
                inner.down_proj = output_bias
            return
        module.heads = units
        if units:
            return
        for name in [name for name, _ in module.named_children()]:
            delattr(module, name)
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            delattr(module, name)
        module.o_proj = output_bias
        module.num_persistent = 0

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan under `head_plan` of the configuration.

        Persistent vectors are gone with the heads of their layer, so there no blocks are left, whatever the plan says.
        """
        if plan.blocks is not None and not model.config.feed_forward_size:
            kept = {layer: blocks if plan.kept[layer] else () for layer, blocks in plan.blocks.kept.items()}
            plan = replace(plan, blocks=replace(plan.blocks, kept=kept))
        model.config.head_plan = plan.to_dict()

    def context_flops(self, site: Site, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums: 2 FLOPs a multiply-add, twice for content, once more for positions."""
        if isinstance(site, FeedForwardSite):
            return {}
        module = cast(AllAttention, site.module)
        config = module.config
        width = config.head_dim * len(module.heads)
        persistent_k = module._parameters.get("persistent_k")
        persistent = {"persistent": 4.0 * (0 if persistent_k is None else persistent_k.shape[1]) * width}
        if isinstance(site, PersistentSite):
            return persistent
        window = min(length + 1, config.memory_length + 1)
        # Positions are scored for the whole window before those outside the text are left out.
        position = 0 if config.position == "rotary" else 2 * (config.memory_length + 1) * width
        return {"context": 4.0 * window * width, "position": float(position), **persistent}

    def cache_values(self, site: Site, length: int) -> int:
        """Count keys and values of at most M positions."""
        if site.has_blocks:
            return 0
        return 2 * site.unit_dim * len(site.units) * min(length, cast(AllAttention, site.module).config.memory_length)


def _attentions(model: PreTrainedModel) -> list[AllAttention]:
    return [layer.attention for layer in _layers(model)]


def _layers(model: PreTrainedModel) -> list[Any]:
    # Any, and casts elsewhere, not checks: a checkpoint loaded with remote code brings its own copies of the classes.
    return list(cast(AllAttentionModel, model.base_model).layers)
