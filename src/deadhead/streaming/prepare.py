"""What a cut of a stored checkpoint will do, worked out from headers and configuration before a byte is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from deadhead.attaching import attach_for, is_gate
from deadhead.checkpoints import checkpoint
from deadhead.compensation.sublayers import layers_path
from deadhead.cutting import cache_values, normal_plan, unit_factors
from deadhead.disk.gguf import gguf_file
from deadhead.disk.stored import StoredCheckpoint, read_header, read_stored
from deadhead.gates.gates import HeadGates
from deadhead.layouts import find_layout
from deadhead.layouts.classes import model_class
from deadhead.measure.cost import cut_skeleton, model_cost, skeleton
from deadhead.measure.costs import Cost
from deadhead.models import OWN_TYPES
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.copying import Keep, Piece, read_piece
from deadhead.streaming.layer_check import LayerCheck, NotStreamable, stub
from deadhead.streaming.resident import ResidentLayers

# Buffers of older versions of transformers, which are worked out now.
_IGNORED = (r"rotary_emb\.inv_freq$",)
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class StreamedCut:
    """A cut that is about to be made.

    `pieces` has by file what of its tensors goes into the new file of that name; files of which nothing stays are left
    out. `model` is the cut model without weights, in the type it is loaded in. `cache_growth` is the share by which the
    key/value cache grows; 0 if it does not.
    """

    stored: StoredCheckpoint
    pieces: dict[str, tuple[Piece, ...]]
    plan: HeadPlan
    model: PreTrainedModel
    check: LayerCheck
    before: Cost
    after: Cost
    cache_growth: float

    @property
    def written_bytes(self) -> int:
        """Bytes of all tensors of the new checkpoint."""
        return sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)

    def check_one(self) -> None:
        """Check one of the layers that lose something, if any does: whether layers of this kind can be checked."""
        for place in sorted(self.check.sites)[:1]:
            self.check.check(place)

    def fitted(self, files: Mapping[str, Path], names: Mapping[str, str]) -> StreamedCut:
        """Return the cut with new values for some tensors of what stays.

        Args:
            files: that have them, by the names of tensors in memory, under which they are there.
            names: of tensors in files of the checkpoint, by those in memory.
        """
        there = {names[name]: (path, name) for name, path in files.items()}
        headers = {path: {tensor.name: tensor for tensor in read_header(path)} for path in set(files.values())}

        def with_values(piece: Piece) -> Piece:
            if piece.source.name not in there:
                return piece
            path, name = there[piece.source.name]
            return replace(piece, fitted=(path, headers[path][name]))

        pieces = {file: tuple(map(with_values, found)) for file, found in self.pieces.items()}
        return replace(self, pieces=pieces)


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A checkpoint that can be taken apart: its tensors lie in files, one by one, as in memory.

    Args:
        stored: its files.
        config: its configuration.
        dtype: that it is loaded in.
        names: of tensors in files, by those in memory.
    """

    stored: StoredCheckpoint
    config: PreTrainedConfig
    dtype: torch.dtype
    names: Mapping[str, str]

    def without_weights(self) -> PreTrainedModel:
        """Return the model with stand-ins for all parameters, which take no memory; its buffers are real."""
        return _empty_model(self.config, self.dtype)

    def resident(self, model: PreTrainedModel, pieces: Mapping[str, Piece] | None = None) -> ResidentLayers:
        """Return such a model, or what a cut left of it, with the weights of a layer at a time.

        Args:
            model: without weights.
            pieces: what stays of each tensor, by its name in the files; None: all of all.
        """
        layout, tensors = find_layout(model), self.stored.tensors
        paths = {id(module): path for path, module in model.named_modules()}
        sites = layout.all_sites(model, layout.units(model)[0], hidden=True)
        layers = layers_path(model, [f"{paths[id(site.module)]}." for site in sites])
        if layers is None:
            raise NotStreamable("its layers are not one list of layers of their own")

        def read(name: str) -> Tensor | None:
            there = self.names.get(name, "")
            if pieces is not None:
                return read_piece(self.stored.folder, pieces[there]) if there in pieces else None
            return read_piece(self.stored.folder, Piece(source=tensors[there])) if there in tensors else None

        return ResidentLayers(model, layers, read)

    def resident_cut(self, planned: StreamedCut) -> ResidentLayers:
        """Return the model that a cut leaves, with the weights of a layer at a time."""
        model = self.without_weights()
        model = cut_skeleton(find_layout(model), model, planned.plan)
        _take_weights(model)
        pieces = {piece.source.name: piece for found in planned.pieces.values() for piece in found}
        return self.resident(model, pieces)


def open_stored(source: Path) -> StoredModel:
    """Read what a checkpoint says of itself; raise NotStreamable if it can only be had whole, in memory."""
    if gguf_file(source) is not None:
        raise NotStreamable("a GGUF file is read as a whole")
    stored = read_stored(source)
    config = checkpoint.load_config(source)
    dtype = _load_dtype(config, stored)
    if config.model_type in OWN_TYPES or hasattr(config, "quantization_config"):
        raise NotStreamable(f"models of type {config.model_type!r} are cut in memory, as are quantised ones")
    try:
        dense = skeleton(config).to(dtype)  # type: ignore[arg-type]
        names = _stored_names(_empty_model(config, dtype))
    except NotStreamable:
        raise
    except Exception as error:  # each architecture has faults of its own
        raise NotStreamable(f"its configuration gives no model ({str(error).strip().partition(chr(10))[0]})") from error
    _require_stored(stored, dense, dtype)
    return StoredModel(stored=stored, config=config, dtype=dtype, names=names)


