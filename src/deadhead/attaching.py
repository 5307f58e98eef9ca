"""Attach gates to a model's heads and blocks of hidden units through its layout, and detach them again."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import InputError, UnsupportedModel, typed, typed_but
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.sharding import require_whole
from deadhead.gates.skipping import SKIPPING_HOOKS, Skipping
from deadhead.layouts import BLOCK_GATE, HEAD_GATE, Layout, Site, find_layout, head_columns
from deadhead.layouts.inputs import require_runnable
from deadhead.layouts.refusals import require_model, require_no_prefix, require_plain, require_untied
from deadhead.models.pruned.structure import text_stack
from deadhead.modes import restored_on_failure
from deadhead.plans.blocks import Blocks, choose_block_size, owners, runs
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, Unit, UnitKey

_log = logging.getLogger(__name__)

_GATE_NAMES = (HEAD_GATE, BLOCK_GATE)
_GATES_ATTRIBUTE = "_deadhead_gates"

_Module = TypeVar("_Module", bound=nn.Module)


class _GateInput:
    """Multiplies the units' outputs by their gates; the outputs lie side by side in the output projection's input.

    It is an object rather than a closure, so that a deep copy of the model refers to the copy's gates.
    """

    def __init__(self, gate: HeadGate, head_dim: int, skipping: Skipping | None = None) -> None:
        self.gate = gate
        self.head_dim = head_dim
        self.skipping = skipping

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        gate = self.gate
        z_H, scale = gate()
        factor_H = (z_H * scale).to(hidden.dtype)
        if gate.is_due and gate.training:
            # Autocast would turn the products to half precision.
            with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                gate.measure(*self._squares(module, hidden.detach().flatten(0, -2), z_H.detach()))
        if gate.owner is not None:
            factor_H = factor_H.index_select(0, gate.owner)
        if self.skipping is not None and self.skipping.computed is not None:
            factor_H = factor_H.index_select(0, self.skipping.computed.to(factor_H.device))
        if gate.owner is not None:
            return (hidden * factor_H, *rest)
        return ((hidden.unflatten(-1, (-1, self.head_dim)) * factor_H[:, None]).flatten(-2), *rest)

    def _squares(self, output: nn.Module, hidden_RF: Tensor, z_H: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate.owner is None:
            return output_squares(output, hidden_RF.unflatten(-1, (-1, self.head_dim)), z_H)
        weight_FD, open_RF = head_columns(output).detach().float().T, hidden_RF.float() * z_H[self.gate.owner]
        alone = []
        for gate in range(self.gate.num_heads):
            units = (self.gate.owner == gate).nonzero().flatten()
            part_RE, part_ED = hidden_RF[:, units].float(), weight_FD[units]
            alone.append(((part_RE.T @ part_RE) * (part_ED @ part_ED.T)).sum())
        return torch.stack(alone), (open_RF @ weight_FD).square().sum()


@torch.no_grad()
def output_squares(output: nn.Module, heads_RHE: Tensor, z_H: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the sums over tokens of ‖W_O^h a_h‖², (H,), and of ‖Σ_open W_O a‖², 0-dim.; without z_H all are open.

    Σ ‖W a‖² over tokens is the inner product of W^T W and the second moments of a, so the layer need not run again.
    """
    rows_RHE = heads_RHE.float()
    weight_HED = head_columns(output).detach().float().T.unflatten(0, heads_RHE.shape[1:])
    moment_HEE = torch.einsum("rhe,rhf->hef", rows_RHE, rows_RHE)
    gram_HEE = weight_HED @ weight_HED.transpose(-1, -2)
    alone_H = (moment_HEE * gram_HEE).sum((-1, -2))
    open_RHE = rows_RHE if z_H is None else rows_RHE * z_H[:, None]
    together = (open_RHE.flatten(1) @ weight_HED.flatten(0, 1)).square().sum()
    return alone_H, together


class _DrawNoise:
    """Draws all gates' noise before the first layer, outside checkpointed and compiled regions."""

    def __init__(self, gates: HeadGates) -> None:
        self.gates = gates

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module.training:
            self.gates.draw()


