"""A wheel of this checkout, installed where nothing of the checkout can be seen, is the whole package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build/ folder in the checkout would bring back files that are gone from it.
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    _run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with our wheel, in which our dependencies, but no editable deadhead, can be imported."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # A path in a .pth file comes after the environment's own, and the .pth files that lie there are not read.
    here = _run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    there = {sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")}
    (Path(here) / "dependencies.pth").write_text("\n".join(sorted(there)) + "\n", encoding="utf-8")
    return folder


def test_metadata_gives_ranges_and_the_constraints_pin_each(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(path))
    requirements = metadata.get_all("Requires-Dist", [])
    assert requirements
    # Markers may compare with ==; versions may not.
    assert [text for text in requirements if "==" in text.split(";")[0]] == []
    pinned = {_name(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {_name(text) for text in requirements} - {"deadhead"} <= pinned


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        f"deadhead/{path.relative_to(ROOT / 'src/deadhead').as_posix()}"
        for path in ROOT.glob("src/deadhead/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    recipes = {f"deadhead/recipes/{path.name}" for path in ROOT.glob("recipes/*") if path.is_file()}
    assert packed == files | recipes
    assert {"deadhead/py.typed", "deadhead/recipes/demo.toml"} <= packed


def test_the_installed_package_imports_and_finds_its_recipe(installed: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.metadata, importlib.resources, deadhead;"
        "print(deadhead.__file__, importlib.metadata.version('deadhead') == deadhead.__version__, sep='\\n');"
        "print((importlib.resources.files('deadhead.recipes') / 'demo.toml').read_text(encoding='utf-8'))"
    )
    place, same_version, recipe = _run(installed / "bin" / "python", "-c", program, cwd=tmp_path).split("\n", 2)
    assert Path(place).is_relative_to(installed)
    assert same_version == "True"
    assert recipe.strip() == (ROOT / "recipes" / "demo.toml").read_text(encoding="utf-8").strip()


def test_the_installed_command_helps(installed: Path, tmp_path: Path) -> None:
    text = _run(installed / "bin" / "deadhead", "--help", cwd=tmp_path)
    for command in ("demo", "run", "prune"):
        assert command in text
