"""Every command and every program in README.md and docs/ runs, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
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


def _blocks(path: Path) -> list[tuple[str, str]]:
    return _BLOCK.findall(path.read_text(encoding="utf-8"))


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
    json_source = Path(__import__("json").__path__[0])
    is_forked = name not in _IN_PROCESSES
    environment = _environment(programs) if is_forked else _environment()
    blocks = _blocks(ROOT / name)
    if name not in ("docs/method.md", "docs/architectures.md"):
        assert blocks, f"{name} has no commands, or the test does not find them"
    if name == "README.md":
        (tmp_path / "json-source").symlink_to(json_source)  # what _FEWER puts in place of the standard library
    for language, code in blocks:
        if language == "bash" and re.search(r"^make ", code, re.MULTILINE):
            continue  # the two commands of the README: `make test` is what runs this
        # The one is built by `make llama-cpp` only, the other wants an environment of its own.
        if any(library in code and find_spec(library) is None for library in ("llama_cpp", "llmcompressor")):
            continue
        if name == "README.md":
            for pattern, replacement in _FEWER:
                code = re.sub(pattern, replacement, code)
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
    script, *others = [code for _, code in _blocks(ROOT / "docs" / "distributed.md") if "#SBATCH" in code]
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
