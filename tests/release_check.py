"""Builds what would be released, installs it into empty environments, and runs the README there: make release-check.

Both distributions are built from a copy of what git tracks, checked by twine, and installed beside the dependencies at
the versions of `requirements/core.txt`. Of the README every block in Python and bash runs, shortened as in
`tests/test_docs.py`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.test_docs import ROOT, runnable_blocks

# What a distribution may have in bytes: nothing but code and short text belongs in it.
_MOST = 2_000_000
# What a source distribution holds beside src/: what setuptools writes, and what a wheel is made of.
_BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}


def _run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command, and end with what it printed if it fails."""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{shlex.join(map(str, command))[:500]}\n{done.stdout}\n{done.stderr}\nfailed in {cwd}")
    return done.stdout


def _build(folder: Path) -> list[Path]:
    """Return the wheel and the source distribution, built from a copy of the files that git tracks."""
    source = folder / "source"
    source.mkdir()
    tracked = _run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    archive = subprocess.run(
        ["tar", "--create", "--null", "--files-from=-"],
        cwd=ROOT,
        input="\0".join(filter(None, tracked)).encode(),
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "--extract"], cwd=source, input=archive.stdout, check=True)
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    found = sorted((folder / "dist").iterdir(), reverse=True)
    if {path.suffix for path in found} != {".gz", ".whl"}:
        sys.exit(f"A wheel and a source distribution were expected, but got {', '.join(path.name for path in found)}.")
    for path in found:
        if path.stat().st_size > _MOST:
            sys.exit(f"{path.name} has {path.stat().st_size:,} bytes; at most {_MOST:,} were expected.")
        if path.suffix == ".gz":
            _check_contents(path, tracked)
    _run(sys.executable, "-m", "twine", "check", "--strict", *found, cwd=folder)
    return found


def _check_contents(distribution: Path, tracked: list[str]) -> None:
    """Check that a source distribution holds every tracked file of src/, and beside it what it is built by alone."""
    with tarfile.open(distribution) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    expected = {name for name in tracked if name.startswith("src/")} | _BESIDE
    if names != expected:
        what = "what was not expected" if names - expected else "not all that was expected"
        sys.exit(f"{distribution.name} holds {what}: {', '.join(sorted(names ^ expected)[:10])}.")


def _installed(distribution: Path, folder: Path, pip_args: list[str]) -> Path:
    """Return the programs of a new environment that holds a distribution and what it needs."""
    _run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    _run(*pip, "--no-deps", *pip_args, "--requirement", ROOT / "requirements" / "core.txt", cwd=folder)
    _run(*pip, "--no-deps", *pip_args, distribution, cwd=folder)
    _run(folder / "bin" / "python", "-m", "pip", "check", cwd=folder)
    return folder / "bin"


def _run_readme(programs: Path, folder: Path) -> int:
    """Run the README's blocks with an environment's programs, in an empty folder; return how many there were."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(programs), environment["PATH"]])
    blocks = runnable_blocks("README.md", folder)
    for language, code in blocks:
        command = ["bash", "-e", "-c", code] if language == "bash" else [programs / "python", "-c", code]
        _run(*command, cwd=folder, environment=environment)
    return len(blocks)


def main() -> None:
    """Check a release, and say in one line what was checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pip-args", default="", help="further arguments of pip install")
    pip_args = shlex.split(parser.parse_args().pip_args)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        told = []
        for number, distribution in enumerate(_build(folder)):
            programs = _installed(distribution, folder / f"environment-{number}", pip_args)
            version = _run(programs / "deadhead", "--version", cwd=folder).split()[-1]
            if f"-{version}" not in distribution.name:
                sys.exit(f"{distribution.name} calls itself version {version}.")
            (place := folder / f"readme-{number}").mkdir()
            size, blocks = distribution.stat().st_size, _run_readme(programs, place)
            told.append(f"{distribution.name} ({size:,} bytes, {blocks} blocks of the README)")
    print(f"Built, checked by twine, installed and run in {time.monotonic() - began:.0f} s: {', '.join(told)}.")


if __name__ == "__main__":
    main()
