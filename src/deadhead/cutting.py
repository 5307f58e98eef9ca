"""Apply a head plan to a model for good: the heads' rows and columns go, and the model is checked against its gates."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.attaching import attach_for, detach, gates_of, is_gate, rehang, require_cuttable
from deadhead.errors import CutError, InputError, RunWarning, first_line, typed_but
from deadhead.gates.gates import HeadGates
from deadhead.gates.head_gate import HeadGate
from deadhead.layouts import Layout, Site, find_layout, head_columns, own_config
from deadhead.layouts.inputs import made_inputs, run, runner
from deadhead.models.pruned.modeling_pruned import stock_class
from deadhead.modes import evaluating, free_memory, restored_on_failure, seeded, uncompiled
from deadhead.plans.plan import HeadPlan, UnitKey

_log = logging.getLogger(__name__)

# max|Δ| / max|reference| that the invariant allows, by the precision of the weights.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
# Up to here rounding may be the reason: the weights of a model in ruins make much of it. Float64 tells.
_PERHAPS_ROUNDING = 1e-3
# In half precision: times the gated model's own error, both to float32; and where there is no memory for float32.
_HALF = (torch.float16, torch.bfloat16)
_RATIO_HALF, _TOLERANCE_HALF = 1.5, 5e-2
# Of the memory that is free, what weights in float32 may take.
_SHARE_OF_MEMORY = 0.7
# So many that whole texts and halves take different ways through our own model's attention.
CHECK_TEXTS, _CHECK_LENGTH = 3, 16


@typed_but("model", "plan")
def cut(model: PreTrainedModel, plan: HeadPlan) -> PreTrainedModel:
    """Delete the heads and hidden units that `plan` drops, in place.

    The model first runs with the gates of these units closed. The cut model must compute the same function; otherwise
    the model is put back as it was. Attached gates are used for this check and then removed. The values of soft gates
    and the output scale are folded into the output projections.

    Args:
        model: the whole model, with or without gates. If you cut an inner model alone (such as `model.model`), the
            outer configuration does not record the cut: the outer model's `save_pretrained` would write a checkpoint
            that does not reload, and `deadhead.save` refuses. A model can be cut several times: indices always refer
            to the original dense model.
        plan: the heads that stay. If the plan says nothing of hidden units, they all stay.

    Returns:
        `model`, now smaller. A plain `save_pretrained` writes a checkpoint that reloads.

    Raises:
        InputError: the plan is not for this model, or the model's own outputs are not finite.
        UnsupportedModel: the model has no prunable heads, or cannot be cut; the message says why, as in `attach`.
        CutError: the cut model computed something else; the model was put back as it was.

    Warns:
        RunWarning: the key/value cache grows, because single query heads are cut out of groups that share keys and
            values.
    """
    if not isinstance(plan, HeadPlan):
        raise InputError(f"A deadhead.HeadPlan was expected, but got a {type(plan).__name__}; gates.plan() makes one.")
    layout = require_cuttable(model, "A cut")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError(
            "The model still has PEFT adapters, whose tensors a cut would not fit; merge them first: "
            "model = model.merge_and_unload()."
        )
    with restored_on_failure(model):
        # Merging adapters replaces the output projections that the gates hang on.
        rehang(model)
        gates = gates_of(model)
        if gates is None or not gates.choices.fits(plan):
            gates = attach_for(detach(model), plan)
        before = gates.state_dict(), gates.config
        try:
            before_cut = sum(each.numel() for name, each in model.named_parameters() if not is_gate(name))
            growth = _cut(model, layout, gates, plan)
            if growth > 0:
                warn_of_cache(growth, stacklevel=4)
        except BaseException:
            state, gates.config = before
            for key, gate in gates:
                gate.config = gates.config.for_gate(of_blocks=key.kind == "block")
            gates.load_state_dict(state)
            raise
    _log.info("cut %s, checked: %d of %d parameters are left", type(model).__name__, model.num_parameters(), before_cut)
    return model


class _PerhapsRoundingError(CutError):
    pass


def _cut(model: PreTrainedModel, layout: Layout, gates: HeadGates, plan: HeadPlan) -> float:
    """Cut a model with gates, and return the share by which its key/value cache grows, below 0 if it shrinks."""
    try:
        with restored_on_failure(model):
            return _cut_once(model, layout, gates, plan)
    except _PerhapsRoundingError:
        return _cut_once(model, layout, gates, plan, in_float64=True)


def _cut_once(
    model: PreTrainedModel, layout: Layout, gates: HeadGates, plan: HeadPlan, *, in_float64: bool = False
) -> float:
    plan = normal_plan(gates, plan)
    if gates.plan() != plan:
        gates.set_plan(plan)
    factors = {key: unit_factors(gate) for key, gate in gates}
    sites = layout.all_sites(model, plan.unit, hidden=gates.choices.has_blocks)
    expected = gated_outputs(model, sites, in_float64=in_float64)
    cache_before = cache_values(layout, model, sites)
    detach(model)
    remove_units(sites, plan.units, factors)
    own_config(model)
    # Before the check: what the configuration says from now on is read by the model's code.
    layout.record_plan(model, plan)
    require_same_function(model, expected)
    return cache_values(layout, model, layout.sites(model, plan.unit)) / max(cache_before, 1) - 1


def warn_of_cache(growth: float, *, stacklevel: int) -> None:
    """Warn that the cut makes the key/value cache larger; `growth` is a share of its size before."""
    warnings.warn(
        f"The key/value cache grows by {growth:.0%}: where groups are left with different numbers of query heads, "
        "their keys and values are repeated. Plans of whole groups (unit 'kv_group') keep it small.",
        RunWarning,
        stacklevel=stacklevel,
    )


def pruned_copy(model: PreTrainedModel, plan: HeadPlan | None = None) -> PreTrainedModel:
    """Return a copy without gates that is cut by a plan, to be timed: nothing is folded, checked or written down.

    The copy shares with the model all weights that are not cut.
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    copied = detach(copy.deepcopy(model, memo))
    if plan is None:
        return copied
    units = plan.units
    sites = find_layout(copied).all_sites(copied, plan.unit, hidden=plan.hidden_units is not None)
    if any(site.units and not units[site.key] for site in sites):
        # What an emptied module must return.
        _watched_outputs(copied, sites, CHECK_TEXTS)
    remove_units(sites, units)
    return copied


