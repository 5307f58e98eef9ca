"""What vLLM asks of a model that it runs by transformers' code, of layers that a cut has emptied.

It replaces every Linear by one of its own, whose weights must be in the files, joins projections of feed-forward layers
by the form of their code, and gives each layer's attention a cache, which it finds by the call in its code.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .feed_forward import find_feed_forwards
from .shrinking import EmptyAttention
from .structure import EmptyLinear, OutputBias, matrices_of_empty

_VLLM = "vllm"


def serve(model: nn.Module, config: Any) -> None:
    """Change a cut model's emptied layers, in place, where vLLM is about to run it; they compute what they did."""
    if not str(config._attn_implementation).startswith(_VLLM):
        return
    # Not those of buffers that GPT-2's old files have: vLLM looks for such names within those of parameters too.
    model._keys_to_ignore_on_load_unexpected = matrices_of_empty(model) or None  # type: ignore[assignment]
    for feed_forward in find_feed_forwards(model):
        # Gates and what they multiply, in projections of their own.
        if not feed_forward.width and len(feed_forward.inputs) > 1:
            feed_forward.module.output_path = feed_forward.output_path  # type: ignore[assignment]
            feed_forward.module.__class__ = ServedEmptyFeedForward
    for path, module in list(model.named_modules()):
        if isinstance(module, EmptyAttention):
            module.__class__ = ServedEmptyAttention
        elif isinstance(module, EmptyLinear):
            model.set_submodule(path, ServedBias(module) if isinstance(module, OutputBias) else ServedNothing())


class ServedEmptyAttention(EmptyAttention):
    """An attention module without heads, for which vLLM keeps a cache of one key/value head, never written."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what `EmptyAttention` does."""
        if not isinstance(self, EmptyAttention):
            # Never reached: vLLM reads this function's code, and refuses layers that do not call attention so.
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(_VLLM, None)
            return attention(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


class ServedEmptyFeedForward(nn.Module):
    """A feed-forward layer without hidden units, whose code is not that of one with gates."""

    output_path: str

    def forward(self, hidden: Tensor) -> Any:
        """Return the output projection's bias for every position of `hidden` (..., D), shape (..., D)."""
        return self.get_submodule(self.output_path)(hidden)


class ServedNothing(nn.Module):
    """A projection into no hidden units that is no Linear."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return nothing for each position of `hidden` (..., D), shape (..., 0)."""
        return hidden[..., :0]


class ServedBias(nn.Module):
    """An output projection without inputs that is no Linear."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.out_features = output.out_features
        self.bias = output.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the bias for every position of `hidden` (..., any), shape (..., D)."""
        output = hidden.new_zeros((*hidden.shape[:-1], self.out_features))
        return output if self.bias is None else output + self.bias
