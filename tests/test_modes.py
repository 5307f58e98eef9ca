"""Whatever step fails of what changes a model, the model is as it was: nothing is lost, or left over."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach, detach, gates_of, rehang
from deadhead.cutting import cut
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.head_gate import HeadGate
from deadhead.layouts.hugging_face import HuggingFaceLayout, HuggingFaceSite
from deadhead.models.pruned import feed_forward, shrinking
from deadhead.modes import restored_on_failure
from deadhead.plans.plan import HeadPlan
from tests.random_models import tiny_model as own_model

# The package exports the functions under the modules' names.
attaching, cutting = (importlib.import_module(f"deadhead.{name}") for name in ("attaching", "cutting"))


def state(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that a failure must leave alone, to be compared by identity, or value."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[path, "class"] = id(module), type(module)
        for name, value in vars(module).items():
            found[path, name] = id(value)
            if isinstance(value, dict):
                found[path, name, "entries"] = [(key, id(entry)) for key, entry in value.items()]
            elif isinstance(value, list | set):
                found[path, name, "entries"] = list(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[name] = tensor.requires_grad, tensor.data_ptr(), tensor.dtype, tensor.detach().flatten().tolist()
        found[name, "gradient"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
    config: Any = model.config
    found["config"] = type(config), copy.deepcopy(vars(config))
    found["generation"] = copy.deepcopy(vars(model.generation_config))  # type: ignore[arg-type]
    gates = gates_of(model)
    if gates is not None:
        found["gates"] = gates.config, [gate.config for _, gate in gates]
    return found


def prepared(kind: str, *, gated: bool) -> tuple[Any, HeadPlan]:
    """Return a model in training, with hooks of its user's, something frozen and a gradient; and a plan that cuts all.

    One layer is emptied, one is left with groups of several sizes, blocks go too, and the rest is scaled.
    """
    model: Any = own_model() if kind == "own" else tiny_model(kind)
    unit = "head"
    gates = attach(model, unit=unit, blocks=True)
    kept = {key: units[: len(units) // 2 + 1] for key, units in gates.choices.units.items()}
    kept[next(iter(kept))] = ()
    plan = gates.choices.plan_of(kept, output_scale=True)
    if not gated:
        detach(model)
    else:
        next(iter(gates.gates.values())).set_log_alpha(
            torch.full((len(next(iter(gates.choices.units.values()))),), 0.25)
        )
    model.train()
    model.get_input_embeddings().eval()
    first, *_, last = [parameter for name, parameter in model.named_parameters() if "gate" not in name]
    first.requires_grad_(False)
    last.grad = torch.ones_like(last)
    for module in list(model.modules())[::3]:
        module.register_forward_pre_hook(lambda *_: None)
    return model, plan


STEPS: dict[str, tuple[Any, str]] = {
    "adding a module": (nn.Module, "add_module"),
    "a hook before": (nn.Module, "register_forward_pre_hook"),
    "a hook behind": (nn.Module, "register_forward_hook"),
    "exchanging a module": (nn.Module, "set_submodule"),
    "setting a gate": (HeadGate, "set_log_alpha"),
    "freezing": (torch.Tensor, "requires_grad_"),
    "shrinking": (HuggingFaceSite, "shrink"),
    "keeping rows": (shrinking, "keep_rows"),
    "keeping rows of blocks": (feed_forward, "keep_rows"),
    "emptying": (shrinking, "leave_bias"),
    "folding": (cutting, "fold"),
    "running": (cutting, "run"),
    "comparing": (cutting, "require_same_function"),
    "a configuration of its own": (cutting, "own_config"),
    "recording": (HuggingFaceLayout, "record_plan"),
    "a class": (importlib.import_module("deadhead.layouts.stock"), "pruned_class"),
    "counting the cache": (cutting, "cache_values"),
    "warning": (cutting, "warn_of_cache"),
    "compiled code": (torch.compiler, "reset"),
}


def _cut(model: Any, plan: HeadPlan) -> None:
    cut(model, plan)


CHANGES: dict[str, tuple[Callable[[Any, HeadPlan], Any], bool]] = {
    "attach": (lambda model, plan: attach(model, blocks=True), False),
    "detach": (lambda model, plan: detach(model), True),
    "rehang": (lambda model, plan: rehang(model), True),
    "cut": (_cut, False),
    "cut with gates": (_cut, True),
}


class Failed(BaseException):
    """What a step fails with; nobody catches it."""


def failing(original: Callable[..., Any], nth: int) -> Callable[..., Any]:
    """Return a function that fails at its nth call."""
    calls = itertools.count(1)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            raise Failed
        return original(*args, **kwargs)

    return fail


@pytest.mark.filterwarnings("ignore:The key/value cache grows")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "own"])
@pytest.mark.parametrize(("change", "gated"), CHANGES.values(), ids=CHANGES.keys())
def test_whatever_step_fails_the_model_is_as_before(
    change: Callable[[Any, HeadPlan], Any], gated: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step fails at its first call, then at its second, and so on, until the change comes to its end."""
    model, plan = prepared(kind, gated=gated)
    before = state(model)
    reached = 0
    for target, name in STEPS.values():
        for nth in (1, 2, 3, 5, 8, 13):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, failing(getattr(target, name), nth))
                try:
                    change(model, plan)
                except Failed:
                    reached += 1
                    now = state(model)
                    different = [key for key in before.keys() | now.keys() if now.get(key) != before.get(key)]
                    assert not different, (name, nth, different[:5])
                    continue
            # It came to its end, so the next step is tried on another model.
            model, plan = prepared(kind, gated=gated)
            before = state(model)
            break
    assert reached


def test_handles_of_hooks_still_remove_them_after_a_failure() -> None:
    model: Any = tiny_model("gpt2")
    handle = model.transformer.h[0].attn.c_proj.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(Failed), restored_on_failure(model):
        attach(model, config=GateConfig())
        raise Failed
    assert gates_of(model) is None
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("move", "value"),
    [
        (lambda model: model._apply(torch.clone), 7.0),
        (lambda model: model.double(), 7.0),
        # What was resized, or has gone where nothing can be had of, is as it was before.
        (lambda model: model.register_buffer("count", torch.full((3,), 7.0)), 1.0),
        (lambda model: model.to("meta"), 1.0),
    ],
    ids=["another place", "another type", "another shape", "meta"],
)
def test_buffers_of_a_model_that_was_moved_are_as_far_as_it_came(move: Callable[[Any], Any], value: float) -> None:
    model: Any = nn.Linear(2, 2)
    model.register_buffer("count", torch.ones(2))
    buffer = model.count
    with pytest.raises(Failed), restored_on_failure(model):
        move(model)
        model.count.fill_(7.0)
        raise Failed
    assert model.count is buffer and buffer.dtype == torch.float32
    assert buffer.tolist() == [value, value]
