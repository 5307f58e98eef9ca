"""Tasks of lm-eval: a tiny one of local files is found by its file and its folder, and scored as by hand."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from deadhead import InputError
from deadhead.data import load_text
from deadhead.measure.tasks import TaskScore, _scores, find_tasks, run_tasks
from tests.models.test_lm_eval import _QUESTIONS, _TASK, _log_likelihood
from tests.random_models import tiny_model
from tests.small_runs import save_small_llama, write_prose

slow = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks of the same questions, which are cached below it."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in _QUESTIONS) + "\n")
    (tmp_path / "tasks").mkdir()
    for name in ("birds", "cats"):
        task = _TASK.format(name=name, data=tmp_path / "questions.jsonl")
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task)
    return tmp_path


def share_right(model: Any, tokenizer: Any, questions: list[dict[str, Any]]) -> float:
    right = 0
    for each in questions:
        found = [_log_likelihood(model, tokenizer, each["question"], choice) for choice in each["choices"]]
        right += found.index(max(found)) == each["answer"]
    return right / len(questions)


@slow
def test_a_task_in_a_file_and_a_folder(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = save_small_llama(folder / "dense", write_prose(folder))
    model.train()
    told: list[tuple[int, int]] = []
    states = random.getstate(), torch.get_rng_state(), logging.root.manager.disable
    capfd.readouterr()
    with find_tasks([str(folder / "tasks" / "birds.yaml")]) as tasks:
        assert tasks.names == ("birds",)
        found = run_tasks(model, tokenizer, tasks, batch_size=2, progress=lambda *done: told.append(done))
        (limited,) = run_tasks(model, tokenizer, tasks, limit=1)
    output, errors = capfd.readouterr()
    assert output == "" and "lm_eval" not in errors and "git" not in errors
    assert model.training and tokenizer.pad_token_id == 256
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert logging.root.manager.disable == states[2]
    model.eval()
    expected = share_right(model, tokenizer, _QUESTIONS)
    assert [(score.task, score.metric, score.value) for score in found] == [("birds", "acc", pytest.approx(expected))]
    assert found[0].stderr == pytest.approx((expected * (1 - expected) / 2) ** 0.5)
    assert limited.value == share_right(model, tokenizer, _QUESTIONS[:1])
    choices = sum(len(each["choices"]) for each in _QUESTIONS)
    assert told[-1] == (choices, choices)
    with find_tasks([str(folder / "tasks")]) as tasks:
        assert tasks.names == ("birds", "cats")


@slow
def test_our_own_model_with_a_memory(folder: Path) -> None:
    _, tokenizer = load_text(str(write_prose(folder)), tokenizer="byte")
    model = tiny_model(vocab_size=len(tokenizer))
    with find_tasks([str(folder / "tasks" / "cats.yaml")]) as tasks:
        (score,) = run_tasks(model, tokenizer, tasks)
    assert score.value == pytest.approx(share_right(model, tokenizer, _QUESTIONS))


@slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "nowhere/task.yaml",
            "A YAML file of a task of lm-eval, or a folder of some, was expected at .*, but there is",
        ),
        ("empty", "YAML files of tasks of lm-eval were expected in .*empty, but it has none"),
        ("nameless.yaml", "it names no task"),
        ("broken.yaml", "A YAML file of a task of lm-eval was expected at .*broken.yaml: "),
    ],
)
def test_files_that_are_no_task(given: str, message: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "nameless.yaml").write_text("test_split: test\n")
    (folder / "broken.yaml").write_text("task: [a\n")
    with pytest.raises(InputError, match=message), find_tasks([str(folder / given)]):
        pass


@slow
def test_a_name_that_lm_eval_does_not_know() -> None:
    pytest.importorskip("lm_eval")
    with (
        pytest.raises(InputError, match=r"A task that lm-eval knows was expected, such as hellaswag, .*got 'helaswag'"),
        find_tasks(["helaswag"]),
    ):
        pass


@slow
def test_data_that_cannot_be_had(folder: Path) -> None:
    model, tokenizer = save_small_llama(folder / "dense", write_prose(folder))
    (folder / "questions.jsonl").unlink()
    with (
        find_tasks([str(folder / "tasks" / "birds.yaml")]) as tasks,
        pytest.raises(InputError, match=r"lm-eval could not run birds \(\w+: .*\); check the task and its data"),
    ):
        run_tasks(model, tokenizer, tasks)


def test_metrics_are_named_as_lm_eval_names_them() -> None:
    results = {
        "birds": {"alias": "birds", "acc,none": 0.5, "acc_stderr,none": 0.25, "acc_norm,none": 1, "sample_len": 4},
        "sums": {"exact_match,strict": 0.0, "exact_match_stderr,strict": "N/A"},
    }
    assert list(_scores(results)) == [
        TaskScore(task="birds", metric="acc", value=0.5, stderr=0.25),
        TaskScore(task="birds", metric="acc_norm", value=1.0, stderr=None),
        TaskScore(task="sums", metric="exact_match,strict", value=0.0, stderr=None),
    ]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deadhead.errors.is_installed", lambda *_: False)
    with (
        pytest.raises(InputError, match=r"needs lm_eval; install with: pip install 'deadhead\[eval\]'"),
        find_tasks(["a"]),
    ):
        pass