@dataclass(frozen=True)
class Outputs:
    """What a model with gates gives for the inputs of a check, and what it would give in a higher precision."""

    own: Tensor
    precise: Tensor | None = None


def gated_outputs(
    model: PreTrainedModel, sites: Sequence[Site], *, texts: int = CHECK_TEXTS, in_float64: bool = False
) -> Outputs:
    """Run the model, with gates closed, on fixed examples, while the sites observe what `shrink` must know.

    A model in half precision is run in float32 too, one in float32 if asked in float64.

    Raises:
        InputError: the outputs are not finite.
        UnsupportedModel: it does not run.
    """
    own = _watched_outputs(model, sites, texts)
    if not bool(own.isfinite().all()):
        raise InputError(f"The model's own outputs are not finite, before anything is cut: {_why_not_finite(model)}.")
    if not _half_precisions(model) and not in_float64:
        return Outputs(own)
    with _in_higher_precision(model) as is_possible:
        try:
            return Outputs(own, _check_outputs(model, texts) if is_possible else None)
        except (RuntimeError, TypeError):
            # Not every model's own code knows of float64.
            if not in_float64:
                raise
            return Outputs(own)


def _watched_outputs(model: PreTrainedModel, sites: Sequence[Site], texts: int) -> Tensor:
    with ExitStack() as watching:
        for site in sites:
            watching.callback(site.observe())
        return _check_outputs(model, texts)


def _half_precisions(model: PreTrainedModel) -> list[torch.dtype]:
    return [parameter.dtype for parameter in model.parameters() if parameter.dtype in _HALF]


def _why_not_finite(model: PreTrainedModel) -> str:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            return f"{name} holds values that are not finite; load the weights again"
    if torch.float16 in _half_precisions(model):
        return "they are too large for float16; load the model in bfloat16 or float32"
    return "its weights are finite, but so large that what they compute is not"


@contextmanager
def _in_higher_precision(model: PreTrainedModel) -> Iterator[bool]:
    """Hold what is in half precision in float32 while the block runs, or if nothing is, what is in float32 in float64.

    Yields whether there is memory for that.
    """
    narrow, wide = (_HALF, torch.float32) if _half_precisions(model) else ((torch.float32,), torch.float64)
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in narrow]
    is_known = wide != torch.float64 or model.device.type != "mps"
    size = wide.itemsize * sum(tensor.numel() for tensor in tensors)
    if not is_known or size > _SHARE_OF_MEMORY * free_memory(model.device):
        yield False
        return
    before = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(wide)
        yield True
    finally:
        for tensor, data in zip(tensors, before, strict=True):
            tensor.data = data


