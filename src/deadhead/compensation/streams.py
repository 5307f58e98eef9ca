"""The hidden states of a model between its layers, batch by batch, and its layers run by themselves on them.

How the model calls each layer (positions, masks) is noted once a batch, while the layers do nothing; so a whole pass
through all layers costs about one forward of the model.

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

# How far layers run by themselves may be from the model as a whole, as root mean squares.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_HALF = 2e-2

Form = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Call:
    """What a model gives a layer besides the hidden states, and where those stand; None where they are not taken."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    hidden_at: int | str | None

    def placed(self, hidden: Tensor | None, memory: tuple[Tensor | None] | None) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments with other hidden states and, behind them, the memory of a layer that has one."""
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
        model: it.
        layers: its layers, in order; the stack as a whole is one layer where they cannot be run by themselves.
        paths: of the layers in the model.
        calls: for each layer and batch.
        states: hidden states before the first layer, of each batch.
        begins: for each batch of a model with segment memory whether it has none; None for other models.
        forms: for each layer what gives hidden states the form in which it returns them.
        is_whole: whether the stack as a whole is the only layer.
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
        """Yield what a layer is called with, batch by batch."""
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
        """Run a layer on all batches: the hidden states are then those before the next."""
        layer = self.layers[index]
        self.states = [first(layer(*args, **kwargs)) for args, kwargs in self.inputs(index)]

    def of(self, places: Sequence[int]) -> Stream:
        """Return the stream of some of the batches alone, of a model without segment memory."""
        calls = [[called[place] for place in places] for called in self.calls]
        states = [self.states[place] for place in places]
        return Stream(self.model, self.layers, self.paths, calls, states, None, self.forms)

    @contextmanager
    def ending(self) -> Iterator[Ending]:
        """Let the model run as if its layers ended in given hidden states, while the block runs."""
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
        """Forget a layer that was passed, in the model too."""
        self.layers[index], self.calls[index] = nn.Identity(), []
        self.model.set_submodule(self.paths[index], nn.Identity())


@dataclass
class Ending:
    """The hidden states behind the last layer, of the rows that come at least; None: those that come in."""

    states: Tensor | None = None


def stream_of(model: PreTrainedModel, calibration: Calibration, layers: str | None) -> Stream:
    """Return the stream of a model before its first layer, given the path of the list of its layers, if it has one."""
    found = None if layers is None else _layered(model, calibration, layers)
    return found or whole_stream(model, calibration)


def whole_stream(model: PreTrainedModel, calibration: Calibration) -> Stream:
    """Return a stream of which the stack as a whole is the only layer."""
    calls = [Call((model, batch), {}, None) for batch in calibration.batches]
    return Stream(model, [_Stack()], [""], [calls], [None] * len(calls), None, is_whole=True)


class _Stack(nn.Module):
    """Runs a model's stack on a batch, as a layer would be."""

    def forward(self, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
        return run_stack(model, batch)


def _layered(model: PreTrainedModel, calibration: Calibration, path: str) -> Stream | None:
    """Return a model's stream, or None where its layers do not compute by themselves what they do in it."""
    holder = model.get_submodule(path)
    names, layers = zip(*holder.named_children(), strict=True)
    paths = [f"{path}.{name}" for name in names]
    outputs: list[Any] = []
    # One row is enough to compare by, where rows know nothing of each other.
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
    """Let layers return what they are given, in their forms, and note how they are called."""
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
    """Return what puts hidden states in the place of those in what a layer returned."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    kind, rest = type(output), output[1:]
    return lambda hidden: kind([hidden, *rest])


@contextmanager
def _forwards(layers: Sequence[nn.Module], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Let layers compute something else, made for each by its index, while the block runs."""
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
    """Return a call without the hidden states, which would be held as long as it."""
    bare = (None, *args[1:]) if at == 0 else args
    return Call(bare, {name: None if name == at else value for name, value in kwargs.items()}, at)


def _hidden_at(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    if args:
        return 0 if isinstance(args[0], Tensor) and args[0].is_floating_point() else None
    return "hidden_states" if isinstance(kwargs.get("hidden_states"), Tensor) else None


def _is_replayed(
    layers: Sequence[nn.Module], calls: Sequence[Call], hidden: Tensor | None, calibration: Calibration, goal: Tensor
) -> bool:
    """Tell whether layers, one after the other, give for hidden states before the first what the whole model gave."""
    for layer, call in zip(layers, calls, strict=True):
        args, kwargs = call.placed(hidden, (call.args[1],) if calibration.has_memory else None)
        hidden = first(layer(*args, **kwargs))
    return hidden is not None and hidden.shape == goal.shape and is_near(hidden, goal)


def first(output: Any) -> Tensor:
    """Return the hidden states of what a layer returns: itself, or its first value."""
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def is_near(found: Tensor, goal: Tensor) -> bool:
    """Tell whether every position of some hidden states (…, D) is what it should be but for rounding."""
    lost = (found.float() - goal.float()).norm(dim=-1)
    return bool((lost <= _TOLERANCE.get(goal.dtype, _TOLERANCE_HALF) * goal.float().norm(dim=-1) + 1e-30).all())
