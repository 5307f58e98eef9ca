"""Tiny random models whose every parameter is random, random plans and texts, and the one measure of difference."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from deadhead.attaching import is_gate
from deadhead.gates.gates import HeadGates
from deadhead.models import AllAttentionConfig, TransformerXLConfig
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_plan import UnitPlan


def difference(values: Tensor, reference: Tensor) -> float:
    """Return max|Δ| / max|reference| in float64; NaN is infinitely far, and shapes must agree."""
    assert values.shape == reference.shape, (values.shape, reference.shape)
    values, reference = values.detach().double(), reference.detach().double()
    result = float((values - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
    return result if result == result else float("inf")


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Give every parameter random values: biases, norms, u, v and persistent vectors too, so that none is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if is_gate(name):
            continue
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if "norm" in name and last == "weight":
            values = 1 + 0.3 * noise
        elif last == "weight":
            values = noise * parameter.shape[-1] ** -0.5
        else:
            values = 0.5 * noise
        parameter.copy_(values)


def tiny_config(**overrides: Any) -> AllAttentionConfig:
    """Return the configuration of a tiny model: 3 layers, 4 heads of 4, window 6."""
    values: dict[str, Any] = {
        "vocab_size": 29,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_persistent": 5,
        "memory_length": 5,
        "segment_length": 6,
    }
    return AllAttentionConfig(**{**values, **overrides})


def tiny_model(seed: int = 0, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """Return a tiny model in evaluation mode whose every parameter is random."""
    return random_model(tiny_config(**overrides), seed, dtype)


def random_model(config: AllAttentionConfig, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model in evaluation mode whose every parameter is random."""
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, seed)
    return model.eval().to(dtype=dtype)


def random_config(draw: random.Random) -> AllAttentionConfig:
    """Return a random small configuration that reaches every switch of the architecture."""
    heads = draw.randint(1, 8)
    # A layer norm over fewer than 8 numbers saturates: heads then hardly matter, and gradients are mere rounding.
    head_dim = draw.choice([dim for dim in (2, 4, 6, 8, 10) if 8 <= heads * dim <= 48])
    adaptive = draw.random() < 0.25
    is_baseline = draw.random() < 0.3
    config: Any = TransformerXLConfig if is_baseline else AllAttentionConfig
    return config(
        vocab_size=draw.randint(17, 31),
        hidden_size=heads * head_dim,
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads,
        num_persistent=0 if is_baseline else draw.randint(1, 6),
        feed_forward_size=draw.randint(4, 12) if is_baseline else 0,
        memory_length=draw.randint(1, 7),
        segment_length=draw.randint(1, 6),
        position=draw.choice(["learned", "sinusoidal", "rotary"]),
        share_position_bias=draw.random() < 0.3,
        attend_initial_memory=draw.random() < 0.4,
        projection_bias=draw.random() < 0.4,
        final_layer_norm=draw.random() < 0.6,
        lm_head_bias=draw.random() < 0.4,
        tie_word_embeddings=draw.random() < 0.6,
        adaptive_cutoffs=[5] if adaptive else None,
        adaptive_factor=2,
        attn_implementation=draw.choice(["eager", "sdpa"]),
    )


def random_plan(
    draw: random.Random,
    kept: Mapping[Any, Sequence[int]],
    total: Mapping[Any, int],
    *,
    output_scale: bool,
    unit: Unit = "head",
    hidden_units: UnitPlan | None = None,
) -> HeadPlan:
    """Return a plan that keeps some of `kept` and cuts at least one; layers are emptied often, also all of them.

    Args:
        draw: of every choice.
        kept: the heads there are.
        total: those there were.
        output_scale: what the plan says of it.
        unit: what an index names.
        hidden_units: those there are, of which some are kept too; also in layers that lose all heads.
    """
    left = {layer: list(heads) for layer, heads in kept.items()}
    if draw.random() < 0.05:
        left = {layer: [] for layer in left}
    for layer, heads in left.items():
        count = 0 if draw.random() < 0.2 else draw.randint(0, len(heads))
        left[layer] = draw.sample(heads, count)
    if all(len(left[layer]) == len(kept[layer]) for layer in left):
        layer = draw.choice([layer for layer in left if kept[layer]])
        left[layer] = left[layer][1:]
    kept = {layer: tuple(heads) for layer, heads in left.items()}
    if hidden_units is not None:
        there = hidden_units.kept
        counts = {layer: 0 if draw.random() < 0.2 else draw.randint(0, len(units)) for layer, units in there.items()}
        chosen = {layer: draw.sample(units, counts[layer]) for layer, units in there.items()}
        hidden_units = replace(hidden_units, kept=chosen)
    return HeadPlan(kept=kept, total=total, unit=unit, output_scale=output_scale, hidden_units=hidden_units)


def all_hidden_units(config: AllAttentionConfig) -> UnitPlan:
    """Return the plan that keeps all hidden units of a model's feed-forward layers, or its persistent vectors."""
    width = config.feed_forward_size or config.num_persistent
    return UnitPlan(kept={}, total=dict.fromkeys(range(config.num_hidden_layers), width))


