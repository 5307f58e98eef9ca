"""Recipes: everything that decides a run, as frozen models that round-trip through TOML and JSON."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from transformers import PreTrainedModel

from deadhead.disk.reading import read_text, shown
from deadhead.errors import InputError
from deadhead.gates.budget import BUDGET_KINDS, Budget
from deadhead.layouts import find_layout
from deadhead.measure.criteria import ONE_SHOT, OneShot
from deadhead.models import OWN_TYPES, AllAttentionConfig
from deadhead.plans.plan import Unit
from deadhead.plans.scores import Ranking

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# log_alpha's learning rate where the model's own is too small for gates to close in a short phase.
_GATE_RATE = 0.02


# Beyond these no training is meant, and arithmetic or memory would end; they keep slips of the keyboard out.
_MOST_STEPS = 10**9
_MOST_TOKENS = 10**15
_MOST_ROWS = 2**20
_LONGEST = 2**24
_FASTEST = 1e3
_LEAST_SHARE = 1e-4


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True)


class ModelRecipe(_Section):
    """The model; see `AllAttentionConfig` for each field.

    `persistent` is of the All-attention Transformer (128), `feed_forward` of the Transformer-XL (four times the width).

    `from` names a model that exists, by its folder or its name on the hub, in place of all of these.
    """

    from_: str | None = Field(None, alias="from", min_length=1)
    architecture: Literal["all_attention", "transformer_xl"] = "all_attention"
    layers: int = Field(4, ge=1, le=1000)
    width: int = Field(128, ge=1, le=65536)
    heads: int = Field(8, ge=1, le=1024)
    persistent: int | None = Field(None, ge=1, le=65536)
    feed_forward: int | None = Field(None, ge=1, le=2**20)
    memory_length: int = Field(64, ge=1, le=65536)
    segment_length: int = Field(64, ge=1, le=65536)
    position: Literal["learned", "sinusoidal", "rotary"] = "learned"
    adaptive_cutoffs: list[int] | None = None
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    output_dropout: float = Field(0.0, ge=0, lt=1)

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
    """The text: where it comes from and how it becomes tokens."""

    source: str = "stdlib"
    tokenizer: Literal["byte", "bpe", "word"] = "byte"
    vocab_size: int | None = Field(None, ge=1, le=2**24)
    column: str | None = None
    split: str | None = None


class PhaseRecipe(_Section):
    """One phase of training.

    Args: steps of the optimizer; batch_size rows on each process; sequence_length, tokens of a row of a model without
    segment memory (by default 256, or all its positions); learning rate (see `with_defaults`), its schedule and
    warm-up; AdamW's weight decay and second beta; clipping norm; accumulated batches; bf16 mixed precision; rank of the
    LoRA adapters that learn in place of the weights (0: the weights learn); distill, the weight in the loss of what a
    teacher says (0: none), and its temperature; steps between two logged lines and between two checkpoints to resume
    from (0: none), of which save_total_limit stay, so that a damaged one is no loss; steps between two measurements of
    validation perplexity (0: none), and the tokens scored in one.
    """

    steps: int = Field(300, ge=1, le=_MOST_STEPS)
    batch_size: int = Field(16, ge=1, le=_MOST_ROWS)
    sequence_length: int | None = Field(None, ge=2, le=_LONGEST)
    learning_rate: float | None = Field(None, gt=0, le=_FASTEST)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0, le=_MOST_STEPS)
    weight_decay: float = Field(0.0, ge=0, le=_FASTEST)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, ge=0, le=1e9)
    gradient_accumulation: int = Field(1, ge=1, le=_MOST_ROWS)
    gradient_checkpointing: bool = False
    bf16: bool = False
    lora_rank: int = Field(0, ge=0, le=65536)
    distill: float = Field(0.0, ge=0, le=1)
    distill_temperature: float = Field(2.0, ge=0.01, le=1000)
    log_every: int = Field(10, ge=1, le=_MOST_STEPS)
    save_every: int = Field(100, ge=0, le=_MOST_STEPS)
    save_total_limit: int = Field(2, ge=1, le=_MOST_STEPS)
    eval_every: int = Field(0, ge=0, le=_MOST_STEPS)
    eval_tokens: int = Field(16384, ge=1, le=_MOST_TOKENS)

    @property
    def training_steps(self) -> int:
        """Steps of the optimizer that the phase makes."""
        return self.steps


class PruneRecipe(PhaseRecipe):
    """The phase that chooses heads: gates with λ or a target sparsity and the paper's three stabilisers, or a ranking.

    Args: criterion is "gates", "topk" (gates of which every draw opens the same number), or a one-shot criterion of
    `deadhead.measure.criteria`, which trains nothing and looks at `steps` batches; start_from, a one-shot criterion by
    whose scores gates begin to lean, from start_batches batches (None: all begin alike); l0 is λ, in nats a token for an
    open head. In its place one budget may be given, reached along a ramp over `ramp_steps` (0: two thirds of the phase):
    sparsity, the share of heads that goes; params, flops or kv_cache, the share of the dense model's that is left; or
    speedup, how many times as fast the model is to be on this machine. budget_length is the text's length for FLOPs,
    cache and time (None: the model's memory, a row, or 1024), budget_batch_size and budget_workload are for time.
    blocks, whether hidden units of feed-forward layers have gates too, in blocks of block_size (None: where the budget
    is of parameters, FLOPs or time, and there are such layers). ranking, whether
    that share goes of all heads or of each layer's; l0_warmup_steps, init and output_scale are the stabilisers; gate_lr
    the rate of the gates' own optimizer (None: by the number of steps; 0: they learn in the model's, gate_lr_scale
    times as fast); freeze_weights trains the gates alone; weighting the plain or output-difference-weighted loss;
    track_difference measures output differences, for the run's page, also where they do not weight the loss; unit what
    a gate opens and closes (None: key/value groups where there are any, else heads); the rest are the gates' constants.
    """

    criterion: Literal["gates", "topk", OneShot] = "gates"
    start_from: OneShot | None = None
    start_batches: int = Field(64, ge=1, le=_MOST_STEPS)
    ranking: Ranking = "global"
    l0: float = Field(0.01, ge=0, le=_FASTEST)
    sparsity: float | None = Field(None, ge=0, lt=1)
    params: float | None = Field(None, ge=_LEAST_SHARE, le=1)
    flops: float | None = Field(None, ge=_LEAST_SHARE, le=1)
    kv_cache: float | None = Field(None, ge=_LEAST_SHARE, le=1)
    speedup: float | None = Field(None, ge=1, le=1000)
    budget_length: int | None = Field(None, ge=1, le=_LONGEST)
    budget_batch_size: int = Field(8, ge=1, le=_MOST_ROWS)
    budget_workload: Literal["prefill", "decode", "train"] = "prefill"
    blocks: bool | None = None
    block_size: int | None = Field(None, ge=1, le=_LONGEST)
    ramp_steps: int = Field(0, ge=0, le=_MOST_STEPS)
    l0_warmup_steps: int = Field(0, ge=0, le=_MOST_STEPS)
    gate_lr: float | None = Field(None, ge=0, le=_FASTEST)
    gate_lr_scale: float | None = Field(None, gt=0, le=1e9)
    init: float = Field(2.0, ge=-1000, le=1000)
    output_scale: bool | None = None
    hard: bool = True
    weighting: Literal["plain", "output_difference"] = "plain"
    track_difference: bool = False
    freeze_weights: bool = False
    unit: Unit | None = None

    @property
    def is_one_shot(self) -> bool:
        """Whether heads are ranked without training anything."""
        return self.criterion in ONE_SHOT

    @property
    def budget(self) -> Budget | None:
        """What of the dense model may be left, if the recipe says so."""
        given = [Budget(kind=kind, value=value) for kind in BUDGET_KINDS if (value := getattr(self, kind)) is not None]
        return given[0] if given else None

    @property
    def training_steps(self) -> int:
        """Steps of the optimizer that the phase makes: none where heads are only ranked."""
        return 0 if self.is_one_shot else self.steps

    @model_validator(mode="after")
    def _asks_for_one_thing(self) -> PruneRecipe:
        given = [kind for kind in BUDGET_KINDS if getattr(self, kind) is not None]
        if len(given) > 1:
            raise PydanticCustomError("budgets", f"it asks for {given[0]} and {given[1]}; leave one of the two out")
        if self.criterion != "gates" and not given:
            raise PydanticCustomError(
                "no_sparsity",
                "Only the criterion gates learns how many heads go; with another set sparsity, or another budget",
            )
        if self.start_from is not None and (not given or self.is_one_shot):
            raise PydanticCustomError(
                "no_sparsity", "start_from is for gates with a target; set sparsity or another budget, or leave it out"
            )
        if given and given != ["sparsity"] and (self.criterion == "topk" or self.ranking == "layer"):
            what = "The criterion topk" if self.criterion == "topk" else "ranking layer"
            raise PydanticCustomError(
                "budgets", f"{what} holds a share of the heads, so it goes with sparsity, not with {given[0]}"
            )
        if given == ["kv_cache"] and self.blocks:
            raise PydanticCustomError("budgets", "blocks hold no key/value cache; leave blocks out")
        if self.block_size is not None and self.blocks is False:
            raise PydanticCustomError("budgets", "block_size is of blocks, which are switched off; leave one out")
        return self


_P = TypeVar("_P", bound=PhaseRecipe)


def with_defaults(phase: _P, model: PreTrainedModel) -> _P:
    """Return a phase's recipe with what it leaves to the model filled in.

    Deadhead's own models are trained from scratch, with the paper's output scale. Others come pretrained: the weights
    take small steps, the gates do not for that, and what is left of a layer is not scaled up.
    """
    ours = model.config.model_type in OWN_TYPES
    rate = phase.learning_rate or (2e-3 if ours else 5e-5)
    filled: dict[str, Any] = {"learning_rate": rate}
    if isinstance(phase, PruneRecipe):
        # With an optimizer of their own the scale would only make clipping see more of the gates' gradients.
        scale = 1.0 if phase.gate_lr != 0 else 10.0 if ours else _GATE_RATE / rate
        filled["gate_lr_scale"] = phase.gate_lr_scale or scale
        filled["output_scale"] = ours if phase.output_scale is None else phase.output_scale
        filled["blocks"] = _has_blocks(phase, model)
    return phase.model_copy(update=filled)


def _has_blocks(phase: PruneRecipe, model: PreTrainedModel) -> bool:
    """Tell whether blocks have gates: as the recipe says, else where heads alone would leave most of the cost."""
    if phase.blocks is not None or phase.block_size is not None:
        return phase.blocks is not False
    asked = phase.budget is not None and phase.budget.kind in ("params", "flops", "speedup")
    return (
        asked
        and model.config.model_type != AllAttentionConfig.model_type
        and bool(find_layout(model).block_sites(model))
    )


class PublishedModel(_Section):
    """A model of a recipe's shape that others have published: what they say of it.

    Args: name; heads left in each layer (None: all, or as `sparsity` says); sparsity, the share of heads gone where no
    heads are stated; parameters without embeddings and output layer, as its authors count them.
    """

    name: str
    heads: list[int] | None = None
    sparsity: float | None = Field(None, ge=0, le=1)
    parameters: int | None = Field(None, ge=1, le=10**15)


class Recipe(_Section):
    """A run: dense training, training with gates, cut, fine-tuning.

    With `control` the dense model is trained on for as many steps in all as the pruned one, without gates, so that the
    two can be compared fairly.

    `dense` is the folder of a model that the `train` section trained in an earlier run, such as "runs/paper/dense": the
    run begins from a copy of it, and goes on in the text behind that section's steps.

    Where `[model] from` names a model, `[data] source` has to be given; without a `train` section that model is the
    dense one as it is.

    `published` changes nothing in a run; `deadhead inspect` shows what such models cost beside what is stated of them.
    """

    name: str = Field("run", max_length=100, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0, lt=2**31)
    control: bool = False
    evaluation_tokens: int | None = Field(None, ge=1, le=_MOST_TOKENS)
    dense: str | None = Field(None, min_length=1)
    model: ModelRecipe = ModelRecipe()
    data: DataRecipe = DataRecipe()
    train: PhaseRecipe = PhaseRecipe()
    prune: PruneRecipe = PruneRecipe()
    finetune: PhaseRecipe = PhaseRecipe()
    published: list[PublishedModel] = []

    @property
    def dense_phase(self) -> PhaseRecipe | None:
        """The phase that the dense model has behind it, in this run or an earlier one; None if it is taken as it is."""
        return None if self.model.from_ is not None and "train" not in self.model_fields_set else self.train

    @property
    def trains_dense(self) -> bool:
        """Whether the dense model is trained in this run."""
        return self.dense is None and self.dense_phase is not None

    @model_validator(mode="after")
    def _begins_with_one_model(self) -> Recipe:
        if self.model.from_ is None:
            return self
        if self.dense is not None:
            raise PydanticCustomError("budgets", "[model] from and dense both name a model; leave one of the two out")
        if "source" not in self.data.model_fields_set:
            raise PydanticCustomError(
                "budgets", "[model] from names a model that learned from other text, so name one: [data] source"
            )
        return self


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        InputError: the file cannot be read or is not TOML, or a key or value is not one of a recipe.
    """
    return parse_recipe(read_text(Path(path), what="recipe"), name=str(path))


