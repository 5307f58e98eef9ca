"""The hidden states of a model between its layers, batch by batch, and running single layers on them.

The arguments with which the model calls each layer (positions, masks) are recorded once for each batch, while the
layers do nothing. So a pass through all layers costs about one forward pass of the model.

Dimensions: B rows, T tokens, P tokens of memory, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.compensation.calibration import Calibration, run_stack

# How far layers that are run alone may be from the whole model, as root mean squares.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_HALF = 2e-2

Form = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Call:
    """The arguments that a model gives a layer besides the hidden states, and the places of these (None: not taken)."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_at: int | str | None

    def placed(self, hidden: Tensor | None, memory: tuple[Tensor | None] | None) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with other hidden states, and with memory after them if the layer has one."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.hidden_at, str):
            kwargs[self.hidden_at] = hidden
        elif self.hidden_at is not None:
            args[self.hidden_at] = hidden
        if memory is not None:
            args[1] = memory[0]
        return args, kwargs


class Stream:
    """One model's hidden states before a layer.

    Args:
        model: the model.
        layers: its layers, in order. If layers cannot be run alone, the whole stack counts as one layer.
        paths: the layers' paths in the model.
        calls: the call of each layer for each batch.
        states: each batch's hidden states before the first layer.
        begins: for a model with segment memory, whether each batch begins without memory; None for other models.
        forms: for each layer, a function that puts hidden states in the form in which the layer returns them.
        is_whole: whether the whole stack is the only layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[nn.Module],
        paths: list[str],
        calls: list[list[Call]],
        states: list[Tensor | None],
        begins: list[bool] | None,
        forms: Sequence[Form] = (),
        *,
        is_whole: bool = False,
    ) -> None:
        self.model, self.layers, self.paths, self.forms = model, layers, paths, forms
        self.calls, self.states, self.begins, self.is_whole = calls, states, begins, is_whole

    def inputs(self, index: int) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Yield the arguments of a layer, batch by batch."""
        memory: Tensor | None = None
        for batch, (call, hidden) in enumerate(zip(self.calls[index], self.states, strict=True)):
            if self.begins is None:
                yield call.placed(hidden, None)
                continue
            assert hidden is not None
            if self.begins[batch]:
                memory = call.args[1]
            yield call.placed(hidden, (memory,))
            kept = hidden if memory is None else torch.cat([memory, hidden], dim=1)
            memory = kept[:, -self.model.config.memory_length :]

    def advance(self, index: int) -> None:
        """Run a layer on all batches; afterwards the hidden states are those before the next layer."""
        layer = self.layers[index]
        self.states = [first(layer(*args, **kwargs)) for args, kwargs in self.inputs(index)]

    def of(self, places: Sequence[int]) -> Stream:
        """Return the stream of some of the batches, for a model without segment memory."""
        calls = [[called[place] for place in places] for called in self.calls]
        states = [self.states[place] for place in places]
        return Stream(self.model, self.layers, self.paths, calls, states, None, self.forms)

    @contextmanager
    def ending(self) -> Iterator[Ending]:
        """Make the model run, while the block runs, as if its layers returned given hidden states."""
        ending = Ending()

        def given(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                at = _hidden_at(args, kwargs)
                hidden: Any = kwargs[at] if isinstance(at, str) else args[0]
                if ending.states is not None and index + 1 == len(self.layers):
                    hidden = ending.states[: len(hidden)]
                return self.forms[index](hidden)

            return forward

        with _forwards(self.layers, given):
            yield ending

    def release(self, index: int) -> None:
        """Free a layer that is no longer needed, in the model too."""
        self.layers[index], self.calls[index] = nn.Identity(), []
        self.model.set_submodule(self.paths[index], nn.Identity())


@dataclass
class Ending:
    """The hidden states after the last layer, at least for the rows that are run; None stands for the inputs."""

    states: Tensor | None = None


def stream_of(model: PreTrainedModel, calibration: Calibration, layers: str | None) -> Stream:
    """Return the stream of a model before its first layer, given the path of its list of layers, if it has one."""
    found = None if layers is None else _layered(model, calibration, layers)
    return found or whole_stream(model, calibration)


def whole_stream(model: PreTrainedModel, calibration: Calibration) -> Stream:
    """Return a stream whose only layer is the whole stack."""
    calls = [Call((model, batch), {}, None) for batch in calibration.batches]
    return Stream(model, [_Stack()], [""], [calls], [None] * len(calls), None, is_whole=True)


class _Stack(nn.Module):
    """Runs a model's stack on a batch, with the interface of a layer."""

    def forward(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        return run_stack(model, batch)


def _layered(model: PreTrainedModel, calibration: Calibration, path: str) -> Stream | None:
    """Return a model's stream, or None if its layers, run alone, compute something else than in the model."""
    holder = model.get_submodule(path)
    names, layers = zip(*holder.named_children(), strict=True)
    paths = [f"{path}.{name}" for name in names]
    outputs: list[Any] = []
    # One row is enough for the comparison, if rows do not depend on each other.
    tried = calibration.batches[0]
    tried = tried if calibration.has_memory else {name: value[:1] for name, value in tried.items()}
    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(lambda _, args, output: outputs.append(output)))
        run_stack(model, tried)
    if len(outputs) != len(layers):
        return None
    forms = [_form(output) for output in outputs]
    expected = first(outputs[-1])
    outputs.clear()
    called: list[list[Call]] = [[] for _ in layers]
    states: list[Tensor | None] = []
    with _idle(layers, forms) as noted:
        for batch in (tried, *calibration.batches):
            noted.clear()
            run_stack(model, batch)
            if [index for index, _, _ in noted] != [*range(len(layers))] or any(
                c.hidden_at is None for _, c, _ in noted
            ):
                return None
            for index, call, hidden in noted:
                called[index].append(call)
                if not index:
                    states.append(hidden)
    if not _is_replayed(layers, [calls.pop(0) for calls in called], states.pop(0), calibration, expected):
        return None
    begins = [bool(batch["is_first"].any()) for batch in calibration.batches] if calibration.has_memory else None
    if begins is not None:
        begins[0] = True
    return Stream(model, list(layers), paths, called, states, begins, forms)


@contextmanager
def _idle(layers: Sequence[nn.Module], forms: Sequence[Form]) -> Iterator[list[tuple[int, Call, Tensor]]]:
    """Make layers return their inputs, in the form of their outputs, and record how they are called."""
    noted: list[tuple[int, Call, Tensor]] = []

    def idle(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            at = _hidden_at(args, kwargs)
            hidden: Any = kwargs[at] if isinstance(at, str) else args[0]
            noted.append((index, _call(args, kwargs, at), hidden))
            return forms[index](hidden)

        return forward

    with _forwards(layers, idle):
        yield noted


def _form(output: Any) -> Form:
    """Return a function that replaces the hidden states in a layer's output."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    kind, rest = type(output), output[1:]
    return lambda hidden: kind([hidden, *rest])


@contextmanager
def _forwards(layers: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Replace the layers' forward functions while the block runs; each gets one made for its index."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int | str | None) -> Call:
    """Return a call without the hidden states, which would otherwise be kept as long as the call."""
    bare = (None, *args[1:]) if at == 0 else args
    return Call(bare, {name: None if name == at else value for name, value in kwargs.items()}, at)


def _hidden_at(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    if args:
        return 0 if isinstance(args[0], Tensor) and args[0].is_floating_point() else None
    return "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else None


def _is_replayed(
    layers: Sequence[nn.Module], calls: Sequence[Call], hidden: Tensor | None, calibration: Calibration, goal: Tensor
) -> bool:
    """Return whether the layers, run one after the other, reproduce the whole model's last hidden states."""
    for layer, call in zip(layers, calls, strict=True):
        args, kwargs = call.placed(hidden, (call.args[1],) if calibration.has_memory else None)
        hidden = first(layer(*args, **kwargs))
    return hidden is not None and hidden.shape == goal.shape and is_near(hidden, goal)


def first(output: Any) -> Tensor:
    """Return the hidden states in a layer's output: the output itself, or its first value."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def is_near(found: Tensor, goal: Tensor) -> bool:
    """Return whether every position of some hidden states (…, D) is as expected, except for rounding."""
    lost = (found.float() - goal.float()).norm(dim=-1)
    return bool((lost <= _TOLERANCE.get(goal.dtype, _TOLERANCE_HALF) * goal.float().norm(dim=-1) + 1e-30).all())
