"""How closely do exported models agree with PyTorch, in each runtime and for each type of weights?

Small models of every family, with random weights, are cut by random plans of heads and blocks, and exported in every
way. The program prints the largest difference of logits and the fewest equal greedy tokens. Random weights are
the worst case, because nothing has trained their logits apart.

    python benchmarks/agreement.py [--quick] [--plans N]
    python benchmarks/agreement.py --types onnx|padded [TYPE …]

The second form tries every type of language model in transformers, or the types you name, in one export format.
"""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from _all_attention import machine
from _tiny_models import CAUSAL_TYPES, scramble, tiny_model
from latency import random_plan
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deadhead
from deadhead.errors import UnsupportedModel, is_installed
from deadhead.export.exporting import Exported

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": _BIASES,
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 8},
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 256},
    "deadhead_all_attention": {"num_persistent": 64, "memory_length": 16, "segment_length": 16},
}
_MEMORY = 10 << 30
_GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_k_m", "q4_k_m")


def cut_model(family: str, seed: int) -> PreTrainedModel:
    """Return a random model of a family, cut by a random plan of heads and blocks."""
    kind = family.split(",")[0]
    known = set(AutoConfig.for_model(kind).to_dict()) | ({"head_dim"} if kind == "qwen2" else set())
    fields = {name: value for name, value in _SIZES.items() if name in known} | _FAMILIES[family]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields))
    scramble(model, seed)
    gates = deadhead.attach(model, blocks=True)
    plan = random_plan(gates, random.Random(seed))
    deadhead.detach(model)
    return deadhead.cut(model, plan).eval()


def exports(model: PreTrainedModel, folder: Path, *, traced: bool) -> Iterator[tuple[str, Exported]]:
    """Yield a model's exports, each with its name for the table."""
    ways: list[tuple[str, str, str | None]] = [("padded", "padded", None)]
    if is_installed("llama_cpp"):
        ways += [(f"llama.cpp {kind}", "gguf", kind) for kind in _GGUF_TYPES]
    if traced:
        runtimes = [name for name in ("onnxruntime", "openvino") if is_installed(name)]
        ways += [(name, name.removesuffix("runtime"), None) for name in runtimes]
    for name, form, kind in ways:
        out = folder / (name.replace(" ", "-") + (".gguf" if form == "gguf" else ""))
        try:
            yield name, deadhead.export_model(model, out, to=form, kind=kind)
        except UnsupportedModel:
            continue


def outcome(kind: str, form: str) -> str:
    """Cut a tiny model of a type by a random plan, and return "works" or the reason why not."""
    try:
        model = tiny_model(kind)
        gates = deadhead.attach(model)
    except Exception as error:  # it can't be built, or can't be cut: not of this program's making
        return f"not cut: {type(error).__name__}"
    plan = random_plan(gates, random.Random(0))
    deadhead.detach(model)
    try:
        deadhead.cut(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            deadhead.export_model(model, Path(folder) / "out", to=form)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
    return "works"


def try_types(form: str, kinds: list[str]) -> None:
    """Print every type with its outcome, and the number of types for each outcome."""
    # Some types build models of many gigabytes, whatever sizes they are given.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    counts: Counter[str] = Counter()
    for kind in kinds or CAUSAL_TYPES:
        found = outcome(kind, form)
        counts[found.split(":")[0]] += 1
        print(f"{kind}: {found}", flush=True)
    print(dict(counts))


def main() -> None:
    """Cut, export, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--types", choices=("onnx", "padded"), help="try every type of transformers in this export format"
    )
    parser.add_argument("kinds", metavar="TYPE", nargs="*", help="the types to try with --types (default: all)")
    parser.add_argument("--quick", action="store_true", help="two families, one plan each")
    parser.add_argument(
        "--plans", type=int, default=None, help="plans of each family (8; quick 1); the first is traced too"
    )
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.types:
        try_types(args.types, args.kinds)
        return
    families = list(_FAMILIES)[:2] if args.quick else list(_FAMILIES)
    found: dict[str, list[tuple[str, Exported]]] = defaultdict(list)
    for family in families:
        for seed in range(args.plans or (1 if args.quick else 8)):
            torch.manual_seed(seed)
            with tempfile.TemporaryDirectory() as folder:
                for name, exported in exports(cut_model(family, seed), Path(folder), traced=seed == 0):
                    found[name].append((family, exported))
    console = Console(width=110)
    console.print(machine())
    table = Table("runtime, type", "models", "families", "largest difference", "of them with all 16 tokens equal")
    for name, rows in found.items():
        agreements = [exported.agreements[0] for _, exported in rows]
        table.add_row(
            name,
            str(len(rows)),
            str(len({family for family, _ in rows})),
            f"{max(agreement.logit_difference for agreement in agreements):.1e}",
            str(sum(agreement.tokens_equal == agreement.tokens for agreement in agreements)),
        )
    console.print(table)


if __name__ == "__main__":
    main()
