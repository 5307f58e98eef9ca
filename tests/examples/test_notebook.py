"""The notebook runs, cell by cell, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples" / "prune_your_llm.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEADHEAD_QUICK_NOTEBOOK", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "prune-your-llm" / "small.gguf").stat().st_size > 10_000
    printed = [out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("perplexity:" in text and "→" in text for text in printed)


def test_it_is_kept_with_the_results_of_the_real_model() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "run it in full, without DEADHEAD_QUICK_NOTEBOOK"
    outputs = [out for cell in cells for out in cell.outputs]
    assert not any(out.output_type == "error" for out in outputs)
    assert any("image/png" in out.get("data", {}) for out in outputs)
    # 106 of SmolLM2's 134.5 million parameters are its blocks'.
    assert any("134,515,008 → 113," in out.get("text", "") for out in outputs)
