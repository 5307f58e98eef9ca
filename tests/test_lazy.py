"""The public names are there at once, load when they are used, and stay what they are whatever is imported first."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import deadhead


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_NOTHING_HEAVY = """
import sys
assert not {"torch", "transformers", "numpy", "datasets", "matplotlib"} & set(sys.modules), "heavy"
"""


def test_importing_loads_neither_torch_nor_transformers() -> None:
    _python("import deadhead; assert 'cut' in dir(deadhead) and deadhead.__version__" + _NOTHING_HEAVY)
    _python("import deadhead.training.recipes.recipe" + _NOTHING_HEAVY)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["prune", "--help"], ["bench", "--nonsense"]]
)
def test_help_and_wrong_options_need_nothing_heavy(arguments: list[str]) -> None:
    _python("import sys; from deadhead.cli import execute; execute(sys.argv[1:])" + _NOTHING_HEAVY, *arguments)


def test_every_public_name_is_there() -> None:
    assert len(deadhead.__all__) > 20
    for name in deadhead.__all__:
        assert getattr(deadhead, name) is not None
        assert name in dir(deadhead)
    imported = re.findall(r"import (\w+) as \1$", Path(deadhead.__file__).read_text("utf-8"), re.M)
    assert sorted(imported) == sorted(deadhead.__all__) == sorted(deadhead._HOME)
    with pytest.raises(AttributeError, match="nonsense"):
        deadhead.nonsense  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow
def test_functions_are_not_hidden_by_modules_of_theirs() -> None:
    code = """
import deadhead.cli.app, deadhead.training.runs.run, deadhead.cutting
import deadhead.measure.timing, deadhead.measure.evaluation
import deadhead
for name in deadhead.__all__:
    assert type(getattr(deadhead, name)).__name__ != "module", name
"""
    _python(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "import deadhead",
        "import transformers",
        "import transformers.models.auto",
    ],
)
def test_auto_classes_know_our_models_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    model = deadhead.models.AllAttentionForCausalLM(
        deadhead.models.AllAttentionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_persistent=3)
    )
    deadhead.save(model, tmp_path / "model")
    code = f"""
import sys
{first}
import deadhead
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "deadhead_all_attention"
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__module__)
"""
    assert _python(code, str(tmp_path / "model")).strip() == "deadhead.models.all_attention.modeling"
