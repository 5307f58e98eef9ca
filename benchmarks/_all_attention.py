"""Shared parts of the speed benchmarks: shapes, a textbook implementation, the floor, and fair timing.

Dimensions: B batch, T queries, M memory, S context = M + T, W window = M + 1, H heads, D width, E head width, N
persistent vectors.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM
from deadhead.models.all_attention.layer import AllAttention, AllAttentionLayer

# Heads of each of the 16 layers, as the authors published them.
LAYOUTS: Mapping[str, tuple[int, ...]] = {
    "dense": (8,) * 16,
    "106 of 128": (8, 3, 7, 6, 6, 6, 6, 7, 6, 7, 8, 8, 7, 8, 7, 6),
    "87 of 128": (6, 4, 6, 5, 4, 5, 5, 6, 5, 6, 7, 5, 6, 6, 6, 5),
    "59 of 128": (5, 2, 5, 4, 3, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A stack of layers and the batch it reads."""

    name: str
    width: int
    persistent: int
    length: int
    batch: int
    heads: tuple[int, ...] = (8, 8, 8, 8)
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        """E; the dense layer has 8 heads."""
        return self.width // 8


PAPER = Shape(name="paper", width=512, persistent=2048, length=192, batch=4, attention_dropout=0.2, hidden_dropout=0.1)
DEMO = Shape(name="demo", width=192, persistent=128, length=64, batch=16)


def paper_shapes(layers: int) -> list[Shape]:
    """Return the paper's shape with the first `layers` layers of each layout at batch 4, and dense at batch 16."""
    shapes = [replace(PAPER, name=f"paper, {name}, batch 4", heads=heads[:layers]) for name, heads in LAYOUTS.items()]
    return [*shapes, replace(PAPER, name="paper, dense, batch 16", heads=(8,) * min(layers, 4), batch=16)]


def build(shape: Shape) -> AllAttentionForCausalLM:
    """Return a model of a shape with random weights."""
    torch.manual_seed(0)
    layers = range(len(shape.heads))
    plan = {
        "version": 1,
        "unit": "head",
        "total": {str(layer): 8 for layer in layers},
        "kept": {str(layer): list(range(shape.heads[layer])) for layer in layers},
        "output_scale": False,
    }
    config = AllAttentionConfig(
        hidden_size=shape.width,
        num_hidden_layers=len(shape.heads),
        num_persistent=shape.persistent,
        segment_length=shape.length,
        memory_length=shape.length,
        attention_dropout=shape.attention_dropout,
        hidden_dropout=shape.hidden_dropout,
        embedding_dropout=shape.hidden_dropout,
        output_dropout=shape.hidden_dropout,
        head_plan=plan,
    )
    return AllAttentionForCausalLM(config)


