"""The layout of transformers' own models: whatever has query, key, value and output projections in each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import transformers
from torch import nn
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts.base import AttentionSite, Layout, Selection
from deadhead.models.pruned.modeling_pruned import auto_map, pruned_class, pruned_config_class, stock_class
from deadhead.models.pruned.shrinking import Heads, dense_heads, heads_of, rows_of, shrink
from deadhead.models.pruned.structure import Attention, emptied, find_attentions, layer_keys
from deadhead.plan import HeadPlan, Unit


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSite(AttentionSite):
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
        now = heads_of(self.unit, self.heads, *dense)
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

    def repeats_keys(self, model: PreTrainedModel) -> bool:
        """Answer yes where there are several groups of several query heads."""
        sizes = [dense_heads(attention) for attention in find_attentions(model)[0]]
        return any(1 < num_kv_heads < num_heads for num_heads, num_kv_heads in sizes)

    def sites(self, model: PreTrainedModel, unit: Unit) -> list[AttentionSite]:
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
        if not attentions and not emptied(model):
            why = next(iter(refused.values()), "it has no attention with query, key, value and output projections")
            raise UnsupportedModel(f"deadhead cannot prune heads of models of type {kind!r}: {why}.")
        plan = self.recorded_plan(model)
        paths = [attention.path for attention in attentions] + list(emptied(model)) + list(refused)
        sites: dict[Any, AttentionSite] = {}
        for attention in attentions:
            num_heads, num_kv_heads = dense_heads(attention)
            total = num_heads if unit == "head" else num_kv_heads
            heads = tuple(range(total)) if plan is None else tuple(plan.kept[attention.key])
            sites[attention.path] = HuggingFaceSite(
                layer=attention.key,
                module=attention.module,
                output_path=attention.output_path,
                head_dim=attention.head_dim * attention.num_heads // len(heads),
                heads=heads,
                total=total,
                attention=attention,
                unit=unit,
            )
        for path, module in emptied(model).items():
            num_heads, num_kv_heads = dense_heads(module)
            key = layer_keys(paths)[path]
            sites[path] = HuggingFaceSite(
                layer=key,
                module=module,
                output_path="",
                head_dim=1,
                heads=(),
                total=num_heads if unit == "head" else num_kv_heads,
                attention=None,
                unit=unit,
            )
        return sorted(sites.values(), key=lambda site: (isinstance(site.layer, str), site.layer))

    def selections(self, site: AttentionSite, heads: tuple[int, ...]) -> Sequence[Selection]:
        """Return the rows of every part of the structure."""
        found = cast(HuggingFaceSite, site)
        assert found.attention is not None
        present = found.present(heads)
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

    def shrink(self, site: AttentionSite, heads: tuple[int, ...]) -> None:
        """Shrink the module as the checkpoint's own code does when it is loaded."""
        found = cast(HuggingFaceSite, site)
        assert found.attention is not None
        shrink(found.attention, found.present(heads), found.outputs[-1] if found.outputs else 2)

    def observe(self, site: AttentionSite) -> Callable[[], None]:
        """Note, when the module runs next, how many values it returns: an emptied one must return as many."""
        found = cast(HuggingFaceSite, site)
        if found.attention is None:
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

    def recorded_plan(self, model: PreTrainedModel) -> HeadPlan | None:
        """Read `head_plan` of the configuration."""
        recorded = getattr(model.config, "head_plan", None)
        return None if recorded is None else HeadPlan.from_dict(recorded)

    def context_flops(self, site: AttentionSite, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums, 2 FLOPs a multiply-add."""
        return {"context": 4.0 * min(length + 1, _window(site) or length + 1) * site.head_dim * len(site.heads)}

    def cache_values(self, site: AttentionSite, length: int) -> int:
        """Count the keys and values of every key/value head there is, repeated ones included."""
        attention = cast(HuggingFaceSite, site).attention
        if attention is None:
            return 0
        return 2 * attention.num_kv_heads * attention.head_dim * min(length, _window(site) or length)


def _window(site: AttentionSite) -> int | None:
    inner = cast(HuggingFaceSite, site).attention
    window = getattr(inner.inner, "sliding_window", None) if inner is not None else None
    return window if isinstance(window, int) and window > 0 else None
