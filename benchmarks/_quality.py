"""One point of the quality benchmark: a trained model, a way to choose heads, a sparsity, a seed → two perplexities."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed

import deadhead
from deadhead.data import TokenizedCorpus, TokenStream
from deadhead.layouts import find_layout
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, close_to_budget, gate_config
from deadhead.training.phases.compensating import calibration_of
from deadhead.training.phases.ranking import rank

# To be raised with whatever else changes the figures: points of another version are measured anew.
_VERSION = 1

MODELS = ("all-attention", "gpt2", "llama-gqa")
Kind = Literal["learned", "one-shot", "torch-pruning", "dense", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of every phase, and tokens measured: the same for all methods.

    Args:
        dense: steps of the dense model before anything is pruned.
        after: steps from there to the end, which a method uses in its own way.
        gates: of these, steps in which gates learn, for methods with gates.
        looked_at: batches that one-shot criteria read.
        tokens: of each split that is measured.
    """

    dense: int = 3000
    after: int = 500
    gates: int = 40
    looked_at: int = 64
    tokens: int = 40_000


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to choose heads and to use the steps after the dense training.

    Args:
        kind: what it is.
        criterion: of deadhead, or "l2" and "taylor" of Torch-Pruning.
        ranking: "global" or "layer".
        distill: weight of the dense model's distribution in the loss, while gates learn and in the fine-tuning.
        compensate: whether output projections are fitted to the dense model right after the cut.
        options: further fields of `PruneRecipe`.
        rank: a sweep measures methods of lower rank first.
    """

    kind: Kind
    rank: int = 0
    criterion: str = ""
    ranking: Literal["global", "layer"] = "global"
    distill: float = 0.0
    compensate: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_ADAM = {"gate_lr": 0.0, "gate_lr_scale": 20.0}
_LEANING = {"start_from": "taylor"}
_SCALED = {**_LEANING, "output_scale": True}
_WEIGHTED = {**_LEANING, "weighting": "output_difference"}
METHODS: dict[str, Method] = {
    "dense": Method(kind="dense"),
    "gates": Method(kind="learned", criterion="gates", options=_LEANING),
    "gates + distillation": Method(kind="learned", criterion="gates", distill=0.5, options=_LEANING),
    "gates + compensation": Method(kind="learned", criterion="gates", compensate=True, options=_LEANING),
    "gates + both": Method(kind="learned", criterion="gates", distill=0.5, compensate=True, options=_LEANING),
    "gates, by layer": Method(kind="learned", criterion="gates", ranking="layer", options=_LEANING, rank=1),
    "gates, starting alike": Method(kind="learned", criterion="gates", rank=3),
    "gates, weighted": Method(kind="learned", criterion="gates", options=_WEIGHTED, rank=3),
    "gates in Adam": Method(kind="learned", criterion="gates", options=_ADAM, rank=3),
    "gates, scaled output": Method(kind="learned", criterion="gates", options=_SCALED, rank=3),
    "topk": Method(kind="learned", criterion="topk", options=_LEANING, rank=1),
    "taylor": Method(kind="one-shot", criterion="taylor"),
    "taylor + distillation": Method(kind="one-shot", criterion="taylor", distill=0.5),
    "taylor + compensation": Method(kind="one-shot", criterion="taylor", compensate=True),
    "taylor + both": Method(kind="one-shot", criterion="taylor", distill=0.5, compensate=True),
    "taylor, by layer": Method(kind="one-shot", criterion="taylor", ranking="layer", rank=3),
    "output-difference": Method(kind="one-shot", criterion="output-difference", rank=1),
    "magnitude": Method(kind="one-shot", criterion="magnitude", rank=2),
    "random": Method(kind="one-shot", criterion="random", rank=2),
    "Torch-Pruning L2, global": Method(kind="torch-pruning", criterion="l2", rank=1),
    "Torch-Pruning L2, local": Method(kind="torch-pruning", criterion="l2", ranking="layer", rank=1),
    "Torch-Pruning Taylor, global": Method(kind="torch-pruning", criterion="taylor", rank=1),
    "Torch-Pruning Taylor, local": Method(kind="torch-pruning", criterion="taylor", ranking="layer", rank=1),
    "small from scratch": Method(kind="scratch", rank=4),
}


def fresh(name: str, vocab_size: int, seed: int) -> PreTrainedModel:
    """Return an untrained model of 4 layers with 8 heads, or 8 groups of 2 query heads, each."""
    set_seed(seed)
    if name == "all-attention":
        return deadhead.models.AllAttentionForCausalLM(
            deadhead.models.AllAttentionConfig(
                vocab_size=vocab_size,
                hidden_size=128,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_persistent=64,
                memory_length=64,
                segment_length=64,
            )
        )
    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        sizes = {"n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": 128}
        return GPT2LMHeadModel(GPT2Config(**common, **sizes, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0))
    return LlamaForCausalLM(
        LlamaConfig(
            **common,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )


def phase(name: str, **values: Any) -> dict[str, Any]:
    """Return the fields of a phase's recipe: 512 tokens a batch for every model."""
    rows = {"batch_size": 8} if name == "all-attention" else {"batch_size": 4, "sequence_length": 128}
    return {**rows, "adam_beta2": 0.99, "save_every": 0, "log_every": 100, **values}


