"""Recipes: everything that decides a run, as frozen models. Each field describes itself; nothing here needs torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deadhead.plans.kinds import BUDGET_KINDS, ONE_SHOT, Criterion, Of, OneShot, Ranking
from deadhead.plans.memory_sizes import in_bytes
from deadhead.plans.plan import Unit
from deadhead.training.recipes.fields import sentence, setting

if TYPE_CHECKING:
    from deadhead.gates.budget import Budget

# Beyond these no training is meant, and arithmetic or memory would end; they keep slips of the keyboard out.
_MOST_STEPS = 10**9
_MOST_TOKENS = 10**15
_MOST_ROWS = 2**20
_LONGEST = 2**24
_FASTEST = 1e3
_LEAST_SHARE = 1e-4
# Batches from which scores are taken, steps in which sizes are learned, and rows of each.
_LOOK, _SIZE_STEPS, _SIZE_ROWS = 8, 80, 4

_optional = partial(setting, None)
_count = partial(setting, ge=1)
_tokens = partial(_count, unit="tokens")
_steps = partial(setting, unit="steps", ge=0, le=_MOST_STEPS)
_share = partial(setting, unit="share", ge=0)
_left = partial(_optional, unit="share", first=True, ge=_LEAST_SHARE, le=1)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Complete the docstring by what the fields say of themselves."""
        fields = [f"    {name}: {sentence(field)}" for name, field in cls.model_fields.items()]
        cls.__doc__ = "\n".join([f"{cls.__doc__}\n\nAttributes:", *fields])


class ModelRecipe(_Section):
    """The model: one of deadhead's own, trained from scratch, or an existing one."""

    from_: str | None = _optional(
        "An existing model, by its folder or its name on the hub, in place of all other fields of this section.",
        unset="a new model of these sizes",
        option="",
        alias="from",
        min_length=1,
    )
    architecture: Literal["all_attention", "transformer_xl"] = setting(
        "all_attention",
        "All-attention layers hold persistent vectors; Transformer-XL layers hold a feed-forward part.",
        first=True,
    )
    layers: int = _count(4, "Number of layers.", first=True, le=1000)
    width: int = _count(128, "Width of the hidden states, a multiple of the number of heads.", first=True, le=65536)
    heads: int = _count(8, "Attention heads of each layer.", first=True, le=1024)
    persistent: int | None = _count(
        None, "Persistent vectors of each head, in an All-attention Transformer.", unit="vectors", unset="128", le=65536
    )
    feed_forward: int | None = _count(
        None, "Width of the feed-forward layers of a Transformer-XL.", unset="four times the model's width", le=2**20
    )
    memory_length: int = _tokens(64, "Number of earlier tokens that a token attends to.", first=True, le=65536)
    segment_length: int = _tokens(64, "Tokens that a training step reads from each row.", first=True, le=65536)
    position: Literal["learned", "sinusoidal", "rotary"] = setting("learned", "How positions are encoded.")
    adaptive_cutoffs: list[int] | None = _optional(
        "Ranks at which the vocabulary is split into parts of decreasing width, for adaptive input and softmax.",
        unset="plain embeddings",
        option="",
    )
    attention_dropout: float = _share(0.0, "Dropout of the attention weights.", lt=1)
    hidden_dropout: float = _share(0.0, "Dropout of each layer's output.", lt=1)
    embedding_dropout: float = _share(0.0, "Dropout of the embeddings.", lt=1)
    output_dropout: float = _share(0.0, "Dropout of the last hidden states.", lt=1)

    @model_validator(mode="after")
    def _is_described_once(self) -> ModelRecipe:
        others = sorted(self.model_fields_set - {"from_"})
        if self.from_ is not None and others:
            raise PydanticCustomError("budgets", f"from names a model that has its sizes, so leave {others[0]} out")
        return self

    @model_validator(mode="after")
    def _has_what_its_layers_are_made_of(self) -> ModelRecipe:
        foreign = "feed_forward" if self.architecture == "all_attention" else "persistent"
        if getattr(self, foreign) is not None:
            raise PydanticCustomError("foreign", f"architecture {self.architecture} has no {foreign}; leave it out")
        return self


