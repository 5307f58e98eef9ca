"""How long does a command take to answer, and how much of that is torch and transformers?

Starts each command in a process of its own, interleaved within one run. The floors are a process that does nothing, and
processes that import torch and the part of transformers that models need, and then end as the command line does.

    python benchmarks/startup.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from _all_attention import machine, medians
from page import write_run
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from deadhead.measure.cost import skeleton

_IMPORTS = "import gc; gc.disable(); import torch, transformers.modeling_utils; gc.freeze()"
_COMMAND = "from deadhead.cli import main; main()"


def write_model(folder: Path) -> None:
    """Write Llama 3's 8B with weights that are holes in a file: they take no room, and nothing reads them."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    tensors, place = {}, 0
    for name, parameter in skeleton(config).named_parameters():
        end = place + 2 * math.prod(parameter.shape)
        tensors[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [place, end]}
        place = end
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + place)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, run = Path(folder) / "8B", Path(folder) / "run"
        for place in (model, run):
            place.mkdir()
        write_model(model)
        write_run(run, steps=1000, layers=4, heads=8)
        processes = {
            "nothing (floor)": ["-c", ""],
            "deadhead --help": ["-c", _COMMAND, "--help"],
            "deadhead --version": ["-c", _COMMAND, "--version"],
            "import deadhead": ["-c", "import deadhead"],
            "deadhead inspect, 8B": ["-c", _COMMAND, "inspect", str(model)],
            "deadhead report": ["-c", _COMMAND, "report", str(run)],
            "import torch (floor)": ["-c", "import torch"],
            "import torch and transformers (floor)": ["-c", _IMPORTS],
            "deadhead inspect, 8B, its config.json alone": ["-c", _COMMAND, "inspect", str(model / "config.json")],
            "import deadhead, use a model": ["-c", "import deadhead; deadhead.models.AllAttentionForCausalLM"],
        }
        runs = {
            name: partial(subprocess.run, [sys.executable, *arguments], check=True, capture_output=True)
            for name, arguments in processes.items()
        }
        seconds = medians(runs, 3 if options.quick else 11)
    table = Table(title=f"start-up: {machine()}")
    table.add_column("process")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.2f}")
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
