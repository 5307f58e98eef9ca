"""`deadhead train`, `prune` and `finetune`: one phase at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape

from deadhead.cli.console import AsJson, Quiet, ReportTo, console, print_json, progress

if TYPE_CHECKING:
    from deadhead.training.recipes.recipe import DataRecipe, PhaseRecipe, PruneRecipe, Recipe
    from deadhead.training.runs.single import Phase

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="The checkpoint folder, or name on the hub, to start from.", show_default=False),
]
RequiredModel = Annotated[
    Path, typer.Option("--model", help="The checkpoint folder, or name on the hub, to start from.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the checkpoint to write.", show_default=False)]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Take settings that are not given here from this recipe.")
]
PhaseData = Annotated[
    str | None,
    typer.Option("--data", help="A text file, a directory, 'stdlib' (the default), or hf:NAME[:CONFIG]."),
]
PhaseSeed = Annotated[int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything random.")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Steps of the optimizer.")]
Batch = Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows of a batch.")]
Rate = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Peak learning rate: 2e-3 for deadhead's own models, 5e-5 for others."),
]
Length = Annotated[
    int | None,
    typer.Option("--sequence-length", min=2, help="Tokens of a row, for models without segment memory (256)."),
]
Schedule = Annotated[Literal["constant", "cosine", "linear"] | None, typer.Option("--schedule", help="Of the rate.")]
Accumulation = Annotated[int | None, typer.Option("--gradient-accumulation", min=1, help="Batches for each step.")]
SaveEvery = Annotated[int | None, typer.Option("--save-every", min=0, help="Steps between checkpoints to resume from.")]
Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="bfloat16 mixed precision.")]
Checkpointing = Annotated[
    bool | None, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Less memory, more time.")
]
Lora = Annotated[
    int | None,
    typer.Option("--lora-rank", min=0, help="Train LoRA adapters of this rank, merged at the end, not the weights."),
]
Distill = Annotated[
    float | None, typer.Option("--distill", min=0, max=1, help="Weight of a teacher's distribution in the loss.")
]
Temperature = Annotated[float | None, typer.Option("--distill-temperature", help="Of both distributions (2).")]
Teacher = Annotated[
    Path | None, typer.Option("--teacher", help="The model to distil from: a folder, or a name on the hub.")
]
EvalEvery = Annotated[
    int | None,
    typer.Option("--eval-every", min=0, help="Steps between two validation perplexities (0: none)."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in OUT.work.")]
Column = Annotated[str | None, typer.Option("--column", help="Text column of an hf: data set.")]
Split = Annotated[str | None, typer.Option("--split", help="The one split of an hf: data set to use.")]


def train(
    out: Out,
    data: PhaseData = None,
    model: ModelOption = None,
    recipe: RecipeOption = None,
    architecture: Annotated[
        Literal["all_attention", "transformer_xl"] | None,
        typer.Option("--architecture", help="Persistent vectors in every head, or feed-forward layers."),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", min=1)] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="D, must be a multiple of the heads.")] = None,
    heads: Annotated[int | None, typer.Option("--heads", min=1)] = None,
    persistent: Annotated[int | None, typer.Option("--persistent", min=1, help="Persistent vectors a head.")] = None,
    feed_forward: Annotated[
        int | None, typer.Option("--feed-forward", min=1, help="Width of a Transformer-XL's feed-forward layers (4 D).")
    ] = None,
    segment_length: Annotated[int | None, typer.Option("--segment-length", min=1)] = None,
    memory_length: Annotated[int | None, typer.Option("--memory-length", min=1)] = None,
    tokenizer: Annotated[Literal["byte", "bpe", "word"] | None, typer.Option("--tokenizer")] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", min=1)] = None,
    steps: Steps = None,
    batch_size: Batch = None,
    sequence_length: Length = None,
    learning_rate: Rate = None,
    schedule: Schedule = None,
    gradient_accumulation: Accumulation = None,
    save_every: SaveEvery = None,
    eval_every: EvalEvery = None,
    bf16: Bf16 = None,
    gradient_checkpointing: Checkpointing = None,
    column: Column = None,
    split: Split = None,
    seed: PhaseSeed = None,
    resume: Resume = False,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a dense All-attention Transformer or Transformer-XL from scratch, or go on with a model."""
    base = _base(recipe)
    given = base.model
    if architecture is not None and architecture != given.architecture:
        # What the recipe says of the other architecture's layers does not hold.
        given = given.model_copy(update={"persistent": None, "feed_forward": None})
    shape = _changed(
        given,
        architecture=architecture,
        layers=layers,
        width=width,
        heads=heads,
        persistent=persistent,
        feed_forward=feed_forward,
        segment_length=segment_length,
        memory_length=memory_length,
    )
    text = _changed(base.data, tokenizer=tokenizer, vocab_size=vocab_size, column=column, split=split)
    phase = _changed(base.train, **_common(locals()))
    _run("train", phase, out, model, data, text, _seed(seed, base), resume, report_to, quiet, as_json, shape=shape)


