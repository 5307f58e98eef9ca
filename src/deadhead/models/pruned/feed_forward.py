"""Find the feed-forward layers of a Hugging Face model by their structure, and take hidden units out of them.

Dimensions: D model width, F hidden units of a feed-forward layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .structure import (
    EmptyLinear,
    Key,
    OutputBias,
    is_projection,
    keep_rows,
    layer_keys,
    leave_bias,
    output_dim,
    text_stack,
    weight_of,
)

# Names of the projections into the hidden units and of the one out of them. Where the first has twice as many outputs
# as the last has inputs, the gate's come first and then those it multiplies, or the other way round.
_NAMES = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("fc_in",), "fc_out"),
    (("lin1",), "lin2"),
    (("Wi",), "Wo"),
    (("intermediate.dense",), "output.dense"),
    (("intermediate_dense",), "output_dense"),
)
WIDTHS = ("intermediate_size", "ffn_dim", "inner_dim", "hidden_dim")
# Experts are chosen token by token; each is a layer of its own.
_EXPERTS = "experts"


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward layer, as it is now."""

    key: Key  # its layer's index, or its path where an index is not enough
    path: str  # of `module` in the text stack
    module: nn.Module  # holds the projections; in some models the whole layer
    inputs: tuple[str, ...]  # names of the projections into the hidden units
    output_path: str  # name of the projection out of them
    width: int  # F; 0 for an emptied one
    copies: int  # rows of an input projection that a hidden unit has: 2 where one projection gives gates too

    @property
    def dense_width(self) -> int:
        """F in the dense model, which `shrink_feed_forward` notes in the module before a cut."""
        noted: Any = getattr(self.module, "dense_feed_forward", self.width)
        return int(noted)

    def tensors(self) -> list[tuple[str, int, bool]]:
        """Return name, dimension with hidden units, and whether it is a matrix, of every parameter with such."""
        found: list[tuple[str, int, bool]] = []
        for name in self.inputs:
            projection = self.module.get_submodule(name)
            found.append((f"{name}.weight", output_dim(projection), True))
            if getattr(projection, "bias", None) is not None:
                found.append((f"{name}.bias", 0, False))
        found.append((f"{self.output_path}.weight", 1 - output_dim(self.module.get_submodule(self.output_path)), True))
        return found


def find_feed_forwards(model: nn.Module) -> list[FeedForward]:
    """Return the feed-forward layers of the part of a model that reads text, emptied ones included.

    Layers of experts are left alone, and those whose hidden units have something to do with one another.
    """
    found: list[tuple[str, nn.Module, tuple[str, ...], str]] = []
    for path, module in text_stack(model).named_modules():
        if _EXPERTS in path.split("."):
            continue
        for inputs, output in _NAMES:
            if all(_has(module, name) for name in (*inputs, output)):
                found.append((path, module, inputs, output))
                break
    keys = layer_keys([path for path, *_ in found])
    described = [_describe(keys[path], path, module, inputs, output) for path, module, inputs, output in found]
    return [feed_forward for feed_forward in described if feed_forward is not None]


def _has(module: nn.Module, path: str) -> bool:
    owner_path, _, name = path.rpartition(".")
    try:
        owner = module.get_submodule(owner_path)
    except AttributeError:
        return False
    return is_projection(owner, name)


def _describe(key: Key, path: str, module: nn.Module, inputs: tuple[str, ...], output_path: str) -> FeedForward | None:
    output: Any = module.get_submodule(output_path)
    if isinstance(output, OutputBias):
        return FeedForward(key, path, module, inputs, output_path, 0, 1)
    if not all(isinstance(weight_of(module.get_submodule(name)), nn.Parameter) for name in (*inputs, output_path)):
        return None
    width = int(weight_of(output).shape[1 - output_dim(output)])
    # The first one's rows may be gates and units, which only one projection has.
    most = 2 if len(inputs) == 1 else 1
    rows = {weight_of(found).shape[output_dim(found)] for found in map(module.get_submodule, inputs)}
    copies = next((copies for copies in range(1, most + 1) if rows == {copies * width}), None)
    # Hidden units that a threshold of all of them selects do not go without changing the others.
    if copies is None or getattr(module, "activation_sparsity", False):
        return None
    return FeedForward(key, path, module, inputs, output_path, width, copies)


def rows_of_units(feed_forward: FeedForward, name: str, units: Tensor) -> Tensor:
    """Return the indices along a parameter's dimension with hidden units, for some of them."""
    if name == f"{feed_forward.output_path}.weight":
        return units
    return torch.cat([units + copy * feed_forward.width for copy in range(feed_forward.copies)])


@torch.no_grad()
def shrink_feed_forward(feed_forward: FeedForward, units: Tensor) -> None:
    """Keep only some hidden units, given by their present index, in place; none empties the layer."""
    module = feed_forward.module
    module.dense_feed_forward = feed_forward.dense_width  # type: ignore[assignment]
    if not len(units):
        for name in feed_forward.inputs:
            projection = module.get_submodule(name)
            weight = weight_of(projection)
            module.set_submodule(name, NoUnits(weight, weight.shape[1 - output_dim(projection)]))
        leave_bias(module, feed_forward.output_path)
        # While a checkpoint loads, some types would initialise their projections, which are not there.
        module._is_hf_initialized = True  # type: ignore[assignment]
        return
    for name, dim, _ in feed_forward.tensors():
        keep_rows(module, name, dim, rows_of_units(feed_forward, name, units))
    for name in WIDTHS:
        if vars(module).get(name) == feed_forward.width:
            setattr(module, name, len(units))


class NoUnits(EmptyLinear):
    """What is left of a projection into hidden units when there are none.

    Args:
        like: the projection's weight.
        width: D.
    """

    def __init__(self, like: Tensor, width: int) -> None:
        super().__init__(like, width, 0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return nothing for each position of `hidden` (..., D), shape (..., 0)."""
        # Not a part of `hidden`: adapters add to what a projection returns, in place.
        return hidden.new_zeros((*hidden.shape[:-1], 0))
