"""deadhead's models: its own, and those of transformers with heads cut off, registered with transformers' Auto classes.

Cut models of transformers are registered as stand-ins, which become classes when a checkpoint names them: making all
of them at once would import every model of transformers.
"""

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from deadhead.models.all_attention import AllAttentionConfig, AllAttentionForCausalLM, AllAttentionModel
from deadhead.models.pruned.modeling_pruned import PREFIX, TYPE_PREFIX, pruned_config_class

AutoConfig.register(AllAttentionConfig.model_type, AllAttentionConfig)
AutoModel.register(AllAttentionConfig, AllAttentionModel)
AutoModelForCausalLM.register(AllAttentionConfig, AllAttentionForCausalLM)

# Checkpoints then carry the modelling files, so that they load where deadhead is not installed.
AllAttentionConfig.register_for_auto_class()
AllAttentionModel.register_for_auto_class("AutoModel")
AllAttentionForCausalLM.register_for_auto_class("AutoModelForCausalLM")


class _StandIn:
    """Stands in AutoConfig's table for the configuration class of a cut model of one type."""

    stock_type: str

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a configuration of the class itself."""
        stock: type[PreTrainedConfig] = CONFIG_MAPPING[cls.stock_type]
        return pruned_config_class(stock).from_dict(*args, **kwargs)


for _type, _name in CONFIG_MAPPING_NAMES.items():
    _stand_in: Any = type(PREFIX + _name, (_StandIn,), {"stock_type": _type, "model_type": TYPE_PREFIX + _type})
    AutoConfig.register(TYPE_PREFIX + _type, _stand_in)

__all__ = ["AllAttentionConfig", "AllAttentionForCausalLM", "AllAttentionModel"]
