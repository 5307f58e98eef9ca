"""Torch-Pruning 1.6.1, set up to remove attention heads and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import nn
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D


class CannotPrune(Exception):
    """Torch-Pruning does not prune this model, or not to this sparsity."""


def prune_heads(
    model: PreTrainedModel,
    sparsity: float,
    *,
    importance: Literal["l2", "taylor"],
    ranking: Literal["global", "layer"],
    batches: Iterable[Mapping[str, torch.Tensor]],
) -> list[int]:
    """Remove heads, or whole groups of heads that share keys and values, in place.

    Torch-Pruning does not follow either model as it is. It takes GPT-2's fused projections for loose parameters, in
    which it finds no heads. Where two query heads share keys, it mistakes the concatenation in the rotary embedding
    for one of features, and its search for what depends on what does not end; without the rotation it refuses to
    remove half of a layer or more, as it counts each key channel twice. So it is shown the same weights, and gradients,
    as plain linear layers in which head i has the same rows everywhere. It scores, ranks and cuts these, as multi-head
    attention, and what is left goes back into the model. The scores are its own defaults: the mean over a head's
    channels in all projections, divided by the mean of the layer, also where the ranking is global.

    It counts in its own way: in a layer it rounds the heads to remove up, in the whole model those to keep down. A
    layer that should lose all its heads would keep all of them instead, and its `max_pruning_ratio` does not apply to
    heads. Hence its best head in each layer gets an infinite score, which leaves one and keeps the share.

    The model's config still states the old numbers: it has one for all layers.

    Args:
        model: GPT-2 or Llama, not pruned before.
        sparsity: share of the heads to remove.
        importance: "l2" for the weights' squares, "taylor" for the absolute value of weight times gradient.
        ranking: "global" compares the heads of all layers, "layer" removes equally many from each.
        batches: `input_ids` whose gradients add up for "taylor"; not read for "l2".

    Returns:
        The heads or groups left in each layer.
    """
    heads, head_dim, layers = _describe(model)
    if sparsity > 1 - 1 / heads:
        raise CannotPrune(
            f"Sparsity {sparsity:g} would take all {heads} heads of a layer, and Torch-Pruning then takes none."
        )
    if importance == "taylor":
        _accumulate_gradients(model, batches)
    shown = nn.ModuleList(_Shown(pieces, head_dim) for pieces in layers)
    num_heads = {linear: heads for layer in shown for linear in layer.writing}
    hidden = next(iter(num_heads)).weight[:1].detach()
    pruner = tp.pruner.BasePruner(
        shown,
        example_inputs=hidden,
        forward_fn=lambda shown, hidden: [layer(hidden) for layer in shown],
        importance=_KeepBest(importance, heads),
        global_pruning=ranking == "global",
        # Of no effect on the width of a head, but with 0 it would not look at heads either.
        pruning_ratio=sparsity,
        head_pruning_ratio=sparsity,
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[layer.reading for layer in shown],
        # The defaults of these two are shared by all pruners, which would keep every earlier model alive.
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    model.zero_grad(set_to_none=True)
    for layer, pieces in zip(shown, layers, strict=True):
        layer.put_back(pieces, head_dim)
    left = [layer.writing[0].weight.shape[0] // head_dim for layer in shown]
    if isinstance(model, GPT2LMHeadModel):
        for block, count in zip(model.transformer.h, left, strict=True):
            block.attn.num_heads = count
            block.attn.split_size = count * head_dim
    return left


@dataclass(frozen=True)
class _Piece:
    """A projection of the model, which consists of `parts` that each have one row, or column, per channel of a head.

    Args:
        module: the projection.
        reads: whether heads are its inputs rather than its outputs.
        parts: several in a fused projection, or where a group has several query heads.
        blocks: whether a part's heads stand together, rather than the parts of a head.
    """

    module: Any
    reads: bool = False
    parts: int = 1
    blocks: bool = False

    @property
    def transposed(self) -> bool:
        """Whether the weight has the inputs first."""
        return isinstance(self.module, Conv1D)

    def take_apart(self, tensor: torch.Tensor, dim: int, head_dim: int) -> list[torch.Tensor]:
        sizes = (self.parts, -1, head_dim) if self.blocks else (-1, self.parts, head_dim)
        parts = tensor.unflatten(dim, sizes).unbind(dim if self.blocks else dim + 1)
        return [part.flatten(dim, dim + 1) for part in parts]

    def join(self, parts: list[torch.Tensor], dim: int, head_dim: int) -> torch.Tensor:
        split = [part.unflatten(dim, (-1, head_dim)) for part in parts]
        return torch.stack(split, dim if self.blocks else dim + 1).flatten(dim, dim + 2)

    def show(self, head_dim: int) -> list[nn.Linear]:
        """Return copies of the parts, gradients included."""
        weights = self._matrices(self.module.weight.detach(), head_dim)
        linears = [nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta") for weight in weights]
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight.clone())
        if self.module.weight.grad is not None:
            for linear, grad in zip(linears, self._matrices(self.module.weight.grad, head_dim), strict=True):
                linear.weight.grad = grad.clone()
        if self.module.bias is not None and not self.reads:
            for linear, bias in zip(linears, self.take_apart(self.module.bias.detach(), 0, head_dim), strict=True):
                linear.bias = nn.Parameter(bias.clone())
        return linears

    def put_back(self, linears: list[nn.Linear], head_dim: int) -> None:
        """Make the projection of what is left of its parts."""
        weight = self.join([linear.weight.detach() for linear in linears], int(self.reads), head_dim)
        outputs, inputs = weight.shape
        self.module.weight = nn.Parameter((weight.T if self.transposed else weight).contiguous())
        if self.module.bias is not None and not self.reads:
            self.module.bias = nn.Parameter(self.join([linear.bias.detach() for linear in linears], 0, head_dim))
        names = ("nf", "nx") if self.transposed else ("out_features", "in_features")
        for name, size in zip(names, (outputs, inputs), strict=True):
            setattr(self.module, name, size)

    def _matrices(self, tensor: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
        return self.take_apart(tensor.T if self.transposed else tensor, int(self.reads), head_dim)


class _Shown(nn.Module):
    """The attention of a layer as Torch-Pruning sees it: it tells which channels belong together, no more."""

    def __init__(self, pieces: list[_Piece], head_dim: int) -> None:
        super().__init__()
        shown = [(piece.reads, linear) for piece in pieces for linear in piece.show(head_dim)]
        self.writing = nn.ModuleList(linear for reads, linear in shown if not reads)
        self.reading = nn.ModuleList(linear for reads, linear in shown if reads)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = torch.stack([linear(hidden) for linear in self.writing]).sum(0)
        return torch.stack([linear(heads) for linear in self.reading]).sum(0)

    def put_back(self, pieces: list[_Piece], head_dim: int) -> None:
        writing, reading = iter(self.writing), iter(self.reading)
        for piece in pieces:
            source = reading if piece.reads else writing
            piece.put_back([next(source) for _ in range(piece.parts)], head_dim)


class _KeepBest:
    """Torch-Pruning's importance, but infinite for the best head of each layer."""

    def __init__(self, name: Literal["l2", "taylor"], heads: int) -> None:
        importance = tp.importance.GroupMagnitudeImportance if name == "l2" else tp.importance.GroupTaylorImportance
        self.score = importance()
        self.heads = heads

    def __call__(self, group: Any) -> torch.Tensor:
        scores = self.score(group).unflatten(0, (self.heads, -1))
        scores[scores.mean(1).argmax()] = torch.inf
        return scores.flatten()