@typed_but("model")
def attach(
    model: PreTrainedModel | nn.Module,
    *,
    config: GateConfig | None = None,
    unit: Unit | None = None,
    blocks: bool | int | Blocks = False,
) -> HeadGates:
    """Add a trainable gate to every prunable head of `model`, and to blocks of hidden units if `blocks` is set.

    In the All-attention Transformer the hidden units are persistent vectors; a gate closes a vector in all heads of a
    layer at once.

    Args:
        model: a supported model, or PEFT's wrapper around one; it is changed in place. If you train adapters, wrap the
            model before you attach gates: PEFT freezes all parameters it finds, gates included.
        config: the gates' constants. By default there is no output scaling, which is right for pretrained models.
            Blocks are never scaled.
        unit: "head" or "kv_group" (a key/value head with its query heads). None chooses "kv_group" if the model has
            such groups.
        blocks: True gives hidden units gates too; a number sets how many neighbouring units share a gate; a mapping
            lists the units of each gate by layer, such as `{0: [[0, 2], [1, 3]]}`.

    Returns:
        The gates. They learn together with the model's other parameters.

    Raises:
        UnsupportedModel: the model has no head, or no block, that can be pruned; the message says why.
        InputError: the model already has gates, the blocks do not fit its layers, or soft gates were requested for
            persistent vectors.
    """
    model = unwrapped(model)
    layout = require_cuttable(model, "Attaching gates", may_be_empty=True)
    if gates_of(model) is not None:
        raise InputError("The model has gates already; use deadhead.gates_of(model), or deadhead.detach(model) first.")
    unit = layout.choose_unit(model, unit, what="gates open and close")
    config = config or GateConfig()
    sites = layout.all_sites(model, unit, hidden=has_blocks(layout, model, blocks))
    choices = choices_of(sites, unit, blocks)
    there = [site for site in sites if site.units]
    if not config.hard and any(site.output_path is None for site in there):
        raise InputError(
            "Blocks of persistent vectors need hard gates, because a cut cannot fold a value between 0 and 1 in the "
            "softmax into a weight; use GateConfig(hard=True), or leave blocks out."
        )
    require_runnable(model)
    costs = _relative_costs(there, choices)
    # Tensors that are made under torch.inference_mode() can never learn.
    with torch.inference_mode(False):
        gates = {
            site.key: HeadGate(
                choices.counts[site.key],
                config.for_gate(of_blocks=site.is_hidden),
                costs[site.key],
                owners(site.units, choices.members[site.key]) if site.is_hidden else None,
            ).to(_weight(site).device)
            for site in there
        }
    head_gates = HeadGates(gates, choices=choices, config=config)
    with restored_on_failure(model):
        for site in there:
            site.module.add_module(site.gate_name, gates[site.key].train(model.training))
        _hang(sites)
        # PEFT calls the model's forward directly, which skips its hooks, but the base model always runs as a module.
        text_stack(model).register_forward_pre_hook(_DrawNoise(head_gates))
        setattr(model, _GATES_ATTRIBUTE, head_gates)
    _log.info("attached %d gates to %s", sum(choices.counts[site.key] for site in there), type(model).__name__)
    return head_gates


def require_cuttable(model: PreTrainedModel, what: str, *, may_be_empty: bool = False) -> Layout:
    """Check that `cut` could do its work on a model, and return its layout; an error begins with `what` is to be done.

    Raises:
        UnsupportedModel: it is no model of transformers, or one that is quantised, offloaded, wrapped by torch.compile,
            with layers that share weights, of a class that no checkpoint could name, or of one that cannot be run to be
            checked.
        InputError: its tensors are shared out among processes.
    """
    layout = find_layout(model)
    require_whole(model, what)
    require_plain(model, what, may_be_empty=may_be_empty)
    require_untied(model, to_cut=True)
    layout.require_reloadable(model)
    return layout


def _weight(site: Site) -> Tensor:
    """Return a weight with the site's units in it: the output projection's, if there is one."""
    if site.output_path is not None:
        return head_columns(site.output)
    return site.module.get_parameter(site.selections(site.units)[0].path)


def has_blocks(layout: Layout, model: PreTrainedModel, blocks: bool | int | Blocks) -> bool:
    """Return whether `blocks`, as given to `attach`, gives hidden units gates.

    Raises:
        UnsupportedModel: the model has no hidden units that can be cut.
    """
    if blocks is False:
        return False
    if not layout.hidden_sites(model):
        raise UnsupportedModel(
            f"The model, of type {model.config.model_type!r}, has neither feed-forward layers nor persistent vectors "
            "that can be cut; leave blocks out."
        )
    return True


def choices_of(sites: Sequence[Site], unit: Unit, blocks: bool | int | Blocks) -> Choices:
    """Return what the gates of some sites open; `blocks` divides hidden units, and is checked, as in `attach`."""
    hidden = [site for site in sites if site.is_hidden]
    members: dict[UnitKey, Sequence[Sequence[int]]]
    members = {site.key: [(head,) for head in site.units] for site in sites if not site.is_hidden}
    if isinstance(blocks, Mapping):
        layers = [site.layer for site in hidden]
        if unknown := [layer for layer in blocks if layer not in layers]:
            raise InputError(f"Blocks were given for layer {unknown[0]!r}, but layers with hidden units are {layers}.")
        # The units of a layer that is not named stay or go together.
        members |= {site.key: [tuple(block) for block in blocks.get(site.layer, [site.units])] for site in hidden}
        for site in hidden:
            owners(site.units, members[site.key])
    else:
        asked = None if isinstance(blocks, bool) else blocks
        size = choose_block_size([len(site.units) for site in hidden], asked) if hidden else 1
        members |= {site.key: runs(site.units, size) for site in hidden}
    return Choices(
        unit=unit,
        members={key: [block for block in found if len(block)] for key, found in members.items()},
        total={site.key: site.total for site in sites},
        headless=frozenset(site.key for site in sites if site.is_headless),
    )


