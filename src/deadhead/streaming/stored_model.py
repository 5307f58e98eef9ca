"""A checkpoint whose files hold the same tensors as the model in memory, and its model, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig

from deadhead.attaching import is_gate
from deadhead.checkpoints import checkpoint
from deadhead.compensation.sublayers import layers_path
from deadhead.disk.gguf import gguf_file
from deadhead.disk.stored import StoredCheckpoint, read_stored
from deadhead.layouts import find_layout
from deadhead.layouts.classes import model_class
from deadhead.measure.cost import skeleton
from deadhead.models import OWN_TYPES
from deadhead.streaming.copying import Piece, read_piece
from deadhead.streaming.layer_check import NotStreamable, stub
from deadhead.streaming.resident import ResidentLayers

# Buffers of older versions of transformers, which are worked out now.
_IGNORED = (r"rotary_emb\.inv_freq$",)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A checkpoint that can be read tensor by tensor.

    Args:
        stored: the files of the checkpoint.
        config: its configuration.
        dtype: the dtype that it is loaded in.
        names: names of tensors in files, by their names in memory, for tensors that are the same in both.
    """

    stored: StoredCheckpoint
    config: PreTrainedConfig
    dtype: torch.dtype
    names: Mapping[str, str]

    def without_weights(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the model with stand-ins for all parameters, which take no memory; its buffers are real."""
        with init_empty_weights(include_buffers=False):
            model = model_class(self.config)._from_config(self.config, dtype=dtype or self.dtype)
        take_weights(model)
        # Made without memory, those that belong together have come apart.
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = model.get_parameter(source)
        return model.eval()

    def resident(self, model: PreTrainedModel, pieces: Mapping[str, Piece] | None = None) -> ResidentLayers:
        """Return a model with stand-ins for its parameters that loads the weights of one layer at a time.

        Args:
            model: the model of the checkpoint, or the cut model.
            pieces: the part of each tensor that stays, by its name in the files; None: all tensors as a whole.
        """
        layout = find_layout(model)
        paths = {id(module): path for path, module in model.named_modules()}
        sites = layout.all_sites(model, layout.units(model)[0], hidden=True)
        layers = layers_path(model, [f"{paths[id(site.module)]}." for site in sites])
        if layers is None:
            raise NotStreamable("its layers are not in one list")
        if pieces is None:
            pieces = {name: Piece(source=tensor) for name, tensor in self.stored.tensors.items()}
        return ResidentLayers(model, layers, lambda names: self._read(names, pieces))

    def _read(self, names: Iterable[str], pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Return those tensors that are stored, by their names in memory."""
        folder, found, others = self.stored.folder, {}, []
        for name in names:
            there = self.names.get(name)
            if there is None:
                others.append(name)
            elif there in pieces:
                found[name] = read_piece(folder, pieces[there])
        return found | self._converted(others, pieces)

    def _converted(self, names: Iterable[str], pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
        """Return tensors that are made of others in files, such as all experts' of each one's."""
        wanted = {name: self._shapes[name] for name in names if name in self._shapes}
        stored = revert_weight_conversion(self._host, dict(wanted)) if wanted else {}
        if not stored or not stored.keys() <= pieces.keys():
            return {}
        values = {name: read_piece(self.stored.folder, pieces[name]) for name in stored}
        mapping: Any = get_model_conversion_mapping(self._host)
        how = LoadStateDictConfig(device_map={"": "cpu"}, dtype=self.dtype, weight_mapping=mapping)
        convert_and_load_state_dict_in_model(self._host, values, how)
        found = {name: self._host.get_parameter(name).detach() for name in wanted}
        take_weights(self._host)
        return found

    @cached_property
    def _host(self) -> PreTrainedModel:
        return self.without_weights()

    @cached_property
    def _shapes(self) -> dict[str, Tensor]:
        """The tensors that are saved of the model, without values, by their names in memory."""
        return _as_stored(self._host)[0]


def open_stored(source: Path) -> StoredModel:
    """Read the configuration and headers of a checkpoint; raise NotStreamable if it must be loaded as a whole."""
    if gguf_file(source) is not None:
        raise NotStreamable("a GGUF file is read as a whole")
    config = checkpoint.load_config(source)
    if not source.is_dir():
        raise NotStreamable(f"it is not a folder on this machine (hf download {source} --local-dir FOLDER makes one)")
    stored = read_stored(source)
    dtype = _load_dtype(config, stored)
    if config.model_type in OWN_TYPES or hasattr(config, "quantization_config"):
        raise NotStreamable(f"models of type {config.model_type!r}, like quantised ones, are cut in memory only")
    try:
        dense = skeleton(config).to(dtype)  # type: ignore[arg-type]
        opened = StoredModel(stored=stored, config=config, dtype=dtype, names={})
        names = _stored_names(opened.without_weights())
    except NotStreamable:
        raise
    except Exception as error:  # each architecture has faults of its own
        raise NotStreamable(
            f"no model can be built from its configuration ({str(error).strip().partition(chr(10))[0]})"
        ) from error
    _require_stored(stored, dense, dtype)
    return replace(opened, names=names)


def take_weights(model: PreTrainedModel) -> None:
    """Replace all parameters of a model by stand-ins."""
    stubs: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # One for one, so that tied parameters stay tied.
                module._parameters[name] = stubs.setdefault(id(parameter), stub(parameter))


def stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors that `save_pretrained` writes for a model."""
    return {name: tuple(value.shape) for name, value in _as_stored(model)[1].items()}


def _stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the names in files of tensors that are written as they are in memory, by their names there."""
    tensors, converted = _as_stored(model)
    names = {id(value): name for name, value in converted.items()}
    return {name: names[id(value)] for name, value in tensors.items() if id(value) in names}


def _as_stored(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors that are saved of a model, without values, as they are in memory and as in files."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    ignored = set(model._keys_to_ignore_on_save or ())
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for names in groups.values():
        spare = [name for name in sorted(names) if name in tied]
        ignored |= set(spare[: len(names) - 1])
    tensors = {
        name: value.to("meta")
        for name, value in model.state_dict().items()
        if name not in ignored and not is_gate(name) and isinstance(value, Tensor)
    }
    try:
        return tensors, revert_weight_conversion(model, tensors)
    except Exception as error:
        raise NotStreamable(f"its tensors have other names or shapes in files than in memory ({error})") from error


def _require_stored(stored: StoredCheckpoint, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Check that a checkpoint's tensors are, one by one, those that a model loaded as `dtype` would be saved as."""
    shapes, found = stored_shapes(model), stored.tensors
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    patterns = (*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
    extra = {name for name in found.keys() - shapes.keys() if not any(re.search(p, name) for p in patterns)}
    missing = shapes.keys() - found.keys()
    # A tensor that others are tied to may be stored under another of its names.
    if missing or extra:
        names = ", ".join(sorted(missing | extra)[:2])
        also = " (two names of one tensor)" if extra and extra <= tied.keys() else ""
        raise NotStreamable(
            f"its tensors are not stored under the names that the model saves them under, such as {names}{also}"
        )
    for name, shape in shapes.items():
        stored_dtype = found[name].torch_dtype
        if found[name].shape != shape:
            raise NotStreamable(f"tensor {name} has shape {list(found[name].shape)} in the file, not {list(shape)}")
        if stored_dtype.is_floating_point and stored_dtype != dtype:
            raise NotStreamable(f"tensor {name} is stored as {stored_dtype}, but loaded as {dtype}")
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in _HALF else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for part in kept:
        if any(part in name.split(".") for name in shapes):
            raise NotStreamable(f"{part} of a model of this type is loaded as float32, but stored as {dtype}")


def _load_dtype(config: PreTrainedConfig, stored: StoredCheckpoint) -> torch.dtype:
    """Return the type that transformers loads a checkpoint in: the configuration's, or that of its first tensor."""
    named: Any = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(named, torch.dtype):
        return named
    types = [tensor.torch_dtype for tensor in stored.tensors.values()]
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)
