"""Recipes: what is written is what is read, and what is wrong is said in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deadhead.data import load_text
from deadhead.errors import InputError
from deadhead.training.recipes.reading import changed, load_recipe, parse_recipe, to_toml
from deadhead.training.recipes.recipe import PruneRecipe, Recipe
from deadhead.training.runs.run import build_model, model_config
from tests.small_runs import small_recipe, write_prose

_RECIPES = Path(__file__).parents[3] / "src" / "deadhead" / "recipes"

_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,99}", fullmatch=True)
_rates = st.floats(1e-12, 1e3)
_phases: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(1, 10**9),
    "learning_rate": _rates,
    "schedule": st.sampled_from(["constant", "cosine", "linear"]),
    "weight_decay": st.floats(0, 1e3),
    "adam_beta2": st.floats(0, 0.999999),
    "bf16": st.booleans(),
}
_recipes = st.fixed_dictionaries(
    {},
    optional={
        "name": _names,
        "seed": st.integers(0, 2**31 - 1),
        "control": st.booleans(),
        "evaluation_tokens": st.none() | st.integers(1, 10**12),
        "model": st.fixed_dictionaries(
            {},
            optional={"adaptive_cutoffs": st.none() | st.lists(st.integers(1, 10**6)), "hidden_dropout": st.just(0.1)},
        ),
        "data": st.fixed_dictionaries({}, optional={"source": _texts, "text_column": st.none() | _texts}),
        "train": st.fixed_dictionaries({}, optional=_phases),
        "published": st.lists(
            st.fixed_dictionaries(
                {"name": _texts},
                optional={
                    "heads": st.none() | st.lists(st.integers(0, 1024), max_size=4),
                    "sparsity": st.none() | st.floats(0, 1),
                    "parameters": st.none() | st.integers(1, 10**12),
                },
            ),
            max_size=3,
        ),
        "prune": st.fixed_dictionaries(
            {}, optional={**_phases, "sparsity": st.none() | st.floats(0, 0.999), "init": st.floats(-1e3, 1e3)}
        ),
    },
).map(Recipe.model_validate)


@given(_recipes)
@settings(deadline=None, max_examples=100)
def test_toml_round_trip(recipe: Recipe) -> None:
    text = to_toml(recipe)
    assert parse_recipe(text, name="it") == recipe
    assert to_toml(parse_recipe(text, name="it")) == text


@given(_recipes)
@settings(deadline=None, max_examples=30)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_file_round_trip(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / 'a "text".txt', prune={"sparsity": 0.5})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize("path", sorted(_RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_that_come_along(path: Path) -> None:
    """They can be read, and their models fit together."""
    recipe = load_recipe(path)
    assert path.stem == recipe.name
    model_config(recipe.model, 267735)


@pytest.mark.parametrize("l0", [0.01, 0.02])
def test_recipes_that_share_a_dense_model(l0: float) -> None:
    """They differ from the one that trains it in λ alone, so that model, text and what was read of it are the same."""
    first = load_recipe(_RECIPES / "paper-wt103.toml")
    prune = first.prune.model_copy(update={"l0": l0})
    expected = {"name": f"paper-wt103-l0-{l0}", "dense": f"runs/{first.name}/dense", "prune": prune}
    assert load_recipe(_RECIPES / f"paper-wt103-l0-{l0}.toml") == first.model_copy(update=expected)


def test_an_empty_recipe_is_the_default() -> None:
    assert parse_recipe("", name="it") == Recipe()


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", "has an unknown key 'train.step'; did you mean 'steps'?"),
        ("[prune]\nl_0 = 3", "has an unknown key 'prune.l_0'; did you mean 'l0'?"),
        ("[prune]\nlearning-rate = 3", "has an unknown key 'prune.learning-rate'; did you mean 'learning_rate'?"),
        ("[trian]\nsteps = 3", "has an unknown key 'trian'; did you mean 'train'?"),
        (
            "[data]\nzzzz = 3",
            "has an unknown key 'data.zzzz'; known are source, tokenizer, vocab_size, text_column, split",
        ),
        ("[train]\nl0 = 0.1", "has an unknown key 'train.l0'"),
        ("[[published]]\nhead = [3]", "has a wrong value for 'published.0.name': field required"),
        ("[[published]]\nname = 'a'\nhead = [3]", "unknown key 'published.0.head'; did you mean 'heads'?"),
        ("[[published]]\nname = 'a'\nheads = [3, 1.5]", "wrong value for 'published.0.heads.1': .*but it is 1.5"),
        ("[published]\nname = 'a'", "wrong value for 'published'"),
        (
            "[train]\nsteps = 0",
            "wrong value for 'train.steps': input should be greater than or equal to 1, but it is 0",
        ),
        ("[train]\nsteps = -3", "wrong value for 'train.steps': .*, but it is -3"),
        ("[train]\nsteps = 1.5", "wrong value for 'train.steps': .*integer, but it is 1.5"),
        ('[train]\nsteps = "3"', "wrong value for 'train.steps': .*integer, but it is '3'"),
        ("[train]\nsteps = true", "wrong value for 'train.steps': .*integer, but it is True"),
        ("[train]\nlearning_rate = nan", "wrong value for 'train.learning_rate': .*finite"),
        ("[train]\nlearning_rate = inf", "wrong value for 'train.learning_rate': .*finite"),
        ("[train]\nlearning_rate = 0", "wrong value for 'train.learning_rate'"),
        (
            '[train]\nschedule = "step"',
            "wrong value for 'train.schedule': .*'constant', 'cosine' or 'linear', but it is 'step'",
        ),
        (
            "[prune]\nl0 = -0.1",
            "wrong value for 'prune.l0': input should be greater than or equal to 0, but it is -0.1",
        ),
        ("[prune]\nsparsity = 1.0", "wrong value for 'prune.sparsity': input should be less than 1, but it is 1.0"),
        ("[model]\nheads = 0", "wrong value for 'model.heads'"),
        ("[model]\nhidden_dropout = 1.0", "wrong value for 'model.hidden_dropout': input should be less than 1"),
        ("[model]\nadaptive_cutoffs = [1, 'a']", "wrong value for 'model.adaptive_cutoffs.1'"),
        ('[model]\nposition = "absolute"', "wrong value for 'model.position'"),
        ('[data]\ntokenizer = "char"', "wrong value for 'data.tokenizer'"),
        ("seed = -1", "wrong value for 'seed'"),
        ("train = 3", "wrong value for 'train'"),
        ("a = \nb = 1", "is not TOML: .*line 1"),
        ("[train]\nsteps = 3\nsteps = 4", "is not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_recipe(text, name="mine.toml")
    sentence = str(caught.value)
    assert sentence.startswith("The recipe mine.toml ")
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "A recipe was expected at .*, but there is no such file"),
        (b"\xff\xfe\x00\x01", "cannot be read as text"),
        (b"a = '\x00'", "is not TOML"),
    ],
)
def test_files_that_are_no_recipe(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as text"):
        load_recipe(tmp_path)


def test_a_ranking_reads_few_batches_unless_told_otherwise() -> None:
    ranking = PruneRecipe(criterion="taylor", sparsity=0.5)
    assert (ranking.steps, PruneRecipe(criterion="taylor", sparsity=0.5, steps=300).steps) == (8, 300)
    # It is no choice of the user's, so gates that are put in its place learn as long as they do by default.
    assert changed(ranking, criterion="gates").steps == PruneRecipe().steps == 300
    assert changed(PruneRecipe(sparsity=0.5), criterion="flap").steps == 8
    assert PruneRecipe(criterion="sizes", params=0.5).steps == 80
    assert PruneRecipe.model_validate(ranking.model_dump()) == ranking


def test_changed_leaves_what_is_none_and_checks_the_rest() -> None:
    recipe = changed(PruneRecipe(), steps=7, l0=None)
    assert (recipe.steps, recipe.l0) == (7, PruneRecipe().l0)
    with pytest.raises(InputError, match=r"This run's setting has a wrong value for 'sparsity'.* but it is 1\.5\."):
        changed(PruneRecipe(), sparsity=1.5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"heads": 5}, "num_attention_heads must divide hidden_size, but 5 does not divide 32"),
        ({"width": 12, "position": "rotary"}, "position 'rotary' needs an even width, but it is 3"),
        ({"adaptive_cutoffs": [300]}, r"adaptive_cutoffs must rise and lie between 1 and vocab_size 257, but are"),
        ({"adaptive_cutoffs": []}, "adaptive_cutoffs must rise"),
        ({"adaptive_cutoffs": [5, 10, 20, 30]}, "hidden_size 32 is too small for 4 tails"),
    ],
)
def test_sizes_that_do_not_fit_each_other(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    recipe = small_recipe(text, model=model)
    _, tokenizer = load_text(str(text))
    with pytest.raises(InputError, match=f"^The recipe's model does not fit together: {message}") as caught:
        build_model(recipe.model, tokenizer, seed=0)
    assert "\n" not in str(caught.value)