def require_same_function(model: PreTrainedModel, expected: Outputs, *, texts: int = CHECK_TEXTS) -> None:
    """Check that a cut model's outputs are those of the gated model; CutError if they are not.

    In half precision it may be 1.5 times as far from what the gated one gives in float32 as that one itself is, as root
    mean squares. One in float32 is judged in float64, if the gated one was run in that.
    """
    # The model may have our classes already.
    kind = stock_class(type(model.config)).model_type  # type: ignore[attr-defined]
    try:
        found = _check_outputs(model, texts)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code fails in many ways
        raise CutError(
            f"The model does not run any more with those heads cut off ({first_line(error.__cause__ or error)}); "
            f"nothing was cut. Please report this model's type, {kind!r}."
        ) from error
    half = _half_precisions(model)
    if half and expected.precise is not None:
        # The floor is for a model whose outputs happen to need no rounding.
        difference, least = _root_mean_square(found, expected.precise), torch.finfo(half[0]).eps / 4
        allowed = max(_RATIO_HALF * _root_mean_square(expected.own, expected.precise), least)
        if not difference <= allowed:
            # Rounding may choose other experts for a token. In float32 the two must then be the same.
            with _in_higher_precision(model) as is_possible:
                found = _check_outputs(model, texts)
            allowed = _TOLERANCE[torch.float32] if is_possible else _TOLERANCE_HALF
            difference = _largest(found, expected.precise)
    elif expected.precise is not None:
        with _in_higher_precision(model):
            found = _check_outputs(model, texts)
        allowed, difference = _TOLERANCE[torch.float64], _largest(found, expected.precise)
    else:
        dtypes = [p.dtype for name, p in model.named_parameters() if not is_gate(name)]
        allowed = _TOLERANCE_HALF if half else max(_TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
        difference = _largest(found, expected.own)
    # What is not finite is infinitely far: no comparison with it holds.
    if not difference <= allowed:
        remedy = "Cut it in float32 and convert it, or report" if half else "Please report"
        is_float32 = not half and expected.precise is None and allowed == _TOLERANCE[torch.float32]
        error_class = _PerhapsRoundingError if is_float32 and difference <= _PERHAPS_ROUNDING else CutError
        raise error_class(
            f"The cut model's output differs from the model's with closed gates by {difference:.1e}, but at most "
            f"{allowed:.0e} is allowed; nothing was cut. {remedy} this model's type, {kind!r}."
        )


def _largest(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).abs().max() / reference.abs().max().clamp(min=1e-30))


def _root_mean_square(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-30))


def normal_plan(gates: HeadGates, plan: HeadPlan) -> HeadPlan:
    """Return a plan for this model with all units of the gates filled in; units that it does not name stay."""
    return gates.choices.plan_of(gates.choices.kept_units(plan), output_scale=plan.output_scale)


def remove_units(
    sites: Iterable[Site], units: Mapping[UnitKey, tuple[int, ...]], factors: Mapping[UnitKey, Tensor] | None = None
) -> None:
    """Remove all but the given units, by key, in place; fold factors, (H,) by key, into the output projections."""
    for site in sites:
        if not site.units:
            continue
        kept = units[site.key]
        if factors is not None and site.output_path is not None:
            fold(site, kept, factors[site.key])
        if site.units != kept:
            site.shrink(kept)


def cache_values(layout: Layout, model: PreTrainedModel, sites: Sequence[Site], length: int = 1) -> int:
    """Return how many numbers all sites of a model store in the key/value cache after `length` positions."""
    return sum(site.cache_values(length) for site in sites) if layout.keeps_cache(model) else 0


def unit_factors(gate: HeadGate) -> Tensor:
    """Return the factors that a cut folds into the output projection, one for each unit of a gate, (units,)."""
    with evaluating(gate), torch.no_grad():
        z_H, scale = gate()
        return z_H * scale if gate.owner is None else (z_H * scale)[gate.owner]


@torch.no_grad()
def fold(site: Site, kept: tuple[int, ...], factor_H: Tensor) -> None:
    """Multiply the columns of W_O of the heads that stay by their factors, in a new tensor: the old may be put back."""
    stays, factors = set(kept), torch.ones_like(factor_H)
    local = [place for place, head in enumerate(site.units) if head in stays]
    factors[local] = factor_H[local]
    if bool((factors == 1).all()):
        return
    weight, columns = site.output.weight, head_columns(site.output)
    assert isinstance(weight, Tensor)
    # In half precision the product is rounded once, from float32.
    precise = torch.promote_types(columns.dtype, torch.float32)
    wide = factors.to(columns.device, precise).repeat_interleave(site.unit_dim)
    scaled = (columns.to(precise) * wide).to(columns.dtype)
    scaled = scaled if columns is weight else scaled.T.contiguous()
    site.output.weight = nn.Parameter(scaled, requires_grad=weight.requires_grad)


@torch.no_grad()
def _check_outputs(model: PreTrainedModel, texts: int) -> Tensor:
    """Return the last hidden states of fixed random texts: whole, and again in two halves from a cache, side by side.

    Hidden states, not logits, so that a model of any head class can be checked. What reads images or sound is run once.
    """
    stack = runner(model)
    inputs = made_inputs(stack, texts, _CHECK_LENGTH)
    half = _CHECK_LENGTH // 2
    takes_cache = inputs.keys() == {"input_ids"} and "past_key_values" in inspect.signature(stack.forward).parameters
    with evaluating(model), uncompiled(), seeded(), torch.autocast(model.device.type, enabled=False):
        parts = [run(stack, inputs | ({"use_cache": False} if takes_cache else {}))[0]]
        if takes_cache:
            ids = inputs["input_ids"]
            first = run(stack, {"input_ids": ids[:, :half], "use_cache": True})
            parts.append(first[0])
            if (cache := getattr(first, "past_key_values", None)) is not None:
                rest = {"input_ids": ids[:, half:], "past_key_values": cache, "use_cache": True}
                parts.append(run(stack, rest)[0])
    # Side by side, whatever the output is of: positions, or the whole example.
    wide = [part if part.dtype == torch.float64 else part.float() for part in parts]
    return wide[0] if len(wide) == 1 else torch.cat(wide, dim=1)