def _describe(model: PreTrainedModel) -> tuple[int, int, list[list[_Piece]]]:
    """Return the heads or groups a layer, the channels a head and the projections of each layer."""
    if isinstance(model, GPT2LMHeadModel):
        heads, blocks = model.config.n_head, [block.attn for block in model.transformer.h]
        fused = [[_Piece(a.c_attn, parts=3, blocks=True), _Piece(a.c_proj, reads=True)] for a in blocks]
        return heads, model.config.n_embd // heads, fused
    if isinstance(model, LlamaForCausalLM):
        heads, blocks = model.config.num_key_value_heads, [layer.self_attn for layer in model.model.layers]
        shared = model.config.num_attention_heads // heads
        return (
            heads,
            blocks[0].head_dim,
            [
                [
                    _Piece(a.q_proj, parts=shared),
                    _Piece(a.k_proj),
                    _Piece(a.v_proj),
                    _Piece(a.o_proj, reads=True, parts=shared),
                ]
                for a in blocks
            ],
        )
    raise CannotPrune(f"Torch-Pruning is shown the heads of GPT-2 and Llama here, not those of {type(model).__name__}.")


def _accumulate_gradients(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Add up the gradients of the loss, without dropout."""
    training = model.training
    model.eval()
    model.zero_grad(set_to_none=True)
    for batch in batches:
        ids = batch["input_ids"]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.train(training)
