"""Is a checkpoint larger than memory cut in little memory, nearly as fast as a copy, and the same after kills?

Writes a Llama of random bfloat16 weights in shards (7 billion parameters, 13.5 GB). Cuts it by a random plan with
`deadhead cut`, in a process whose data may take 2 GiB. In turn with that, `cp` copies the checkpoint on the same disk.
Both begin with nothing of the source in the page cache, and end when everything is on the disk. Then:

- every new file is hashed and compared with SHA256SUMS;
- every new tensor is compared with the rows and columns of the source that the plan keeps, read by safetensors;
- the cut is killed by SIGKILL at random moments and resumed, and the hashes are compared.

Finally it prints what the same would read, write and hold for the shape of a Llama of 70 billion parameters.

    python benchmarks/streaming_cut.py [--repeats N] [--kills N] [--folder DIR] [--seed N] [--json FILE] [--quick]

The folder needs free space for three times the checkpoint's size. By default it is the folder for temporary files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._large_checkpoint import QUICK, SEVEN_BILLION, SEVENTY_BILLION, size_of, tensors, write_checkpoint
from deadhead import HeadPlan
from deadhead.disk.checksums import CHECKSUMS_FILE, read_checksums, sha256_of
from deadhead.plans.plan import Unit
from deadhead.streaming.copying import CHUNK, send_to_disk

_LIMIT = 2 << 30
# Of what lies around a layer's tensors while it is checked: Python, torch, transformers, buffers.
_BASE_BYTES = 800 << 20


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One cut or copy.

    Args:
        seconds: of wall-clock time.
        cpu_seconds: of all cores.
        peak_bytes: memory peak of the process, mapped files included.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def draw_plan(config: LlamaConfig, seed: int) -> HeadPlan:
    """Return a plan that keeps 20 to 100 % of a layer's key/value groups, drawn for each; one layer loses all."""
    draw = random.Random(seed)
    count, layers = config.num_key_value_heads, config.num_hidden_layers
    kept = {layer: sorted(draw.sample(range(count), round(count * draw.uniform(0.2, 1.0)))) for layer in range(layers)}
    kept[draw.randrange(layers)] = []
    unit: Unit = "head" if count == config.num_attention_heads else "kv_group"
    return HeadPlan(kept=kept, total=dict.fromkeys(range(layers), count), unit=unit)


def forget(folder: Path) -> None:
    """Send a folder's files to the disk, and out of the page cache."""
    for path in folder.iterdir():
        send_to_disk(path)


def timed(command: list[str], source: Path, limit: int | None = None) -> Timing:
    """Run a command to its end and return its timing."""
    forget(source)
    confine = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=confine) as child:
        assert child.stderr is not None
        said = child.stderr.read().decode(errors="replace")
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}: {said[-2000:]}")
    return Timing(
        seconds=time.perf_counter() - start,
        cpu_seconds=used.ru_utime + used.ru_stime,
        peak_bytes=used.ru_maxrss * 1024,
    )


def copy_command(source: Path, target: Path) -> list[str]:
    """Return the command that copies a folder, byte by byte, and sends it to the disk."""
    return ["sh", "-c", 'cp -r --reflink=never "$0" "$1" && sync "$1"/*', str(source), str(target)]


def cut_command(source: Path, plan: Path, out: Path, *more: str) -> list[str]:
    """Return the command that cuts."""
    return [sys.executable, "-m", "deadhead", "cut", str(source), "--plan", str(plan), "--out", str(out), *more]


def wrong_files(folder: Path) -> list[str]:
    """Return the files whose hash differs from the list's."""
    return [name for name, digest in read_checksums(folder).items() if sha256_of(folder / name) != digest]


def wrong_tensors(config: LlamaConfig, plan: HeadPlan, source: Path, target: Path) -> tuple[int, list[str]]:
    """Return the number of new tensors, and those that differ from what the plan keeps of the source's tensors."""
    count, wrong = 0, []
    size = config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    for path in sorted(target.glob("*.safetensors")):
        with safe_open(source / path.name, "pt") as old, safe_open(path, "pt") as new:
            for name in new.keys():  # noqa: SIM118 (it is no dict)
                count += 1
                expected, found = old.get_tensor(name), new.get_tensor(name)
                if "self_attn" in name:
                    each = size * (queries if name.split(".")[-2] in ("q_proj", "o_proj") else 1)
                    rows = torch.tensor(plan.kept[int(name.split(".")[2])], dtype=torch.long)
                    rows = (rows[:, None] * each + torch.arange(each)).flatten()
                    expected = expected.index_select(1 if ".o_proj." in name else 0, rows)
                if not torch.equal(expected, found):
                    wrong.append(name)
    empty = {layer for layer, kept in plan.kept.items() if not kept}
    gone = sum("self_attn" in name and int(name.split(".")[2]) in empty for name, _ in tensors(config))
    if count != sum(1 for _ in tensors(config)) - gone:
        wrong.append(f"{count} tensors are there")
    return count, wrong


