"""Every command and every program in README.md and docs/ runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from torch.distributed import run

from tests.fork_server import fork_server

ROOT = Path(__file__).parents[1]
_DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# The README's programs train for minutes; here they do everything they say, with fewer steps and a smaller text.
_FEWER = [(r"steps=\d+", "steps=2"), (r'"stdlib"', '"json-source"'), (r"--scale-steps [\d.]+", "--scale-steps 0.01")]
# Their commands start as a user's do; others skip the seconds that imports take.
_IN_PROCESSES = ("README.md", "docs/distributed.md")
_BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def runnable_blocks(name: str, folder: Path) -> list[tuple[str, str]]:
    """Return language and code of the blocks of a document that can run here, for a folder that is made ready."""
    is_readme = name == "README.md"
    if is_readme:
        # What _FEWER puts in place of the standard library.
        (folder / "json-source").symlink_to(Path(__import__("json").__path__[0]))
    found = []
    for language, code in _BLOCK.findall((ROOT / name).read_text(encoding="utf-8")):
        if language == "bash" and re.search(r"^make ", code, re.MULTILINE):
            continue  # the two commands of the README: `make test` is what runs this
        # The one is built by `make llama-cpp` only, the other wants an environment of its own.
        if any(library in code and find_spec(library) is None for library in ("llama_cpp", "llmcompressor")):
            continue
        for pattern, replacement in _FEWER if is_readme else ():
            code = re.sub(pattern, replacement, code)
        found.append((language, code))
    return found


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Return a folder of a `deadhead` that starts at once."""
    # Addresses of sockets are short.
    with TemporaryDirectory() as folder, fork_server(Path(folder)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", _DOCUMENTS)
def test_commands_run(name: str, tmp_path: Path, programs: Path) -> None:
    """Run each block; one that fails shows what it printed."""
    is_forked = name not in _IN_PROCESSES
    environment = _environment(programs) if is_forked else _environment()
    text = (ROOT / name).read_text(encoding="utf-8")
    found = len(_BLOCK.findall(text))
    assert found == len(re.findall(r"^ *```(?:bash|python)", text, re.MULTILINE)), f"{name}: not all are found"
    for language, code in runnable_blocks(name, tmp_path):
        python = [str(programs / "run-python")] if is_forked else [sys.executable, "-c"]
        command = ["bash", "-e", "-c", code] if language == "bash" else [*python, code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{code}\n--- printed\n{result.stdout}\n{result.stderr}"


def _environment(*first: Path) -> dict[str, str]:
    return os.environ | {
        "PATH": os.pathsep.join([*map(str, first), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }


# Stands for Slurm's: starts the command as on two machines.
_SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


@pytest.mark.full
def test_the_slurm_script_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    """Two launchers on this machine find each other, train together, and do so again with the same line."""
    script, *others = [code for _, code in runnable_blocks("docs/distributed.md", tmp_path) if "#SBATCH" in code]
    assert not others
    for name, stand_in in (("srun", _SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (tmp_path / name).write_text(stand_in)
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_NODELIST": "localhost", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "1", "JOB_ID": str(os.getpid())}
    environment = _environment(tmp_path) | {f"SLURM_{name}": value for name, value in slurm.items()}
    (tmp_path / "text").write_text("One line of a text that is learned by heart. " * 40)
    command = "--data text --layers 1 --width 16 --heads 2 --segment-length 8 --memory-length 8 --steps 2"
    lines = f"{script}\nbash -e deadhead.sbatch train {command} --out trained --quiet"
    result = subprocess.run(
        ["bash", "-e", "-c", lines], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained: heads a layer 2") == 1
    assert (tmp_path / "trained" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_lines_for_real_machines_are_torchruns(tmp_path: Path) -> None:
    """What needs several machines is understood by torchrun, and is the same on each but for its number."""
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines() if line.startswith("torchrun --nnodes")]
    found = [run.get_args_parser().parse_args(line[1:]) for line in lines]
    assert [arguments.node_rank for arguments in found] == [0, 1]
    assert {(a.nnodes, a.rdzv_backend, a.rdzv_endpoint, a.training_script) for a in found} == {
        ("2", "static", "node0:29500", "deadhead")
    }
    script = found[0].training_script_args
    assert script == found[1].training_script_args and (ROOT / script[1]).exists()
    command = [sys.executable, "-m", "deadhead", *script[:1], *script[2:], "--help"]
    assert subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True).returncode == 0


@pytest.mark.parametrize("path", _DOCUMENTS)
def test_links_lead_somewhere(path: str) -> None:
    """Relative links and pictures exist."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / path).parent / target).exists(), f"{path} links to {target}"


def _build_site(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a copy of the repository as `make docs` does."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=root,
        env=_environment() | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


class _Addresses(HTMLParser):
    """Collects what a browser loads with a page, but for the pages that it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get("href") or "")
        if tag != "a":
            self.found += [value for name in ("src", "srcset", "data", "poster") if (value := values.get(name))]


@pytest.mark.slow
def test_the_site_needs_no_other_host(tmp_path: Path) -> None:
    """It builds without a warning; no page and no style sheet names another host for what a browser loads."""
    built = _build_site(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix(): path for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "cli.html", "api/prune.html", "contributing.html", "changelog.html"} <= pages.keys()
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        addresses = _Addresses()
        addresses.feed(text)
        assert any(address.endswith(".js") for address in addresses.found), f"{name}: the test finds no script"
        styles = re.findall(r"url\(([^)]*)\)|@import ([^;]*)", text)
        outside = [one for one in (*addresses.found, *map("".join, styles)) if re.match(r"[\"']?(https?:)?//", one)]
        assert not outside, f"{name} loads {outside}"
        assert "arithmatex" not in text, f"{name} has an equation that is not MathML"
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path
    assert "<math" in pages["how_it_works.html"].read_text(encoding="utf-8")


@pytest.mark.slow
def test_mistakes_fail_the_build_of_the_site(tmp_path: Path) -> None:
    """Broken anchors, lists that are none, names that no page shows, and those without a docstring."""
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)

    def change(name: str, old: str, new: str) -> None:
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, name
        path.write_text(text.replace(old, new), encoding="utf-8")

    change(
        "docs/which.md",
        "# Which option?\n",
        "# Which option?\n\n[nowhere](index.md#nowhere)\n\n- one\n  - two\n\nText:\n- three\n",
    )
    change("docs/api/gates.md", "::: deadhead.gates_of\n", "")
    change("src/deadhead/attaching.py", '    """Remove the gates, so ', '    b"""Remove the gates, so ')
    built = _build_site(tmp_path, tmp_path / "site")
    assert built.returncode == 1
    for sentence in (
        "does not contain an anchor '#nowhere'",
        "indent the items of a list in a list by four spaces:   - two",
        "leave an empty line before this item of a list: - three",
        "deadhead.gates_of is public, but no page in docs/api shows it",
        "deadhead.detach has no docstring",
    ):
        assert sentence in built.stderr, built.stderr
    assert built.stderr.count("WARNING") == 5, built.stderr


def test_the_picture_of_the_pipeline_is_current() -> None:
    """If it is not, `python docs/pipeline.py` draws it."""
    drawn = runpy.run_path(str(ROOT / "docs" / "pipeline.py"))
    assert drawn["PICTURE"].read_text(encoding="utf-8") == drawn["picture"]()
