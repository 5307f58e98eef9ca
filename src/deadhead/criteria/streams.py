"""The residual stream around each sublayer, as a model runs.

A layer gets the stream h. Its attention and feed-forward parts each add the output of their output projection, perhaps
after a norm: h ← h + Δ.

Dimensions: B batch, T tokens, D model width, n width of an output projection's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts import Site

# What half precision may make of a sum.
_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What one sublayer computed on one batch, without gradients."""

    site: Site
    inputs: Tensor  # (B, T, n) what the output projection got
    before: Tensor  # (B, T, D) the stream before the sublayer
    after: Tensor  # (B, T, D) and behind it


class _Part:
    """A site's output projection: its input, and the part of its output that reaches the stream, as observed so far."""

    def __init__(self, site: Site, inputs: Tensor, output: Tensor) -> None:
        self.site, self.inputs = site, inputs.detach()
        self.follow(output)

    def follow(self, output: Tensor) -> None:
        # Its memory is held, so that no other tensor gets it. Some models add to it in place.
        self.held, self.added = output.detach(), output.detach().clone()

    def is_given(self, value: Any) -> bool:
        """Return whether a value is the output, in whatever shape."""
        return isinstance(value, Tensor) and value.data_ptr() == self.held.data_ptr() and self.has_size_of(value)

    def has_size_of(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.numel() == self.held.numel()


@dataclass
class _Layer:
    """A running layer: its input, and what its sites computed."""

    module: nn.Module
    sites: list[Site]
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    parts: dict[str, _Part] = field(default_factory=dict)  # by kind


@contextmanager
def watched(model: PreTrainedModel, sites: Sequence[Site], visit: Callable[[Passage], None]) -> Iterator[None]:
    """Call `visit` after each layer with what its sites did to the stream, while the block runs.

    Raises:
        UnsupportedModel: a site is in no layer, or, when the model runs, a layer does something else to the stream.
    """
    with ExitStack() as exits:
        for layer in _layers(model, sites):
            for site in layer.sites:
                exits.enter_context(site.output.register_forward_hook(_noting(layer, site)))
            for module in layer.module.modules():
                if module is not layer.module:
                    exits.enter_context(module.register_forward_hook(_following(layer)))
            exits.enter_context(layer.module.register_forward_pre_hook(_beginning(layer), with_kwargs=True))
            exits.enter_context(layer.module.register_forward_hook(_ending(layer, visit)))
        yield


def _layers(model: PreTrainedModel, sites: Sequence[Site]) -> list[_Layer]:
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, _Layer] = {}
    for site in sites:
        parts = paths[id(site.module)].split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if not numbers:
            raise UnsupportedModel(
                f"This criterion follows the residual stream from layer to layer, but the module {'.'.join(parts)} is "
                "in no list of layers; use criterion 'gates', 'taylor' or 'flap'."
            )
        path = ".".join(parts[: numbers[-1] + 1])
        found.setdefault(path, _Layer(model.get_submodule(path), [])).sites.append(site)
    return list(found.values())


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _beginning(layer: _Layer) -> Callable[..., None]:
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.stream = (args[0] if args else kwargs["hidden_states"]).detach()
        layer.parts = {}

    return begin


def _noting(layer: _Layer, site: Site) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer.parts[site.key.kind] = _Part(site, args[0], output)

    return note


def _following(layer: _Layer) -> Callable[..., None]:
    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for part in layer.parts.values():
            # A module, such as a norm, stands between projection and stream.
            if part.is_given(_first(args)) and part.has_size_of(_first(output)):
                part.follow(_first(output))

    return follow


def _ending(layer: _Layer, visit: Callable[[Passage], None]) -> Callable[..., None]:
    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first, last = layer.stream, _first(output).detach()
        added = {kind: part.added.reshape(first.shape) for kind, part in layer.parts.items()}
        if len(added) > 1:
            missing = (last - first - sum(added.values())).float().norm()
            if missing > _TOLERANCE * (last - first).float().norm():
                raise UnsupportedModel(
                    "This criterion needs layers that add what attention and feed-forward give to one residual stream, "
                    f"but those of {type(module).__name__} do something else; use criterion 'gates', 'taylor' or "
                    "'flap'."
                )
        for kind, part in layer.parts.items():
            before, after = (first, first + added[kind]) if kind == "head" else (last - added[kind], last)
            inputs = part.inputs.reshape(*first.shape[:-1], -1)
            visit(Passage(site=part.site, inputs=inputs, before=before, after=after))
        layer.parts = {}

    return end
