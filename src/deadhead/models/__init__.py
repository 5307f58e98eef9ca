"""deadhead's models: its own, and transformers' models with heads cut off, registered with transformers' Auto classes.

The latter are registered as stand-ins, because making all the classes at once would import every model of transformers.
The files in the folders are saved with checkpoints, so they import only torch, transformers and each other.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from deadhead.models.all_attention.configuration import AllAttentionConfig, TransformerXLConfig
from deadhead.models.all_attention.modeling import (
    AllAttentionForCausalLM,
    AllAttentionModel,
    TransformerXLForCausalLM,
    TransformerXLModel,
)
from deadhead.models.pruned.modeling_pruned import PREFIX, TYPE_PREFIX, pruned_config_class

OWN_TYPES = (AllAttentionConfig.model_type, TransformerXLConfig.model_type)
"""Model types of deadhead's own models."""

for _config, _model, _causal in (
    (AllAttentionConfig, AllAttentionModel, AllAttentionForCausalLM),
    (TransformerXLConfig, TransformerXLModel, TransformerXLForCausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
    AutoModelForCausalLM.register(_config, _causal)
    # Checkpoints then carry the modelling files, so that they load where deadhead is not installed.
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")


class _StandIn:
    """A placeholder in AutoConfig's table for the configuration class of a cut model of one type."""

    stock_type: str

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a configuration of the class that this one stands for."""
        stock: type[PreTrainedConfig] = CONFIG_MAPPING[cls.stock_type]
        return pruned_config_class(stock).from_dict(*args, **kwargs)


for _type, _name in CONFIG_MAPPING_NAMES.items():
    _stand_in: Any = type(PREFIX + _name, (_StandIn,), {"stock_type": _type, "model_type": TYPE_PREFIX + _type})
    AutoConfig.register(_stand_in.model_type, _stand_in)

__all__ = [
    "OWN_TYPES",
    "AllAttentionConfig",
    "AllAttentionForCausalLM",
    "AllAttentionModel",
    "TransformerXLConfig",
    "TransformerXLForCausalLM",
    "TransformerXLModel",
]
