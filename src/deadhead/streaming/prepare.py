"""What a cut of a stored checkpoint will do, worked out from headers and configuration before a byte is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deadhead.attaching import attach
from deadhead.checkpoints import checkpoint
from deadhead.cutting import cache_values, normal_plan
from deadhead.disk.stored import StoredCheckpoint, read_stored
from deadhead.gates.hard_concrete import GateConfig
from deadhead.layouts import find_layout
from deadhead.measure.cost import cut_skeleton, model_cost, skeleton
from deadhead.measure.costs import Cost
from deadhead.models import OWN_TYPES
from deadhead.plans.plan import HeadPlan
from deadhead.streaming.copying import Piece
from deadhead.streaming.layer_check import LayerCheck
from deadhead.streaming.shape import (
    NotStreamable,
    empty_model,
    kept_parts,
    load_dtype,
    require_stored,
    stored_names,
    stored_shapes,
)


@dataclass(frozen=True, kw_only=True)
class StreamedCut:
    """A cut that is about to be made.

    Args:
        stored: the weights.
        pieces: by file, what of its tensors goes into the new file of that name; files of which nothing stays are left
            out.
        plan: the heads, and blocks, that stay.
        model: the cut model without weights, in the type it is loaded in.
        check: of the layers.
        before: what the model costs now.
        after: what the cut model costs.
        cache_growth: by what share the key/value cache grows; 0 if it does not.
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


def prepare(source: Path, plan: HeadPlan) -> StreamedCut:
    """Work out a cut.

    Raises:
        InputError: the checkpoint is damaged, or the plan is not one for this model.
        UnsupportedModel: the model has no prunable heads.
        NotStreamable: the checkpoint can only be cut in memory.
    """
    stored = read_stored(source)
    config = checkpoint.load_config(source)
    dtype = load_dtype(config, stored)
    own: Any = config
    if config.model_type in OWN_TYPES or hasattr(own, "quantization_config"):
        raise NotStreamable(f"models of type {config.model_type!r} are cut in memory, as are quantised ones")
    try:
        dense = skeleton(config).to(dtype)  # type: ignore[arg-type]
        # In float32 the check is as sharp as for a model of that precision.
        model = empty_model(config, torch.promote_types(dtype, torch.float32))
    except Exception as error:  # each architecture has faults of its own
        raise NotStreamable(f"its configuration gives no model ({str(error).strip().partition(chr(10))[0]})") from error
    require_stored(stored, dense, dtype)
    layout = find_layout(model)
    size = None if plan.blocks is None else plan.blocks.size
    blocks = False if size is None else size
    gates = attach(model, config=GateConfig(output_scale=plan.output_scale), unit=plan.unit, blocks=blocks)
    plan = normal_plan(gates, plan)
    gates.set_plan(plan)
    sites = layout.all_sites(model, plan.unit, size)
    names = stored_names(model)
    keeps = {names.get(name, name): keep for name, keep in kept_parts(model, sites, plan.units, gates).items()}
    cut = cut_skeleton(layout, dense, plan)
    cut_shapes = stored_shapes(cut)
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
    before = cache_values(layout.sites(dense, plan.unit))
    after = cache_values(layout.sites(cut, plan.unit))
    return StreamedCut(
        stored=stored,
        pieces=pieces,
        plan=plan,
        model=cut.to(dtype),  # type: ignore[arg-type]
        check=LayerCheck(stored, names, model, sites, plan.units, gates),
        before=model_cost(dense, unit=plan.unit),
        after=model_cost(cut),
        cache_growth=max(0.0, after / before - 1) if before else 0.0,
    )
