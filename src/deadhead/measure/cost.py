"""What a model costs on paper: parameters, FLOPs, key/value cache. A model on the meta device will do."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deadhead.attaching import choices_of, detach, has_blocks, is_gate
from deadhead.cutting import cache_values, remove_units
from deadhead.errors import InputError, typed
from deadhead.layouts import Layout, Site, find_layout
from deadhead.layouts.classes import model_class
from deadhead.measure.costs import Cost
from deadhead.plans.kinds import Of
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_costs import UnitCosts

Counted = Literal["params", "flops", "kv_cache", "memory"]


@typed
def model_cost(
    model: PreTrainedModel, plan: HeadPlan | None = None, *, length: int | None = None, unit: Unit | None = None
) -> Cost:
    """Count the parameters, FLOPs and cache of `model`, as it is or as it would be after a cut by `plan`.

    Args:
        model: on any device, meta included. Attached gates are not counted.
        plan: the heads that stay; None counts the model as it is.
        length: positions before the token; by default the model's window, or 1024.
        unit: what `heads` counts. By default the unit that the model was cut by, else key/value groups if the model
            has any.

    Returns:
        The counts.

    Raises:
        UnsupportedModel: deadhead does not support the model's architecture.
        InputError: the plan is not for this model, or `length` is negative.
    """
    if length is not None and length < 0:
        raise InputError(f"length must be at least 0, but is {length}.")
    layout = find_layout(model)
    if plan is not None:
        model = cut_skeleton(layout, model, plan)
    sites = layout.sites(model, unit or layout.units(model)[0])
    length = _default_length(model) if length is None else length
    # Models of sound, and some of images, have no table of embeddings; transformers then raises an error.
    inputs, output = None, model.get_output_embeddings()
    with suppress(NotImplementedError):
        inputs = model.get_input_embeddings()
    given = {} if inputs is None else {id(p): p.numel() for p in inputs.parameters()}
    returned = {} if output is None else {id(p): p.numel() for p in output.parameters()}
    every = given | returned | {id(p): p.numel() for name, p in model.named_parameters() if not is_gate(name)}
    heads = [pair for site in sites for pair in _unit_parameters(site)]
    heads_flops = sum((2.0 * parameter.numel() for parameter, per_token in heads if per_token), 0.0)
    heads_flops += sum(sum(site.context_flops(length).values()) for site in sites if site.units)
    # A table of embeddings is looked up, not multiplied, unless it is the output layer too.
    other_flops = _other_flops(model, {id(parameter) for parameter, _ in heads} | (given.keys() - returned.keys()))
    hidden = layout.hidden_sites(model)
    return Cost(
        heads=[len(site.units) for site in sites],
        total_heads=[site.total for site in sites],
        parameters=sum(every.values()),
        embedding_parameters=sum((given | returned).values()),
        attention_parameters=sum(parameter.numel() for parameter, _ in heads),
        flops_per_token=other_flops + heads_flops,
        attention_flops_per_token=heads_flops,
        kv_cache_bytes=cache_values(layout, model, sites, length) * model.dtype.itemsize,
        hidden_units=[len(site.units) for site in hidden],
        total_hidden_units=[site.total for site in hidden],
        hidden_parameters=sum(p.numel() for site in hidden for p, _ in _unit_parameters(site)),
    )


def _unit_parameters(site: Site) -> list[tuple[nn.Parameter, bool]]:
    """Return the parameters that contain units, and whether each multiplies every token."""
    parts = site.selections(site.units) if site.units else ()
    return [(site.module.get_parameter(part.path), part.per_token) for part in parts]


def _default_length(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "memory_length", 1024))


def cut_skeleton(layout: Layout, model: PreTrainedModel, plan: HeadPlan) -> PreTrainedModel:
    """Return a copy of `model` without its weights, cut by `plan`."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in model.parameters()}
    copied = detach(copy.deepcopy(model, memo))
    hidden = has_blocks(layout, copied, plan.hidden_units is not None)
    sites = layout.all_sites(copied, plan.unit, hidden=hidden)
    remove_units(sites, choices_of(sites, plan.unit, hidden).kept_units(plan))
    layout.record_plan(copied, plan)
    return copied


def _other_flops(model: PreTrainedModel, counted: set[int]) -> float:
    """Count the FLOPs a token of all matrices not counted yet; of experts, only those that a token goes through."""
    total = 0.0
    config: Any = model.config.get_text_config()
    for name, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        if isinstance(module, (nn.Linear, Conv1D)):
            total += 2.0 * sum(weight.numel() for weight in weights if weight.ndim == 2)
        elif name.rpartition(".")[2] == "experts":
            # Experts' matrices are stacked in one tensor.
            stacked = [weight for weight in weights if weight.ndim == 3]
            used = getattr(config, "num_experts_per_tok", None) or 1
            total += sum(2.0 * weight.numel() * min(1.0, used / weight.shape[0]) for weight in stacked)
    return total


