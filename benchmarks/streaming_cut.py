"""How fast is a cut shard by shard, beside copying the same file on the same disk, and how much memory does it take?

Makes a Llama with random bf16 weights in shards, and a plan that keeps about half of the heads of each layer, at random.
Copies the checkpoint (`cp`, then fsync) and cuts it, each in a process of its own and in turn, with the source out of the
page cache. Reports wall times, and of both the bytes read and written a second: the cut writes less than it reads, and
the wall time of copying stands for reading and writing all. Then checks the files' hashes and every tensor against a slice
that is taken here, independently, one tensor at a time; and kills a cut half-way and resumes it.

    python benchmarks/streaming_cut.py [--quick] [--shape 7b|70b] [--folder DIR] [--repeats N] [--json FILE]

`--shape 70b` writes nothing: it counts on the meta device what the cut would read and write, and the memory it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from transformers import LlamaConfig

from deadhead.checksums import file_sha256
from deadhead.cost import skeleton
from deadhead.plan import HeadPlan
from deadhead.streaming.shape import stored_shapes

SHAPES: dict[str, dict[str, int]] = {
    "quick": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "70b": {
        **{"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        "intermediate_size": 28672,
    },
}
SHARD_BYTES = {"quick": 100_000_000, "7b": 5_000_000_000, "70b": 5_000_000_000}
# What the process that cuts runs: it says what its memory came to, in kB.
_CUT = """
import json, re, sys
from pathlib import Path
import deadhead
plan = deadhead.HeadPlan.from_json(sys.argv[2])
most = 0
def watch(*_):
    global most
    most = max(most, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
done = deadhead.cut_checkpoint(sys.argv[1], plan, sys.argv[3], stream=True, resume="--resume" in sys.argv, progress=watch)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps({"peak": peak, "anonymous": most, "read": done.read_bytes, "written": done.written_bytes}))
"""


def config_of(shape: str) -> Any:
    """Return the configuration of a shape."""
    made: Any = LlamaConfig
    return made(vocab_size=32000, max_position_embeddings=4096, dtype="bfloat16", **SHAPES[shape])


def make(folder: Path, shape: str) -> int:
    """Write the model, straight by bytes; return how many."""
    config = config_of(shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    shapes = stored_shapes(skeleton(config))
    shards: list[list[str]] = [[]]
    size = 0
    for name, dims in shapes.items():
        if size + 2 * prod(dims) > SHARD_BYTES[shape] and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * prod(dims)
    draw = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, place = {}, 0
        for name in names:
            count = 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [place, place + count]}
            place += count
            weight_map[name] = file
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                left = prod(shapes[name])
                while left:
                    count = min(left, 4 << 20)
                    # Random signs and mantissas, and exponents about those of weights of 0.01 to 0.06.
                    bits = draw.integers(0, 1 << 16, count, dtype=np.uint16)
                    out.write((bits & 0x80FF | 0x3C00).astype("<u2").tobytes())
                    left -= count
            out.flush()
            os.fsync(out.fileno())
    total = sum(2 * prod(dims) for dims in shapes.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def half_plan(shape: str) -> HeadPlan:
    """Return a plan that keeps about half of the heads, or key/value groups, of every layer, at random."""
    draw, config = random.Random(0), config_of(shape)
    groups, layers = config.num_key_value_heads, range(config.num_hidden_layers)
    kept = {layer: [group for group in range(groups) if draw.random() < 0.5] for layer in layers}
    unit: Any = "head" if groups == config.num_attention_heads else "kv_group"
    return HeadPlan(kept=kept, total=dict.fromkeys(layers, groups), unit=unit)


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy_seconds(source: Path, target: Path) -> float:
    """Return the seconds that copying the weights takes, until they are on the disk."""
    forget(source)
    target.mkdir()
    begin = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["cp", path, target / path.name], check=True)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def cut_once(source: Path, plan: Path, target: Path, *options: str) -> tuple[float, dict[str, int]]:
    """Cut in a process of its own; return its seconds, start of Python and torch included, and what it says."""
    forget(source)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CUT, source, plan, target, *options],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin, json.loads(done.stdout.splitlines()[-1])


def wrong_tensors(source: Path, target: Path, plan: HeadPlan, shape: str) -> int:
    """Compare every tensor with a slice taken here, one at a time; return how many differ."""
    config = config_of(shape)
    width, repeat = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    maps = [json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] for folder in (source, target)]
    wrong = 0
    for name, file in maps[0].items():
        kind = name.split(".")[-2]
        with safe_open(source / file, "pt") as opened:
            value = opened.get_tensor(name)
        if kind in ("q_proj", "k_proj", "v_proj", "o_proj"):
            each = width if kind in ("k_proj", "v_proj") else width * repeat
            groups = torch.tensor(plan.kept[int(name.split(".")[2])], dtype=torch.long)
            if not len(groups):
                wrong += name in maps[1]
                continue
            rows = (groups[:, None] * each + torch.arange(each)).flatten()
            value = value[:, rows] if kind == "o_proj" else value[rows]
        with safe_open(target / maps[1][name], "pt") as opened:
            wrong += not torch.equal(opened.get_tensor(name), value)
    return wrong


def killed_and_resumed(source: Path, plan: Path, target: Path) -> dict[str, Any]:
    """Kill a cut once it has finished a shard, and go on."""
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _CUT, source, plan, target], stdout=subprocess.DEVNULL)
    manifest = target.with_name(target.name + ".work") / "cut.json"
    while child.poll() is None and not (manifest.exists() and json.loads(manifest.read_text())["finished"]):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = len(json.loads(manifest.read_text())["finished"]) if manifest.exists() else None
    seconds, _ = cut_once(source, plan, target, "--resume") if manifest.exists() else (0.0, {})
    return {"finished_before_kill": kept, "resume_seconds": seconds}


def on_paper(shape: str, console: Console) -> dict[str, float]:
    """Count what a cut would read and write, and the memory that it would take."""
    from deadhead.streaming.prepare import predicted_memory

    config, plan = config_of(shape), half_plan(shape)
    dense = stored_shapes(skeleton(config))
    shares = {layer: len(kept) / plan.total[layer] for layer, kept in plan.kept.items()}
    attention = {name: prod(dims) for name, dims in dense.items() if ".self_attn." in name}
    read = 2 * sum(prod(dims) for dims in dense.values())
    gone = 2 * sum(count * (1 - shares[int(name.split(".")[2])]) for name, count in attention.items())
    layer = 4 * sum(count for name, count in attention.items() if name.startswith("model.layers.0."))
    found = {
        "read_gb": read / 1e9,
        "read_again_for_the_check_gb": 2 * sum(attention.values()) / 1e9,
        "written_gb": (read - gone) / 1e9,
        "layer_in_float32_gb": layer / 1e9,
        "predicted_memory_gb": predicted_memory(layer) / 1e9,
    }
    console.print(f"{shape}, on paper: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape, in under a minute")
    parser.add_argument("--shape", choices=["7b", "70b"], default="7b")
    parser.add_argument("--folder", type=Path, help="scratch folder; 7b needs 40 GB there")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, shape = Console(soft_wrap=True, highlight=False), "quick" if options.quick else options.shape
    results: dict[str, Any] = {"paper": on_paper(shape, console)}
    if shape != "70b":
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="streaming-cut-") as name:
            results |= measure(Path(name), shape, options.repeats, console)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(folder: Path, shape: str, repeats: int, console: Console) -> dict[str, Any]:
    """Run all of it in a scratch folder."""
    source, target, plan_file = folder / "dense", folder / "cut", folder / "plan.json"
    source.mkdir()
    size = make(source, shape)
    plan = half_plan(shape)
    plan.to_json(plan_file)
    console.print(
        f"{os.uname().machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch; {shape}: bf16, "
        f"{size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards; {sum(plan.heads)} of "
        f"{sum(plan.total.values())} heads stay"
    )
    copies, cuts, said = [], [], {}
    for number in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        copies.append(copy_seconds(source, folder / "copy"))
        seconds, said = cut_once(source, plan_file, target)
        cuts.append(seconds)
        console.print(f"run {number + 1}: copy {copies[-1]:.1f} s, cut {cuts[-1]:.1f} s")
    ratio = statistics.median(copy / cut for copy, cut in zip(copies, cuts, strict=True))
    moved = said["read"] + said["written"]
    rate = statistics.median(
        (moved / cut) / (2 * size / copy) for copy, cut in zip(copies, cuts, strict=True)
    )
    console.print(f"floor, copy: {2 * size / 1e6 / statistics.median(copies):,.0f} MB read and written a second")
    console.print(f"cut: {moved / 1e6 / statistics.median(cuts):,.0f} MB read and written a second: {rate:.0%} of copying")
    console.print(f"wall time: copying takes {ratio:.0%} of the time of cutting")
    console.print(f"peak memory: {said['peak'] / 2**20:.2f} GiB, of which anonymous {said['anonymous'] / 2**20:.2f} GiB")
    sums = dict(reversed(line.split("  ", 1)) for line in (target / "SHA256SUMS").read_text().splitlines())
    bad = [name for name, digest in sums.items() if file_sha256(target / name) != digest]
    wrong = wrong_tensors(source, target, plan, shape)
    console.print(f"hashes that differ: {len(bad)} of {len(sums)}; tensors that differ: {wrong}")
    weights = {name: digest for name, digest in sums.items() if name.endswith(".safetensors")}
    shutil.rmtree(target)
    resumed = killed_and_resumed(source, plan_file, target)
    again = {name: file_sha256(target / name) for name in weights}
    console.print(f"killed and resumed: {resumed}; same bytes: {again == weights}")
    if bad or wrong or again != weights:
        raise SystemExit("the cut is wrong")
    return {"size": size, "copies": copies, "cuts": cuts, "ratio": ratio, "rate": rate, **said, **resumed}


if __name__ == "__main__":
    main()
