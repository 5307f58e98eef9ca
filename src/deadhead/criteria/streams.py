"""The residual stream around each sublayer, as a model runs.

A layer gets the stream h, and its attention and feed-forward parts each add what their output projections give, perhaps
through a norm: h ← h + Δ.

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
    """What one sublayer made of one batch, without gradients."""

    site: Site
    inputs: Tensor  # (B, T, n) what the output projection got
    before: Tensor  # (B, T, D) the stream before the sublayer
    after: Tensor  # (B, T, D) and behind it


@dataclass
class _Layer:
    """A layer that runs: what came in, and of each site what its output projection got and what reaches the stream."""

    module: nn.Module
    sites: list[Site]
    stream: Tensor = field(default_factory=lambda: torch.empty(0))
    seen: dict[str, tuple[Site, Tensor, Tensor]] = field(default_factory=dict)  # by kind, in the order of running


@contextmanager
def watched(model: PreTrainedModel, sites: Sequence[Site], visit: Callable[[Passage], None]) -> Iterator[None]:
    """Tell `visit`, as a layer ends, what each of its sites made of the stream, while the block runs.

    Raises:
        UnsupportedModel: a site lies in no layer, or when the model runs, a layer does something else to the stream.
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
                "in no list of layers; use 'taylor' or 'flap'."
            )
        path = ".".join(parts[: numbers[-1] + 1])
        found.setdefault(path, _Layer(model.get_submodule(path), [])).sites.append(site)
    return list(found.values())


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _beginning(layer: _Layer) -> Callable[..., None]:
    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer.stream = (args[0] if args else kwargs["hidden_states"]).detach()
        layer.seen = {}

    return begin


def _noting(layer: _Layer, site: Site) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer.seen[site.key.kind] = (site, args[0].detach(), output.detach())

    return note


def _following(layer: _Layer) -> Callable[..., None]:
    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        given, made = _first(args), _first(output)
        for kind, (site, inputs, added) in layer.seen.items():
            # The same memory, whatever its shape: a module, such as a norm, stands between projection and stream.
            if (
                isinstance(given, Tensor)
                and isinstance(made, Tensor)
                and given.data_ptr() == added.data_ptr()
                and given.numel() == added.numel() == made.numel()
            ):
                layer.seen[kind] = (site, inputs, made.detach())

    return follow


def _ending(layer: _Layer, visit: Callable[[Passage], None]) -> Callable[..., None]:
    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first, last = layer.stream, _first(output).detach()
        added = {kind: values.reshape(first.shape) for kind, (_, _, values) in layer.seen.items()}
        if len(added) > 1:
            missing = (last - first - sum(added.values())).float().norm()
            if not missing <= _TOLERANCE * (last - first).float().norm():
                raise UnsupportedModel(
                    "This criterion needs layers that add what attention and feed-forward give to one residual stream, "
                    f"but those of {type(module).__name__} do something else; use 'taylor' or 'flap'."
                )
        for kind, (site, inputs, _) in layer.seen.items():
            before, after = (first, first + added[kind]) if kind == "head" else (last - added[kind], last)
            visit(Passage(site=site, inputs=inputs.reshape(*first.shape[:-1], -1), before=before, after=after))
        layer.seen = {}

    return end
