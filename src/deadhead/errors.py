"""The errors a user can cause. Each carries one sentence: what was expected, what came, how to mend it."""

from __future__ import annotations

from importlib.util import find_spec

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
    """Return the first line of what another library's error says, or its type, without the full stop, shortened."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".:!")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def is_installed(*modules: str) -> bool:
    """Return whether all these top-level modules can be imported; none is imported."""
    return all(find_spec(name) is not None for name in modules)


def require_extra(extra: str, *modules: str, what: str) -> None:
    """Check that the modules that an extra brings, and `what` needs, are installed; InputError if one is not."""
    if missing := [name for name in modules if not is_installed(name)]:
        raise InputError(f"{what} needs {' and '.join(missing)}; install with: pip install 'deadhead[{extra}]'.")
