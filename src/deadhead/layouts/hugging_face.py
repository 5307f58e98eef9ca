"""The layout of transformers' own models: whatever has query, key, value and output projections in each layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from deadhead.errors import InputError, UnsupportedModel
from deadhead.layouts.base import Layout, Selection, Site
from deadhead.layouts.feed_forward import feed_forward_sites
from deadhead.layouts.stock import NotStock, stock_sizes, take_own_class, take_stock_class
from deadhead.models.pruned.feed_forward import find_feed_forwards
from deadhead.models.pruned.modeling_pruned import stock_class
from deadhead.models.pruned.shrinking import Heads, heads_of, hold_numbers, rows_of, shrink
from deadhead.models.pruned.structure import Attention, Key, emptied, find_attentions, layer_keys, text_stack
from deadhead.plans.plan import HeadPlan, Unit


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSite(Site):
    """The heads of a layer, with what is known of its structure."""

    attention: Attention | None  # None for an emptied module
    unit: Unit
    outputs: list[int] = field(default_factory=list)  # how many values it returns (see `shrink`), once observed

    def present(self, kept: tuple[int, ...]) -> Heads:
        """Return the heads of units `kept` by the index they have in the module now."""
        dense = self._attention.dense_heads
        now = heads_of(self.unit, self.units, *dense)
        later = heads_of(self.unit, kept, *dense)
        queries = tuple(now.queries.index(head) for head in later.queries)
        if not queries:
            return Heads((), ())
        # Copies of a key/value head may have learnt different things: take the one that serves these queries.
        share_now, share_later = len(now.queries) // len(now.kv), len(queries) // len(later.kv)
        return Heads(queries, tuple(query // share_now for query in queries[::share_later]))

    def selections(self, units: tuple[int, ...]) -> list[Selection]:
        """Return the rows of every part of the structure."""
        attention, present = self._attention, self.present(units)
        sizes = [self.module.get_parameter(part.path).shape[part.dim] for part in attention.parts]
        return [
            Selection(
                path=part.path,
                dim=part.dim,
                index=rows_of(attention, part.order, size, present),
                per_token=part.per_token,
            )
            for part, size in zip(attention.parts, sizes, strict=True)
        ]

    def observe(self) -> Callable[[], None]:
        """Note, when the module runs next, how many values it returns: an emptied one must return as many."""
        if self.attention is None:
            return lambda: None

        def note(module: nn.Module, args: Any, output: Any) -> None:
            count = len(output) if isinstance(output, (tuple, list)) else 0
            self.outputs.append(-count if isinstance(output, list) else count)

        return self.attention.inner.register_forward_hook(note).remove

    def shrink(self, units: tuple[int, ...]) -> None:
        """Shrink the module as the checkpoint's own code does when it is loaded."""
        shrink(self._attention, self.present(units), self.outputs[-1] if self.outputs else 2)

    def context_flops(self, length: int) -> Mapping[str, float]:
        """Count scores and weighted sums, 2 FLOPs a multiply-add."""
        return {"context": 4.0 * min(length + 1, self._window or length + 1) * self.unit_dim * len(self.units)}

    def cache_values(self, length: int) -> int:
        """Count the keys and values of every key/value head there is, repeated ones included."""
        if self.attention is None:
            return 0
        return 2 * self.attention.num_kv_heads * self.attention.head_dim * min(length, self._window or length)

    @property
    def _attention(self) -> Attention:
        assert self.attention is not None, "an emptied module has nothing to cut"
        return self.attention

    @property
    def _window(self) -> int | None:
        window = None if self.attention is None else getattr(self.attention.inner, "sliding_window", None)
        return window if isinstance(window, int) and window > 0 else None


def has_encoder_and_decoder(model: PreTrainedModel) -> bool:
    """Return whether a model has two stacks of layers; either of them may be had alone."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and model.get_decoder() is not model


def _require_recorded(layer: Key, what: str, recorded: tuple[int, int], found: tuple[int, int]) -> None:
    """Check that a plan in a stock configuration, which nothing but deadhead reads, is that of the model's layer."""
    if recorded != found:
        raise InputError(
            f"The head plan in the model's configuration keeps {recorded[0]} of {recorded[1]} {what} of layer {layer}, "
            f"but there are {found[0]} of {found[1]}; restore the config.json that was written with the weights."
        )


