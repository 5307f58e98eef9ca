"""One phase on its own: what it leaves, and what it refuses to go on with. Kills are in tests/cli/test_commands.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from deadhead import InputError, load
from deadhead.disk.files import write_json
from deadhead.disk.reading import read_json
from deadhead.training.recipes.reading import changed
from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe
from deadhead.training.runs.single import Options, run_single
from tests.small_runs import save_small_model, write_prose

_PHASE = PhaseRecipe(steps=2, batch_size=2)


def test_nothing_to_resume(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model = save_small_model(tmp_path / "dense", text)
    with pytest.raises(InputError, match="nothing to resume"):
        data = DataRecipe(source=str(text))
        run_single("finetune", _PHASE, model, data, Options(out=tmp_path / "out", resume=True))
    assert not (tmp_path / "out").exists()


def test_other_settings_are_not_resumed(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    model = save_small_model(tmp_path / "dense", text)
    data, out, work = DataRecipe(source=str(text)), tmp_path / "out", tmp_path / "out.work"
    result = run_single("finetune", _PHASE, model, data, Options(out=out))
    assert result.steps == 2
    assert not work.exists()
    assert load(out).config.num_hidden_layers == load(model).config.num_hidden_layers
    write_json(work / "settings.json", {"phase": "finetune"})
    with pytest.raises(InputError, match="other settings"):
        run_single("finetune", changed(_PHASE, steps=3), model, data, Options(out=out, resume=True))
    assert read_json(work / "settings.json", what="settings") == {"phase": "finetune"}
