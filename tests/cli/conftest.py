"""Checkpoints and texts that the command line's tests share, and what a command leaves changed in the process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging as transformers_logging

from deadhead.plan import HeadPlan
from tests.small import save_small_llama, save_small_model, write_prose


@pytest.fixture(autouse=True)
def same_process() -> Iterator[None]:
    """Undo what a command changes for the whole process, which is its own where a user runs it."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_bars = are_progress_bars_disabled()
    with warnings.catch_warnings():
        yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()
    if not hub_bars:
        enable_progress_bars()


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a dense model of ours and a Llama made of it, and a plan for ours."""
    folder = tmp_path_factory.mktemp("given")
    text = write_prose(folder)
    save_small_model(folder / "model", text)
    save_small_llama(folder / "llama", text)
    HeadPlan(kept={0: (1, 2), 1: ()}, total={0: 4, 1: 4}).to_json(folder / "plan.json")
    return folder
