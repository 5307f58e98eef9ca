"""Size, perplexity and speed of models that are cut and then quantised to 8 and 4 bits, as in deployment.

llm-compressor quantises every checkpoint, rounding to nearest without calibration. W8A8 has weights of 8 bits, by row,
and rounds their inputs to 8 bits, token by token. W4A16 has weights of 4 bits, by groups of one row. Embeddings and the
output layer stay as they are.

Transformers turns the weights back into plain numbers when the model first runs, so its times show no effect of
quantisation. vLLM computes with the codes; it is measured if DEADHEAD_VLLM_PYTHON names a Python that has it. "Allowed"
is the speedup of a decoding step over that of the first checkpoint that the bytes on disk allow: a step reads each byte
once, where embeddings and output layer are one.

    python benchmarks/quantised.py DENSE CUT … --text wikitext2-test.txt [--rows N] [--repeats N] [--threads N]
    python benchmarks/quantised.py --quick      # a tiny random model, dense and cut
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from benchmarks._all_attention import machine
from benchmarks.llm import LENGTH, perplexity, rows_of
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.errors import ExportError, is_installed
from deadhead.export import vllm
from deadhead.plans.unit_plan import UnitPlan

PLAIN, SCHEMES = "as it is", ("W8A8", "W4A16")
# Sizes of groups that kernels have, the fewest scales first.
GROUP_SIZES = (128, 64, 32)
_OUTPUT = "lm_head"
_STEPS = 16


@dataclass
class Row:
    """The measurements of one checkpoint."""

    name: str
    scheme: str
    folder: Path
    detail: str = ""
    perplexity: float = math.nan
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    served: tuple[str, str] = ("–", "–")  # perplexity and tokens/s in vLLM

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights on disk."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def group_size_of(model: nn.Module) -> int:
    """Return the largest group size that divides the rows of all projections, or of as many as possible."""
    widths = [found.in_features for found in _projections(model).values()]
    return max(GROUP_SIZES, key=lambda size: (sum(width % size == 0 for width in widths), size))


def _projections(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the quantised modules by path: every Linear with weights, except the output layer."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight.numel() and path.rpartition(".")[2] != _OUTPUT
    }


def quantised(source: Path, out: Path, scheme: str, group_size: int | None = None) -> str:
    """Write a checkpoint with quantised weights; return its scheme and the number of projections left unquantised.

    Projections stay as they are if the groups do not divide their rows: groups of `group_size`, or of the size that
    divides most projections.
    """
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(source)
    projections = _projections(model)
    chosen, detail = preset_name_to_scheme(scheme, []), scheme
    if chosen.weights.group_size is None:
        chosen.targets = [*projections]
    else:
        size = chosen.weights.group_size = group_size or group_size_of(model)
        chosen.targets = [path for path, module in projections.items() if not module.in_features % size]
        detail += f", groups of {size}, {len(projections) - len(chosen.targets)} of {len(projections)} left"
    # By path, not as every Linear: emptied ones would be among them, which other modifiers cannot calibrate.
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"all": chosen}))
    model.save_pretrained(out, save_compressed=True)
    return detail


def prepared(sources: Sequence[Path], out: Path) -> list[Row]:
    """Return the rows of the table, each checkpoint quantised where llm-compressor is installed."""
    rows = []
    for source in sources:
        rows.append(Row(source.name, PLAIN, source))
        for scheme in SCHEMES if is_installed("llmcompressor") else ():
            row = Row(source.name, scheme, out / f"{source.name}-{scheme}")
            row.detail = quantised(source, row.folder, scheme)
            rows.append(row)
    return rows


def measure(rows: list[Row], ids_NT: Tensor, repeats: int) -> None:
    """Record perplexities and interleaved times of all checkpoints in transformers."""
    models: list[PreTrainedModel] = []
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(row.folder).eval()
        row.perplexity = perplexity(model, ids_NT)
        models.append(model)
    for repetition in range(repeats + 1):
        for row, model in zip(rows, models, strict=True):
            prefill, decode = _times(model, ids_NT[:1])
            if repetition:
                row.prefill.append(prefill)
                row.decode.append(decode)


@torch.inference_mode()
def _times(model: PreTrainedModel, ids_1T: Tensor) -> tuple[float, float]:
    begin = time.perf_counter()
    cache = model(ids_1T, use_cache=True, logits_to_keep=1).past_key_values
    middle = time.perf_counter()
    for step in range(_STEPS):
        model(ids_1T[:, step : step + 1], past_key_values=cache, use_cache=True)
    return middle - begin, time.perf_counter() - middle


def serve(rows: list[Row], python: Path, ids_NT: Tensor, repeats: int) -> None:
    """Record perplexities in vLLM and the tokens/s of one prompt and its answer, or why vLLM cannot run it."""
    texts = ids_NT.tolist()
    settings = {"dtype": "float32", "max_model_len": LENGTH + _STEPS + 1, "enforce_eager": True}
    for row in rows:
        job = {"path": str(row.folder.absolute()), "engine": {**settings, "enable_prefix_caching": False}}
        reading = {"prompts": texts, "max_tokens": 1, "likeliest": 1}
        writing = {"prompts": texts[:1], "max_tokens": _STEPS, "likeliest": 0, "repeats": repeats}
        try:
            (read, written), _ = vllm.run(python, [{**job, **asked} for asked in (reading, writing)])
        except ExportError as error:
            reason = str(error).partition("the model: ")[2].partition(";")[0]
            print(f"vLLM does not run {row.name}, {row.detail or row.scheme}: {reason}.", flush=True)
            continue
        losses = [
            -text["log_probabilities"][position][str(token)]
            for text, ids in zip(read["texts"], texts, strict=True)
            for position, token in enumerate(ids[1:])
        ]
        speed = (LENGTH + _STEPS) / statistics.median(written["seconds"])
        row.served = f"{math.exp(statistics.fmean(losses)):.2f}", f"{speed:,.0f}"


def tiny(out: Path) -> tuple[list[Path], Path]:
    """Return folders of a tiny random model, dense and cut, and a text."""
    torch.manual_seed(0)
    config: Any = LlamaConfig
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    model = LlamaForCausalLM(config(vocab_size=320, num_attention_heads=4, num_key_value_heads=2, **sizes))
    deadhead.save(model, out / "dense", tokenizer=byte_tokenizer())
    units = UnitPlan(kept={0: range(96), 1: range(131), 2: ()}, total=dict.fromkeys(range(3), 256))
    kept = {0: [1], 1: [], 2: [0, 1]}
    plan = deadhead.HeadPlan(kept=kept, total=dict.fromkeys(kept, 2), unit="kv_group", hidden_units=units)
    deadhead.save(deadhead.cut(model, plan), out / "cut", tokenizer=byte_tokenizer())
    text = out / "text.txt"
    text.write_text("".join(chr(97 + value % 26) for value in torch.randint(999, (4 * LENGTH,)).tolist()))
    return [out / "dense", out / "cut"], text


def main() -> None:
    """Quantise, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", help="checkpoint folders, the dense one first")
    parser.add_argument("--text", type=Path, help="text to measure perplexity on")
    parser.add_argument("--rows", type=int, default=24, help=f"rows of {LENGTH} tokens")
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    options = parser.parse_args()
    if not options.quick and not (options.models and options.text):
        parser.error("folders of checkpoints and --text are expected, or --quick")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=130)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        sources, text = tiny(out) if options.quick else (options.models, options.text)
        count, repeats = (2, 1) if options.quick else (options.rows, options.repeats)
        if not is_installed("llmcompressor"):
            console.print("llm-compressor is not installed here (pip install llmcompressor), so nothing is quantised.")
        rows = prepared(sources, out)
        ids_NT = rows_of(text, sources[0], 0, count)
        measure(rows, ids_NT, repeats)
        python = vllm.find_python(None)
        if python is None:
            console.print(f"vLLM is not installed here, and {vllm.PYTHON} names no Python that has it.")
        else:
            # Of processes of vLLM: it would take all cores.
            os.environ.update(OMP_NUM_THREADS=str(options.threads), VLLM_CPU_OMP_THREADS_BIND="nobind")
            serve(rows, python, ids_NT, repeats)
        console.print(machine())
        console.print(_table(rows))
    console.print(
        f"{count} rows of {LENGTH} tokens; prompt of {LENGTH}, then {_STEPS}; float32, batch 1, {options.threads} "
        f"threads, medians of {repeats}, interleaved in transformers"
    )


def _table(rows: list[Row]) -> Table:
    table = Table("model", "weights", "MB", "allowed", "perplexity", "prefill tok/s", "decode tok/s")
    table.add_column("perplexity in vLLM")
    table.add_column("tok/s in vLLM")
    for row in rows:
        table.add_row(
            row.name,
            row.detail or row.scheme,
            f"{row.num_bytes / 1e6:.1f}",
            f"{rows[0].num_bytes / row.num_bytes:.2f}",
            f"{row.perplexity:.2f}",
            f"{LENGTH / statistics.median(row.prefill):,.0f}",
            f"{_STEPS / statistics.median(row.decode):,.1f}",
            *row.served,
        )
    return table


if __name__ == "__main__":
    main()
