"""Commands take the fields of recipes as options, and their help shows the important ones first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deadhead.cli import execute, phases
from deadhead.training.recipes.fields import option_name
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, Recipe
from tests.cli.cases import recipe

_FIRST = (
    *(
        "--out",
        "--model",
        "--dry-run",
        "--resume",
        "--recover",
        "--fast",
        "--stream",
        "--max-memory",
        "--data",
        "--sparsity",
        "--params",
        "--flops",
        "--kv-cache",
        "--memory",
    ),
    *("--speedup", "--l0", "--criterion", "--freeze-weights", "--steps", "--batch-size", "--learning-rate"),
    *("--lora-rank", "--distill", "--help"),
)


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert execute([command, "--help"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    return output


@pytest.mark.parametrize("colors", [{}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1"}], ids=str)
def test_the_settings_that_people_need_first_come_first(
    colors: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, value in colors.items():
        monkeypatch.setenv(name, value)
    output = _help("prune", capsys)
    assert "\x1b" not in output and max(map(len, output.splitlines())) <= 80
    first, further = output.split("\nOptions:\n")[1].split("\nFurther settings:\n")
    assert tuple(re.findall(r"^  (--[a-z0-9-]+)", first, re.MULTILINE)) == _FIRST
    assert re.search(r"^  --gate-lr NUMBER +Learning rate of the gates' own", further, re.MULTILINE)
    assert re.search(r"^  --ranking <global\|layer> +Whether", further, re.MULTILINE)
    assert "-q, --quiet" in further and "[required]" in first
    assert "--hard" not in output


@pytest.mark.parametrize(
    ("command", "sections", "without"),
    [
        ("train", (ModelRecipe, DataRecipe, PhaseRecipe), {"--lora-rank", "--distill", "--distill-temperature"}),
        ("prune", (DataRecipe, PruneRecipe), {"--tokenizer", "--vocab-size"}),
        ("finetune", (DataRecipe, PhaseRecipe), {"--tokenizer", "--vocab-size"}),
    ],
)
def test_every_field_is_an_option(
    command: str, sections: tuple[type[Recipe], ...], without: set[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = {option_name(name, field) for section in sections for name, field in section.model_fields.items()}
    expected = (options | {"--seed"}) - without - {""}
    own = {"--out", "--model", "--resume", "--recipe", "--report-to", "--json", "--help", "--device", "--dtype"}
    own |= {
        "prune": {"--cut", "--dry-run", "--teacher", "--recover", "--fast", "--stream", "--max-memory"},
        "finetune": {"--teacher"},
    }.get(command, set())
    assert set(re.findall(r"^  (--[a-z0-9-]+)", _help(command, capsys), re.MULTILINE)) == expected | own


def test_what_is_given_changes_the_recipe_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "here").mkdir()
    recipe(prune={"flops": 0.5, "init": 1.0}, seed=3)(tmp_path / "here")
    seen: list[Any] = []
    monkeypatch.setattr(phases, "_run", lambda *given, **options: seen.append((given, options)))
    command = f"prune --model m --out o --recipe {tmp_path / 'here' / 'r.toml'} --params 0.7 --no-blocks --data text"
    command += " --adam-beta2 0.95 --text-column body --no-cut"
    assert execute(command.split()) == 0
    ((name, phase, out, model, text, seed, *_), options) = seen[0]
    assert (name, out, model, seed, options["cut"]) == ("prune", Path("o"), Path("m"), 3, False)
    assert (phase.params, phase.flops, phase.blocks, phase.adam_beta2, phase.init) == (0.7, None, False, 0.95, 1.0)
    assert (text.source, text.text_column) == ("text", "body")


@pytest.mark.parametrize("command", ["train", "prune", "finetune"])
def test_help_names_options_not_fields(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = _help(command, capsys)
    assert "`" not in output
    assert "gate_lr" not in output and "start_from" not in output