class TextbookLayer(nn.Module):
    """A layer as one would write it from the paper's equations, with the weights of one of ours."""

    def __init__(self, layer: AllAttentionLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_BTD: Tensor, memory_BMD: Tensor, positions_WD: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D)."""
        layer, attention = self.layer, self.layer.attention
        assert isinstance(attention, AllAttention)
        config, heads = attention.config, len(attention.heads)
        width, length, window = config.head_dim, hidden_BTD.shape[1], config.sliding_window

        def split(states: Tensor) -> Tensor:
            return states.unflatten(-1, (heads, width)).transpose(1, 2)

        context = layer.norm(torch.cat([memory_BMD, hidden_BTD], dim=1))
        q, k, v = (
            split(attention.q_proj(context[:, -length:])),
            split(attention.k_proj(context)),
            split(attention.v_proj(context)),
        )
        r = attention.r_proj(positions_WD).unflatten(-1, (heads, width)).transpose(0, 1)
        content = torch.matmul(q + attention.content_bias[:, None], k.transpose(-1, -2))
        position = torch.matmul(q + attention.position_bias[:, None], r.transpose(-1, -2))
        # Transformer-XL's shift: padded rows, read back one shorter.
        columns = window + length - 1
        position = functional.pad(position, (0, length)).flatten(-2)[..., : length * columns]
        position = position.unflatten(-1, (length, columns))
        distance = torch.arange(columns) - torch.arange(length)[:, None]
        outside = (distance < 0) | (distance >= window)
        in_context = (content + position).masked_fill(outside, float("-inf"))
        persistent = torch.matmul(q, (attention.persistent_k * width**0.5).transpose(-1, -2))
        weights = torch.softmax(torch.cat([in_context, persistent], dim=-1) / width**0.5, dim=-1)
        weights = functional.dropout(weights, config.attention_dropout, self.training)
        values = attention.persistent_v * config.num_persistent**0.5
        attended = torch.matmul(weights, torch.cat([v, values.expand(v.shape[0], -1, -1, -1).to(v.dtype)], dim=2))
        return hidden_BTD + layer.dropout(attention.o_proj(attended.transpose(1, 2).flatten(-2)))


class Floor:
    """The matrix products of a stack of layers, into memory that is already allocated, and nothing else.

    Args:
        shape: the stack.
        dtype: of all operands.
        cached: evaluation, where keys and values of the memory and the keys of the positions are kept: only those of
            the queries are computed.
        backward: also the two products that the gradients of each product take.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, *, cached: bool, backward: bool) -> None:
        batch, length, width, head, persistent = (
            shape.batch,
            shape.length,
            shape.width,
            shape.head_dim,
            shape.persistent,
        )
        rows = batch * length
        # (batches, rows, inner, columns, times in a layer) of products, by number of heads.
        self.products: list[tuple[Tensor, Tensor, Tensor]] = []
        made: dict[tuple[int, int, int, int], list[tuple[Tensor, Tensor, Tensor]]] = {}
        for heads in shape.heads:
            inner = heads * head
            sizes = [
                (1, rows, width, inner),  # q
                (1, rows if cached else 2 * rows, width, inner),  # k
                (1, rows if cached else 2 * rows, width, inner),  # v
                (1, rows, inner, width),  # o
                (batch * heads, length, head, 2 * length),  # content scores
                (batch * heads, length, 2 * length, head),  # times values
                (heads, rows, head, length + 1),  # position scores
                (heads, rows, head, persistent),  # persistent scores
                (heads, rows, persistent, head),  # times persistent values
            ]
            if not cached:
                sizes.append((1, length + 1, width, inner))  # W_R p
            if backward:
                sizes += [size for b, m, k, n in sizes for size in ((b, m, n, k), (b, k, m, n))]
            for size in sizes:
                if size not in made:
                    b, m, k, n = size
                    tensors = torch.randn(b, m, k).to(dtype), torch.randn(b, k, n).to(dtype)
                    made[size] = [(*tensors, torch.empty(b, m, n, dtype=dtype))]
                self.products.append(made[size][0])

    @property
    def flops(self) -> float:
        """Multiply-adds, counted twice."""
        return sum(2.0 * left.numel() * right.shape[2] for left, right, _ in self.products)

    @torch.no_grad()
    def __call__(self) -> None:
        """Multiply."""
        for left, right, product in self.products:
            if left.shape[0] == 1:
                torch.mm(left[0], right[0], out=product[0])
            else:
                torch.bmm(left, right, out=product)


class Softmax:
    """The softmax over as many scores as a stack of layers has, in a buffer that stays in the cache, and nothing else.

    It is not a product, so the floor leaves it out, but no implementation can.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        columns = 2 * shape.length + shape.persistent
        self.scores = torch.randn(shape.length, columns).to(dtype)
        self.times = sum(shape.heads) * shape.batch

    @torch.no_grad()
    def __call__(self) -> None:
        """Exponentiate and divide."""
        for _ in range(self.times):
            torch.softmax(self.scores, -1, out=self.scores)


def medians(
    runs: Mapping[str, Callable[[], Any]], repeats: int, prepare: Mapping[str, Callable[[], Any]] | None = None
) -> dict[str, float]:
    """Return the median seconds of each run. All runs are interleaved, each time in another order.

    Noise then affects all of them alike, and so does what the previous run leaves in caches and in the heap.

    Args:
        runs: what is timed.
        repeats: number of measured repetitions, after one that is not counted.
        prepare: called before each repetition, and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    draw = random.Random(0)
    for repetition in range(repeats + 1):
        for name in draw.sample(list(runs), len(runs)):
            if prepare is not None:
                prepare[name]()
            begin = time.perf_counter()
            runs[name]()
            if repetition:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the growth of a fresh process's memory while it runs a function."""
    rise: float = in_fresh_process(_rise, function, arguments)
    return rise


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a fresh process, whose memory is its own, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _rise(function: Callable[..., Any], arguments: Sequence[Any]) -> float:
    before = status("VmRSS")
    function(*arguments)
    return (status("VmHWM") - before) / 1024


def status(field: str) -> int:
    """Return a number of kilobytes that Linux reports for this process, such as VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@contextmanager
def no_gradients() -> Iterator[None]:
    """Evaluate."""
    with torch.inference_mode():
        yield


def machine() -> str:
    """Describe this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}, torch {torch.__version__}"
