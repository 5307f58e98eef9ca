"""What the command line's tests share: checkpoints, texts, and what runs a command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deadhead.cli import execute
from deadhead.plans.plan import HeadPlan
from tests.small_runs import save_small_llama, save_small_model, write_prose


class Command:
    """Runs a command that must succeed, and returns what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *arguments: object) -> str:
        self.capfd.readouterr()
        code = execute([str(argument) for argument in arguments])
        output, errors = self.capfd.readouterr()
        assert (code, errors) == (0, "")
        return output

    def json(self, *arguments: object) -> dict[str, Any]:
        """Run a command with --json."""
        result = json.loads(self(*arguments, "--json"))
        assert isinstance(result, dict)
        return result


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a dense model of ours and a Llama made of it, and a plan for ours."""
    folder = tmp_path_factory.mktemp("given")
    text = write_prose(folder)
    save_small_model(folder / "model", text)
    save_small_llama(folder / "llama", text)
    HeadPlan(kept={0: (1, 2), 1: ()}, total={0: 4, 1: 4}).to_json(folder / "plan.json")
    return folder
