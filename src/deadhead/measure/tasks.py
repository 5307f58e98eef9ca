"""Tasks of EleutherAI's lm-eval, by name or from your own files, and models' scores on them."""

from __future__ import annotations

import copy
import difflib
import io
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.data.encoders import text_frame
from deadhead.data.hub import datasets_offline
from deadhead.disk.hub import answers, from_cache
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, first_line, require_extra, typed
from deadhead.layouts.refusals import require_weights
from deadhead.measure.losses import require_language_model
from deadhead.modes import evaluating, seeded

# What lm-eval draws for the few errors that have no formula; its own default takes minutes.
_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A model's score on a task.

    Args:
        task: name of the task, or of a group of tasks.
        metric: lm-eval's name of the metric, such as "acc", with the filter after a comma if there is one.
        value: the metric's value.
        stderr: standard error of the value; None if there is none.
    """

    task: str
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, and what lm-eval knows of them.

    Args:
        names: of tasks, groups and tags.
        manager: lm-eval's.
    """

    names: tuple[str, ...]
    manager: Any


@typed
@contextmanager
def find_tasks(asked: Sequence[str]) -> Iterator[Tasks]:
    """Find tasks, and keep them while the block runs.

    Args:
        asked: lm-eval's names of tasks, groups or tags, in which `*` stands for anything; YAML files of single tasks;
            and folders of such files. None of them needs a network if the task's data is on this disk.

    Raises:
        InputError: lm-eval is not installed, or there is no such task.
    """
    require_extra("eval", "lm_eval", what="A task of lm-eval")
    if not asked:
        raise InputError("The name of a task of lm-eval was expected, or its YAML file, but there is none.")
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with _silent():
            found = _found(asked, Path(folder))
        yield found


def _found(asked: Sequence[str], folder: Path) -> Tasks:
    """Find tasks, and write to an empty folder what leads to those in files."""
    from lm_eval.tasks import TaskManager

    names: list[str] = []
    places = [str(folder)]
    builtin = []
    for index, each in enumerate(asked):
        path = checked_path(each)
        if path.is_dir():
            places.append(str(path))
            names += (found := TaskManager(include_path=str(path), include_defaults=False).all_subtasks)
            if not found:
                raise InputError(f"YAML files of tasks of lm-eval were expected in {path}, but it has none.")
        elif path.is_file():
            names.append(_task_of(path))
            # lm-eval reads a whole folder, with all that is below it; this one has nothing else.
            text = f"include: {_quoted(str(path.resolve()))}\ntask: {_quoted(names[-1])}\n"
            (folder / f"{index}.yaml").write_text(text, encoding="utf-8")
        elif len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
            raise InputError(
                f"A YAML file of a task of lm-eval, or a folder of some, was expected at {path}, but there is none."
            )
        else:
            builtin.append(each)
    # lm-eval knows over ten thousand tasks, which it takes seconds to read.
    manager = TaskManager(include_path=places, include_defaults=bool(builtin))
    names += [name for each in builtin for name in _known(manager, each)]
    return Tasks(tuple(dict.fromkeys(names)), manager)


def _known(manager: Any, name: str) -> list[str]:
    """Return the names of all tasks that a name with `*` in it stands for."""
    if found := sorted(manager.match_tasks([name])):
        return found
    near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.7)
    hint = f", such as {near[0]}" if near else ""
    raise InputError(f"A task that lm-eval knows was expected{hint}, or a YAML file of one, but got {name!r}.")


def _task_of(path: Path) -> str:
    """Return the name of the task in a YAML file."""
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        """Leaves lm-eval's own tags, !function say, alone."""

    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        declared = yaml.load(path.read_text("utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"A YAML file of a task of lm-eval was expected at {path}: {first_line(error)}.") from error
    name = declared.get("task") if isinstance(declared, dict) else None
    if not isinstance(name, str) or "group" in declared:
        raise InputError(
            f"The file of a single task of lm-eval was expected at {path}, but it names no task (task: NAME); name "
            "the folder of a group's tasks instead."
        )
    return name


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@typed
def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskScore, ...]:
    """Score a model on tasks by lm-eval, as its `hf` model does: without chat template, with each task's own examples.

    Args:
        model: a language model; afterwards it is in its mode again.
        tokenizer: the model's tokenizer.
        tasks: the tasks, from `find_tasks`.
        limit: the most examples of each task.
        batch_size: rows side by side.
        progress: called with the number of requests done and to do, as far as it is known.

    Raises:
        InputError: a task's data is not available, or lm-eval cannot run a task.
        UnsupportedModel: the model does not predict the next token.
    """
    require_language_model(model, "A task of lm-eval")
    require_weights(model, "A task of lm-eval")
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, but is {value}.")
    is_down = not answers()
    with _silent(), _seeded(), evaluating(model), from_cache(is_down), datasets_offline(is_down), _without_facts():
        from lm_eval import simple_evaluate

        try:
            results = simple_evaluate(
                _counting(model, tokenizer, batch_size, progress),
                tasks=list(tasks.names),
                limit=limit,
                bootstrap_iters=_DRAWS,
                log_samples=False,
                task_manager=tasks.manager,
            )
        except (MemoryError, InputError):
            raise
        except Exception as error:  # what lm-eval, the datasets library and a task's own code raise
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise InputError(
                f"lm-eval could not run {_shortened(tasks.names)} ({type(error).__name__}: {first_line(error)}); check "
                f"the task and its data{', which may be missing as the hub does not answer' if is_down else ''}."
            ) from error
    return tuple(_scores(results["results"]))


def _scores(results: dict[str, dict[str, Any]]) -> Iterator[TaskScore]:
    """Yield the metrics of all tasks; lm-eval calls one "acc,none", and its standard error "acc_stderr,none"."""
    for task, values in results.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = values.get(f"{metric}_stderr,{kind}")
                yield TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                )


def _counting(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> Any:
    """Return a model as lm-eval takes it, which tells how far it is in place of lm-eval's own bars."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):
        done, total = 0, 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            self.total += len(requests)
            found = super().generate_until(requests, disable_tqdm=True)
            self._tell(self.total - self.done)
            return found

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            self.total += len(requests)
            found = super()._loglikelihood_tokens(requests, *args, **kwargs)
            # Requests that share a context were read together.
            self._tell(self.total - self.done)
            return found

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            self._tell(len(inps))
            return found

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_generate(context, *args, **kwargs)
            self._tell(len(context))
            return found

        def _tell(self, more: int) -> None:
            self.done = min(self.done + more, self.total)
            progress(self.done, self.total)

    # It is given a token to pad with.
    tokenizer = copy.deepcopy(tokenizer)
    begin = next(iter(text_frame(tokenizer)[0]), 0)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(begin)
    has_begin = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    # What stands before a text without any context; lm-eval takes a BOS or an end of a text where there is one.
    first = {} if has_begin else {"prefix_token_id": begin}
    return Counting(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, **first)


@contextmanager
def _silent() -> Iterator[None]:
    """Let lm-eval, which says much, print, log and warn of nothing while the block runs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _seeded() -> Iterator[None]:
    """Put all random states back that lm-eval seeds."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with seeded():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _without_facts() -> Iterator[None]:
    """Let lm-eval not ask git, pip and compilers for its results, which takes seconds, and of which git complains."""
    from lm_eval import evaluator

    before = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info = evaluator.get_git_commit_hash = lambda *_: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = before


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
