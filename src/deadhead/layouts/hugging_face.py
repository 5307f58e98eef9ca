"""The layout of transformers' own models: whatever has query, key, value and output projections in each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import transformers
from torch import nn
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts.base import Layout, Selection, Site
from deadhead.layouts.feed_forward import FeedForwardSite, feed_forward_selections, feed_forward_sites
from deadhead.models.pruned.feed_forward import block_rows, find_feed_forwards, shrink_feed_forward
from deadhead.models.pruned.modeling_pruned import auto_map, pruned_class, pruned_config_class, stock_class
from deadhead.models.pruned.shrinking import Heads, dense_heads, heads_of, rows_of, shrink
from deadhead.models.pruned.structure import Attention, emptied, find_attentions, layer_keys
from deadhead.plans.plan import HeadPlan, Unit


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSite(Site):
    """A site with what is known of its structure.

    Args:
        attention: what was found; None for an emptied module.
        unit: what a gate opens and closes.
        outputs: how many values the module returns (see `shrink`), once it was observed.
    """

    attention: Attention | None
    unit: Unit
    outputs: list[int] = field(default_factory=list)

    def present(self, kept: tuple[int, ...]) -> Heads:
        """Return the heads of units `kept` by the index they have in the module now."""
        assert self.attention is not None
        dense = dense_heads(self.attention)
        now = heads_of(self.unit, self.units, *dense)
        later = heads_of(self.unit, kept, *dense)
        queries = tuple(now.queries.index(head) for head in later.queries)
        if not queries:
            return Heads((), ())
        # Copies of a key/value head may have learnt different things: take the one that serves these queries.
        share_now, share_later = len(now.queries) // len(now.kv), len(queries) // len(later.kv)
        return Heads(queries, tuple(query // share_now for query in queries[::share_later]))


class HuggingFaceLayout(Layout):
    """Heads of any model of transformers, found by `models.pruned.structure`."""

    def matches(self, model: PreTrainedModel) -> bool:
        """Tell whether `model` is one of transformers, or one of those with heads cut off."""
        return isinstance(model, PreTrainedModel)

    def units(self, model: PreTrainedModel) -> tuple[Unit, ...]:
        """Return KV groups first where queries share keys and values, but for one group in all, or what was cut by."""
        recorded = self.recorded_plan(model)
        if recorded is not None:
            return (recorded.unit,)
        attentions, _ = find_attentions(model)
        if all(attention.num_heads == attention.num_kv_heads for attention in attentions):
            return ("head",)
        if all(attention.num_kv_heads == 1 for attention in attentions):
            return ("head", "kv_group")
        return ("kv_group", "head")

    def sites(self, model: PreTrainedModel, unit: Unit) -> list[Site]:
        """Return every module of the text stack whose structure is known.

        Raises:
            UnsupportedModel: there is none, or the model is an encoder and a decoder.
        """
        kind = model.config.model_type
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"deadhead prunes models with one stack of layers, but {kind!r} has an encoder and a decoder."
            )
        attentions, refused = find_attentions(model)
        without = emptied(model)
        if not attentions and not without:
            why = next(iter(refused.values()), "it has no attention with query, key, value and output projections")
            raise UnsupportedModel(f"deadhead cannot prune heads of models of type {kind!r}: {why}.")
        plan = self.recorded_plan(model)
        keys = layer_keys([attention.path for attention in attentions] + list(without) + list(refused))
        found: dict[str, Attention | None] = {attention.path: attention for attention in attentions}
        found |= dict.fromkeys(without)
        sites: list[Site] = []
        for path, attention in found.items():
            module = without[path] if attention is None else attention.module
            total = dense_heads(attention or module)[0 if unit == "head" else 1]
            heads = tuple(range(total)) if plan is None else tuple(plan.kept[keys[path]])
            width = 1 if attention is None else attention.head_dim * attention.num_heads // len(heads)
            sites.append(
                HuggingFaceSite(
                    layer=keys[path],
                    module=module,
                    output_path="" if attention is None else attention.output_path,
                    unit_dim=width,
                    units=() if attention is None else heads,
                    total=total,
                    attention=attention,
                    unit=unit,
                )
            )
        return sorted(sites, key=lambda site: (isinstance(site.layer, str), site.layer))

    def block_sites(self, model: PreTrainedModel, size: int | None = None) -> list[Site]:
        """Return every feed-forward layer of the text stack that is not one of experts."""
        plan = self.recorded_plan(model)
        return [*feed_forward_sites(find_feed_forwards(model), size, None if plan is None else plan.blocks)]

    def selections(self, site: Site, units: tuple[int, ...]) -> Sequence[Selection]:
        """Return the rows of every part of the structure."""
        if isinstance(site, FeedForwardSite):
            return feed_forward_selections(site, units)
        found = cast(HuggingFaceSite, site)
        assert found.attention is not None
        present = found.present(units)
        return [
            Selection(
                path=part.path,
                dim=part.dim,
                index=rows_of(
                    found.attention, part.order, site.module.get_parameter(part.path).shape[part.dim], present
                ),
                per_token=part.per_token,
            )
            for part in found.attention.parts
        ]

    def shrink(self, site: Site, units: tuple[int, ...]) -> None:
        """Shrink the module as the checkpoint's own code does when it is loaded."""
        if isinstance(site, FeedForwardSite):
            shrink_feed_forward(site.feed_forward, block_rows(site.present(units), site.unit_dim))
            return
        found = cast(HuggingFaceSite, site)
        assert found.attention is not None
        shrink(found.attention, found.present(units), found.outputs[-1] if found.outputs else 2)

    def observe(self, site: Site) -> Callable[[], None]:
        """Note, when the module runs next, how many values it returns: an emptied one must return as many."""
        found = cast(HuggingFaceSite, site)
        if site.has_blocks or found.attention is None:
            return lambda: None

        def note(module: nn.Module, args: Any, output: Any) -> None:
            count = len(output) if isinstance(output, (tuple, list)) else 0
            found.outputs.append(-count if isinstance(output, list) else count)

        return found.attention.inner.register_forward_hook(note).remove

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Give model and configuration our classes, in place, and write the plan under `head_plan`.

        Raises:
            UnsupportedModel: the model's class is not one of transformers' own, so that a checkpoint could not name it.
        """
        config = model.config
        stock_model, stock_config = stock_class(type(model)), stock_class(type(config))
        for stock in (stock_model, stock_config):
            if getattr(transformers, stock.__name__, None) is not stock:
                raise UnsupportedModel(
                    f"The class {stock.__name__} is not one of transformers' own, so a checkpoint of the cut model "
                    "could not be loaded again; deadhead cannot cut it."
                )
        config.auto_map = auto_map(stock_config)
        config.__class__ = pruned_config_class(stock_config)
        config.head_plan = plan.to_dict()
        config.attention_outputs = next((m.num_outputs for m in model.modules() if hasattr(m, "num_outputs")), 2)
        model.__class__ = pruned_class(stock_model, stock_config)

    def context_flops(self, site: Site, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums, 2 FLOPs a multiply-add."""
        if site.has_blocks:
            return {}
        return {"context": 4.0 * min(length + 1, _window(site) or length + 1) * site.unit_dim * len(site.units)}

    def cache_values(self, site: Site, length: int) -> int:
        """Count the keys and values of every key/value head there is, repeated ones included."""
        attention = None if site.has_blocks else cast(HuggingFaceSite, site).attention
        if attention is None:
            return 0
        return 2 * attention.num_kv_heads * attention.head_dim * min(length, _window(site) or length)


def _window(site: Site) -> int | None:
    inner = cast(HuggingFaceSite, site).attention
    window = getattr(inner.inner, "sliding_window", None) if inner is not None else None
    return window if isinstance(window, int) and window > 0 else None
