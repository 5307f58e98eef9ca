"""Apply a head plan to a model for good: the heads' rows and columns go, and the model is checked against its gates."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.attaching import attach, detach, gates_of, rehang
from deadhead.errors import CutError, InputError, typed
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.sharding import require_whole
from deadhead.layouts import Site, find_layout, head_columns
from deadhead.models.pruned.structure import text_stack
from deadhead.modes import evaluating
from deadhead.plans.plan import HeadPlan, UnitKey

# max|Δ| / max|reference| that the invariant allows, by the precision of the weights.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
_TOLERANCE_HALF = 5e-2
# So many that whole texts and halves take different ways through our own model's attention.
CHECK_TEXTS, _CHECK_LENGTH = 3, 16


@typed
def cut(model: PreTrainedModel, plan: HeadPlan) -> PreTrainedModel:
    """Delete the heads, and blocks, that `plan` drops, in place.

    The model is first run with their gates closed; the cut model must compute the same function, or everything
    is put back. Gates that are attached are used for that and then taken off; values of soft gates and the output
    scale are folded into the output projection.

    Args:
        model: with or without gates. Cuts compose: indices always refer to the original dense model.
        plan: the heads that stay; blocks of which it says nothing stay too.

    Returns:
        `model`, smaller; a plain `save_pretrained` writes a checkpoint that reloads.

    Raises:
        InputError: the plan is not one for this model.
        UnsupportedModel: the model has no prunable heads.
        CutError: the cut model computed something else; the model was put back as it was.

    Warns:
        UserWarning: the key/value cache grows, as single query heads are cut out of groups that share keys and values.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError(
            "The model still has PEFT adapters, whose tensors a cut would not fit; merge them first: "
            "model = model.merge_and_unload()."
        )
    require_whole(model.parameters(), "A cut")
    layout = find_layout(model)
    gates = gates_of(model)
    # Merging adapters replaces the output projections that the gates hang on.
    rehang(model)
    given_gates = gates is not None
    if gates is None:
        size = False if plan.blocks is None else plan.blocks.size
        gates = attach(model, config=GateConfig(output_scale=plan.output_scale), unit=plan.unit, blocks=size)
    before = gates.state_dict(), gates.config
    try:
        plan = normal_plan(gates, plan)
        if gates.plan() != plan:
            gates.set_plan(plan)
        factors = {key: head_factors(gate) for key, gate in gates}
        sites = layout.all_sites(model, plan.unit, gates.block_size)
        expected = watched_outputs(model, sites)
        cache_before = cache_values(sites)
        with _undone_on_failure(model):
            detach(model)
            remove_units(sites, plan.units, factors)
            require_same_function(model, expected)
            layout.record_plan(model, plan)
    except BaseException:
        state, gates.config = before
        for key, gate in gates:
            gate.config = gates.config.for_gate(of_blocks=key.kind == "block")
        gates.load_state_dict(state)
        if not given_gates:
            detach(model)
        raise
    cache_now = cache_values(layout.sites(model, plan.unit))
    if cache_now > cache_before:
        warn_of_cache(cache_now / cache_before - 1, stacklevel=3)
    return model


