"""`deadhead eval` and `compare` with --replies and --tasks: the numbers are those of the functions that they call."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import deadhead
from deadhead.cli import execute
from deadhead.data import load_tokenizer
from deadhead.measure.replies import compare_replies
from tests.cli.conftest import Command
from tests.models.test_lm_eval import _QUESTIONS, _TASK
from tests.small_runs import save_small_llama

_ASKED = {"prompts": ("hi", "Why?", "Tell me a joke."), "max_new_tokens": 8}


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    few = functools.partial(compare_replies, **_ASKED)  # type: ignore[arg-type]
    monkeypatch.setattr("deadhead.measure.replies.compare_replies", few)
    return Command(capfd)


@pytest.fixture(scope="module")
def same(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama once more."""
    folder = tmp_path_factory.mktemp("same") / "same"
    save_small_llama(folder, given / "prose.txt")
    return folder


def test_replies_of_models_side_by_side(given: Path, same: Path, command: Command) -> None:
    names = [str(given / "llama"), str(same), str(given / "model")]
    found = command.json("compare", *names, "--replies", "--show", 2)
    # Without --data no text is read.
    assert all("perplexity" not in values and "divergence" not in values for values in found["models"].values())
    expected = compare_replies(
        {name: deadhead.load(name) for name in names},
        {name: load_tokenizer(name) for name in names},
        **_ASKED,  # type: ignore[arg-type]
    )
    first, again, own = (found["models"][name]["replies"] for name in names)
    assert "divergence" not in first and first["count"] == 3
    assert (again["divergence"], again["agreement"]) == (pytest.approx(0, abs=1e-6), 1)
    assert own["divergence"] == pytest.approx(expected[names[2]].likeness.divergence, rel=1e-5)  # type: ignore[union-attr]
    for name, values in zip(names, (first, again, own), strict=True):
        assert (values["repetition"], values["tokens"]) == (expected[name].repetition, expected[name].tokens)
    shown = found["shown"]
    assert [each["prompt"] for each in shown] == ["hi", "Why?"]
    assert shown[0]["replies"] == {name: expected[name].replies[0].text for name in names}
    output = command("compare", *names, "--replies", "--show", 1)
    for words in ("KL on replies", "same token on replies", "100.0%", "repetition", "\nhi\n", f"{same}: "):
        assert words in output
    assert "perplexity" not in output and "Why?" not in output


def test_replies_of_one_model(given: Path, same: Path, command: Command) -> None:
    found = command.json("eval", given / "llama", "--replies")
    assert found.keys() == {"replies"} and found["replies"].keys() == {"repetition", "count", "tokens"}
    near = command.json("eval", given / "llama", "--replies", "--reference", same, "--data", given / "prose.txt")
    assert near["replies"] == {**found["replies"], "divergence": pytest.approx(0, abs=1e-6), "agreement": 1}
    assert near["reference"]["replies"] == found["replies"] and near["perplexity"] > 1
    output = command("eval", given / "llama", "--show", 1)
    assert output.startswith("llama: repetition ") and " in 3 replies of " in output and "\nhi\n" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task-limit", "3"), "--task-limit is for the tasks of --tasks, but none were given"),
        (("--tasks", "a,,b"), "--tasks takes names of tasks with commas between them, but got 'a,,b'"),
        (("--reference", "{model}"), "--reference names another model that --replies compares with"),
        (("--replies", "--reference", "{llama}"), "--reference names another model that --replies"),
        (("--replies", "--reference", "nowhere"), "nowhere"),
        ((), "A text was expected for a model of type llama"),
    ],
)
def test_what_does_not_fit_together(
    words: tuple[str, ...], message: str, given: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {name: given / name for name in ("llama", "model")}
    assert execute(["eval", str(given / "llama"), *(word.format(**names) for word in words)]) == 2
    output, errors = capfd.readouterr()
    assert message in errors and errors.count("\n") == 1 and output == ""


def test_a_missing_package_is_named(
    given: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deadhead.errors.is_installed", lambda *_: False)
    assert execute(["eval", str(given / "llama"), "--tasks", "hellaswag"]) == 2
    assert "--tasks needs lm_eval; install with: pip install 'deadhead[eval]'." in capfd.readouterr().err


@pytest.mark.slow
def test_tasks(given: Path, same: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in _QUESTIONS) + "\n")
    (tmp_path / "birds.yaml").write_text(_TASK.format(name="birds", data=tmp_path / "questions.jsonl"))
    found = command.json("eval", given / "llama", "--tasks", tmp_path / "birds.yaml")
    assert found.keys() == {"tasks"} and 0 <= found["tasks"]["birds"]["acc"]["value"] <= 1
    both: dict[str, Any] = command.json(
        "compare", given / "llama", same, "--tasks", tmp_path / "birds.yaml", "--task-limit", 2
    )["models"]
    assert all(values["tasks"]["birds"]["acc"]["value"] in (0, 0.5, 1) for values in both.values())
    output = command("eval", given / "llama", "--tasks", tmp_path / "birds.yaml")
    assert "birds" in output and f"{found['tasks']['birds']['acc']['value']:.4f}" in output
    assert "birds, acc" in command("compare", given / "llama", same, "--tasks", tmp_path / "birds.yaml")
