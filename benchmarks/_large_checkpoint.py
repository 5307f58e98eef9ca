"""A Llama of random bfloat16 weights in shards, of any size, written without holding more than a few megabytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from transformers import LlamaConfig

# Random numbers that are drawn once; tensors begin at different places of them, so that no two are alike.
_DRAWN = 1 << 24
_SHARD = 1 << 30

SEVEN_BILLION = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    dtype="bfloat16",
)
QUICK = LlamaConfig(
    vocab_size=8000,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=16,
    dtype="bfloat16",
)
SEVENTY_BILLION = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)


def tensors(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of a Llama's tensors, in the order in which they are stored."""
    width, hidden = config.hidden_size, config.intermediate_size
    head = width // config.num_attention_heads
    grouped = head * config.num_key_value_heads
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (width,)
        yield prefix + "mlp.down_proj.weight", (width, hidden)
        yield prefix + "mlp.gate_proj.weight", (hidden, width)
        yield prefix + "mlp.up_proj.weight", (hidden, width)
        yield prefix + "post_attention_layernorm.weight", (width,)
        yield prefix + "self_attn.k_proj.weight", (grouped, width)
        yield prefix + "self_attn.o_proj.weight", (width, width)
        yield prefix + "self_attn.q_proj.weight", (width, width)
        yield prefix + "self_attn.v_proj.weight", (grouped, width)
    yield "model.norm.weight", (width,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, width)


def size_of(config: LlamaConfig) -> int:
    """Return the bytes of a Llama's tensors in bfloat16."""
    return sum(2 * prod(shape) for _, shape in tensors(config))


def write_checkpoint(folder: Path, config: LlamaConfig, *, shard: int = _SHARD) -> None:
    """Write a checkpoint.

    Args:
        folder: a new folder.
        config: its configuration.
        shard: the most bytes of a file.
    """
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors(config):
        count = 2 * prod(shape)
        if shards[-1] and size + count > shard:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += count
    drawn = (torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    bits = drawn.view(torch.uint8).numpy().data
    weight_map = {}
    for index, held in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys((name for name, _ in held), file))
        _write(folder / file, held, bits)
    total = {"total_size": size_of(config)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": weight_map}))


def _write(path: Path, held: list[tuple[str, tuple[int, ...]]], bits: memoryview) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, shape in held:
        count = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + count]}
        place += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in held:
            left, start = 2 * prod(shape), sum(name.encode()) * 2_000_006 % len(bits)
            while left:
                part = bits[start : start + left]
                file.write(part)
                left, start = left - len(part), 0
