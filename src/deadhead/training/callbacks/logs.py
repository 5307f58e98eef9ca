"""Logs of a running phase: metrics.jsonl, validation perplexity, steps for a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deadhead.data import TokenStream
from deadhead.disk.files import no_space_is_input_error, write_text
from deadhead.gates.gates import HeadGates
from deadhead.measure.evaluation import evaluate
from deadhead.training.callbacks.metrics import parsed_line


def add_to_log(state: TrainerState, logs: dict[str, Any], values: Mapping[str, float]) -> None:
    """Add numbers to the current log from a callback's on_log; callbacks later in the list see them."""
    logs.update(values)
    state.log_history[-1].update(values)


class MetricsFile(TrainerCallback):
    """Appends one JSON object to metrics.jsonl for each log: the Trainer's numbers and those of each gate, if any."""

    def __init__(self, path: Path, phase: str, gates: HeadGates | None = None) -> None:
        self.path = path
        self.phase = phase
        self.gates = gates
        self.begin = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Drop the lines that a stopped run wrote for this phase after the checkpoint that it resumes from."""
        self.begin = time.perf_counter()
        if not state.is_world_process_zero:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(self.path, "".join(line for line in lines if _is_before(line, self.phase, state.global_step)))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the Trainer log the last step of a phase too."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append a line for this log."""
        logs = kwargs["logs"]
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line: dict[str, Any] = {"phase": self.phase, "step": state.global_step}
        line |= {name: value for name, value in logs.items() if not name.startswith(("heads/", "blocks/"))}
        if self.gates is not None:
            gates = self.gates
            line["heads"] = [int(gate.is_open.sum()) for key, gate in gates if key.kind == "head"]
            if gates.choices.has_blocks:
                line["blocks"] = [int(gate.is_open.sum()) for key, gate in gates if key.kind == "block"]
            line["open_probability"] = {str(layer): p.tolist() for layer, p in gates.open_probability().items()}
            if gates.tracks_difference:
                line["output_difference"] = {str(layer): d.tolist() for layer, d in gates.difference().items()}
        line["seconds"] = round(time.perf_counter() - self.begin, 3)
        with no_space_is_input_error(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _is_before(line: str, phase: str, step: int) -> bool:
    values = parsed_line(line)
    return values is not None and (values["phase"] != phase or values["step"] <= step)


class Validation(TrainerCallback):
    """Adds ``eval_perplexity`` to the log of every n-th step and of the last; it does not change the training.

    Each of several processes measures, because sharded models must run in all of them at once. With gates, the model is
    measured with those that are open now.
    """

    def __init__(self, model: PreTrainedModel, text: TokenStream, *, every: int, tokens: int) -> None:
        self.model = model
        self.text = text
        self.every = every
        self.tokens = tokens
        self.perplexity: float | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the perplexity, and make the Trainer log it."""
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self.perplexity = evaluate(self.model, self.text, limit=self.tokens).perplexity
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the perplexity to the training log."""
        if "loss" in kwargs["logs"] and self.perplexity is not None:
            add_to_log(state, kwargs["logs"], {"eval_perplexity": self.perplexity})
            self.perplexity = None


class StepReporter(TrainerCallback):
    """Calls a function with the number of steps done, the number in total, and the last logged numbers."""

    def __init__(self, report: Callable[[int, int, dict[str, Any]], None]) -> None:
        self.report = report
        self.last: dict[str, Any] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the logged numbers."""
        self.last = dict(kwargs["logs"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        self.report(state.global_step, state.max_steps, self.last)