def killed(command: list[str], resumed: list[str], work: Path, after: float) -> bool:
    """Start a cut, kill it, and resume it; return whether it was still running when it was killed."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = child.communicate(timeout=after)
        if child.returncode:
            raise SystemExit(said[-2000:])
        return False
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    again = resumed if work.exists() else command
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
    return True


def on_paper(config: LlamaConfig, plan: HeadPlan) -> dict[str, float]:
    """Return the bytes that a cut reads and writes, and its approximate memory peak."""
    size = config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    gone = sum(plan.total[layer] - len(kept) for layer, kept in plan.kept.items())
    head = 2 * size * config.hidden_size
    attention = 2 * head * (config.num_attention_heads + config.num_key_value_heads)
    norms = 4 * config.hidden_size
    return {
        "read": size_of(config),
        "written": size_of(config) - gone * 2 * head * (queries + 1),
        # Of a layer the check holds attention and norms, in float32, and twice, as it is dense while it is cut.
        "memory": _BASE_BYTES + 2 * 2 * (attention + norms) + 16 * CHUNK,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 0.2 GB")
    arguments = parser.parse_args()
    config = QUICK if arguments.quick else SEVEN_BILLION
    needed, free = 3 * size_of(config), shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if needed > free:
        raise SystemExit(f"{needed / 1e9:.0f} GB must be free, but {free / 1e9:.0f} GB are; choose another --folder.")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        report(measured(Path(temporary), config, arguments), arguments.json)


def measured(folder: Path, config: LlamaConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, copy it, cut it, and return everything to print."""
    source, plan_file, copied, out = (folder / name for name in ("source", "plan.json", "copied", "out"))
    write_checkpoint(source, config, shard=(32 << 20) if arguments.quick else (1 << 30))
    plan = draw_plan(config, arguments.seed)
    plan.to_json(plan_file)
    cuts, copies = [], []
    for _ in range(arguments.repeats):
        copies.append(timed(copy_command(source, copied), source))
        shutil.rmtree(copied)
        shutil.rmtree(out, ignore_errors=True)
        cuts.append(timed(cut_command(source, plan_file, out), source, _LIMIT))
        print(f"copied in {copies[-1].seconds:.1f} s, cut in {cuts[-1].seconds:.1f} s", file=sys.stderr)
    bad_files = wrong_files(out)
    count, bad_tensors = wrong_tensors(config, plan, source, out)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    sums = (out / CHECKSUMS_FILE).read_text()
    draw, survived, different = random.Random(arguments.seed), 0, 0
    while survived < arguments.kills:
        shutil.rmtree(out)
        after = draw.uniform(0, median(cut.seconds for cut in cuts))
        commands = cut_command(source, plan_file, out), cut_command(source, plan_file, out, "--resume")
        if killed(*commands, out.with_name("out.work"), after):
            survived += 1
            different += (out / CHECKSUMS_FILE).read_text() != sums or bool(wrong_files(out))
            print(f"killed after {after:.1f} s and resumed", file=sys.stderr)
    speeds = [copy.seconds / cut.seconds for copy, cut in zip(copies, cuts, strict=True)]
    return {
        "read": size_of(config),
        "written": written,
        "cuts": [asdict(cut) for cut in cuts],
        "copies": [asdict(copy) for copy in copies],
        "speed": median(speeds),
        "speeds": speeds,
        "peak_bytes": max(cut.peak_bytes for cut in cuts),
        "files": len(read_checksums(out)),
        "wrong_files": bad_files,
        "tensors": count,
        "wrong_tensors": bad_tensors,
        "kills": survived,
        "different_after_kills": different,
        "seventy_billion": on_paper(SEVENTY_BILLION, draw_plan(SEVENTY_BILLION, arguments.seed)),
    }


def report(found: dict[str, Any], path: Path | None) -> None:
    """Print the figures, and write them to a file; exit with 1 if something is wrong."""
    table = Table(
        title=f"{found['read'] / 1e9:.2f} GB read, {found['written'] / 1e9:.2f} GB written", show_header=False
    )
    copies, cuts = ([f"{one['seconds']:.1f}" for one in found[key]] for key in ("copies", "cuts"))
    table.add_row("copied in, s", ", ".join(copies))
    table.add_row("cut in, s", ", ".join(cuts))
    table.add_row("CPU seconds of a cut", ", ".join(f"{one['cpu_seconds']:.1f}" for one in found["cuts"]))
    speeds = ", ".join(f"{speed:.0%}" for speed in found["speeds"])
    table.add_row("speed of the cut ÷ of the copy", f"{found['speed']:.0%} ({speeds})")
    table.add_row("most memory of the process", f"{found['peak_bytes'] / 2**30:.2f} GiB")
    wrong = len(found["wrong_files"])
    table.add_row("files with another hash than listed", f"{wrong} of {found['files']}")
    table.add_row("tensors unlike the source's rows", f"{len(found['wrong_tensors'])} of {found['tensors']}")
    table.add_row("kills that changed a hash", f"{found['different_after_kills']} of {found['kills']}")
    paper = found["seventy_billion"]
    table.add_row(
        "70 billion parameters, on paper",
        f"{paper['read'] / 1e9:.1f} GB read, {paper['written'] / 1e9:.1f} written, {paper['memory'] / 2**30:.2f} GiB",
    )
    Console(width=110).print(table)
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if found["wrong_files"] or found["wrong_tensors"] or found["different_after_kills"] else 0)


if __name__ == "__main__":
    main()
