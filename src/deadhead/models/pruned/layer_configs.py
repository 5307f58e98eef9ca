"""What a cut model's configuration says of each layer: transformers and servers ask it for `per_layer_config`.

The configuration itself keeps the dense model's numbers, which `head_plan` is about.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from .adapters import tell_peft
from .feed_forward import WIDTHS
from .shrinking import heads_of, hidden_units
from .structure import config_head_names

# Where a configuration of transformers keeps the numbers of layers that differ in the dense model.
_OWN = "_heterogeneity_spec"
_BUILDING = "_is_building_dense"


class PrunedConfig:
    """What our class of configuration adds to transformers': the numbers of a layer of its own, by its index.

    They are computed from the plan and not written down once more. vLLM takes from them how many heads each layer's
    cache has, transformers the shapes of a static cache. A layer without heads counts as one key/value head: a cache
    has some place for every layer.
    """

    head_plan: dict[str, Any] | None
    stock_type: ClassVar[str]

    @property
    def plans_layers(self) -> bool:
        """Return whether the plan says how many heads each of the layers has of those that the configuration names.

        It does not where the layers are those of a part, as in models that read images too, or differ in the dense
        model.
        """
        config: Any = self
        plan, values = self.head_plan, vars(self)
        if plan is None or _OWN in values or _BUILDING in values or config.get_text_config() is not self:
            return False
        numbers = head_counts(config)
        total = numbers.get(plan["unit"])
        return all(key.isdecimal() and count == total for key, count in plan["total"].items())

    @property
    def is_heterogeneous(self) -> bool:
        """Return whether layers may have numbers of their own, by the plan or as the dense model's have."""
        return self.plans_layers or super().is_heterogeneous  # type: ignore[misc]

    @property
    def per_layer_config(self) -> Sequence[Any]:
        """Return the configuration of each layer, in order; by the name of a kind of layer, the dense model's."""
        if not self.plans_layers:
            dense: Sequence[Any] = super().per_layer_config  # type: ignore[misc]
            return dense
        return _Layers(self)

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        # Dense models whose layers differ have it in their files.
        super(PrunedConfig, type(self)).per_layer_config.__set__(self, value)  # type: ignore[misc]

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:
        """Whether numbers may be read from the configuration itself: if the plan alone makes layers differ."""
        return _OWN not in vars(self) or super().allow_global_per_layer_attribute_access  # type: ignore[misc]

    @allow_global_per_layer_attribute_access.setter
    def allow_global_per_layer_attribute_access(self, value: bool) -> None:
        vars(self)["allow_global_per_layer_attribute_access"] = value

    def to_dict(self) -> dict[str, Any]:
        """Return the values that a file has, as transformers does."""
        config: Any = self
        # PEFT asks for them before it looks the type up.
        tell_peft(type(config).stock_type, type(config).model_type)
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return values

    def _update_heterogeneous_to_dict_output(self, values: dict[str, Any]) -> None:
        if _OWN in vars(self):
            super()._update_heterogeneous_to_dict_output(values)  # type: ignore[misc]


@contextmanager
def building_dense(config: Any) -> Iterator[None]:
    """Let a configuration tell the dense model's numbers only: some models ask it while they are made, before a cut."""
    # One of ours may be made within another, with the same configuration.
    is_within = _BUILDING in vars(config)
    vars(config)[_BUILDING] = True
    try:
        yield
    finally:
        if not is_within:
            del vars(config)[_BUILDING]


def head_counts(config: Any) -> dict[str, int]:
    """Return how many units a layer of the dense model has, by the unit of a plan, "head" and "kv_group"."""
    numbers = {is_kv: getattr(config, name) for name, is_kv in config_head_names(config)}
    if False not in numbers:
        return {}
    return {"head": numbers[False], "kv_group": numbers.get(True, numbers[False])}


def head_width(config: Any) -> int:
    """Return the width of a head of the dense model, which follows from their number where it is not written."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // head_counts(config)["head"])


class _Layers(Sequence[Any]):
    """The configurations of a cut model's layers, made as they are asked for."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __len__(self) -> int:
        count: int = self._config.num_hidden_layers
        return count

    def __getitem__(self, index: Any) -> Any:
        # Of a kind of layer, such as "full_attention": layers of one kind may differ, but not in the dense model.
        if isinstance(index, str):
            return self._config
        found = range(len(self))[index]
        return [self._layer(each) for each in found] if isinstance(index, slice) else self._layer(found)

    def _layer(self, index: int) -> Any:
        config, plan, key = copy.copy(self._config), self._config.head_plan, str(index)
        vars(config)["head_plan"] = None
        counts = head_counts(config)
        if key in plan["total"]:
            # Where it is not written, it follows from the number of heads, which is about to change.
            if not getattr(config, "head_dim", None):
                config.head_dim = head_width(config)
            heads = heads_of(plan["unit"], plan["kept"][key] or [0], counts["head"], counts["kv_group"])
            for name, is_kv in list(config_head_names(config)):
                setattr(config, name, len(heads.kv if is_kv else heads.queries))
        if (units := hidden_units(plan).get(key)) is not None:
            kept, total = units
            for name in WIDTHS:
                if getattr(config, name, None) == total:
                    setattr(config, name, len(kept))
        return config
