"""Checkpoints and texts that the command line's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from deadhead.plans.plan import HeadPlan
from tests.small_runs import save_small_llama, save_small_model, write_prose


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a dense model of ours and a Llama made of it, and a plan for ours."""
    folder = tmp_path_factory.mktemp("given")
    text = write_prose(folder)
    save_small_model(folder / "model", text)
    save_small_llama(folder / "llama", text)
    HeadPlan(kept={0: (1, 2), 1: ()}, total={0: 4, 1: 4}).to_json(folder / "plan.json")
    return folder
