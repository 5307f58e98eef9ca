"""The errors a user can cause. Each carries one sentence: what was expected, what came, how to mend it."""

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

# Where wrappers, of PEFT, of parallel training and of torch.compile, have their model.
_WRAPPED = ("get_base_model", "module", "_orig_mod")

_F = TypeVar("_F", bound=Callable[..., Any])

# Characters of another library's sentence that one of ours may hold.
_LONGEST = 120


class InputError(ValueError):
    """Bad input: a recipe, path, text, plan or checkpoint that cannot be used. The command line exits with 2."""


class UnsupportedModel(InputError):
    """The model has no attention head that deadhead can prune; the message says why."""


class CutError(RuntimeError):
    """A cut model did not compute what the model with closed gates computes. The model was put back as it was."""


class ExportError(RuntimeError):
    """An exported model did not run, or did not compute what PyTorch computes. Nothing was left in its place."""


class DivergenceError(RuntimeError):
    """Training met a loss, gradient or weight that is not finite. The message names the step and what to try.

    The optimizer's steps are counted from 1; the reason is a clause, such as "loss is nan".
    """

    def __init__(self, message: str, step: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.step = step
        self.reason = reason


class FailedElsewhere(RuntimeError):
    """Another process of this training failed, and says why."""


class RunWarning(UserWarning):
    """Something a run met and went on from, which its user should know. The command line prints it."""


def own_sentence(error: ValueError) -> str:
    """Return what a check of our own configurations said: transformers wraps its sentence in a line of its own."""
    return str(error.__cause__ or error).strip().splitlines()[-1].strip()


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or its type, without the full stop.

    Where that line only begins a list, what follows is added; it never is longer than 120 characters.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]
    return (said if len(said) <= _LONGEST else f"{said[: _LONGEST - 2]} …").rstrip(".:!")


def is_installed(*modules: str) -> bool:
    """Return whether all these top-level modules can be imported; none is imported."""
    return all(find_spec(name) is not None for name in modules)


def require_extra(extra: str, *modules: str, what: str) -> None:
    """Check that the modules that an extra brings, and `what` needs, are installed; InputError if one is not."""
    if missing := [name for name in modules if not is_installed(name)]:
        raise InputError(f"{what} needs {' and '.join(missing)}; install with: pip install 'deadhead[{extra}]'.")


def typed(function: _F) -> _F:
    """Let a public function refuse, by an InputError, arguments that are not of the types in its signature.

    Numbers of NumPy are numbers.
    """
    return typed_but()(function)


def typed_but(*names: str) -> Callable[[_F], _F]:
    """Do as `typed` does, but leave some arguments to the function, which has a better sentence for them."""

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
    """Check a dataclass's fields by their types, or raise an InputError that begins with `whose` field is wrong."""
    for name, hint in get_type_hints(type(value)).items():
        require_type(getattr(value, name), hint, f"{whose}{name} must be")


def require_type(value: Any, hint: Any, expected: str) -> None:
    """Check that a value is of a type, or raise an InputError that begins with what was expected."""
    if isinstance(hint, TypeVar):
        hint = hint.__bound__
    if not _fits(value, hint):
        plain = value is None or isinstance(value, (bool, int, float, str, bytes))
        came = reprlib.repr(value) if plain else f"an object of type {type(value).__name__}"
        words = hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+|~", "", str(hint))
        raise InputError(f"{expected} {words}, but {came} came.")


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
        # The function itself says what is to be done with a model in a wrapper.
        return getattr(hint, "__name__", "") == "PreTrainedModel" and any(hasattr(value, name) for name in _WRAPPED)
    if origin is not None and isinstance(value, Mapping):
        return all(_fits(each, inner[-1]) for each in value.values())
    if origin is not None and isinstance(value, list | tuple) and len({*inner} - {...}) == 1:
        return all(_fits(each, inner[0]) for each in value)
    return True
