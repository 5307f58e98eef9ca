"""What a cut model's configuration says of each layer: transformers and servers ask it for `per_layer_config`.

The configuration itself keeps the dense model's numbers, which `head_plan` is about.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

from .adapters import tell_peft
from .feed_forward import WIDTHS
from .shrinking import heads_of, hidden_units
from .structure import config_head_names

# Where a configuration of transformers keeps the numbers of layers that differ in the dense model.
_OWN = "_heterogeneity_spec"


class PrunedConfig:
    """What our class of configuration adds to transformers': the numbers of a layer of its own, by its index.

    They are computed from the plan and not written down once more. vLLM takes from them how many heads each layer's
    cache has, transformers the shapes of a static cache. A layer without heads counts as one key/value head: a cache
    has some place for every layer.
    """

    head_plan: dict[str, Any] | None
    stock_type: ClassVar[str]

    @property
    def is_heterogeneous(self) -> bool:
        """Tell whether layers may have numbers of their own, by the plan or as the dense model's have."""
        return self.plans_layers or super().is_heterogeneous  # type: ignore[misc]

    @property
    def plans_layers(self) -> bool:
        """Tell whether there is a plan for this configuration's own layers, not those of a part, by their index."""
        config: Any = self
        plan = self.head_plan
        return plan is not None and all(key.isdecimal() for key in plan["total"]) and config.get_text_config() is self

    @property
    def per_layer_config(self) -> Sequence[Any]:
        """Return the configuration of each layer, in order."""
        config: Any = self
        if _OWN in vars(self) or not self.plans_layers:
            dense: Sequence[Any] = super().per_layer_config  # type: ignore[misc]
        else:
            dense = [config] * config.num_hidden_layers
        if not self.plans_layers:
            return dense
        return [_of_layer(layer, str(index), self.head_plan) for index, layer in enumerate(map(copy.copy, dense))]

    @per_layer_config.setter
    def per_layer_config(self, value: Any) -> None:
        # Dense models whose layers differ have it in their files.
        super(PrunedConfig, type(self)).per_layer_config.__set__(self, value)  # type: ignore[misc]

    @property
    def allow_global_per_layer_attribute_access(self) -> bool:
        """Tell whether the dense model's numbers may be read for all layers, as transformers' classes do of ours."""
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

    def validate_architecture(self) -> None:
        """Check the dense model's numbers; those of a cut layer need not divide its width."""
        dense = copy.copy(self)
        vars(dense)["head_plan"] = None
        super(PrunedConfig, dense).validate_architecture()  # type: ignore[misc]

    def _update_heterogeneous_to_dict_output(self, values: dict[str, Any]) -> None:
        if _OWN in vars(self):
            super()._update_heterogeneous_to_dict_output(values)  # type: ignore[misc]


def _of_layer(layer: Any, key: str, plan: dict[str, Any] | None) -> Any:
    """Give a copy of the dense model's configuration the numbers of one layer, in place."""
    assert plan is not None
    vars(layer)["head_plan"] = None
    names = list(config_head_names(layer))
    numbers = {is_kv: getattr(layer, name) for name, is_kv in names}
    if key in plan["total"] and False in numbers:
        num_heads = numbers[False]
        num_kv_heads = numbers.get(True, num_heads)
        # Where it is not written, it follows from the number of heads, which is about to change.
        if not getattr(layer, "head_dim", None):
            layer.head_dim = layer.hidden_size // num_heads
        heads = heads_of(plan["unit"], plan["kept"][key] or [0], num_heads, num_kv_heads)
        for name, is_kv in names:
            setattr(layer, name, len(heads.kv if is_kv else heads.queries))
    if (units := hidden_units(plan).get(key)) is not None:
        kept, total = units
        for name in WIDTHS:
            if getattr(layer, name, None) == total:
                setattr(layer, name, len(kept))
    return layer