def attach_for(model: PreTrainedModel, plan: HeadPlan) -> HeadGates:
    """Attach gates that can represent a plan, and set them to it.

    Of each layer's hidden units, those that stay share one gate and those that go share another.

    Raises:
        UnsupportedModel: see `attach`.
        InputError: see `attach`, or the plan is not for this model.
    """
    layout = find_layout(model)
    hidden = has_blocks(layout, model, plan.hidden_units is not None)
    sites = layout.all_sites(model, layout.choose_unit(model, plan.unit, what="heads are cut by"), hidden=hidden)
    kept = choices_of(sites, plan.unit, hidden).kept_units(plan)
    blocks: Blocks = {
        site.layer: [kept[site.key], sorted(set(site.units).difference(kept[site.key]))]
        for site in sites
        if site.is_hidden
    }
    gates = attach(model, config=GateConfig(output_scale=plan.output_scale), unit=plan.unit, blocks=hidden and blocks)
    gates.set_plan(plan)
    return gates


def _relative_costs(sites: Sequence[Site], choices: Choices) -> dict[UnitKey, float]:
    """Return the cost of an open gate: 1 for a head; for a block, its parameters over those of the mean head."""
    numbers = {s.key: sum(s.module.get_parameter(part.path).numel() for part in s.selections(s.units)) for s in sites}
    sizes = {key: count / choices.counts[key] for key, count in numbers.items()}
    heads = [size for site in sites if not site.is_hidden for size in [sizes[site.key]] * len(site.units)]
    mean = sum(heads) / len(heads) if heads else 1.0
    return {site.key: sizes[site.key] / mean if site.is_hidden else 1.0 for site in sites}


def unwrapped(model: PreTrainedModel | nn.Module) -> PreTrainedModel:
    """Return the transformers model inside PEFT's wrapper, or `model` itself; UnsupportedModel if there is none."""
    require_no_prefix(model)
    wrapper: Any = model
    inner = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    require_model(inner)
    return cast(PreTrainedModel, inner)


def rehang(model: PreTrainedModel | nn.Module) -> None:
    """Hook gates to the current output projections, after PEFT has wrapped them in adapters or merged adapters."""
    model = unwrapped(model)
    gates = gates_of(model)
    if gates is None:
        return
    sites = find_layout(model).all_sites(model, gates.unit, hidden=gates.choices.has_blocks)
    with restored_on_failure(model):
        for module in model.modules():
            _remove_hooks(module, _GateInput, *SKIPPING_HOOKS)
        _hang(sites)
        for _, gate in gates:
            gate.log_alpha_bias.requires_grad_()


def _hang(sites: Sequence[Site]) -> None:
    for site in sites:
        gate = site.module._modules.get(site.gate_name)
        if isinstance(gate, HeadGate) and site.output_path is not None:
            skipping = None if site.leaves_out_shut else Skipping(site, gate)
            site.output.register_forward_pre_hook(_GateInput(gate, site.unit_dim, skipping))
            if skipping is not None:
                skipping.hang()
    # Code that was compiled without these hooks, or with others, would keep running without them.
    torch.compiler.reset()


def _remove_hooks(module: nn.Module, *kinds: type, gate: nn.Module | None = None) -> None:
    """Remove a module's hooks of the given kinds: those of all gates, or of one."""
    # By type, not by handle: the handles of a deep copy refer to the original.
    tables: tuple[dict[int, Any], ...] = module._forward_pre_hooks, module._forward_hooks
    for hooks in tables:
        found = {key: cast(Any, hook) for key, hook in hooks.items() if isinstance(hook, kinds)}
        for key in [key for key, hook in found.items() if gate is None or hook.gate is gate]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def take_off(site: Site) -> None:
    """Remove the gate of one site; the model's other gates stay."""
    if site.output_path is not None:
        _remove_hooks(site.output, _GateInput)
        _remove_hooks(site.module, *SKIPPING_HOOKS, gate=site.module._modules.get(site.gate_name))
    site.module._modules.pop(site.gate_name, None)


def is_gate(name: str) -> bool:
    """Return whether a parameter or buffer with this name, in a gated model, belongs to a gate."""
    return not set(_GATE_NAMES).isdisjoint(name.split("."))


@typed
def gates_of(model: nn.Module) -> HeadGates | None:
    """Return the gates of `model`, or of the model inside a wrapper such as DataParallel.

    Args:
        model: any module.

    Returns:
        The gates, or None if the model has none.
    """
    found = (vars(module).get(_GATES_ATTRIBUTE) for module in model.modules())
    return next((gates for gates in found if gates is not None), None)


@typed
def detach(model: _Module) -> _Module:
    """Remove the gates, so that the model is as it was before `attach`.

    A model without gates is left alone.

    Args:
        model: a gated model; changed in place.

    Returns:
        `model`.
    """
    with restored_on_failure(model):
        for module in model.modules():
            _remove_hooks(module, _GateInput, _DrawNoise, *SKIPPING_HOOKS)
            for name in _GATE_NAMES:
                if isinstance(module._modules.get(name), HeadGate):
                    del module._modules[name]
            # PEFT's wrapper exposes its model's gates as its own attribute.
            vars(module).pop(_GATES_ATTRIBUTE, None)
        torch.compiler.reset()
    return model