class DataRecipe(_Section):
    """The text, and how it becomes tokens."""

    source: str = setting(
        "stdlib",
        "The text: a file or a directory of text, JSON, JSON Lines, CSV or Parquet, compressed (.gz, .zst) or not; "
        "hf:NAME[:CONFIG]; 'stdlib' (Python's own source code, the default for deadhead's own models only); or, in "
        "deadhead prune, 'self', text that the model itself writes first (for a file with one of these names, write "
        "'./self').",
        option="--data",
        first=True,
    )
    tokenizer: Literal["byte", "bpe", "word"] = setting("byte", "How the text is split into tokens.", first=True)
    vocab_size: int | None = _tokens(
        None, "Size of the vocabulary, with its special tokens.", unset="8192 for bpe, all words for word", le=2**24
    )
    text_column: str | None = _optional(
        "The column that contains the text, or lists of messages, in data with fields.",
        unset="text, else messages, else prompt and completion, else the only column of strings",
    )
    split: str | None = _optional("Use only this split of an hf: data set.")
    data_format: Literal["text", "json", "csv", "parquet"] | None = _optional(
        "Format of the files, whatever their names; text reads them unchanged.", unset="by their suffixes"
    )
    chat_template: str | None = _optional(
        "File with the chat template for conversations.", unset="the tokenizer's own", min_length=1
    )
    answers_only: bool = setting(False, "Train and measure only on the answers of conversations.")

    @property
    def reading(self) -> dict[str, Any]:
        """How the text is read, as `deadhead.data.load_text` takes it."""
        return self.model_dump(exclude={"source", "tokenizer", "vocab_size"})