def warn_of_cache(growth: float, *, stacklevel: int) -> None:
    """Warn that the key/value cache of a cut model is larger, by a share of what it was."""
    warnings.warn(
        f"The key/value cache grows by {growth:.0%}: where groups are left with different numbers of query heads, "
        "their keys and values are repeated. Plans of whole groups (unit 'kv_group') keep it small.",
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
    sites = find_layout(copied).all_sites(copied, plan.unit, None if plan.blocks is None else plan.blocks.size)
    if any(site.units and not units[site.key] for site in sites):
        # What an emptied module must return.
        watched_outputs(copied, sites)
    remove_units(sites, units)
    return copied


def watched_outputs(model: PreTrainedModel, sites: Sequence[Site], *, texts: int = CHECK_TEXTS) -> Tensor:
    """Run the model on so many fixed texts; the sites watch for what `shrink` must know."""
    with ExitStack() as watching:
        for site in sites:
            watching.callback(site.observe())
        return _check_outputs(model, texts)


@contextmanager
def _undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Put modules, parameters, configuration and classes back as they were if the block raises."""
    modules = [
        (module, type(module), {name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
        for module in model.modules()
    ]
    config = type(model.config), dict(vars(model.config))
    try:
        yield
    except BaseException:
        for module, kind, attributes in modules:
            module.__class__ = kind
            module.__dict__ = attributes
        model.config.__class__, model.config.__dict__ = config
        raise


def require_same_function(model: PreTrainedModel, expected: Tensor, *, texts: int = CHECK_TEXTS) -> None:
    """Check that a cut model gives the outputs that the gated one gave; CutError if it does not."""
    try:
        found = _check_outputs(model, texts)
    except MemoryError:
        raise
    except Exception as error:  # a model's own code fails in many ways
        raise CutError(
            f"The model does not run any more with those heads cut off ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}); nothing was cut. Please report this model's type, "
            f"{model.config.model_type!r}."
        ) from error
    # What is not finite is infinitely far: no comparison with it holds.
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    allowed = _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)
    if not difference <= allowed:
        raise CutError(
            f"The cut model's output differs from the model's with closed gates by {difference:.1e}, but at most "
            f"{allowed:.0e} is allowed; nothing was cut. Please report this model's type, "
            f"{model.config.model_type!r}."
        )


def normal_plan(gates: HeadGates, plan: HeadPlan) -> HeadPlan:
    """Return a plan, which must be one for this model, with every unit of the gates: blocks it does not name stay."""
    return replace(gates.plan_of(gates.require_plan(plan)), output_scale=plan.output_scale)


def remove_units(
    sites: Iterable[Site], units: Mapping[UnitKey, tuple[int, ...]], factors: Mapping[UnitKey, Tensor] | None = None
) -> None:
    """Remove all but some units, by key, in place; the factors, (H,) by key, are folded into the output projections."""
    for site in sites:
        if not site.units:
            continue
        kept = units[site.key]
        if factors is not None and site.output_path is not None:
            fold(site, kept, factors[site.key])
        if site.units != kept:
            site.shrink(kept)


def cache_values(sites: Sequence[Site]) -> int:
    """Return how many numbers all sites keep in the key/value cache for one position."""
    return sum(site.cache_values(1) for site in sites)


def head_factors(gate: HeadGate) -> Tensor:
    """Return what a cut folds into the output projection for each head of a gate, in evaluation, shape (H,)."""
    with evaluating(gate), torch.no_grad():
        z_H, scale = gate()
        return z_H * scale


@torch.no_grad()
def fold(site: Site, kept: tuple[int, ...], factor_H: Tensor) -> None:
    """Multiply the columns of W_O of the heads that stay by their factors, in a new tensor: the old may be put back."""
    local = [site.units.index(head) for head in kept]
    factors = torch.ones_like(factor_H)
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

    Hidden states, not logits, so that a model of any head class can be checked, on text.
    """
    stack = text_stack(model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (texts, _CHECK_LENGTH), generator=generator).to(model.device)
    half = _CHECK_LENGTH // 2
    takes_cache = "past_key_values" in inspect.signature(stack.forward).parameters
    with evaluating(model):
        parts = [stack(input_ids=ids, **({"use_cache": False} if takes_cache else {}))[0]]
        if takes_cache:
            first = stack(input_ids=ids[:, :half], use_cache=True)
            parts.append(first[0])
            if (cache := getattr(first, "past_key_values", None)) is not None:
                parts.append(stack(input_ids=ids[:, half:], past_key_values=cache, use_cache=True)[0])
    return torch.cat([part if part.dtype == torch.float64 else part.float() for part in parts], dim=1)
