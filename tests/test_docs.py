"""Every command and every program in README.md and docs/ runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The README's programs train for minutes; here they do everything they say, with fewer steps and a smaller text.
_FEWER = [(r"steps=\d+", "steps=2"), (r'"stdlib"', '"json-source"'), (r"--scale-steps [\d.]+", "--scale-steps 0.01")]
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _blocks(path: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_commands_run(name: str, tmp_path: Path) -> None:
    """Run each block; one that fails shows what it printed."""
    json_source = Path(__import__("json").__path__[0])
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    blocks = _blocks(ROOT / name)
    if name not in ("docs/method.md", "docs/architectures.md"):
        assert blocks, f"{name} has no commands, or the test does not find them"
    if name == "README.md":
        (tmp_path / "json-source").symlink_to(json_source)  # what _FEWER puts in place of the standard library
    for language, code in blocks:
        if language == "bash" and re.search(r"^make ", code, re.MULTILINE):
            continue  # the two commands of the README: `make test` is what runs this
        if "llama_cpp" in code and find_spec("llama_cpp") is None:
            continue  # built by `make llama-cpp` only
        if name == "README.md":
            for pattern, replacement in _FEWER:
                code = re.sub(pattern, replacement, code)
        command = ["bash", "-e", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{code}\n--- printed\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("path", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(path: str) -> None:
    """Relative links and pictures exist."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), f"{path} links to {target}"