def parse_recipe(text: str, *, name: str) -> Recipe:
    """Read a recipe from TOML text; `name` says in messages where it came from.

    Raises:
        InputError: the text is not TOML, or a key or value is not one of a recipe.
    """
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"The recipe {name} is not TOML: {error}.") from None
    except RecursionError:
        raise InputError(f"The recipe {name} is not TOML that can be read: it is nested too deep.") from None
    except ValidationError as error:
        raise InputError(f"The recipe {name} {_explain(error, Recipe)}.") from None
    except ValueError:
        raise InputError(f"The recipe {name} has a number or a date that cannot be: too many digits, say.") from None


def changed(section: Any, **values: Any) -> Any:
    """Return a copy of a recipe or section with some values changed (None leaves a value as it is).

    Raises:
        InputError: a value is not allowed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        # What was not said stays unsaid: some defaults depend on that.
        return type(section).model_validate({**section.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise InputError(f"This run's setting {_explain(error, type(section))}.") from None


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    """Say in one clause what the first problem is; an unknown key gets the nearest known one."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = [field.alias or key for key, field in _section(root, where[:-1]).model_fields.items()]
        near = difflib.get_close_matches(where[-1][:100], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"has an unknown key {shown('.'.join(where))}; {hint}"
    expected = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] == "no_sparsity":
        return f"does not say how many heads go: {expected}"
    if first["type"] == "budgets":
        return f"does not go together: {expected}"
    if first["type"] == "foreign":
        return f"has layers of two kinds: {expected}"
    return f"has a wrong value for {'.'.join(where)!r}: {expected}, but it is {shown(first['input'])}"


