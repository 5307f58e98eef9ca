"""What a model costs on paper: parameters, FLOPs, key/value cache. Works on the meta device too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deadhead.layouts import AttentionSite, Layout, find_layout
from deadhead.plan import HeadPlan


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a model with some of its heads.

    Args:
        heads: heads left, one number a layer.
        total_heads: heads of the original dense model, one number a layer.
        parameters: all parameters, shared tensors counted once.
        embedding_parameters: those of embeddings and output layer.
        attention_parameters: those that belong to heads and go with them.
        flops_per_token: of one forward pass over a token at the given length; a multiply-add counts as 2. Norms,
            softmax and the once-per-pass projection of relative positions are not counted.
        attention_flops_per_token: the heads' part of it.
        kv_cache_bytes: cache of one text at the given length, in the model's precision.
    """

    heads: list[int]
    total_heads: list[int]
    parameters: int
    embedding_parameters: int
    attention_parameters: int
    flops_per_token: float
    attention_flops_per_token: float
    kv_cache_bytes: int


def model_cost(model: PreTrainedModel, plan: HeadPlan | None = None, *, length: int | None = None) -> Cost:
    """Count what `model` costs, as it is or once `plan` were applied.

    Args:
        model: on any device, meta included; attached gates are not counted.
        plan: heads that stay; None counts the heads there are.
        length: positions before the token; by default the model's window, or 1024.

    Raises:
        UnsupportedModel: the model has no layout.
    """
    layout = find_layout(model)
    sites = layout.sites(model)
    if length is None:
        length = getattr(model.config, "memory_length", 1024)
    embeddings = [*model.get_input_embeddings().parameters()]
    if (output := model.get_output_embeddings()) is not None:
        embeddings += output.parameters()
    seen = {id(parameter): parameter.numel() for parameter in embeddings}
    embedding_parameters = sum(seen.values())
    seen |= {id(p): p.numel() for name, p in model.named_parameters() if "head_gate." not in name}
    parameters = sum(seen.values())
    inside = {id(module) for site in sites for module in site.module.modules()}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in inside]
    other_flops = 2.0 * sum(module.weight.numel() for module in linear)

    heads: list[int] = []
    attention_parameters, attention_flops, cache_values = 0, 0.0, 0
    for site in sites:
        kept = site.heads if plan is None else plan.kept[site.layer]
        heads.append(len(kept))
        if not site.heads:
            continue
        per_head_parameters, per_head_flops = _per_head(layout, site, length)
        parameters -= per_head_parameters * (len(site.heads) - len(kept))
        attention_parameters += per_head_parameters * len(kept)
        attention_flops += per_head_flops * len(kept)
        cache_values += layout.cache_values(site, length) * len(kept)
    return Cost(
        heads=heads,
        total_heads=[site.total for site in sites],
        parameters=parameters,
        embedding_parameters=embedding_parameters,
        attention_parameters=attention_parameters,
        flops_per_token=other_flops + attention_flops,
        attention_flops_per_token=attention_flops,
        kv_cache_bytes=cache_values * model.dtype.itemsize,
    )


def _per_head(layout: Layout, site: AttentionSite, length: int) -> tuple[int, float]:
    parameters, multiply_adds = 0, 0
    for part in layout.slices(site):
        size = site.module.get_parameter(part.path).numel() // len(site.heads)
        parameters += size
        multiply_adds += size if part.per_token else 0
    return parameters, 2.0 * multiply_adds + sum(layout.context_flops(site, length).values())


def config_cost(config: PreTrainedConfig, plan: HeadPlan | None = None, *, length: int | None = None) -> Cost:
    """Count what a model of this configuration costs, without making its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model_cost(model, plan, length=length)