def prepare(opened: StoredModel, plan: HeadPlan) -> StreamedCut:
    """Work out a cut; raise NotStreamable if the checkpoint can only be cut in memory."""
    stored, names, dtype = opened.stored, opened.names, opened.dtype
    dense = skeleton(opened.config).to(dtype)  # type: ignore[arg-type]
    # In float32 the check is as sharp as for a model of that precision.
    model = _empty_model(opened.config, torch.promote_types(dtype, torch.float32))
    layout = find_layout(model)
    gates = attach_for(model, plan)
    plan = normal_plan(gates, plan)
    keeps = {names.get(name, name): keep for name, keep in _kept_parts(model, gates).items()}
    cut = cut_skeleton(layout, dense, plan)
    cut_shapes = _stored_shapes(cut)
    if not cut_shapes.keys() <= stored.tensors.keys() or not keeps.keys() <= cut_shapes.keys():
        raise NotStreamable("what is cut of it lies in files otherwise than in memory")
    pieces: dict[str, tuple[Piece, ...]] = {}
    for file, tensors in stored.files.items():
        found = tuple(Piece(source=t, keep=keeps.get(t.name)) for t in tensors if t.name in cut_shapes)
        for piece in found:
            if piece.shape != cut_shapes[piece.source.name]:
                raise NotStreamable(f"tensor {piece.source.name} does not become what the cut model asks for")
        if found:
            pieces[file] = found
    before = cache_values(layout, dense, layout.sites(dense, plan.unit))
    after = cache_values(layout, cut, layout.sites(cut, plan.unit))
    return StreamedCut(
        stored=stored,
        pieces=pieces,
        plan=plan,
        model=cut.to(dtype),  # type: ignore[arg-type]
        check=LayerCheck(stored, names, model, gates),
        before=model_cost(dense, unit=plan.unit),
        after=model_cost(cut),
        cache_growth=max(0.0, after / before - 1) if before else 0.0,
    )


def _empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model on the CPU whose parameters are zeros that take no memory; its buffers are real."""
    with init_empty_weights(include_buffers=False):
        model = model_class(config)._from_config(config, dtype=dtype)
    _take_weights(model)
    # Made without memory, those that belong together have come apart.
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._parameters[last] = model.get_parameter(source)
    return model.eval()


def _take_weights(model: PreTrainedModel) -> None:
    """Put stand-ins in the place of all parameters."""
    stubs: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                # One for one, so that tied parameters stay tied.
                module._parameters[name] = stubs.setdefault(id(parameter), stub(parameter))


def _stored_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that `save_pretrained` writes of a model."""
    return {name: tuple(value.shape) for name, value in _as_stored(model)[1].items()}


def _stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the names in files of tensors that are written as they are in memory, by their names there."""
    tensors, converted = _as_stored(model)
    names = {id(value): name for name, value in converted.items()}
    return {name: names[id(value)] for name, value in tensors.items() if id(value) in names}


def _as_stored(model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what is saved of a model, without values, as it is in memory and as it is in files."""
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
    shapes, found = _stored_shapes(model), stored.tensors
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    patterns = (*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ()))
    extra = {name for name in found.keys() - shapes.keys() if not any(re.search(p, name) for p in patterns)}
    missing = shapes.keys() - found.keys()
    # A tensor that others are tied to may be stored under another of its names.
    if missing or extra:
        names = ", ".join(sorted(missing | extra)[:2])
        also = " (two names of one tensor)" if extra and extra <= tied.keys() else ""
        raise NotStreamable(f"its tensors are not stored under the names they are saved by, such as {names}{also}")
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


def _kept_parts(model: PreTrainedModel, gates: HeadGates) -> dict[str, Keep]:
    """Return what is left of each tensor with units in it, by the parameter's name; of emptied modules nothing.

    The gates, closed by the plan, have the values that are folded into the output projections.
    """
    units = gates.plan().units
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, Keep] = {}
    for site in find_layout(model).all_sites(model, gates.unit, hidden=gates.choices.has_blocks):
        if not site.units or not units[site.key]:
            continue
        stays = set(units[site.key])
        kept = [place for place, unit in enumerate(site.units) if unit in stays]
        factor = unit_factors(gates.gates[site.key])[kept].repeat_interleave(site.unit_dim)
        scales = not bool((factor == 1).all())
        if site.units == units[site.key] and not scales:
            continue
        for part in site.selections(units[site.key]):
            name = f"{paths[id(site.module)]}.{part.path}"
            if name in found:
                raise NotStreamable(f"tensor {name} has parts of two kinds of units")
            is_scaled = scales and part.path == f"{site.output_path}.weight"
            found[name] = Keep(dim=part.dim, index=part.index, factor=factor if is_scaled else None)
    return found


def _load_dtype(config: PreTrainedConfig, stored: StoredCheckpoint) -> torch.dtype:
    """Return the type that transformers loads a checkpoint in: the configuration's, or that of its first tensor."""
    named: Any = getattr(config, "dtype", None)
    named = getattr(torch, named, None) if isinstance(named, str) else named
    if isinstance(named, torch.dtype):
        return named
    types = [tensor.torch_dtype for tensor in stored.tensors.values()]
    return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)
