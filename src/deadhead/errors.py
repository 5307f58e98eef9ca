"""The errors a user can cause. Each carries one sentence: what was expected, what came, how to mend it."""

from __future__ import annotations


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

    Args:
        message: the sentence.
        step: of the optimizer, counted from 1.
        reason: a clause, such as "loss is nan".
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
