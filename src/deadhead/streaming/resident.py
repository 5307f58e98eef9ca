"""Models without weights, of which one layer at a time gets its weights, read from files, while it runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.streaming.layer_check import NotStreamable

Read = Callable[[Iterable[str]], Mapping[str, Tensor]]


class ResidentLayers:
    """Keeps the real weights of one layer of a model in memory: the layer that was run or requested last.

    Modules outside the layers have their weights while `outside` runs.

    Args:
        model: a model on the CPU, with stand-ins for all parameters.
        path: path of the list of its layers.
        read: returns the stored ones of some parameters and buffers, by their names.

    Raises:
        NotStreamable: a parameter is not stored under its name in memory.
    """

    def __init__(self, model: PreTrainedModel, path: str, read: Read) -> None:
        self.model, self.path, self._read = model, path, read
        layers: Any = model.get_submodule(path)
        self.layers: list[nn.Module] = list(layers)
        self._resident: int | None = None
        self._stand_ins: list[tuple[nn.Module, str, nn.Parameter]] = []
        for index, layer in enumerate(self.layers):
            layer.forward = self._loading(index, layer.forward)

    def load(self, index: int) -> None:
        """Read a layer's weights unless they are in memory; release those of another layer."""
        if index != self._resident:
            self.release()
            self._stand_ins = self._fill(self.layers[index].named_modules(prefix=f"{self.path}.{index}"))
            self._resident = index

    def release(self) -> None:
        """Release the weights of the layer that has them."""
        _put_back(self._stand_ins)
        self._stand_ins, self._resident = [], None

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Load a layer's weights for the block only."""
        self.load(index)
        try:
            yield
        finally:
            self.release()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Load the weights of modules outside the layers, such as embeddings, for the block only."""
        before = self._fill(self._rest())
        try:
            yield
        finally:
            _put_back(before)

    def _loading(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def loaded(*args: Any, **kwargs: Any) -> Any:
            self.load(index)
            return forward(*args, **kwargs)

        return loaded

    def _rest(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules that are no part of a layer, by their paths."""
        inside = {id(module) for layer in self.layers for module in layer.modules()}
        for path, module in self.model.named_modules():
            if id(module) not in inside:
                yield path, module

    def _fill(self, modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Give modules their weights, those that are tied the same; return what stood in their places."""
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        buffers: list[tuple[nn.Module, str, str]] = []
        names: dict[int, list[str]] = defaultdict(list)
        for path, module in modules:
            place = f"{path}." if path else ""
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    before.append((module, name, parameter))
                    names[id(parameter)].append(place + name)
            buffers += [(module, name, place + name) for name in module._buffers]
        found = self._read([*(name for each in names.values() for name in each), *(path for _, _, path in buffers)])
        filled: dict[int, nn.Parameter] = {}
        for module, name, parameter in before:
            if id(parameter) not in filled:
                values = _values(names[id(parameter)], parameter, found)
                filled[id(parameter)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = filled[id(parameter)]
        for module, name, path in buffers:
            # What is not stored was made with the model.
            if path in found:
                module._buffers[name] = found[path]
        return before


def _put_back(stand_ins: Iterable[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, name, parameter in stand_ins:
        module._parameters[name] = parameter


def _values(names: Sequence[str], parameter: nn.Parameter, found: Mapping[str, Tensor]) -> Tensor:
    values = next((found[name] for name in names if name in found), None)
    if values is None and not parameter.numel():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    if values is None or values.shape != parameter.shape:
        raise NotStreamable(f"tensor {names[0]} has another name or shape in the file than in memory")
    return values