def random_blocks(
    draw: random.Random, units: Mapping[Any, Sequence[int]], kept: Mapping[Any, Sequence[int]]
) -> dict[Any, list[list[int]]]:
    """Return hidden units in blocks of random sizes and orders, by layer, none of which is kept in part."""
    blocks: dict[Any, list[list[int]]] = {}
    for layer, there in units.items():
        blocks[layer] = []
        for group in (set(kept[layer]), set(there) - set(kept[layer])):
            order = draw.sample(sorted(group), len(group))
            while order:
                size = draw.randint(1, len(order))
                blocks[layer].append(order[:size])
                order = order[size:]
        draw.shuffle(blocks[layer])
    return blocks


def random_text(draw: random.Random, config: AllAttentionConfig, *, padded: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask (B, T) of a text that may be several windows long, left-padded if asked."""
    batch, length = draw.randint(1, 3), draw.randint(2, 4 * (config.memory_length + 1))
    ids = torch.tensor([[draw.randrange(config.vocab_size) for _ in range(length)] for _ in range(batch)])
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, : draw.randint(0, length - 1)] = 0
    return ids, mask


def chunks(draw: random.Random, length: int) -> list[int]:
    """Return random chunk lengths that add up to `length`."""
    sizes: list[int] = []
    while sum(sizes) < length:
        sizes.append(draw.randint(1, length - sum(sizes)))
    return sizes


@torch.no_grad()
def cached_logits(model: PreTrainedModel, ids: Tensor, sizes: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Return the logits of `ids`, read in chunks of the given sizes through the cache."""
    parts, cache, start = [], None, 0
    for size in sizes:
        stop = start + size
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(output.logits)
        cache, start = output.past_key_values, stop
    return torch.cat(parts, dim=1)


@torch.no_grad()
def segment_logits(model: PreTrainedModel, ids: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the logits of `ids`, read in segments with the hidden states of the segments before."""
    parts, memory, start = [], None, 0
    for size in sizes:
        output = model(input_ids=ids[:, start : start + size], memory=memory, use_cache=False)
        parts.append(output.logits)
        memory, start = output.memory, start + size
    return torch.cat(parts, dim=1)


def gradients(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the gradient of the language-modelling loss for every parameter that is not a gate's; none means zero."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if not is_gate(name)
    }
    model.zero_grad(set_to_none=True)
    return found


def kept_part(name: str, tensor: Tensor, plan: HeadPlan, head_dim: int) -> Tensor:
    """Return the part of a parameter of a layer that a plan keeps, written down without the layout."""
    layer = int(name.split(".layers.")[1].split(".")[0])

    def hidden(dim: int) -> Tensor:
        units = list(range(tensor.shape[dim]))
        if plan.hidden_units is not None:
            units = list(plan.hidden_units.kept[layer])
        return tensor.index_select(dim, torch.tensor(units, dtype=torch.long))

    if ".up_proj." in name:
        return hidden(0)
    if name.endswith("down_proj.weight"):
        return hidden(1)
    if ".attention." not in name:
        return tensor
    kept = plan.kept[layer]
    if ".persistent_" in name:
        return hidden(1)[list(kept)]
    rows = [head * head_dim + i for head in kept for i in range(head_dim)]
    if name.endswith("o_proj.weight"):
        return tensor[:, rows]
    if name.endswith("o_proj.bias"):
        return tensor
    return tensor[rows] if "_proj" in name else tensor[list(kept)]


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a failed change must leave alone: tensors, hooks, attributes, configuration."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "identities": {name: id(value) for name, value in model.named_parameters()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "attributes": {
            name: {key: value for key, value in module.__dict__.items() if isinstance(value, (int, str, tuple))}
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
    }


def assert_unchanged(model: PreTrainedModel, before: Mapping[str, Any]) -> None:
    """Assert that `model` is bit for bit as it was when `before` was taken by `snapshot`."""
    now = snapshot(model)
    assert now["tensors"].keys() == before["tensors"].keys()
    for name, value in before["tensors"].items():
        assert torch.equal(now["tensors"][name], value), name
    for part in ("identities", "requires_grad", "hooks", "attributes", "config"):
        assert now[part] == before[part], part


def choices_among(counts: Mapping[UnitKey, int], *, unit: Unit = "head") -> Choices:
    """Return the choice of each of so many units by itself."""
    members = {key: [(index,) for index in range(count)] for key, count in counts.items()}
    return Choices(unit=unit, members=members, total=counts)


def random_units(draw: random.Random, gates: HeadGates, *, output_scale: bool) -> HeadPlan:
    """Return a plan that cuts at least one head, and where blocks have gates some of them; layers are often emptied."""
    heads = {key.layer: units for key, units in gates.choices.units.items() if key.kind == "head"}
    total = {key.layer: count for key, count in gates.choices.total.items() if key.kind == "head"}
    plan = random_plan(draw, heads, total, output_scale=False, unit=gates.unit)
    kept: dict[UnitKey, list[int]] = {}
    for key, blocks in gates.choices.hidden.items():
        stay = [] if draw.random() < 0.2 else draw.sample(list(blocks), draw.randint(0, len(blocks)))
        kept[key] = [unit for block in stay for unit in block]
    return gates.choices.plan_of({**plan.units, **kept}, output_scale=output_scale)
