"""Compare training in several processes with one: what is learned and sent, and an estimate for many GPUs.

Measured here, with gloo on a CPU: a small Llama trains gates on the source of Python's json package, with the same
batch over 1, 2 and 4 processes. Bytes are counted in DDP's communication hook, which sees every gradient that is
reduced, and in calls of all_reduce for everything else: losses, heads' output differences (one step in ten), and the
decision to stop. Times of more processes than cores say nothing about a cluster, and are marked as such.

Estimated: a ring sends 2 (N - 1) / N times the gradients' bytes through each GPU's link. Within a node that is NVLink,
and between nodes the GPUs' share of the network; the slower of the two counts. Efficiency is compute / (compute +
sending), with no sending hidden behind the backward pass, so it is a lower bound if the assumed rates hold.

    python benchmarks/scaling.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deadhead.training import PhaseRun, PruneRecipe, attach_gates, train

ROWS, LENGTH, VOCABULARY = 8, 32, 256


def measure(folder: Path, steps: int) -> None:
    """Train in this process, one of those that the launcher started, and write the results."""
    import numpy as np
    import torch
    from _all_attention import machine
    from safetensors.torch import save_file
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

    from deadhead.data import TokenStream

    rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sent = {"gradients": 0, "gates": 0, "all else": 0}
    reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The hook's own calls are the asynchronous ones.
        sent["all else"] += 0 if kwargs.get("async_op") else tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def noted(bucket: Any) -> Any:
        sent["gradients"] += bucket.buffer().nbytes
        sent["gates"] += sum(
            g.nbytes for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True) if id(p) in ids
        )
        return default_hooks.allreduce_hook(None, bucket)

    class Watch(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0 and count > 1:
                wrapped[-1].register_comm_hook(None, lambda _, bucket: noted(bucket))
            if state.global_step == 1:
                self.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = (time.perf_counter() - self.begun) / max(state.global_step - 1, 1)

    wrapped: list[Any] = []
    made = torch.nn.parallel.DistributedDataParallel.__init__

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        wrapped.append(self)

    torch.nn.parallel.DistributedDataParallel.__init__ = noting  # type: ignore[method-assign]
    torch.distributed.all_reduce = counted
    set_seed(0)
    config: Any = LlamaConfig
    model = LlamaForCausalLM(
        config(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    # A text with something to learn: on random tokens rounding alone decides which heads go.
    source = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parent.glob("*.py")))
    tokens = np.frombuffer(source, np.uint8)[: ROWS * LENGTH * 40].astype(np.uint16)
    text = TokenStream(tokens=tokens, num_bytes=len(tokens), num_words=len(tokens))
    recipe = PruneRecipe(
        steps=steps,
        batch_size=ROWS // count,
        sequence_length=LENGTH,
        sparsity=0.5,
        weighting="output_difference",
        learning_rate=1e-3,
        ramp_steps=steps // 2,
    )
    gates = attach_gates(model, recipe)
    ids = {id(gate.log_alpha_bias) for _, gate in gates}
    watch = Watch()
    train(model, text, recipe, PhaseRun(gates=gates, callbacks=[watch]))
    if rank == 0:
        found = {f"weights.{name}": p.detach().clone() for name, p in model.named_parameters() if id(p) not in ids}
        found |= {f"gates.{layer}": values for layer, values in gates.log_alpha().items()}
        save_file(found, folder / f"{count}.safetensors")
        gates.plan().to_json(folder / f"{count}.json")
        parameters = sum(p.numel() for p in model.parameters())
        facts = {"seconds": watch.seconds, "parameters": parameters, "gates": len(gates), "machine": machine()}
        facts |= {"sent": {name: total / steps for name, total in sent.items()}}
        (folder / f"facts{count}.json").write_text(json.dumps(facts))


def measured(counts: list[int], steps: int) -> list[dict[str, Any]]:
    """Return a row for each number of processes."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as place:
        folder, rows = Path(place), []
        for count in counts:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            command = [*(launch if count > 1 else [sys.executable]), __file__]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, "--into", place, "--steps", str(steps)], env=environment, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{count} processes failed:\n{done.stderr[-3000:]}")
            one, several = load_file(folder / "1.safetensors"), load_file(folder / f"{count}.safetensors")
            apart = {
                kind: max(float((one[name] - several[name]).abs().max()) for name in one if name.startswith(kind))
                for kind in ("gates", "weights")
            }
            facts = json.loads((folder / f"facts{count}.json").read_text())
            same = (folder / "1.json").read_text() == (folder / f"{count}.json").read_text()
            rows.append({"processes": count, "apart": apart, "same plan": same, **facts})
    return rows


