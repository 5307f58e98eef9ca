"""What every test stands on: no network, no progress bars, one thread per worker, and the reference tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Set before torch and the Hugging Face libraries are imported, as they read them once. Processes of tests inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    TQDM_DISABLE="1",
    TRANSFORMERS_VERBOSITY="error",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own; with torch's usual threads they would wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("This test needs a GPU, and torch sees none.")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Return the folder of the tensors that the paper authors' released code computed."""
    folder = Path(os.environ.get("DEADHEAD_REFERENCE_DIR") or ROOT.parent / "shared" / "peer")
    if not folder.is_dir():
        pytest.skip(
            f"There are no reference tensors at {folder}; set DEADHEAD_REFERENCE_DIR to the folder that holds them."
        )
    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of 2 layers × 4 heads of which half go, with its control.

    Tests share it, so they change a copy only.
    """
    from deadhead.training.runs.run import Run
    from tests.small_runs import small_recipe, write_prose

    folder = tmp_path_factory.mktemp("runs") / "first"
    text = write_prose(folder.parent.parent)
    phases: dict[str, Any] = {name: {"eval_every": 2, "eval_tokens": 50} for name in ("train", "finetune")}
    prune = {"sparsity": 0.5, "track_difference": True, "eval_every": 2, "eval_tokens": 50}
    recipe = small_recipe(text, prune=prune, control=True, **phases)
    Run.start(recipe, folder).execute()
    return folder
