"""Bad recipes: each gives one sentence that names what is wrong, and exit code 2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deadhead.errors import InputError
from deadhead.training.recipes.reading import parse_recipe
from deadhead.training.recipes.recipe import Recipe
from tests.cli.cases import Case, recipe, require_one_sentence, write

# What the TOML says, and what the sentence must say of it.
_TOML = {
    # The language.
    "a key twice": ("seed = 1\nseed = 2", "is not TOML"),
    "a section twice": ("[train]\n[train]", "is not TOML"),
    "a value without a key": ("= 3", "is not TOML"),
    "a key without a value": ("seed", "is not TOML"),
    "a string without an end": ('name = "run', "is not TOML"),
    "a number with two points": ("seed = 1.2.3", "is not TOML"),
    "JSON": ('{"seed": 1}', "is not TOML"),
    "YAML": ("train:\n  steps: 3", "is not TOML"),
    "nested too deep": ("a = " + "[" * 100_000, "nested too deep|is not TOML"),
    "a number of 5,000 digits": (f"seed = {'9' * 5000}", "too many digits"),
    "a number of 5,000 hexadecimal digits": (f"seed = 0x{'f' * 5000}", "wrong value for 'seed'.*thousands of digits"),
    "a date that cannot be": ("seed = 2026-02-31", "is not TOML|a date that cannot be"),
    "a null character": ('name = "a\0b"', "is not TOML"),
    # The recipe itself.
    "seed as a string": ('seed = "1"', "wrong value for 'seed'"),
    "seed as a fraction": ("seed = 1.5", "wrong value for 'seed'"),
    "seed as a truth value": ("seed = true", "wrong value for 'seed'"),
    "seed below 0": ("seed = -1", "wrong value for 'seed'"),
    "seed too large": ("seed = 2147483648", "wrong value for 'seed'"),
    "seed as a date": ("seed = 2026-01-01", "wrong value for 'seed'"),
    "name of nothing": ('name = ""', "wrong value for 'name'"),
    "name with a slash": ('name = "../run"', "wrong value for 'name'"),
    "name of dots": ('name = ".."', "wrong value for 'name'"),
    "name with a line": (r'name = "a\nb"', "wrong value for 'name'"),
    "name too long": (f'name = "{"a" * 300}"', "wrong value for 'name'"),
    "control as a number": ("control = 1", "wrong value for 'control'"),
    "no tokens to measure": ("evaluation_tokens = 0", "wrong value for 'evaluation_tokens'"),
    "dense of nothing": ('dense = ""', "wrong value for 'dense'"),
    "dense that is not there": ('dense = "nothing/dense"', "nothing/dense, but there is no such folder"),
    "a section as a number": ("train = 3", "wrong value for 'train'"),
    "a section as a list": ("[[train]]", "wrong value for 'train'"),
    "an unknown key": ("stepz = 3", "unknown key 'stepz'"),
    "an unknown key of 100,000 letters": (f"{'k' * 100_000} = 3", "unknown key 'kkk"),
    "a value of 100,000 letters": (f'seed = "{"k" * 100_000}"', "wrong value for 'seed'.* …"),
    "a key that is a command": ('"\\u001b[2J" = 3', r"unknown key '\\x1b"),
    # [model]
    "unknown architecture": ('[model]\narchitecture = "lstm"', "wrong value for 'model.architecture'"),
    "no layers": ("[model]\nlayers = 0", "wrong value for 'model.layers'"),
    "10^9 layers": ("[model]\nlayers = 1_000_000_000", "wrong value for 'model.layers'"),
    "10^12 wide": ("[model]\nwidth = 1_000_000_000_000", "wrong value for 'model.width'"),
    "no heads": ("[model]\nheads = 0", "wrong value for 'model.heads'"),
    "heads as a list": ("[model]\nheads = [4, 4]", "wrong value for 'model.heads'"),
    "heads that do not divide": ("[model]\nwidth = 32\nheads = 5", "must divide hidden_size"),
    "feed-forward of an All-attention model": ("[model]\nfeed_forward = 8", "layers of two kinds"),
    "persistent of a Transformer-XL": (
        '[model]\narchitecture = "transformer_xl"\npersistent = 8',
        "layers of two kinds",
    ),
    "unknown position": ('[model]\nposition = "alibi"', "wrong value for 'model.position'"),
    "dropout of 1": ("[model]\nhidden_dropout = 1.0", "wrong value for 'model.hidden_dropout'"),
    "dropout of nan": ("[model]\nhidden_dropout = nan", "wrong value for 'model.hidden_dropout'"),
    "no memory": ("[model]\nmemory_length = 0", "wrong value for 'model.memory_length'"),
    "cut-offs of text": ('[model]\nadaptive_cutoffs = ["a"]', "wrong value for 'model.adaptive_cutoffs.0'"),
    "cut-offs that fall": ("[model]\nadaptive_cutoffs = [20, 10]", "cutoffs"),
    # [data]
    "unknown tokenizer": ('[data]\ntokenizer = "char"', "wrong value for 'data.tokenizer'"),
    "no vocabulary": ("[data]\nvocab_size = 0", "wrong value for 'data.vocab_size'"),
    "a vocabulary of 10^12": ("[data]\nvocab_size = 1_000_000_000_000", "wrong value for 'data.vocab_size'"),
    "source as a list": ('[data]\nsource = ["a"]', "wrong value for 'data.source'"),
    "source of nothing": ('[data]\nsource = ""', "text|Text|source"),
    "source that is not there": ('[data]\nsource = "nothing.txt"', "nothing.txt"),
    "source with a null character": (r"[data]" + "\n" + r'source = "a\u0000b"', "a"),
    # [train], [finetune]
    "no steps": ("[train]\nsteps = 0", "wrong value for 'train.steps'"),
    "10^30 steps": (f"[train]\nsteps = {10**30}", "wrong value for 'train.steps'"),
    "half a step": ("[train]\nsteps = 2.5", "wrong value for 'train.steps'"),
    "no rows": ("[train]\nbatch_size = 0", "wrong value for 'train.batch_size'"),
    "10^30 rows": (f"[train]\nbatch_size = {10**30}", "wrong value for 'train.batch_size'"),
    "rows of one token": ("[train]\nsequence_length = 1", "wrong value for 'train.sequence_length'"),
    "no rate": ("[train]\nlearning_rate = 0.0", "wrong value for 'train.learning_rate'"),
    "an endless rate": ("[train]\nlearning_rate = inf", "wrong value for 'train.learning_rate'"),
    "a rate of 10^30": ("[train]\nlearning_rate = 1e30", "wrong value for 'train.learning_rate'"),
    "a rate of text": ('[train]\nlearning_rate = "1e-3"', "wrong value for 'train.learning_rate'"),
    "unknown schedule": ('[train]\nschedule = "step"', "wrong value for 'train.schedule'"),
    "warm-up below 0": ("[train]\nwarmup_steps = -1", "wrong value for 'train.warmup_steps'"),
    "decay below 0": ("[train]\nweight_decay = -0.1", "wrong value for 'train.weight_decay'"),
    "beta2 of 1": ("[train]\nadam_beta2 = 1.0", "wrong value for 'train.adam_beta2'"),
    "clipping below 0": ("[train]\nmax_grad_norm = -1.0", "wrong value for 'train.max_grad_norm'"),
    "no accumulation": ("[train]\ngradient_accumulation = 0", "wrong value for 'train.gradient_accumulation'"),
    "rank of 10^30": (f"[finetune]\nlora_rank = {10**30}", "wrong value for 'finetune.lora_rank'"),
    "distillation above 1": ("[finetune]\ndistill = 1.5", "wrong value for 'finetune.distill'"),
    "no temperature": ("[finetune]\ndistill_temperature = 0.0", "wrong value for 'finetune.distill_temperature'"),
    "never logged": ("[finetune]\nlog_every = 0", "wrong value for 'finetune.log_every'"),
    "no checkpoint kept": ("[finetune]\nsave_total_limit = 0", "wrong value for 'finetune.save_total_limit'"),
    "nothing scored": ("[finetune]\neval_tokens = 0", "wrong value for 'finetune.eval_tokens'"),
    "gates in fine-tuning": ("[finetune]\nl0 = 0.1", "unknown key 'finetune.l0'"),
    # [prune]
    "unknown criterion": ('[prune]\ncriterion = "best"', "wrong value for 'prune.criterion'"),
    "criterion without a share": ('[prune]\ncriterion = "taylor"', "does not say how many heads go"),
    "topk without a share": ('[prune]\ncriterion = "topk"', "does not say how many heads go"),
    "leaning without a share": ('[prune]\nstart_from = "taylor"', "start_from is for gates with a target"),
    "two budgets": ("[prune]\nsparsity = 0.5\nparams = 0.5", "it asks for sparsity and params"),
    "sparsity of 1": ("[prune]\nsparsity = 1.0", "wrong value for 'prune.sparsity'"),
    "sparsity below 0": ("[prune]\nsparsity = -0.1", "wrong value for 'prune.sparsity'"),
    "no parameters left": ("[prune]\nparams = 0.0", "wrong value for 'prune.params'"),
    "a cache of nothing": ("[prune]\nkv_cache = 1e-30", "wrong value for 'prune.kv_cache'"),
    "FLOPs above 1": ("[prune]\nflops = 1.5", "wrong value for 'prune.flops'"),
    "slower": ("[prune]\nspeedup = 0.5", "wrong value for 'prune.speedup'"),
    "10^30 times as fast": ("[prune]\nspeedup = 1e30", "wrong value for 'prune.speedup'"),
    "l0 below 0": ("[prune]\nl0 = -1.0", "wrong value for 'prune.l0'"),
    "l0 of nan": ("[prune]\nl0 = nan", "wrong value for 'prune.l0'"),
    "unknown ranking": ('[prune]\nranking = "all"', "wrong value for 'prune.ranking'"),
    "a layer's share of parameters": (
        '[prune]\nparams = 0.5\nranking = "layer"',
        "ranking layer holds a share of the heads",
    ),
    "topk of parameters": ('[prune]\nparams = 0.5\ncriterion = "topk"', "topk holds a share of the heads"),
    "blocks of a cache": ("[prune]\nkv_cache = 0.5\nblocks = true", "blocks hold no key/value cache"),
    "a size of no blocks": ("[prune]\nblocks = false\nblock_size = 4", "block_size is of blocks"),
    "blocks of nothing": ("[prune]\nblock_size = 0", "wrong value for 'prune.block_size'"),
    "init of inf": ("[prune]\ninit = inf", "wrong value for 'prune.init'"),
    "init of 10^300": ("[prune]\ninit = 1e300", "wrong value for 'prune.init'"),
    "no rate of gates": ("[prune]\ngate_lr_scale = 0.0", "wrong value for 'prune.gate_lr_scale'"),
    "unknown weighting": ('[prune]\nweighting = "more"', "wrong value for 'prune.weighting'"),
    "unknown unit": ('[prune]\nunit = "layer"', "wrong value for 'prune.unit'"),
    "unknown workload": ('[prune]\nbudget_workload = "sleep"', "wrong value for 'prune.budget_workload'"),
    "a length of nothing": ("[prune]\nbudget_length = 0", "wrong value for 'prune.budget_length'"),
    # [[published]]
    "published without a name": ("[[published]]\nparameters = 3", "wrong value for 'published.0.name'"),
    "published as a section": ("[published]\nname = 'a'", "wrong value for 'published'"),
    "published of text": ('[[published]]\nname = "a"\nheads = ["b"]', "wrong value for 'published.0.heads.0'"),
    "published with another key": ('[[published]]\nname = "a"\nsize = 3', "unknown key 'published.0.size'"),
}
# What only the model, or the text, shows to be wrong: found before anything is trained.
_PRUNES: dict[str, tuple[dict[str, object], str]] = {
    "FLOPs that cannot be": ({"flops": 0.001}, "cannot be reached"),
    "more rows than the text has": ({"batch_size": 2**20}, "tokens were expected"),
    "soft gates on persistent vectors": ({"hard": False, "blocks": True}, "need hard gates"),
    "blocks that do not fit": ({"blocks": True, "block_size": 3000}, "block size must lie between"),
    "parameters that cannot be": ({"params": 0.001}, "cannot be reached"),
    "groups of a model without": ({"unit": "kv_group"}, "kv_group"),
    "adapters of a model of ours": ({"lora_rank": 4}, "leave the LoRA rank out"),
    "rows of a model with memory": ({"sequence_length": 9}, "leave it out"),
}


@pytest.mark.parametrize("name", _TOML)
def test_one_sentence_and_nothing_written(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    content, message = _TOML[name]
    case = Case("run r.toml --out {out}", message, write("r.toml", content))
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("name", _PRUNES)
def test_what_the_model_shows_is_said_before_it_is_trained(
    name: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values, message = _PRUNES[name]
    case = Case("run r.toml --out {out}", message, recipe(prune=values))
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)


def test_a_dense_phase_has_no_teacher(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case("run r.toml --out {out}", r"\[train\] has no teacher to learn from", recipe(train={"distill": 0.5}))
    require_one_sentence(case, given, tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("place", ["../pipe", "/dev/zero", "../loop"])
def test_what_is_no_file(
    place: str, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare(folder: Path) -> None:
        if place == "../pipe":
            os.mkfifo(folder.parent / "pipe")
        if place == "../loop":
            (folder.parent / "loop").symlink_to("loop")

    message = {"../pipe": "is a named pipe", "/dev/zero": "longer than 64 MiB", "../loop": "symbolic links"}[place]
    require_one_sentence(Case(f"run {place} --out {{out}}", message, prepare), given, tmp_path, monkeypatch, capfd)


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**30, 10**300)
    | st.floats()
    | st.text(max_size=20)
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _keys(section: type) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(section.model_fields)) | st.text(max_size=8)  # type: ignore[attr-defined]


_sections = st.one_of(
    *(
        st.fixed_dictionaries(
            {name: st.dictionaries(_keys(type(getattr(Recipe(), name))), _values, min_size=1, max_size=4)}
        )
        for name in ("model", "data", "train", "prune", "finetune")
    ),
    st.dictionaries(_keys(Recipe), _values, min_size=1, max_size=4),
)


def _toml(value: object) -> str:
    """Write any value as TOML; None, which it has not, as a word that is no value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in value) + '"'
    return str(value)


def _require_sentence_or_recipe(text: str) -> None:
    try:
        recipe = parse_recipe(text, name="r.toml")
    except InputError as error:
        assert len(str(error)) < 1500
    else:
        assert isinstance(recipe, Recipe)


@given(_sections)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_give_a_recipe_or_a_sentence(values: dict[str, object]) -> None:
    _require_sentence_or_recipe("\n".join(f"{_toml(key)} = {_toml(value)}" for key, value in values.items()))


@given(st.text(max_size=200) | st.lists(st.sampled_from("[]{}=\".\n#'ab1-+_:,\\ué\0"), max_size=80).map("".join))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_a_recipe_or_a_sentence(text: str) -> None:
    _require_sentence_or_recipe(text)
