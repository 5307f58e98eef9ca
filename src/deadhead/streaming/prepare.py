"""Plan a cut of a stored checkpoint from its headers and configuration, before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deadhead.attaching import attach_for
from deadhead.cutting import cache_values, normal_plan, unit_factors
from deadhead.disk.stored import StoredCheckpoint, read_header
from deadhead.gates.gates import HeadGates
from deadhead.layouts import find_layout
from deadhead.measure.cost import cut_skeleton, model_cost, skeleton
from deadhead.measure.costs import Cost
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.copying import Keep, Piece
from deadhead.streaming.layer_check import LayerCheck, NotStreamable
from deadhead.streaming.resident import ResidentLayers
from deadhead.streaming.stored_model import StoredModel, stored_shapes, take_weights


@dataclass(frozen=True, kw_only=True)
class StreamedCut:
    """A planned cut.

    `pieces` lists for each new file the parts of tensors that go into it; files of which nothing stays are left out.
    `model` is the cut model without weights, in the dtype it is loaded in. `cache_growth` is the share by which the
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
        """Size of all tensors of the new checkpoint, in bytes."""
        return sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)

    def check_one(self) -> None:
        """Check one of the layers that lose units, if any, to see whether layers of this kind can be checked."""
        for place in sorted(self.check.sites)[:1]:
            self.check.check(place)

    def resident(self, opened: StoredModel) -> ResidentLayers:
        """Return the cut model of a checkpoint, with the weights of one layer at a time."""
        model = opened.without_weights()
        model = cut_skeleton(find_layout(model), model, self.plan)
        take_weights(model)
        pieces = {piece.source.name: piece for found in self.pieces.values() for piece in found}
        return opened.resident(model, pieces)

    def fitted(self, files: Mapping[str, Path], names: Mapping[str, str]) -> StreamedCut:
        """Return the cut with new values for some of the tensors that stay.

        Args:
            files: files with the new values, by the names of tensors in memory, which the files use too.
            names: names of tensors in the checkpoint's files, by their names in memory.
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


def prepare(opened: StoredModel, plan: HeadPlan) -> StreamedCut:
    """Plan a cut; raise NotStreamable if the checkpoint can only be cut in memory."""
    stored, names, dtype = opened.stored, opened.names, opened.dtype
    dense = skeleton(opened.config).to(dtype)  # type: ignore[arg-type]
    # In float32 the check is as sharp as for a model of that precision.
    model = opened.without_weights(torch.promote_types(dtype, torch.float32))
    layout = find_layout(model)
    gates = attach_for(model, plan)
    plan = normal_plan(gates, plan)
    keeps = {names.get(name, name): keep for name, keep in _kept_parts(model, gates).items()}
    cut = cut_skeleton(layout, dense, plan)
    cut_shapes = stored_shapes(cut)
    if not cut_shapes.keys() <= stored.tensors.keys() or not keeps.keys() <= cut_shapes.keys():
        raise NotStreamable("the tensors to cut are stored in files in another form than in memory")
    pieces: dict[str, tuple[Piece, ...]] = {}
    for file, tensors in stored.files.items():
        found = tuple(Piece(source=t, keep=keeps.get(t.name)) for t in tensors if t.name in cut_shapes)
        for piece in found:
            if piece.shape != cut_shapes[piece.source.name]:
                raise NotStreamable(f"tensor {piece.source.name} does not get the shape that the cut model has")
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


def _kept_parts(model: PreTrainedModel, gates: HeadGates) -> dict[str, Keep]:
    """Return the part that stays of each tensor with units, by the parameter's name; emptied modules have none.

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
