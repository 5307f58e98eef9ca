"""What tests of single phases begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import save_small_llama, save_small_model, write_prose


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text, a Llama and a model of ours."""
    folder = tmp_path_factory.mktemp("one_call")
    text = write_prose(folder)
    save_small_llama(folder / "llama", text)
    save_small_model(folder / "ours", text)
    return folder
