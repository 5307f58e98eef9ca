"""Check a cut layer by layer: one layer's real tensors in a model without weights, closed gates against the cut.

Random hidden states come from a table in place of the embeddings and go through the text stack, in which all other
layers pass on their input. Within the layer, the modules that are cut and all small parameters have their real weights;
other large matrices give zeros.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from deadhead.attaching import take_off
from deadhead.cutting import Outputs, gated_outputs, remove_units, require_same_function, unit_factors
from deadhead.disk.stored import StoredCheckpoint
from deadhead.errors import InputError, UnsupportedModel
from deadhead.gates.gates import HeadGates
from deadhead.gates.head_gate import HeadGate
from deadhead.layouts import Site, find_layout
from deadhead.models.pruned.structure import text_stack

# Numbers of a tensor that is loaded whatever it is.
_SMALL = 1 << 20
# Products of so few rows take little more than reading the weights.
_TEXTS = 1
# Rows of the table of hidden states.
_TABLE = 97


class NotStreamable(Exception):
    """Raised for a checkpoint that cannot be cut shard by shard; the message is a clause that says why."""


def stub(parameter: Tensor) -> nn.Parameter:
    """Return zeros of a parameter's shape and dtype that take no memory."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)


class LayerCheck:
    """Checks a model's layers, in any order, each once.

    The model has no weights, and its gates are closed by the plan; layers that were checked are cut in it. `names` maps
    names of tensors in memory to names in files; `sites` holds what each layer to check loses, by its index.

    Raises:
        NotStreamable: the model's layers are not in one list.
    """

    def __init__(
        self, stored: StoredCheckpoint, names: Mapping[str, str], model: PreTrainedModel, gates: HeadGates
    ) -> None:
        self.stored, self.model, self.gates = stored, model, gates
        self.units = gates.plan().units
        tensors = stored.tensors
        self._tensors = {name: tensors[there] for name, there in names.items() if there in tensors}
        self._names = {id(module): path for path, module in model.named_modules()}
        # How many values layers return, in a tuple; 0: one tensor alone.
        self.outputs = 0
        stack = text_stack(model)
        modules = list(stack.named_modules(remove_duplicate=False))
        self.sites: dict[int, list[Site]] = {}
        containers: set[str] = set()
        for site in find_layout(model).all_sites(model, gates.unit, hidden=gates.choices.has_blocks):
            if not site.units or site.units == self.units[site.key]:
                continue
            found = [path for path, module in modules if module is site.module]
            match = re.fullmatch(r"(.*?)\.?\b(\d+)(?:\..*)?", found[0]) if len(found) == 1 else None
            if match is None:
                raise NotStreamable(f"its layer {site.layer} is not a separate entry of a list of layers")
            containers.add(match[1])
            self.sites.setdefault(int(match[2]), []).append(site)
        if len(containers) > 1:
            raise NotStreamable(f"it has more than one stack of layers: {', '.join(sorted(containers))}")
        layers = stack.get_submodule(containers.pop()) if containers else nn.ModuleList()
        if not isinstance(layers, nn.ModuleList):
            raise NotStreamable("its layers are not in a list")
        self._layers = layers
        if self.sites:
            self._fill_rest(stack)

    def check(self, place: int) -> None:
        """Check a layer; raise CutError if it differs, NotStreamable if it does not run alone."""
        layers, sites = list(self._layers), self.sites[place]
        layer = layers[place]
        self._fill(layer, sites)
        try:
            for index, other in enumerate(layers):
                if index != place:
                    self._layers[index] = _HandOn(other, index, self)
            expected = self._gated(layer, sites)
            factors = {site.key: unit_factors(self.gates.gates[site.key]) for site in sites}
            for site in sites:
                take_off(site)
            remove_units(sites, self.units, factors)
            require_same_function(self.model, expected, texts=_TEXTS)
        finally:
            for index, other in enumerate(layers):
                self._layers[index] = other
            # The weights go again.
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = stub(parameter)

    def _gated(self, layer: nn.Module, sites: Sequence[Site]) -> Outputs:
        """Return the outputs with gates; other layers learn to return what this one does."""
        seen: set[int] = set()
        handle = layer.register_forward_hook(
            lambda _, __, output: seen.add(len(output) if isinstance(output, (tuple, list)) else 0)
        )
        failure: BaseException | None = None
        try:
            for count in dict.fromkeys((self.outputs, 0, 1, 2, 3)):
                self.outputs = count
                seen.clear()
                try:
                    expected = gated_outputs(self.model, sites, texts=_TEXTS)
                    if seen == {count}:
                        return expected
                except Exception as error:  # a layer's own code, which got another form than it expects
                    if isinstance(error, InputError) and not isinstance(error, UnsupportedModel):
                        raise
                    failure = error
        finally:
            handle.remove()
        kind = self.model.config.model_type
        raise NotStreamable(f"a layer of a model of type {kind!r} cannot be run alone to check it") from failure

    def _fill(self, layer: nn.Module, sites: Sequence[Site]) -> None:
        """Load the modules of a layer that are cut, and small parameters; the rest gives zeros."""
        cut = {id(module) for site in sites for module in site.module.modules() if site.module is not layer}
        for site in sites:
            for part in site.selections(site.units):
                cut.add(id(site.module.get_submodule(part.path.rpartition(".")[0])))
        owners = self._load_all((module for module in layer.modules() if not isinstance(module, HeadGate)), cut)
        for path, module in list(layer.named_modules()):
            if id(module) in owners or not path or not any(True for _ in module.parameters(recurse=False)):
                continue
            parent, _, name = path.rpartition(".")
            width = module.out_features if isinstance(module, nn.Linear) else None
            if width is not None or name == "experts":
                setattr(layer.get_submodule(parent), name, _Zeros(module, width))

    def _load_all(self, modules: Iterable[nn.Module], wanted: Collection[int] = ()) -> set[int]:
        """Load the parameters that are small or of `wanted` modules, and return which modules have any; all by id."""
        owners = set()
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(module) in wanted or parameter.numel() <= _SMALL):
                    self._load(module, name, parameter)
                    owners.add(id(module))
        return owners

    def _load(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """Replace a stand-in by its stored tensor."""
        path = self._names.get(id(module))
        found = self._tensors.get(f"{path}.{name}")
        # Routers and the like of models whose files have other names stay so; what they are makes no difference.
        values = torch.ones(parameter.shape, dtype=parameter.dtype)
        if found is not None and found.shape == tuple(parameter.shape):
            self.stored.read_into(found, values)
        elif parameter.numel() > _SMALL:
            raise NotStreamable(f"tensor {path}.{name} has another name or shape in the file than in memory")
        module._parameters[name] = nn.Parameter(values, requires_grad=False)

    def _fill_rest(self, stack: nn.Module) -> None:
        """Load small parameters outside the layers, and replace the embeddings by random hidden states."""
        inside = {id(module) for module in self._layers.modules()}
        embeddings: Any = cast(Any, stack).get_input_embeddings() if hasattr(stack, "get_input_embeddings") else None
        path = next((path for path, module in stack.named_modules() if module is embeddings), "")
        if not path or not isinstance(embeddings, nn.Embedding):
            raise NotStreamable("its text embeddings were not found")
        self._load_all(module for module in stack.modules() if id(module) not in inside and module is not embeddings)
        parent, _, name = path.rpartition(".")
        setattr(stack.get_submodule(parent), name, _HiddenStates(embeddings))


class _StandIn(nn.Module):
    """Replaces a module, with its attributes but without its parameters."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not as a child: what looks for attention, or for weights, is not to find it.
        self.__dict__["original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _HiddenStates(_StandIn):
    """Gives each token random hidden states."""

    def __init__(self, original: nn.Embedding) -> None:
        super().__init__(original)
        shape = (_TABLE, original.weight.shape[1])
        self.table = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(original.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids % _TABLE]


class _HandOn(_StandIn):
    """Passes on the hidden states in the form that the checked layer returns; the cache counts positions."""

    def __init__(self, original: nn.Module, place: int, check: LayerCheck) -> None:
        super().__init__(original)
        self.place, self.check = place, check

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        hidden = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
        if hidden is None:
            raise TypeError("No hidden states were found: they were passed on in a form that this model does not use.")
        cache: Any = next((value for value in values if isinstance(value, Cache)), None)
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        # Linear attention and the like keep states that count nothing.
        if cache is not None and (self.place >= len(cache.layers) or hasattr(cache.layers[self.place], "update")):
            nothing = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], 1))
            # A layer that keeps no cache says so.
            with suppress(NotImplementedError):
                cache.update(nothing, nothing, self.place)
        count = self.check.outputs
        return (hidden, *[None] * (count - 1)) if count else hidden


class _Zeros(_StandIn):
    """Replaces a large projection or experts: gives zeros (..., width), or of `hidden`'s width."""

    def __init__(self, original: nn.Module, width: int | None) -> None:
        super().__init__(original)
        self.width = width

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden.new_zeros((*hidden.shape[:-1], self.width or hidden.shape[-1]))
