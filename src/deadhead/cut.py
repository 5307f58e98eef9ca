"""Apply a head plan to a model for good: the heads' rows and columns go, and the model is checked against its gates."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import CutError
from deadhead.gates import GateConfig, HeadGates
from deadhead.gating import attach, detach, gates_of
from deadhead.layouts import AttentionSite, Layout, find_layout
from deadhead.modes import evaluating
from deadhead.plan import HeadPlan, Layer

# max|Δ| / max|reference| that the invariant allows, by the precision of the weights.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
_TOLERANCE_HALF = 2e-2
_CHECK_LENGTH = 16


def cut(model: PreTrainedModel, plan: HeadPlan) -> PreTrainedModel:
    """Delete the heads that `plan` drops, in place.

    The model is first run with those heads' gates closed; the cut model must compute the same function, or everything
    is put back. Gates that are attached are used for that and then taken off; values of soft gates and the output
    scale are folded into the output projection.

    Args:
        model: with or without gates. Cuts compose: indices always refer to the original dense model.
        plan: the heads that stay.

    Returns:
        `model`, smaller; a plain `save_pretrained` writes a checkpoint that reloads.

    Raises:
        InputError: the plan is not one for this model.
        UnsupportedModel: the model has no prunable heads.
        CutError: the cut model computed something else; the model was put back as it was.
    """
    layout = find_layout(model)
    gates = gates_of(model)
    given_gates = gates is not None
    if gates is None:
        gates = attach(model, config=GateConfig(output_scale=plan.output_scale))
    before = gates.state_dict(), gates.config
    try:
        gates.require_plan(plan)
        if gates.plan() != plan:
            gates.set_plan(plan)
        factors = _gate_factors(gates)
        expected = _check_logits(model)
    except BaseException:
        _restore_gates(model, gates, before, keep=given_gates)
        raise

    sites = layout.sites(model)
    old_config = copy.deepcopy(model.config)
    old_modules = [(module, _snapshot(module)) for module in model.modules()]
    try:
        detach(model)
        for site in sites:
            _shrink(layout, site, tuple(plan.kept[site.layer]), factors.get(site.layer))
        layout.record_plan(model, plan)
        difference = _relative_difference(_check_logits(model), expected)
        allowed = _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)
        if not difference <= allowed:
            raise CutError(
                f"The cut model's output differs from the model's with closed gates by {difference:.1e}, but at most "
                f"{allowed:.0e} is allowed; nothing was cut. Please report this model's type, "
                f"{model.config.model_type!r}."
            )
    except BaseException:
        for module, attributes in old_modules:
            module.__dict__ = attributes
        model.config = old_config
        _share_config(model, old_config)
        _restore_gates(model, gates, before, keep=given_gates)
        raise
    return model


def _gate_factors(gates: HeadGates) -> dict[Layer, Tensor]:
    with evaluating(*(gate for _, gate in gates)), torch.no_grad():
        return {layer: z_H * scale for layer, gate in gates for z_H, scale in [gate()]}


@torch.no_grad()
def _shrink(layout: Layout, site: AttentionSite, kept: tuple[int, ...], factor_H: Tensor | None) -> None:
    """Keep the rows of the heads in `kept` and multiply each head's columns of W_O by its factor."""
    if not site.heads:
        return
    local = [site.heads.index(head) for head in kept]
    assert factor_H is not None
    for part in layout.slices(site):
        owner_path, _, name = part.path.rpartition(".")
        owner = site.module.get_submodule(owner_path)
        old = getattr(owner, name)
        rows = part.rows[local].flatten().to(old.device)
        values = old.index_select(part.dim, rows)
        if part.path == f"{site.output_path}.weight":
            # In half precision the product is rounded once, from float32.
            precise = torch.promote_types(old.dtype, torch.float32)
            columns = factor_H[local].to(old.device, precise).repeat_interleave(part.rows.shape[1])
            values = (values.to(precise) * columns.unsqueeze(1 - part.dim)).to(old.dtype)
        setattr(owner, name, nn.Parameter(values, requires_grad=old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    layout.after_cut(site, kept)


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {name: copy.copy(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}


def _share_config(model: PreTrainedModel, config: Any) -> None:
    for module in model.modules():
        if "config" in module.__dict__:
            module.__dict__["config"] = config


def _restore_gates(
    model: PreTrainedModel, gates: HeadGates, before: tuple[Mapping[str, Tensor], GateConfig], *, keep: bool
) -> None:
    state, config = before
    gates.config = config
    for _, gate in gates:
        gate.config = config
    gates.load_state_dict(state)
    if not keep:
        detach(model)


@torch.no_grad()
def _check_logits(model: PreTrainedModel) -> Tensor:
    """Return the outputs on a fixed random text: whole, and its second half again from a cache, side by side."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, _CHECK_LENGTH), generator=generator).to(model.device)
    half = _CHECK_LENGTH // 2
    with evaluating(model):
        first = model(input_ids=ids[:, :half], use_cache=True)
        parts = [model(input_ids=ids, use_cache=False)[0], first[0]]
        parts.append(model(input_ids=ids[:, half:], past_key_values=first.past_key_values, use_cache=True)[0])
    return torch.cat([part.float() if part.dtype != torch.float64 else part for part in parts], dim=1)


def _relative_difference(values: Tensor, reference: Tensor) -> float:
    """Return max|Δ| / max|reference|; a number that is not finite counts as infinitely far."""
    difference = float((values - reference).abs().max() / reference.abs().max().clamp(min=1e-30))
    return difference if difference == difference else float("inf")
