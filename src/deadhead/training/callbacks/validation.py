"""Validation perplexity while a phase goes on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deadhead.data import TokenStream
from deadhead.measure.evaluation import evaluate
from deadhead.training.callbacks.logs import add_to_log


class Validation(TrainerCallback):
    """Adds ``eval_perplexity`` to the log of every n-th step, and of the last; the training is the same without it.

    Of several processes each measures for itself, as sharded models must run everywhere at once.

    Args:
        model: what is trained; with gates, those that are open now count.
        text: the validation text.
        every: steps between two measurements.
        tokens: how many tokens of the text are scored.
    """

    def __init__(self, model: PreTrainedModel, text: TokenStream, *, every: int, tokens: int) -> None:
        self.model = model
        self.text = text
        self.every = every
        self.tokens = tokens
        self.perplexity: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, and have it logged."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.perplexity = evaluate(self.model, self.text, limit=self.tokens).perplexity
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the number to the training log."""
        if "loss" in kwargs["logs"] and self.perplexity is not None:
            add_to_log(state, kwargs["logs"], {"eval_perplexity": self.perplexity})
            self.perplexity = None
