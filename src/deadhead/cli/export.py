"""`deadhead export`: a checkpoint for llama.cpp, ONNX Runtime, OpenVINO or vLLM, or one of the stock architecture."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, Dtype, Model, console, load_torch, print_json, working
from deadhead.errors import InputError


def export(
    model: Model,
    to: Annotated[
        Literal["gguf", "onnx", "openvino", "padded", "vllm"],
        typer.Option(
            help="gguf: a file for llama.cpp; onnx, openvino: a folder with the cache as inputs and outputs; vllm: the "
            "unchanged checkpoint, tested in vLLM; padded: a checkpoint of the stock architecture, for servers that "
            "accept no other."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new file (gguf) or folder.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="For gguf: f32, f16 (the default), bf16, q8_0, or a type of llama.cpp's quantiser, such as q4_k_m.",
        ),
    ] = None,
    tokenizer: Annotated[bool, typer.Option(help="Put the tokenizer into the file, or beside it.")] = True,
    dtype: Dtype = None,
    python: Annotated[
        Path | None,
        typer.Option(
            metavar="PROGRAM",
            help="For vllm: the Python of an environment that has vLLM, such as .venv-vllm/bin/python; by default the "
            "one that DEADHEAD_VLLM_PYTHON names, or this one.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a model, and check in the runtime that it computes the same as in PyTorch."""
    load_torch(as_json, model)
    import torch

    from deadhead.checkpoints import checkpoint
    from deadhead.checkpoints.declared import has_gates
    from deadhead.data import has_tokenizer, load_tokenizer
    from deadhead.export.exporting import export_model, require_exportable

    if model.is_dir() and has_gates(model):
        plan = model / "head_plan.json"
        how = f"deadhead cut {model} --plan {plan}" if plan.exists() else "deadhead.load_gated returns model and gates"
        raise InputError(f"The checkpoint {model} has gates that are still on; cut it first: {how}.")
    is_checkpoint = to in ("padded", "vllm")
    if dtype is not None and not is_checkpoint:
        raise InputError("--dtype is for checkpoints (padded, vllm); set the precision of other files with --type.")
    kind = None if kind is None else kind.lower()
    require_exportable(out, to=to, kind=kind, python=python)
    network = checkpoint.load(model, dtype=dtype if is_checkpoint else torch.float32)
    words = load_tokenizer(model) if tokenizer and has_tokenizer(model) else None
    with working(f"writing {out.name}, and checking it in its runtime"):
        result = export_model(network, out, to=to, kind=kind, tokenizer=words, base=model, python=python)
    if as_json:
        print_json({**asdict(result), "path": str(out), "tokenizer": words is not None})
        return
    console.print(
        f"{escape(str(out))}: {result.form}, {result.kind}, as {result.detail}, {result.num_bytes / 1e6:,.1f} MB"
        + ("" if words is not None else ", without a tokenizer")
    )
    for agreement in result.agreements:
        console.print(
            f"{agreement.runtime}: outputs differ from PyTorch's by {agreement.logit_difference:.1e} of the largest"
            + (f", {agreement.tokens_equal} of {agreement.tokens} greedy tokens are equal" if agreement.tokens else "")
        )
    if result.unchecked is not None:
        console.print(f"Not checked: {escape(result.unchecked)}.")
