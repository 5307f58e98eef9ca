"""What the tables of bad input share: a case, what prepares the folder it runs in, and how it must end."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import MambaConfig, MambaForCausalLM

from deadhead.cli import execute
from deadhead.training.recipes.reading import to_toml
from tests.small_runs import small_recipe, tree


@dataclass(frozen=True)
class Case:
    """A command line, what its sentence must match, and how the folder it runs in is prepared."""

    command: str
    message: str
    prepare: Callable[[Path], object] = lambda folder: None


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def folder_of(name: str, file: str = "letter.txt") -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        (folder / name).mkdir()
        (folder / name / file).write_text("dear")

    return prepare


def damaged(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        shutil.copytree(folder.parent / "given" / "model", folder / "damaged")
        # As in a checkpoint that others wrote: by its checksums every change would be seen.
        (folder / "damaged" / "SHA256SUMS").unlink()
        change(folder / "damaged")

    return prepare


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def config(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def other_architecture(folder: Path) -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=8, num_hidden_layers=1))
    model.save_pretrained(folder / "mamba")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / "given" / "model" / name, folder / "mamba")


def recipe(**sections: object) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        recipe = small_recipe(folder.parent / "given" / "prose.txt", **sections)
        (folder / "r.toml").write_text(to_toml(recipe))

    return prepare


def edited(old: str, new: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        recipe()(folder)
        text = (folder / "r.toml").read_text()
        assert old in text
        (folder / "r.toml").write_text(text.replace(old, new))

    return prepare


def plan(kept: str, total: str = '{"0": 4, "1": 4}', unit: str = "head") -> Callable[[Path], object]:
    return write("p.json", f'{{"version": 1, "unit": "{unit}", "total": {total}, "kept": {kept}}}')


def two(*prepares: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [prepare(folder) for prepare in prepares]


def require_one_sentence(
    case: Case, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run a case: exit code 2, one sentence, no traceback, nothing written.

    Args:
        case: what to run.
        given: folder of what all cases are given.
        tmp_path: of the test.
        monkeypatch: of the test.
        capfd: of the test.
    """
    (tmp_path / "given").symlink_to(given)
    folder = tmp_path / "here"
    folder.mkdir()
    case.prepare(folder)
    monkeypatch.chdir(folder)
    names = {
        "text": given / "prose.txt",
        "model": given / "model",
        "llama": given / "llama",
        "plan": given / "plan.json",
        "out": "out",
        "name": "nothing\nat all",
        "escape": "\x1b[2J",
        "null": "a\0b",
    }
    before, given_before = tree(folder), tree(given)
    capfd.readouterr()
    code = execute([word.format(**names) for word in case.command.split()])
    output, errors = capfd.readouterr()
    assert code == 2, errors
    assert output == ""
    assert errors.startswith("deadhead: ")
    assert errors.endswith((".\n", "?\n"))
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    assert re.search(case.message, errors), errors
    assert tree(folder) == before
    assert tree(given) == given_before