def on_paper(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each model: parameters, gates, and the estimate for several GPUs."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import deadhead

    paper = deadhead.models.AllAttentionConfig(
        vocab_size=32000, hidden_size=512, num_hidden_layers=16, num_attention_heads=8, num_persistent=2048
    )
    # Llama-2's sizes.
    llama = AutoConfig.for_model(
        "llama",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    )
    models = {"paper, 16 layers": (paper, 16 * 8), "Llama, 7B": (llama, 32 * 32)}
    rows, gpus = [], options.nodes * options.gpus
    for name, (config, num_gates) in models.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        # Forward and backward: 6 FLOPs a parameter and token.
        compute = 6 * parameters * options.tokens / (options.tflops * 1e12)
        share = 2 * (gpus - 1) / gpus
        # All GPUs of a node send at once, through as many parts of its network.
        slowest = min(options.nvlink * 1e9, options.network * 1e9 / 8) if options.nodes > 1 else options.nvlink * 1e9
        gradients, gates = parameters * options.bytes, num_gates * 4
        sending, of_gates = share * gradients / slowest, share * gates / slowest
        rows.append(
            {
                "model": name,
                "parameters": parameters,
                "gates": num_gates,
                "compute": compute,
                "sending": sending,
                "efficiency": compute / (compute + sending + of_gates),
                "hidden": compute / max(compute, sending),
                "gradient bytes": gradients,
                "gate bytes": gates,
            }
        )
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, and 1 and 2 processes only")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--nodes", type=int, default=8, help="machines (8)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each machine (8)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step for each GPU (16384)")
    parser.add_argument("--tflops", type=float, default=400, help="TFLOP/s that a GPU reaches (400: an H100, bfloat16)")
    parser.add_argument("--nvlink", type=float, default=450, help="GB/s of a GPU within its node (450)")
    parser.add_argument("--network", type=float, default=400, help="Gbit/s between nodes for each GPU (400)")
    parser.add_argument("--bytes", type=int, default=4, help="bytes of a gradient when it is sent (4: float32)")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.into:
        measure(options.into, options.steps)
        return
    rows = measured([1, 2] if options.quick else [1, 2, 4], 12 if options.quick else 60)
    title = f"{rows[0]['parameters']:,} parameters, {rows[0]['gates']} gates: {rows[0]['machine']}"
    table = Table(title=title, box=None)
    for name in ("processes", "gates apart", "weights apart", "same plan"):
        table.add_column(name, justify="right")
    for name in ("gradients, B a step", "of them gates", "all else, B a step", "ms a step"):
        table.add_column(name, justify="right")
    for row in rows:
        apart, sent = row["apart"], row["sent"]
        table.add_row(
            *(str(row["processes"]), f"{apart['gates']:.1e}", f"{apart['weights']:.1e}"),
            *("yes" if row["same plan"] else "no", f"{sent['gradients']:,.0f}", f"{sent['gates']:,.0f}"),
            *(f"{sent['all else']:,.1f}", f"{1e3 * row['seconds']:.0f}"),
        )
    console = Console(width=140)
    console.print(table)
    paper = on_paper(options)
    table = Table(title=f"On paper, {options.nodes} nodes × {options.gpus} GPUs, data parallel", box=None)
    for name in ("model", "parameters", "gates", "gradients, B a step", "of them gates", "compute, ms", "sending, ms"):
        table.add_column(name, justify="right")
    for name in ("efficiency, nothing hidden", "all hidden"):
        table.add_column(name, justify="right")
    for row in paper:
        table.add_row(
            *(row["model"], f"{row['parameters'] / 1e6:,.0f} M", str(row["gates"])),
            *(f"{row['gradient bytes'] + row['gate bytes']:,}", f"{row['gate bytes']:,}"),
            *(f"{1e3 * row['compute']:,.1f}", f"{1e3 * row['sending']:,.1f}"),
            *(f"{row['efficiency']:.0%}", f"{row['hidden']:.0%}"),
        )
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({"measured": rows, "paper": paper}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