def counted_costs(
    model: PreTrainedModel,
    kind: Counted,
    *,
    unit: Unit,
    hidden: bool = False,
    length: int | None = None,
    of: Of = "all",
    texts: int = 1,
) -> UnitCosts:
    """Return what a model's units cost in parameters, FLOPs a token, or bytes of cache or memory, layer by layer.

    Query heads that share keys and values, and heads that share persistent vectors, count with their mean cost;
    `model_cost` with a plan counts exactly.

    Args:
        model: on any device, meta included.
        kind: what to count.
        unit: what a head's index names.
        hidden: whether hidden units count as units too.
        length: positions before the token; by default the model's window, or 1024.
        of: which parameters are counted (see `cost_of_kind`).
        texts: how many texts have a cache in memory (see `cost_of_kind`).

    Raises:
        InputError: `kind` is "kv_cache", but the model keeps no cache.
    """
    layout = find_layout(model)
    if kind == "kv_cache":
        require_cache(model)
    length = _default_length(model) if length is None else length
    cost = model_cost(model, length=length, unit=unit)
    sites = [site for site in layout.all_sites(model, unit, hidden=hidden) if site.units]
    parameters = {site.key: _unit_parameters(site) for site in sites}
    owners = Counter(id(parameter) for found in parameters.values() for parameter, _ in found)
    # Persistent vectors belong to heads and to hidden units: half of their numbers, and FLOPs, counts for each.
    shares = {"persistent": 0.5} if any(count > 1 for count in owners.values()) else {}
    tables: dict[UnitKey, Tensor] = {}
    keeps_cache = layout.keeps_cache(model)
    present = 0.0
    for site in sites:
        found = parameters[site.key]
        if kind == "kv_cache":
            whole = float(site.cache_values(length) * model.dtype.itemsize)
        elif kind == "params" or kind == "memory":
            whole = sum(parameter.numel() / owners[id(parameter)] for parameter, _ in found)
            if kind == "memory":
                whole = model.dtype.itemsize * (whole + texts * site.cache_values(length) * keeps_cache)
        else:
            whole = sum(2.0 * parameter.numel() for parameter, per_token in found if per_token)
            whole += sum(flops * shares.get(name, 1) for name, flops in site.context_flops(length).items())
        present += whole
        tables[site.key] = torch.arange(len(site.units) + 1, dtype=torch.float64) * (whole / len(site.units))
    total = cost_of_kind(cost, kind, of, itemsize=model.dtype.itemsize, texts=texts)
    return UnitCosts(fixed=total - present, tables=tables)


def require_cache(model: PreTrainedModel) -> None:
    """Raise an InputError if a model keeps no key/value cache, which a budget could limit."""
    if not find_layout(model).keeps_cache(model):
        raise InputError(
            f"A budget of kv_cache needs a model that keeps a key/value cache, but {type(model).__name__} keeps none; "
            "ask for sparsity, params or flops."
        )


def cost_of_kind(cost: Cost, kind: Counted, of: Of = "all", *, itemsize: int = 0, texts: int = 1) -> float:
    """Return one of the numbers of a cost.

    Args:
        cost: of a model.
        kind: which number. "memory" is the bytes of the weights and of the cache of `texts` texts.
        of: "all" counts all parameters, "blocks" those without embeddings and output layer.
        itemsize: bytes of each weight.
        texts: texts that have a cache in memory.
    """
    parameters = cost.parameters - (cost.embedding_parameters if of == "blocks" else 0)
    memory = itemsize * cost.parameters + texts * cost.kv_cache_bytes
    found = {"params": parameters, "flops": cost.flops_per_token, "kv_cache": cost.kv_cache_bytes, "memory": memory}
    return float(found[kind])


def config_cost(config: PreTrainedConfig, plan: HeadPlan | None = None, *, length: int | None = None) -> Cost:
    """Count what a model with this configuration costs, without making its weights; arguments as in `model_cost`."""
    return model_cost(skeleton(config), plan, length=length)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model with this configuration on the meta device, without weights."""
    with torch.device("meta"):
        return model_class(config)._from_config(config)


def first_heads(config: PreTrainedConfig, counts: Sequence[int]) -> HeadPlan:
    """Return the plan that keeps the first heads of each layer, or the first key/value groups if the model has any.

    Which heads stay makes no difference to the cost.

    Args:
        config: of the model.
        counts: how many heads, or groups, each layer keeps.

    Raises:
        InputError: there are more or fewer numbers than layers, or one is not between 0 and its layer's heads.
    """
    model = skeleton(config)
    layout = find_layout(model)
    unit = layout.units(model)[0]
    sites = layout.sites(model, unit)
    present = [len(site.units) for site in sites]
    if len(counts) != len(sites) or not all(0 <= count <= most for count, most in zip(counts, present, strict=True)):
        raise InputError(
            f"Heads that stay must be {len(sites)} numbers, one a layer and at most {present}, but are {list(counts)}."
        )
    return HeadPlan(
        kept={site.layer: site.units[:count] for site, count in zip(sites, counts, strict=True)},
        total={site.layer: site.total for site in sites},
        unit=unit,
    )