class HuggingFaceLayout(Layout):
    """Heads of any model of transformers, found by `models.pruned.structure`."""

    def matches(self, model: PreTrainedModel) -> bool:
        """Return whether `model` is one of transformers, or one of those with heads cut off."""
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
        """Return every module of the text stack whose structure is known."""
        kind = model.config.model_type
        if has_encoder_and_decoder(model):
            raise UnsupportedModel(
                f"deadhead prunes models with one stack of layers, but {kind!r} has an encoder and a decoder."
            )
        if groups := getattr(model.config, "num_hidden_groups", None):
            raise UnsupportedModel(
                f"deadhead prunes models whose layers have weights of their own, but {kind!r} has {groups} for all its "
                f"{model.config.num_hidden_layers} layers."
            )
        attentions, refused = find_attentions(model)
        without = emptied(model)
        if not attentions and not without:
            why = next(iter(refused.values()), "it has no attention with query, key, value and output projections")
            raise UnsupportedModel(f"deadhead cannot prune heads of models of type {kind!r}: {why}.")
        plan = self.recorded_plan(model)
        keys = layer_keys([attention.path for attention in attentions] + list(without) + list(refused))
        owners: dict[str, Any] = {attention.path: attention for attention in attentions} | without
        sites: list[Site] = []
        for path, owner in owners.items():
            attention = owner if isinstance(owner, Attention) else None
            total = owner.dense_heads[0 if unit == "head" else 1]
            heads = tuple(range(total)) if plan is None else tuple(plan.kept.get(keys[path], ()))
            if plan is not None and plan.unit == unit:
                now = 0 if attention is None else attention.num_heads if unit == "head" else attention.num_kv_heads
                _require_recorded(keys[path], "heads", (len(heads), plan.total.get(keys[path], 0)), (now, total))
            width = 1 if attention is None else attention.head_dim * attention.num_heads // len(heads)
            sites.append(
                HuggingFaceSite(
                    layer=keys[path],
                    module=owner if attention is None else attention.module,
                    output_path="" if attention is None else attention.output_path,
                    unit_dim=width,
                    units=() if attention is None else heads,
                    total=total,
                    attention=attention,
                    unit=unit,
                )
            )
        return sorted(sites, key=lambda site: (isinstance(site.layer, str), site.layer))

    def hidden_sites(self, model: PreTrainedModel) -> list[Site]:
        """Return every feed-forward layer of the text stack that is not one of experts."""
        plan = self.recorded_plan(model)
        found, units = find_feed_forwards(model), None if plan is None else plan.hidden_units
        if units is not None:
            for layer in found:
                kept, total = units.kept.get(layer.key, ()), units.total.get(layer.key, 0)
                _require_recorded(layer.key, "hidden units", (len(kept), total), (layer.width, total))
        return feed_forward_sites(found, units)

    def keeps_cache(self, model: PreTrainedModel) -> bool:
        """Return whether the text stack takes a cache. Encoders that can be decoders say which of the two they are."""
        stack: Any = text_stack(model)
        takes_cache = "past_key_values" in inspect.signature(stack.forward).parameters
        return takes_cache and bool(getattr(stack.config, "is_decoder", True))

    def require_reloadable(self, model: PreTrainedModel) -> None:
        """Check that the classes of model and configuration are transformers' own, or ours of those."""
        for stock in (stock_class(type(model)), stock_class(type(model.config))):
            if getattr(transformers, stock.__name__, None) is not stock:
                raise UnsupportedModel(
                    f"The class {stock.__name__} is not one of those that transformers offers by name, so a checkpoint "
                    "of the cut model could not be loaded again; use a class of transformers, with these weights."
                )

    def record_plan(self, model: PreTrainedModel, plan: HeadPlan) -> None:
        """Write the plan under `head_plan` of the configuration, and give model and configuration their classes.

        Those of transformers where its configuration can say what is left, else ours. This is decided at the cut rather
        than at `deadhead.save`: so it is part of what the cut checks, a plain `save_pretrained` and a Trainer write the
        same as `save`, and a model has the class in memory that it will have when it is loaded.
        """
        self.require_reloadable(model)
        super().record_plan(model, plan)
        for attention in find_attentions(model)[0]:
            hold_numbers(attention)
        try:
            sizes = stock_sizes(model, HeadPlan.from_dict(model.config.head_plan))
        except NotStock:
            take_own_class(model)
        else:
            take_stock_class(model, sizes)
