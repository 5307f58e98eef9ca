"""What a run writes while it goes: metrics.jsonl, TensorBoard scalars, a progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deadhead.disk.files import no_space_is_input_error, write_text
from deadhead.gates.gates import HeadGates
from deadhead.training.callbacks.metrics import parsed_line


def add_to_log(state: TrainerState, logs: dict[str, Any], values: Mapping[str, float]) -> None:
    """Add numbers to what is being logged, in a callback's on_log; callbacks that come later in the list see them."""
    logs.update(values)
    state.log_history[-1].update(values)


class MetricsFile(TrainerCallback):
    """Appends one JSON object to a file for each log: the Trainer's numbers and, with gates, those of every head.

    Args:
        path: metrics.jsonl.
        phase: name of the phase, written into each line.
        gates: the gates being trained, or None.
    """

    def __init__(self, path: Path, phase: str, gates: HeadGates | None = None) -> None:
        self.path = path
        self.phase = phase
        self.gates = gates
        self.begin = time.perf_counter()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Drop what a stopped run wrote of this phase after the checkpoint it goes on from."""
        self.begin = time.perf_counter()
        if not state.is_world_process_zero:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return
        kept = [
            line
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if _is_before(line, self.phase, state.global_step)
        ]
        write_text(self.path, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the last step of a phase too."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Append a line."""
        logs = kwargs["logs"]
        if not state.is_world_process_zero or "loss" not in logs:
            return
        line: dict[str, Any] = {"phase": self.phase, "step": state.global_step}
        line |= {name: value for name, value in logs.items() if not name.startswith(("heads/", "blocks/"))}
        if self.gates is not None:
            values = self.gates
            line["heads"] = [int(gate.is_open.sum()) for key, gate in values if key.kind == "head"]
            if values.block_size is not None:
                line["blocks"] = [int(gate.is_open.sum()) for key, gate in values if key.kind == "block"]
            line["open_probability"] = {str(layer): p.tolist() for layer, p in values.open_probability().items()}
            if values.tracks_difference:
                line["output_difference"] = {str(layer): d.tolist() for layer, d in values.difference().items()}
        line["seconds"] = round(time.perf_counter() - self.begin, 3)
        with no_space_is_input_error(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _is_before(line: str, phase: str, step: int) -> bool:
    values = parsed_line(line)
    return values is not None and (values["phase"] != phase or values["step"] <= step)


class StepReporter(TrainerCallback):
    """Tells a function how many steps are done, with the last logged loss.

    Args:
        report: called with steps done, steps in all and a dictionary of the last logged numbers.
    """

    def __init__(self, report: Callable[[int, int, dict[str, Any]], None]) -> None:
        self.report = report
        self.last: dict[str, Any] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remember the numbers."""
        self.last = dict(kwargs["logs"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report."""
        self.report(state.global_step, state.max_steps, self.last)