def _section(root: type[BaseModel], path: list[str]) -> type[BaseModel]:
    for name in path:
        if name.isdigit():
            continue  # the place in a list of tables
        inner = root.model_fields[name].annotation if name in root.model_fields else None
        inner = next(iter(get_args(inner)), inner)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return root
        root = inner
    return root


def to_toml(recipe: Recipe) -> str:
    """Write a recipe as TOML; values that are None are left out, as TOML has none."""

    def value(item: Any) -> str:
        if isinstance(item, bool):
            return str(item).lower()
        if isinstance(item, str):
            # A JSON string is a TOML basic string but for the one character JSON leaves unescaped.
            # Escaped, characters beyond U+FFFF would become two surrogates, which TOML refuses.
            return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
        return repr(item)

    dumped = recipe.model_dump(exclude_none=True)
    if recipe.model.from_ is not None:
        dumped["model"] = {"from": recipe.model.from_}
    if recipe.dense_phase is None:
        del dumped["train"]
    tables = {name: item for name, item in dumped.items() if isinstance(item, list)}
    lines = [f"{name} = {value(item)}" for name, item in dumped.items() if not isinstance(item, (dict, list))]
    for name, section in dumped.items():
        if isinstance(section, dict):
            lines += ["", f"[{name}]", *(f"{key} = {value(item)}" for key, item in section.items())]
    for name, entries in tables.items():
        for entry in entries:
            lines += ["", f"[[{name}]]", *(f"{key} = {value(item)}" for key, item in entry.items())]
    return "\n".join(lines) + "\n"