def again(name: str, steps: int, distill: float, **values: Any) -> dict[str, Any]:
    """Return the fields of a phase after the dense training: the rate warms up again, then falls to 0."""
    rate = 2e-3 if name == "all-attention" else 1e-3
    warmup = min(20, steps // 5)
    fields = {"steps": steps, "learning_rate": rate, "warmup_steps": warmup, "schedule": "cosine", "distill": distill}
    return phase(name, **fields, **values)


def train_dense(name: str, seed: int, text: TokenizedCorpus, vocab_size: int, steps: int, folder: Path) -> None:
    """Train a dense model to the end of its schedule and keep it in `folder`."""
    model = fresh(name, vocab_size, seed)
    recipe = phase(name, steps=steps, learning_rate=3e-3, warmup_steps=min(100, steps // 5), schedule="cosine")
    deadhead.training.train(model, text.splits["train"], PhaseRecipe(**recipe), PhaseRun(seed=seed))
    deadhead.save(model, folder)


def perplexities(model: PreTrainedModel, text: TokenizedCorpus, tokens: int) -> dict[str, float]:
    """Return the perplexity a token, each seen after 64 or more, of the test and the validation text."""
    window = None if hasattr(model.config, "memory_length") else 128
    return {
        split: deadhead.evaluate(model, text.splits[split], limit=tokens, window=window).perplexity
        for split in ("test", "valid")
    }


def measure_point(
    name: str,
    method: Method,
    sparsity: float,
    seed: int,
    *,
    text: TokenizedCorpus,
    vocab_size: int,
    dense: Path,
    budget: Budget,
) -> dict[str, Any]:
    """Prune, measure, fine-tune, measure.

    Returns:
        `before` and `after`, perplexities of "test" and "valid" right after the cut and at the end, `heads` a layer,
        `parameters`, `steps` after the dense training (in all, from scratch) and `seconds`. Or `cannot`, the reason why
        a peer's library does not prune this model.
    """
    begun = time.perf_counter()
    train, steps = text.splits["train"], budget.after
    first = budget.dense
    if method.kind == "scratch":
        model = fresh(name, vocab_size, seed)
        deadhead.cut(model, _uniform(model, sparsity))
        recipe = phase(name, steps=budget.dense + budget.after, learning_rate=3e-3, warmup_steps=100, schedule="cosine")
        deadhead.training.train(model, train, PhaseRecipe(**recipe), PhaseRun(seed=seed))
        return _result(model, begun, None, perplexities(model, text, budget.tokens), budget.dense + budget.after)
    model = deadhead.load(dense)
    teacher = deadhead.load(dense) if method.distill or method.compensate else None
    learned_from = teacher if method.distill else None
    if method.kind == "torch-pruning":
        if (reason := _prune_as_peers_do(model, method, sparsity, train, budget, seed)) is not None:
            return {"cannot": reason}
    elif method.kind != "dense":
        learned = method.kind == "learned"
        choice = {"sparsity": sparsity, "criterion": method.criterion, "ranking": method.ranking}
        choice |= {"output_scale": False, **method.options}
        recipe = PruneRecipe(**again(name, budget.looked_at, method.distill, **choice))
        if learned:
            # The rate does not fall in so short a phase: what is learned in it counts at the end.
            values = {"steps": budget.gates, "schedule": "constant", "start_batches": budget.looked_at}
            recipe = recipe.model_copy(update=values)
            gates = deadhead.attach(model, config=gate_config(recipe, model, seed))
            deadhead.training.train(
                model,
                train,
                recipe,
                PhaseRun(gates=gates, seed=seed + 1000, first_segment=first, teacher=learned_from),
            )
            close_to_budget(model, gates, recipe)
            deadhead.cut(model, gates.plan())
            steps, first = steps - recipe.steps, first + recipe.steps
        else:
            deadhead.cut(model, rank(model, train, recipe, seed=seed + 3000, first_segment=first))
    if method.compensate:
        assert teacher is not None
        recipe = PruneRecipe(**again(name, budget.looked_at, 0.0, sparsity=sparsity, compensate=True))
        recipe = recipe.model_copy(update={"compensate_rows": budget.looked_at * recipe.batch_size})
        deadhead.compensate(model, teacher, calibration_of(model, train, recipe, seed=seed))
    before = perplexities(model, text, budget.tokens)
    # Another order than that of the dense training, which would read the same rows again.
    deadhead.training.train(
        model,
        train,
        PhaseRecipe(**again(name, steps, method.distill)),
        PhaseRun(seed=seed + 2000, first_segment=first, teacher=learned_from),
    )
    return _result(model, begun, before, perplexities(model, text, budget.tokens), budget.after)


def _prune_as_peers_do(
    model: Any, method: Method, sparsity: float, train: TokenStream, budget: Budget, seed: int
) -> str | None:
    """Prune a model with Torch-Pruning, in place; return why it cannot, or None."""
    # Here, as only these methods need the package.
    from benchmarks._torch_pruning import CannotPrune, prune_heads

    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(train.tokens) - 129, (budget.looked_at, 4, 1), generator=generator)
    windows = torch.from_numpy(train.tokens[(starts + torch.arange(128)).numpy()].astype("int64"))
    importance: Any = method.criterion
    try:
        prune_heads(
            model,
            sparsity,
            importance=importance,
            ranking=method.ranking,
            batches=[{"input_ids": rows} for rows in windows],
        )
    except CannotPrune as reason:
        return str(reason)
    return None


def _uniform(model: PreTrainedModel, sparsity: float) -> deadhead.HeadPlan:
    """Return the plan that keeps the first heads of every layer."""
    layout = find_layout(model)
    unit = layout.units(model)[0]
    total = {site.layer: site.total for site in layout.sites(model, unit)}
    kept = {layer: range(count - round(sparsity * count)) for layer, count in total.items()}
    return deadhead.HeadPlan(kept=kept, total=total, unit=unit)


def _result(
    model: PreTrainedModel, begun: float, before: dict[str, float] | None, after: dict[str, float], steps: int
) -> dict[str, Any]:
    return {
        "before": before,
        "after": after,
        "heads": _heads(model),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def _heads(model: PreTrainedModel) -> list[int]:
    """Return the heads or groups left in each layer, by the projections' sizes: peers leave no plan behind."""
    if hasattr(model.config, "memory_length"):
        return [len(layer.attention.heads) for layer in model.model.layers]
    if isinstance(model, GPT2LMHeadModel):
        return [
            sum(p.shape[0] for n, p in b.attn.named_parameters() if n == "c_proj.weight") // 16
            for b in model.transformer.h
        ]
    return [
        sum(p.shape[0] for n, p in b.self_attn.named_parameters() if n == "k_proj.weight") // 16
        for b in model.model.layers
    ]


def settings(budget: Budget, method: Method) -> dict[str, Any]:
    """Return what a point depends on besides its name. A point with other settings is measured again."""
    how = {name: value for name, value in asdict(method).items() if name != "rank"}
    return {"version": _VERSION, "budget": asdict(budget), "how": how}