def prune(
    out: Out,
    model: RequiredModel,
    data: PhaseData = None,
    recipe: RecipeOption = None,
    criterion: Annotated[
        Literal["gates", "topk", "magnitude", "taylor", "output-difference", "random"] | None,
        typer.Option("--criterion", help="How heads are chosen: learned by gates, or ranked from --steps batches."),
    ] = None,
    start_from: Annotated[
        Literal["magnitude", "taylor", "output-difference", "random"] | None,
        typer.Option("--start-from", help="Let gates begin to lean as this criterion ranks their heads."),
    ] = None,
    l0: Annotated[
        float | None, typer.Option("--l0", min=0, help="λ, nats a token that an open head costs: the ratio is learned.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", min=0, max=0.999, help="Budget: close this share of the heads.")
    ] = None,
    params: Annotated[
        float | None, typer.Option("--params", min=0, max=1, help="Budget: leave this share of all parameters.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", min=0, max=1, help="Budget: leave this share of a token's FLOPs.")
    ] = None,
    kv_cache: Annotated[
        float | None, typer.Option("--kv-cache", min=0, max=1, help="Budget: leave this share of the key/value cache.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option("--speedup", min=1, help="Budget: so many times as fast, measured on this machine.")
    ] = None,
    budget_length: Annotated[
        int | None, typer.Option("--budget-length", min=1, help="Text length for FLOPs, cache and time.")
    ] = None,
    budget_batch_size: Annotated[
        int | None, typer.Option("--budget-batch-size", min=1, help="Texts at once for --speedup (8).")
    ] = None,
    budget_workload: Annotated[
        Literal["prefill", "decode", "train"] | None,
        typer.Option("--budget-workload", help="What --speedup makes faster (prefill)."),
    ] = None,
    blocks: Annotated[
        bool | None,
        typer.Option(
            "--blocks/--no-blocks",
            help="Gates on feed-forward layers too: on with --params, --flops and --speedup, off otherwise.",
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", min=1, help="Hidden units that a gate of a feed-forward layer closes.")
    ] = None,
    ranking: Annotated[
        Literal["global", "layer"] | None,
        typer.Option("--ranking", help="Take the share of all heads together, or of each layer's."),
    ] = None,
    l0_warmup_steps: Annotated[int | None, typer.Option("--l0-warmup-steps", min=0)] = None,
    gate_lr: Annotated[
        float | None,
        typer.Option(
            "--gate-lr", min=0, help="Rate of the gates' own optimizer (by the steps); 0: they learn in the model's."
        ),
    ] = None,
    gate_lr_scale: Annotated[
        float | None,
        typer.Option(
            "--gate-lr-scale",
            help="With --gate-lr 0, gates learn so many times as fast: 10, or a rate of 0.02 for other models.",
        ),
    ] = None,
    init: Annotated[float | None, typer.Option("--init", help="log_alpha of every gate at the start.")] = None,
    output_scale: Annotated[
        bool | None,
        typer.Option("--output-scale/--no-output-scale", help="On for deadhead's own models, off for others."),
    ] = None,
    weighting: Annotated[Literal["plain", "output_difference"] | None, typer.Option("--weighting")] = None,
    unit: Annotated[
        Literal["head", "kv_group"] | None,
        typer.Option("--unit", help="What a gate closes: a query head, or a key/value head with its query heads."),
    ] = None,
    freeze_weights: Annotated[
        bool | None,
        typer.Option("--freeze-weights/--no-freeze-weights", help="Train the gates alone: a probe for dead heads."),
    ] = None,
    cut: Annotated[bool, typer.Option("--cut/--no-cut", help="Cut the dead heads, or keep the gates.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be left and what memory training would take.")
    ] = False,
    steps: Steps = None,
    batch_size: Batch = None,
    sequence_length: Length = None,
    learning_rate: Rate = None,
    schedule: Schedule = None,
    gradient_accumulation: Accumulation = None,
    save_every: SaveEvery = None,
    eval_every: EvalEvery = None,
    bf16: Bf16 = None,
    gradient_checkpointing: Checkpointing = None,
    lora_rank: Lora = None,
    distill: Distill = None,
    distill_temperature: Temperature = None,
    teacher: Teacher = None,
    column: Column = None,
    split: Split = None,
    seed: PhaseSeed = None,
    resume: Resume = False,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train gates on a model's heads and cut the heads whose gates close, or rank heads and cut the lowest.

    How much goes is learned under --l0, or asked for by one budget, in shares of the model as it is.

    The teacher of --distill is the model itself, unless --teacher names another.
    """
    base = _base(recipe)
    given = {"sparsity": sparsity, "params": params, "flops": flops, "kv_cache": kv_cache, "speedup": speedup}
    begun = base.prune
    if any(value is not None for value in given.values()):
        # The recipe's budget does not hold where another is asked for.
        begun = begun.model_copy(update=given)
    phase = _changed(
        begun,
        criterion=criterion,
        start_from=start_from,
        l0=l0,
        **given,
        budget_length=budget_length,
        budget_batch_size=budget_batch_size,
        budget_workload=budget_workload,
        blocks=blocks,
        block_size=block_size,
        ranking=ranking,
        gate_lr=gate_lr,
        l0_warmup_steps=l0_warmup_steps,
        gate_lr_scale=gate_lr_scale,
        init=init,
        output_scale=output_scale,
        weighting=weighting,
        unit=unit,
        freeze_weights=freeze_weights,
        **_common(locals()),
    )
    if dry_run:
        _dry_run(model, phase, quiet, as_json)
        return
    text = _changed(base.data, column=column, split=split)
    _run(
        "prune",
        phase,
        out,
        model,
        data,
        text,
        _seed(seed, base),
        resume,
        report_to,
        quiet,
        as_json,
        cut=cut,
        teacher=teacher,
    )


def finetune(
    out: Out,
    model: RequiredModel,
    data: PhaseData = None,
    recipe: RecipeOption = None,
    steps: Steps = None,
    batch_size: Batch = None,
    sequence_length: Length = None,
    learning_rate: Rate = None,
    schedule: Schedule = None,
    gradient_accumulation: Accumulation = None,
    save_every: SaveEvery = None,
    eval_every: EvalEvery = None,
    bf16: Bf16 = None,
    gradient_checkpointing: Checkpointing = None,
    lora_rank: Lora = None,
    distill: Distill = None,
    distill_temperature: Temperature = None,
    teacher: Teacher = None,
    column: Column = None,
    split: Split = None,
    seed: PhaseSeed = None,
    resume: Resume = False,
    report_to: ReportTo = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Train a cut model on, to recover what the cut cost."""
    base = _base(recipe)
    phase = _changed(base.finetune, **_common(locals()))
    text = _changed(base.data, column=column, split=split)
    _run(
        "finetune", phase, out, model, data, text, _seed(seed, base), resume, report_to, quiet, as_json, teacher=teacher
    )


def _dry_run(model: Path, phase: PruneRecipe, quiet: bool, as_json: bool) -> None:
    from deadhead.checkpoints import checkpoint
    from deadhead.measure.cost import skeleton
    from deadhead.report.dry_run import dry_run_table
    from deadhead.training.phases.choosing import measure_budget_latency
    from deadhead.training.runs.dry_run import dry_run

    latency = None
    if phase.budget is not None and phase.budget.kind == "speedup":
        network = checkpoint.load(model)
        with progress(quiet) as report:
            latency = measure_budget_latency(
                network, phase, report=lambda done, total: report("measuring latency", done, total, {})
            )
    else:
        # Without weights: what they are makes no difference.
        network = skeleton(checkpoint.load_config(model))
    result = dry_run(network, phase, latency=latency)
    if as_json:
        print_json(result.to_dict())
        return
    console.print(dry_run_table(result, phase))


def _base(recipe: Path | None) -> Recipe:
    from deadhead.training.recipes.recipe import Recipe, load_recipe

    return Recipe() if recipe is None else load_recipe(recipe)


def _changed(section: Any, **values: Any) -> Any:
    from deadhead.training.recipes.recipe import changed

    return changed(section, **values)


def _seed(given: int | None, base: Recipe) -> int:
    return base.seed if given is None else given


def _common(given: dict[str, Any]) -> dict[str, Any]:
    names = (
        *("steps", "batch_size", "sequence_length", "learning_rate", "schedule", "gradient_accumulation"),
        *("save_every", "eval_every", "bf16", "gradient_checkpointing", "lora_rank", "distill", "distill_temperature"),
    )
    return {name: given.get(name) for name in names}


def _run(
    name: Phase,
    phase: PhaseRecipe,
    out: Path,
    model: Path | None,
    source: str | None,
    text: DataRecipe,
    seed: int,
    resume: bool,
    report_to: list[str] | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    from deadhead.training.processes import is_main, leave
    from deadhead.training.runs.one_call import finetune, prune
    from deadhead.training.runs.single import Options, run_single

    with progress(quiet or not is_main()) as report:
        given: dict[str, Any] = {"out": out, "seed": seed, "resume": resume, "progress": report}
        given |= {"report_to": report_to or (), **options}
        data = _changed(text, source=source)
        if name == "train":
            begun = given.pop("shape") if model is None else model
            done = run_single("train", phase, begun, data, Options(**given))
        else:
            call: Any = prune if name == "prune" else finetune
            done = call(model, data, recipe=phase, **given)
    result = done.to_dict()
    if not leave():
        return
    if as_json:
        print_json(result)
        return
    heads = " ".join(str(count) for count in result["heads"])
    blocks = "".join([", blocks ", " ".join(map(str, result["blocks"]))]) if "blocks" in result else ""
    console.print(
        f"{escape(str(out))}: heads a layer {heads}{blocks}, {result['parameters']:,} parameters, "
        f"perplexity {result['perplexity']:.3f}, {result['bits_per_byte']:.3f} bits/byte"
    )
    if "budget" in result:
        from deadhead.report.budget import budget_sentence

        console.print(budget_sentence(result["budget"]))
