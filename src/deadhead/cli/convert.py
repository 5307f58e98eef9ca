"""`deadhead convert`: a state dict of the paper authors' released code becomes a checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, console, print_json
from deadhead.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def convert(
    state: Annotated[
        Path,
        typer.Argument(
            metavar="STATE", help="The state dict: .pt, .pth, .bin, .safetensors or .npz.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the checkpoint.", show_default=False)],
    memory_length: Annotated[
        int | None,
        typer.Option(
            "--memory-length", min=1, max=2**24, help="Positions of memory; by default half the position table's rows."
        ),
    ] = None,
    segment_length: Annotated[
        int | None,
        typer.Option(
            "--segment-length", min=1, max=2**24, help="Tokens a training step reads; by default the memory length."
        ),
    ] = None,
    attention_dropout: Annotated[
        float, typer.Option("--attention-dropout", min=0, max=1, help="For further training; the paper's is 0.2.")
    ] = 0.0,
    dropout: Annotated[
        float, typer.Option("--dropout", min=0, max=1, help="For further training; the paper's is 0.1.")
    ] = 0.0,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder of a saved tokenizer that the model was trained with.")
    ] = None,
    vocab: Annotated[
        Path | None, typer.Option("--vocab", help="Or its vocabulary: one word a line, in the order of the numbers.")
    ] = None,
    gates: Annotated[bool, typer.Option("--gates/--no-gates", help="Keep the gates, where there are any.")] = True,
    cut: Annotated[bool, typer.Option("--cut", help="Cut the heads whose gates are closed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a state dict of the paper authors' released code and write a checkpoint."""
    from deadhead.checkpoints import checkpoint
    from deadhead.convert import GATES, convert_state, read_state
    from deadhead.cutting import cut as cut_heads
    from deadhead.data import special_token_ids
    from deadhead.measure.cost import model_cost

    if cut and not gates:
        raise InputError("Closed gates say what to cut, so --cut and --no-gates exclude each other; leave one out.")
    checkpoint.require_ours_or_free(out)
    for file in (state, vocab):
        if file is not None and out.resolve() in file.resolve().parents:
            raise InputError(f"{file} lies in {out}, which the checkpoint would replace; choose another --out.")
    words = _tokenizer(tokenizer, vocab)
    special = {} if words is None else special_token_ids(words)
    converted = convert_state(
        read_state(state),
        memory_length=memory_length,
        segment_length=segment_length,
        attention_dropout=attention_dropout,
        dropout=dropout,
        **special,
    )
    model, config = converted.model, converted.model.config
    if words is not None and len(words) != config.vocab_size:
        raise InputError(
            f"The model has a vocabulary of {config.vocab_size:,} tokens, but that of {tokenizer or vocab} has "
            f"{len(words):,}; give the one the model was trained with."
        )
    plan = None
    if cut or (gates and converted.log_alpha is not None):
        plan = converted.attach().plan()
        if cut:
            cut_heads(model, plan)
    cost = model_cost(model)
    heads = cost.heads if plan is None else plan.heads
    gated = plan is not None and not cut
    once_cut = model_cost(model, plan) if gated else None
    checkpoint.save(model, out, tokenizer=words)
    if as_json:
        sizes: dict[str, Any] = {
            "gated": gated,
            "tokenizer": words is not None,
            "vocab_size": config.vocab_size,
            "adaptive_cutoffs": config.adaptive_cutoffs,
            "positions": converted.positions,
            "memory_length": config.memory_length,
            "segment_length": config.segment_length,
        }
        if once_cut is not None:
            sizes["once_cut"] = asdict(once_cut)
        print_json({**asdict(cost), "heads": heads, **sizes})
        return
    console.print(f"{escape(str(out))}: {cost.parameters:,} parameters, {cost.flops_per_token:,.0f} FLOPs a token")
    kind = "cut off" if cut else "closed by gates" if gated else "no gates"
    console.print(f"heads left a layer: {' '.join(map(str, heads))} of {config.num_attention_heads} ({kind})")
    half = "" if memory_length is not None else f", half of the {converted.positions} rows of the position table"
    console.print(f"memory {config.memory_length}{half}; segments of {config.segment_length}")
    if words is None:
        console.print(
            "No tokenizer: deadhead eval, generate, prune and finetune will need one; convert again with --tokenizer "
            "or --vocab."
        )
    if once_cut is not None:
        console.print(
            f"The checkpoint has gates, with the authors' β of {GATES.beta}; deadhead.load_gated gives model and "
            f"gates. Once cut (--cut): {once_cut.parameters:,} parameters, {once_cut.flops_per_token:,.0f} FLOPs a "
            "token."
        )


def _tokenizer(folder: Path | None, vocabulary: Path | None) -> PreTrainedTokenizerBase | None:
    from deadhead.data import load_tokenizer
    from deadhead.data.tokenizer import read_vocabulary

    if folder is not None and vocabulary is not None:
        raise InputError("Give either --tokenizer or --vocab, one of the two.")
    if vocabulary is not None:
        return read_vocabulary(vocabulary)
    return None if folder is None else load_tokenizer(folder)