class PhaseRecipe(_Section):
    """One phase of training."""

    steps: int = _steps(300, "Optimizer steps.", first=True, scaled_from=1, ge=1)
    batch_size: int = _count(16, "Rows of a batch in each process.", unit="rows", first=True, le=_MOST_ROWS)
    sequence_length: int | None = _optional(
        "Tokens of each row, for models without segment memory.",
        unit="tokens",
        unset="256, or all positions of the model if it has fewer",
        ge=2,
        le=_LONGEST,
    )
    learning_rate: float | None = _optional(
        "Peak learning rate of the weights.",
        unset="2e-3 for deadhead's own models, 5e-5 for others, 2e-4 for others that recover from a cut",
        first=True,
        gt=0,
        le=_FASTEST,
    )
    schedule: Literal["constant", "cosine", "linear"] = setting(
        "constant", "Schedule of the learning rate after the warm-up."
    )
    warmup_steps: int = _steps(0, "Steps over which the learning rate rises to its peak.", scaled_from=0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", ge=0, le=_FASTEST)
    adam_beta2: float = _share(0.999, "Decay of AdamW's second moment.", lt=1)
    max_grad_norm: float = setting(
        1.0, "Norm to which larger gradients are clipped; 0 disables clipping.", ge=0, le=1e9
    )
    gradient_accumulation: int = _count(1, "Batches in each optimizer step.", unit="batches", le=_MOST_ROWS)
    gradient_checkpointing: bool = setting(False, "Save memory by computing activations again in the backward pass.")
    bf16: bool = setting(False, "Train in bfloat16 mixed precision.")
    lora_rank: int = setting(
        0,
        "Rank of LoRA adapters that are trained in place of the weights and merged at the end; 0 trains the weights.",
        first=True,
        ge=0,
        le=65536,
    )
    distill: float = _share(0.0, "Weight of a teacher's distribution in the loss; 0 uses no teacher.", first=True, le=1)
    distill_temperature: float = setting(2.0, "Temperature of both distributions in distillation.", ge=0.01, le=1000)
    log_every: int = _steps(10, "Steps between two logged lines.", ge=1)
    save_every: int = _steps(100, "Steps between two checkpoints to resume from; 0 saves none.")
    save_total_limit: int = _count(
        2, "Number of checkpoints to keep; with more than one, a damaged checkpoint is no loss.", le=_MOST_STEPS
    )
    eval_every: int = _steps(
        0, "Steps between two measurements of validation perplexity; 0 measures none.", scaled_from=1
    )
    eval_tokens: int = _tokens(16384, "Tokens that each measurement of validation perplexity scores.", le=_MOST_TOKENS)

    @property
    def training_steps(self) -> int:
        """Steps of the optimizer that the phase makes."""
        return self.steps


class PruneRecipe(PhaseRecipe):
    """The phase that chooses heads: gates learn which heads to remove, or a criterion ranks heads."""

    sparsity: float | None = _share(None, "Budget: the share of the heads to remove.", first=True, lt=1)
    params: float | None = _left("Budget: the share of the parameters to keep.")
    of: Of = setting(
        "all",
        "Whether `params` is a share of all parameters, or of those of the blocks, without embeddings and output "
        "layer.",
    )
    flops: float | None = _left("Budget: the share of the FLOPs of a token to keep.")
    kv_cache: float | None = _left("Budget: the share of the key/value cache to keep.")
    memory: str | None = _optional(
        "Budget: the most memory that the weights, as loaded, and the cache of `budget_batch_size` texts of "
        "`budget_length` tokens may take, such as 4GiB or 500MB.",
        unit="size",
        first=True,
        max_length=40,
    )
    speedup: float | None = _optional(
        "Budget: the speedup of the model on this machine, as a factor.", first=True, ge=1, le=1000
    )
    l0: float = setting(
        0.01,
        "λ: the price of an open head, in nats a token; without a budget, it decides how many heads are removed.",
        unit="nats",
        first=True,
        ge=0,
        le=_FASTEST,
    )
    criterion: Criterion | None = _optional(
        "How heads are chosen: gates and topk learn which heads to keep; sizes learns how much of each sublayer to "
        "keep, in `steps` steps (80 if not set) on batches of 4 rows (if not set); the others rank heads without "
        "training, from `steps` batches (8 if not set).",
        unset="sizes if deadhead prune gets a language model that is not deadhead's own and a budget of params, flops, "
        "kv_cache, memory or speedup, but nothing that only gates or training need; otherwise, and in a run, gates",
        first=True,
    )
    freeze_weights: bool = setting(False, "Train only the gates, as a probe for dead heads.", first=True)
    start_from: OneShot | None = _optional(
        "With a budget, the criterion whose scores set the gates at the start; blocks are then of units with similar "
        "scores.",
        unset="all gates start with the same value",
    )
    start_batches: int = _count(
        _LOOK, "Batches from which the scores of `start_from` are computed.", unit="batches", le=_MOST_STEPS
    )
    ranking: Ranking = setting("global", "Whether the share is that of all heads together or of each layer.")
    budget_length: int | None = _tokens(
        None,
        "Length of the text for which FLOPs, cache and time are counted.",
        unset="that of the model's memory, or of a row",
        le=_LONGEST,
    )
    budget_batch_size: int = _count(8, "Texts in the batch for which time is measured.", unit="texts", le=_MOST_ROWS)
    budget_workload: Literal["prefill", "decode", "train"] = setting("prefill", "The workload that `speedup` measures.")
    blocks: bool | None = _optional(
        "Also choose among the hidden units of feed-forward layers, or among persistent vectors.",
        unset="on with params, flops, memory and speedup if the model has such layers, off otherwise",
    )
    block_size: int | None = _count(
        None,
        "Hidden units of a block, which are kept or removed together: units with similar scores, or neighbours where "
        "gates start with the same value.",
        unit="units",
        unset="depends on the width of the layers, at most 128 for neighbours and 32 for others",
        le=_LONGEST,
    )
    ramp_steps: int = _steps(
        0, "Steps over which a budget is approached; 0 uses two thirds of the phase.", scaled_from=0
    )
    l0_warmup_steps: int = _steps(0, "Steps over which λ rises to its value.", scaled_from=0)
    gate_lr: float | None = _optional(
        "Learning rate of the gates' own optimizer; with 0, gates learn in the model's optimizer.",
        unset="by the number of steps",
        ge=0,
        le=_FASTEST,
    )
    gate_lr_scale: float | None = _optional(
        "With a gate_lr of 0, the learning rate of the gates in the model's optimizer, as a multiple of that of the "
        "weights.",
        unset="10; for models that are not deadhead's own, the multiple that makes their rate 0.02",
        gt=0,
        le=1e9,
    )
    init: float = setting(2.0, "log_alpha of every gate at the start.", ge=-1000, le=1000)
    output_scale: bool | None = _optional(
        "Multiply a layer's output by heads / open heads.", unset="on for deadhead's own models, off for others"
    )
    hard: bool = setting(True, "Draw gates of exactly 0 or 1, with a straight-through gradient.", option="")
    weighting: Literal["plain", "output_difference"] = setting(
        "plain",
        "Whether all heads are pushed alike, or hardest those whose removal changes the output of their layer least.",
    )
    track_difference: bool = setting(
        False, "Measure output differences for the run's page even where they do not weight the loss."
    )
    compensate: bool | None = _optional(
        "After the cut, fit what is left of each layer to the outputs of the dense model, on rows of the same text.",
        unset="on for models that are not deadhead's own, off for others",
    )
    compensate_rows: int = _count(
        512, "Rows of text on which the fits are made and checked.", unit="rows", le=_MOST_ROWS
    )
    unit: Unit | None = _optional(
        "What a gate closes: a query head, or a key/value head with its query heads.",
        unset="kv_group if key/value heads are shared, head otherwise",
    )

    @property
    def is_ranked(self) -> bool:
        """Whether units are ranked, without gates and without training the model."""
        return self.criterion == "sizes" or self.criterion in ONE_SHOT

    @property
    def budget(self) -> Budget | None:
        """What of the dense model may be left, if the recipe says so."""
        from deadhead.gates.budget import Budget  # needs torch

        given = [(kind, value) for kind in BUDGET_KINDS if (value := getattr(self, kind)) is not None]
        if given and given[0][0] == "memory":
            return Budget(kind="memory", value=float(in_bytes(given[0][1])))
        return Budget(kind=given[0][0], value=given[0][1], of=self.of) if given else None

    @property
    def training_steps(self) -> int:
        """Steps of the optimizer that the phase makes: none where units are only ranked."""
        return 0 if self.is_ranked else self.steps

    @field_validator("memory", mode="before")
    @classmethod
    def _may_be_a_number(cls, value: Any) -> Any:
        return f"{value}B" if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("memory")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                in_bytes(value)
        except ValueError as error:
            raise PydanticCustomError("size", str(error)) from None
        return value

    @model_validator(mode="after")
    def _looks_at_few_batches(self) -> PruneRecipe:
        # As many steps as training takes would be hours of a real model, and no better. It stays unsaid all the same.
        if self.is_ranked and "steps" not in self.model_fields_set:
            object.__setattr__(self, "steps", _SIZE_STEPS if self.criterion == "sizes" else _LOOK)
        if self.criterion == "sizes" and "batch_size" not in self.model_fields_set:
            object.__setattr__(self, "batch_size", _SIZE_ROWS)
        return self

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> PruneRecipe:
        given = [kind for kind in BUDGET_KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise PydanticCustomError("budgets", f"it asks for {given[0]} and {given[1]}; leave one of the two out")
        if self.criterion not in (None, "gates") and not given:
            raise PydanticCustomError(
                "no_sparsity",
                "Only the criterion gates learns how many heads go; with another set sparsity, or another budget",
            )
        if self.start_from is not None and (not given or self.is_ranked):
            raise PydanticCustomError(
                "no_sparsity", "start_from is for gates with a target; set sparsity or another budget, or leave it out"
            )
        if given and given != ["sparsity"] and (self.criterion == "topk" or self.ranking == "layer"):
            what = "The criterion topk" if self.criterion == "topk" else "ranking layer"
            raise PydanticCustomError(
                "budgets", f"{what} holds a share of the heads, so it goes with sparsity, not with {given[0]}"
            )
        if given == ["sparsity"] and self.criterion == "sizes":
            raise PydanticCustomError(
                "budgets",
                "The criterion sizes learns by what units cost, so it goes with params, flops, kv_cache, memory or "
                "speedup, not with sparsity",
            )
        if self.of != "all" and given != ["params"]:
            raise PydanticCustomError("budgets", "of says what params is a share of; give params too, or leave it out")
        if given == ["kv_cache"] and self.blocks:
            raise PydanticCustomError("budgets", "blocks hold no key/value cache; leave blocks out")
        if self.block_size is not None and self.blocks is False:
            raise PydanticCustomError("budgets", "block_size is of blocks, which are switched off; leave one out")
        return self


# Fields of `PruneRecipe` that only gates read.
GATES_ONLY = (
    *("l0", "freeze_weights", "start_from", "start_batches", "ramp_steps", "l0_warmup_steps", "gate_lr"),
    *("gate_lr_scale", "init", "output_scale", "hard", "weighting", "track_difference"),
)


class PublishedModel(_Section):
    """Published figures of a model with the shape of the recipe's model."""

    name: str = Field(description="Name of the model.")
    heads: list[int] | None = _optional("Heads left in each layer.", unset="all, or as `sparsity` says", option="")
    sparsity: float | None = _share(
        None, "Share of the heads that is removed, if `heads` is not given.", option="", le=1
    )
    parameters: int | None = _count(
        None, "Parameters without embeddings and output layer, as the authors count them.", le=10**15
    )


class Recipe(_Section):
    """A run: dense training, training with gates, cut, fine-tuning."""

    name: str = setting("run", "Name of the run.", option="", max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    seed: int = setting(0, "Seed of everything random.", ge=0, lt=2**31)
    control: bool = setting(
        False,
        "Also train the dense model further without gates, for as many steps in total as the pruned one, for a fair "
        "comparison.",
        option="",
    )
    evaluation_tokens: int | None = _tokens(
        None, "Tokens that each stage is scored on.", unset="all of the held-out text", option="", le=_MOST_TOKENS
    )
    dense: str | None = _optional(
        "Folder of a model that an earlier run trained by the same `train` section; the run begins from a copy of it, "
        "at the place in the text that follows the steps of that section.",
        unset="the run trains its own",
        option="",
        min_length=1,
    )
    model: ModelRecipe = Field(ModelRecipe(), description="The model.")
    data: DataRecipe = Field(DataRecipe(), description="The text.")
    train: PhaseRecipe = Field(PhaseRecipe(), description="Dense training.")
    prune: PruneRecipe = Field(PruneRecipe(), description="The phase that chooses heads.")
    finetune: PhaseRecipe = Field(PhaseRecipe(), description="Training of the cut model.")
    published: list[PublishedModel] = Field(
        [], description="Published models, whose costs `deadhead inspect` shows; they change nothing in a run."
    )

    @property
    def dense_phase(self) -> PhaseRecipe | None:
        """The phase that the dense model has behind it, in this run or an earlier one; None if it is taken as it is."""
        return None if self.model.from_ is not None and "train" not in self.model_fields_set else self.train

    @property
    def trains_dense(self) -> bool:
        """Whether the dense model is trained in this run."""
        return self.dense is None and self.dense_phase is not None

    @property
    def planned_steps(self) -> dict[str, int]:
        """Steps of the optimizer that each phase of this run makes, by its name, in order."""
        steps = {"train": self.train.steps if self.trains_dense else 0, "prune": self.prune.training_steps}
        steps["finetune"] = self.finetune.steps
        return steps | {f"control_{name}": steps[name] for name in ("prune", "finetune") if self.control}

    @model_validator(mode="after")
    def _begins_with_one_model(self) -> Recipe:
        if self.model.from_ is None:
            return self
        if self.dense is not None:
            raise PydanticCustomError("budgets", "[model] from and dense both name a model; leave one of the two out")
        if "source" not in self.data.model_fields_set:
            raise PydanticCustomError(
                "budgets",
                "[model] from names a model that learned from other text, so name one in [data] source: a text file, "
                "a directory, hf:NAME[:CONFIG] or stdlib",
            )
        if others := sorted({"tokenizer", "vocab_size"} & self.data.model_fields_set):
            raise PydanticCustomError(
                "budgets", f"[model] from has its own tokenizer, so leave [data] {' and '.join(others)} out"
            )
        return self
