"""deadhead's own models, registered with transformers' Auto classes under model types of their own."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deadhead.models.all_attention import AllAttentionConfig, AllAttentionForCausalLM, AllAttentionModel

AutoConfig.register(AllAttentionConfig.model_type, AllAttentionConfig)
AutoModel.register(AllAttentionConfig, AllAttentionModel)
AutoModelForCausalLM.register(AllAttentionConfig, AllAttentionForCausalLM)

# Checkpoints then carry the modelling files, so that they load where deadhead is not installed.
AllAttentionConfig.register_for_auto_class()
AllAttentionModel.register_for_auto_class("AutoModel")
AllAttentionForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["AllAttentionConfig", "AllAttentionForCausalLM", "AllAttentionModel"]
