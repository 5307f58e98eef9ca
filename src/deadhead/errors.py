"""The errors a user can cause. Each message is one sentence: what was expected, what was given, how to mend it."""

from __future__ import annotations

import functools
import inspect
import re
import reprlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

# Where the wrappers of PEFT, of parallel training and of torch.compile keep their model.
_WRAPPED = ("get_base_model", "module", "_orig_mod")

_F = TypeVar("_F", bound=Callable[..., Any])

# The most characters of another library's message that are quoted.
_LONGEST = 120


class InputError(ValueError):
    """A recipe, path, text, plan, checkpoint or argument cannot be used.

    The message says what was expected, what was given and how to mend it. The command line exits with code 2.
    """


class UnsupportedModel(InputError):
    """The model is not supported, for example because no head of it can be pruned; the message says why."""


class CutError(RuntimeError):
    """The cut model did not compute what the model with closed gates computes. The model was put back as it was."""


class ExportError(RuntimeError):
    """The exported model did not run, or did not compute what PyTorch computes. The export was removed."""


class DivergenceError(RuntimeError):
    """A loss, gradient or weight became infinite or NaN in training. The message names the step and what to try.

    Args:
        message: the whole message.
        step: the optimizer step, counted from 1.
        reason: a clause, such as "loss is nan".
    """

    def __init__(self, message: str, step: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason


class FailedElsewhere(RuntimeError):
    """Another process of this training failed; that process reports the reason."""


class RunWarning(UserWarning):
    """Something that the user of a run should know, though the run went on. The command line prints it."""


def own_sentence(error: ValueError) -> str:
    """Return the message of a check in our own configurations, without the line that transformers puts around it."""
    return str(error.__cause__ or error).strip().splitlines()[-1].strip()


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or its type, without the full stop.

    If that line ends in a colon, the lines that follow are added. The text has at most 120 characters.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return (said if len(said) <= _LONGEST else f"{said[: _LONGEST - 2]} …").rstrip(".:!")


def is_installed(*modules: str) -> bool:
    """Return whether all these top-level modules can be imported, without importing them."""
    return all(find_spec(name) is not None for name in modules)


def require_extra(extra: str, *modules: str, what: str) -> None:
    """Raise an InputError if a module that `what` needs, and the extra installs, is missing."""
    if missing := [name for name in modules if not is_installed(name)]:
        raise InputError(f"{what} needs {' and '.join(missing)}; install with: pip install 'deadhead[{extra}]'.")


def typed(function: _F) -> _F:
    """Decorate a public function so that it raises an InputError if an argument is not of its annotated type.

    NumPy's numbers count as numbers.
    """
    return typed_but()(function)


def typed_but(*names: str) -> Callable[[_F], _F]:
    """Decorate as `typed` does, but leave out some arguments, for which the function has a better message."""

    def door(function: _F) -> _F:
        signature, hints = inspect.signature(function), functools.cache(lambda: get_type_hints(function))
        what = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:
                # Python's own words name the function.
                return function(*args, **kwargs)
            for name, value in given.items():
                if name not in names and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                    require_type(value, hints().get(name, Any), f"{what} takes {name} as")
            return function(*args, **kwargs)

        return cast(_F, checked)

    return door


def require_fields(value: Any, whose: str = "") -> None:
    """Raise an InputError if a dataclass's field is not of its type; the message begins with `whose` and its name."""
    for name, hint in get_type_hints(type(value)).items():
        require_type(getattr(value, name), hint, f"{whose}{name} must be")


def require_type(value: Any, hint: Any, expected: str) -> None:
    """Raise an InputError if a value is not of a type; the message begins with `expected`."""
    if isinstance(hint, TypeVar):
        hint = hint.__bound__
    if not _fits(value, hint):
        plain = value is None or isinstance(value, (bool, int, float, str, bytes))
        got = reprlib.repr(value) if plain else f"an object of type {type(value).__name__}"
        words = hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+|~", "", str(hint))
        raise InputError(f"{expected} {words}, but got {got}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint is Any or not isinstance(origin or hint, type):
        return True
    if isinstance(value, str | bytes) and origin is not None:
        return False
    if not isinstance(value, origin or hint):
        # The function's own message says what to do with a wrapped model.
        return getattr(hint, "__name__", "") == "PreTrainedModel" and any(hasattr(value, name) for name in _WRAPPED)
    if origin is not None and isinstance(value, Mapping):
        return all(_fits(each, inner[-1]) for each in value.values())
    if origin is not None and isinstance(value, list | tuple) and len({*inner} - {...}) == 1:
        return all(_fits(each, inner[0]) for each in value)
    return True
