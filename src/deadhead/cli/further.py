"""What `deadhead eval` and `compare` measure besides perplexity on request: replies, and tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from deadhead.cli.console import console, working
from deadhead.errors import InputError, require_extra

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deadhead.measure.replies import Replies
    from deadhead.measure.tasks import Tasks, TaskScore
    from deadhead.training.processes import Progress

_UNREAD = "A text is then read only if --data names one."

WithReplies = Annotated[
    bool,
    typer.Option(
        "--replies",
        help=f"Also have it reply to 50 prompts, 200 tokens at most, and measure how much it repeats itself. {_UNREAD}",
    ),
]
Show = Annotated[int, typer.Option(min=0, max=50, metavar="N", help="Print the first N prompts with the replies.")]
TaskNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Also run tasks of lm-eval: names with commas between them, such as hellaswag,blimp_*, or YAML files or "
        f"folders of such files; may be repeated. {_UNREAD}",
    ),
]
TaskLimit = Annotated[
    int | None, typer.Option(min=1, max=10**9, metavar="N", help="Run at most N examples of each task.")
]


@dataclass(frozen=True, kw_only=True)
class Further:
    """What was measured besides perplexity, by the models' names."""

    replies: Mapping[str, Replies] = field(default_factory=dict)
    tasks: Mapping[str, tuple[TaskScore, ...]] = field(default_factory=dict)

    def values(self, name: str) -> dict[str, Any]:
        """Return the measurements of a model in the form that JSON output has."""
        found: dict[str, Any] = {}
        if (replies := self.replies.get(name)) is not None:
            # The first is not compared with itself.
            near = {} if name == next(iter(self.replies)) else {"divergence": None, "agreement": None}
            found["replies"] = {**near, **replies.values}
        if name in self.tasks:
            found["tasks"] = {}
            for score in self.tasks[name]:
                value = {"value": score.value, "stderr": score.stderr}
                found["tasks"].setdefault(score.task, {})[score.metric] = value
        return found

    def shown(self, count: int) -> list[dict[str, Any]]:
        """Return the first prompts, each with the models' replies; a model without room for a reply is left out."""
        texts: dict[str, dict[str, str]] = {}
        for name, replies in self.replies.items():
            for reply in replies.replies:
                texts.setdefault(reply.asked, {})[name] = reply.text
        return [{"prompt": prompt, "replies": by_model} for prompt, by_model in list(texts.items())[:count]]


@dataclass(frozen=True)
class Asked:
    """What the options ask to measure besides perplexity.

    Args:
        replies: whether models reply to prompts.
        show: number of prompts that are printed with their replies.
        tasks: names of the tasks, as they were given.
        limit: the most examples of each task; None for all.
    """

    replies: bool
    show: int
    tasks: Sequence[str]
    limit: int | None

    def is_text_read(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a text is scored too: one that is named, or the default if nothing else is asked for."""
        return "source" in settings or not (self.replies or self.tasks)

    @contextmanager
    def ready(self, *, quiet: bool) -> Iterator[Callable[..., Further]]:
        """Find the tasks, and yield the function that measures models."""
        with ExitStack() as stack:
            tasks: Tasks | None = None
            if self.tasks:
                from deadhead.measure.tasks import find_tasks

                with nullcontext() if quiet else working("looking for tasks"):
                    tasks = stack.enter_context(find_tasks(self.tasks))
            yield partial(self._measure, tasks)

    def _measure(
        self,
        tasks: Tasks | None,
        networks: Mapping[str, PreTrainedModel],
        report: Progress,
        batch_size: int = 8,
        unscored: str | None = None,
    ) -> Further:
        """Measure models by name; the first is the reference, and the one named `unscored` runs no tasks."""
        from deadhead.data import load_tokenizer
        from deadhead.measure.replies import compare_replies
        from deadhead.measure.tasks import run_tasks
        from deadhead.training.processes import counted

        tokenizers = {name: load_tokenizer(name) for name in networks} if self.replies or tasks else {}
        scores: dict[str, tuple[TaskScore, ...]] = {}
        replies: Mapping[str, Replies] = {}
        if self.replies:
            replies = compare_replies(
                networks, tokenizers, progress=lambda name, done, total: report(Path(name).name, done, total, {})
            )
        if tasks is not None:
            for name in [name for name in networks if name != unscored]:
                scores[name] = run_tasks(
                    networks[name],
                    tokenizers[name],
                    tasks,
                    limit=self.limit,
                    batch_size=batch_size,
                    progress=counted(report, f"{Path(name).name}: tasks"),
                )
        return Further(replies=replies, tasks=scores)


def asked(replies: bool, show: int, tasks: Sequence[str] | None, limit: int | None) -> Asked:
    """Return what the options ask for; raise InputError if they contradict each other or lm-eval is not installed."""
    if limit is not None and not tasks:
        raise InputError("--task-limit is for the tasks of --tasks, but none were given; name some, or leave it out.")
    names = [name.strip() for each in tasks or () for name in each.split(",")]
    if not all(names):
        raise InputError(
            f"--tasks takes names of tasks with commas between them, but got {','.join(tasks or ())!r}; leave no name "
            "empty."
        )
    if names:
        require_extra("eval", "lm_eval", what="--tasks")
    return Asked(replies or show > 0, show, names, limit)


def rows(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows that replies and tasks add to a table with a column for each model."""

    def cells(text: str, values: list[Any]) -> list[str]:
        return ["–" if value is None else text.format(value) for value in values]

    replies = [values.get("replies", {}) for values in found.values()]
    if any(replies):
        for title, key, text in (
            ("KL on replies, nats a token", "divergence", "{:.4f}"),
            ("same token on replies", "agreement", "{:.1%}"),
            ("repetition", "repetition", "{:.1%}"),
        ):
            yield title, cells(text, [each.get(key) for each in replies])
    tasks = [values.get("tasks", {}) for values in found.values()]
    pairs = dict.fromkeys((task, metric) for each in tasks for task, metrics in each.items() for metric in metrics)
    for task, metric in pairs:
        yield f"{task}, {metric}", cells("{:,.4f}", [each.get(task, {}).get(metric, {}).get("value") for each in tasks])


def print_replies(found: Further, count: int) -> None:
    """Print the first prompts, each followed by the replies of all models."""
    for each in found.shown(count):
        console.print(f"\n[bold]{escape(each['prompt'])}[/bold]")
        for name, text in each["replies"].items():
            console.print(f"[cyan]{escape(name)}[/cyan]: {escape(text)}")


def print_tasks(scores: Sequence[TaskScore]) -> None:
    """Print the scores of a model on tasks."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column, side in (("task", "left"), ("metric", "left"), ("value", "right"), ("± stderr", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for score in scores:
        stderr = "–" if score.stderr is None else f"{score.stderr:,.4f}"
        table.add_row(escape(score.task), escape(score.metric), f"{score.value:,.4f}", stderr)
    console.print(table)
