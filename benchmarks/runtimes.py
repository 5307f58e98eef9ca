"""Is a pruned model faster where models are served? PyTorch, ONNX Runtime, OpenVINO and llama.cpp.

The models are a dense Llama-like model and one that is cut by a plan with different numbers of heads and hidden units
in each layer, or two models that you name. They are exported for each installed runtime. Then prefill and decoding of
one text are timed, interleaved, with the same number of threads. "Allowed" is the ratio of their FLOPs; efficiency is
the part of it that was reached.

    python benchmarks/runtimes.py [--quick] [--repeats N] [--threads N] [--models DENSE CUT] [--only RUNTIME …]
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from _all_attention import machine
from latency import random_plan
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from deadhead.errors import is_installed
from deadhead.export import flat
from deadhead.export.exporting import export_model
from deadhead.measure.timing import efficiency

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
QUICK = {**SIZES, "vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3}
GGUF_TYPES = ("f32", "f16", "q8_0")
RUNTIMES = ("PyTorch", "onnxruntime", "openvino", "llama.cpp")

Prefill = Callable[[np.ndarray], None]
# Reads one more token.
Step = Callable[[int], None]


def in_torch(model: PreTrainedModel) -> tuple[Prefill, Step]:
    cache: dict[str, Any] = {}

    def read(ids_T: np.ndarray, past: Any) -> None:
        with torch.inference_mode():
            cache["past"] = model(
                input_ids=torch.from_numpy(ids_T)[None], past_key_values=past, use_cache=True, logits_to_keep=1
            ).past_key_values

    return lambda ids_T: read(ids_T, None), lambda token: read(np.array([token]), cache["past"])


def in_flat(path: Path, runtime: str, threads: int) -> tuple[Prefill, Step]:
    session = flat.FlatSession(path, runtime, threads=threads)

    def prefill(ids_T: np.ndarray) -> None:
        session.forget()
        session.read(ids_T[None])

    def step(token: int) -> None:
        session.read(np.array([[token]]))

    return prefill, step


def in_llama_cpp(path: Path, threads: int, length: int) -> tuple[Prefill, Step]:
    import llama_cpp as binding

    model = binding.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )

    def prefill(ids_T: np.ndarray) -> None:
        model.reset()
        model.eval(ids_T.tolist())

    return prefill, lambda token: model.eval([token])


def made(sizes: dict[str, int]) -> dict[str, PreTrainedModel]:
    """Return a random model, dense and cut."""
    torch.manual_seed(0)
    make: Any = LlamaConfig
    dense = LlamaForCausalLM(make(**sizes)).eval()
    gates = deadhead.attach(dense, blocks=True)
    plan = random_plan(gates, random.Random(1))
    deadhead.detach(dense)
    return {"dense": dense, "cut": deadhead.cut(copy.deepcopy(dense), plan)}


def main() -> None:
    """Export, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and few repetitions")
    parser.add_argument("--repeats", type=int, default=None, help="measured repetitions (12; quick 2)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--models", type=Path, nargs=2, metavar=("DENSE", "CUT"), help="two models: folders or GGUF files"
    )
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument(
        "--types", nargs="+", choices=GGUF_TYPES, default=GGUF_TYPES, help="types of llama.cpp's weights"
    )
    parser.add_argument("--length", type=int, default=None, help="tokens of the prompt (256; quick 16)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    repeats = args.repeats or (2 if args.quick else 12)
    length, steps = args.length or (16 if args.quick else 256), 4 if args.quick else 24
    torch.set_num_threads(args.threads)
    if args.models:
        models = dict(zip(("dense", "cut"), map(deadhead.load, args.models), strict=True))
    else:
        models = made(QUICK if args.quick else SIZES)
    costs = {name: deadhead.model_cost(model, length=length) for name, model in models.items()}
    console = Console(width=110)
    console.print(machine())
    console.print(
        f"heads {costs['cut'].heads} of {costs['dense'].heads[0]}, hidden units "
        f"{costs['cut'].hidden_units}; parameters "
        f"{costs['dense'].parameters:,} → {costs['cut'].parameters:,}; batch 1, {args.threads} threads, prompt {length}"
    )
    with tempfile.TemporaryDirectory() as folder:
        wanted = [name for name in args.only if name == "PyTorch" or is_installed(name.replace(".", "_"))]
        runs, sizes = _exported(models, Path(folder), args.threads, length + steps, wanted, args.types)
        seconds = _time(runs, length, steps, repeats)
    allowed = costs["dense"].flops_per_token / costs["cut"].flops_per_token
    table = Table("runtime", "MB", "prefill tok/s", "×", "eff.", "decode tok/s", "×", "eff.")
    for runtime in dict.fromkeys(name for name, _ in runs):
        row = ["/".join(f"{sizes[runtime, name] / 1e6:.0f}" for name in models)]
        for index, tokens in ((0, length), (1, steps)):
            slow, fast = (seconds[runtime, name][index] for name in models)
            row += [f"{tokens / slow:,.0f} → {tokens / fast:,.0f}", f"{slow / fast:.2f}"]
            row.append(f"{efficiency(slow, fast, costs['dense'].flops_per_token, costs['cut'].flops_per_token):.2f}")
        table.add_row(runtime, *row)
    console.print(table)
    console.print(f"FLOPs allow ×{allowed:.2f}; medians of {repeats}, interleaved")


def _exported(
    models: dict[str, PreTrainedModel],
    folder: Path,
    threads: int,
    length: int,
    runtimes: Sequence[str],
    types: Sequence[str],
) -> tuple[dict[tuple[str, str], tuple[Prefill, Step]], dict[tuple[str, str], int]]:
    """Export every model for every runtime; return functions that run them, and bytes on disk."""
    runs: dict[tuple[str, str], tuple[Prefill, Step]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for name, model in models.items():
        if "PyTorch" in runtimes:
            runs["PyTorch", name] = in_torch(model)
            sizes["PyTorch", name] = 4 * deadhead.model_cost(model).parameters
        for runtime, form, file in (
            ("onnxruntime", "onnx", "model.onnx"),
            ("openvino", "openvino", "openvino_model.xml"),
        ):
            if runtime in runtimes:
                found = export_model(model, folder / f"{name}-{form}", to=form)
                runs[runtime, name] = in_flat(found.path / file, runtime, threads)
                sizes[runtime, name] = found.num_bytes
        for kind in types if "llama.cpp" in runtimes else ():
            found = export_model(model, folder / f"{name}-{kind}.gguf", to="gguf", kind=kind)
            runs[f"llama.cpp {kind}", name] = in_llama_cpp(found.path, threads, length)
            sizes[f"llama.cpp {kind}", name] = found.num_bytes
    return runs, sizes


def _time(
    runs: dict[tuple[str, str], tuple[Prefill, Step]], length: int, steps: int, repeats: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the median seconds of prefill and of all decoding steps, with all runs interleaved."""
    ids_T = np.random.default_rng(0).integers(0, 500, length)
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {key: ([], []) for key in runs}
    for repetition in range(repeats + 1):
        for key, (prefill, step) in runs.items():
            begin = time.perf_counter()
            prefill(ids_T)
            middle = time.perf_counter()
            for token in range(steps):
                step(token)
            end = time.perf_counter()
            if repetition:
                found[key][0].append(middle - begin)
                found[key][1].append(end - middle)
    return {key: (statistics.median(first), statistics.median(second)) for key, (first, second) in found.items()}


if __name__ == "__main__":
    main()
