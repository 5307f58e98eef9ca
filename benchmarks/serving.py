"""Is a pruned model faster in vLLM, which serves many texts at once, with the checkpoint as it is on disk?

The models are those of `runtimes.py`, dense and cut, or two that you name. vLLM runs the dense model by its own code,
and by transformers' code as it runs the cut one. The first is what people use; the second shows the cost of that route.
vLLM reads a batch of prompts, and continues a batch of short prompts. The models run in turn, one process after
another.

    python benchmarks/serving.py [--quick] [--rounds N] [--models DENSE CUT] [--python .venv-vllm/bin/python]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import transformers
from _all_attention import machine
from rich.console import Console
from rich.table import Table
from runtimes import QUICK, SIZES, made

import deadhead
from deadhead.checkpoints import checkpoint
from deadhead.export import vllm
from deadhead.measure.timing import efficiency

# What vLLM runs a model by.
OWN, TRANSFORMERS = "vllm", "transformers"


def job(path: Path, code: str, vocabulary: int, *, batch: int, prompt: int, tokens: int, repeats: int) -> Any:
    """Return the job of continuing a batch of random prompts by a number of tokens."""
    draw = random.Random(0)
    prompts = [[draw.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)]
    engine = {
        "dtype": "float32",
        "model_impl": code,
        "max_model_len": prompt + tokens,
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(batch * prompt, prompt + tokens),
        # The same prompts are read several times.
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    return {
        "path": str(path),
        "prompts": prompts,
        "max_tokens": tokens,
        "likeliest": 0,
        "repeats": repeats,
        "engine": engine,
    }


def main() -> None:
    """Save, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few repetitions")
    parser.add_argument("--rounds", type=int, default=None, help="number of rounds; each runs every model (3; quick 1)")
    parser.add_argument("--models", type=Path, nargs=2, metavar=("DENSE", "CUT"), help="two checkpoint folders")
    parser.add_argument("--python", type=Path, default=None, help="Python of an environment with vLLM")
    parser.add_argument("--batch", type=int, default=8, help="texts served at once")
    args = parser.parse_args()
    console = Console(width=110)
    python = vllm.find_python(args.python)
    if python is None:
        console.print("vLLM is not installed: make vllm, then --python .venv-vllm/bin/python.")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rounds, repeats = args.rounds or (1 if args.quick else 3), 1 if args.quick else 4
    names = ("dense", "cut")
    models = dict(zip(names, map(deadhead.load, args.models), strict=True)) if args.models else None
    models = models or made(QUICK if args.quick else SIZES)
    costs = {name: deadhead.model_cost(model) for name, model in models.items()}
    vocabulary = models["dense"].config.vocab_size
    work = {
        "prefill": {"prompt": 16 if args.quick else 256, "tokens": 1},
        "decode": {"prompt": 8, "tokens": 4 if args.quick else 48},
    }
    runs = [("dense", OWN), ("dense", TRANSFORMERS), ("cut", TRANSFORMERS)]
    seconds: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / name for name in names}
        for name, model in models.items():
            checkpoint.save(model, paths[name])
        asked = {
            (name, code, kind): job(paths[name], code, vocabulary, batch=args.batch, repeats=repeats, **sizes)
            for kind, sizes in work.items()
            for name, code in runs
        }
        for _ in range(rounds):
            found, version = vllm.run(python, list(asked.values()))
            for key, each in zip(asked, found, strict=True):
                seconds.setdefault(key, []).extend(each["seconds"])
    median = {key: statistics.median(values) for key, values in seconds.items()}
    flops = [costs[name].flops_per_token for name in names]
    console.print(machine())
    console.print(f"vLLM {version}, {args.batch} texts at once, medians of {rounds} × {repeats}")
    table = Table("model, by whose code", "prefill tok/s", "×", "eff.", "decode tok/s", "×", "eff.")
    for name, code in runs:
        row = [f"{name}, {'vLLM’s' if code == OWN else 'transformers’'}"]
        for kind, sizes in work.items():
            tokens = args.batch * (sizes["prompt"] if kind == "prefill" else sizes["tokens"])
            own, slow = median[name, code, kind], median["dense", OWN, kind]
            row += [f"{tokens / own:,.0f}", f"{slow / own:.2f}"]
            row.append(f"{efficiency(slow, own, *flops):.2f}" if name == "cut" else "")
        table.add_row(*row)
    console.print(table)
    console.print(f"FLOPs allow ×{flops[0] / flops[1]:.2f}, against the dense model by vLLM's code")


if __name__ == "__main__":
    main()
