"""Every field of a recipe describes itself, and what is made of the fields is up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from deadhead.training.recipes.fields import about, bounds_text, known_bounds, option_name, own_fields, sentence
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, PublishedModel, Recipe

_SECTIONS = (Recipe, ModelRecipe, DataRecipe, PhaseRecipe, PruneRecipe, PublishedModel)
_DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize("section", _SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described_in_one_sentence(section: type[Recipe]) -> None:
    assert section.__doc__ is not None
    for name, field in section.model_fields.items():
        description = field.description or ""
        assert description.endswith(".") and ". " not in description and "\n" not in description, name
        assert f"    {name}: {description}" in section.__doc__


def test_the_page_of_fields_is_up_to_date() -> None:
    """If it is not, `python docs/recipes.py` writes it."""
    page = runpy.run_path(str(_DOCS / "recipes.py"))["page"]()
    assert (_DOCS / "recipes.md").read_text(encoding="utf-8") == page


def test_what_a_field_says_of_itself() -> None:
    fields = PruneRecipe.model_fields
    assert sentence(fields["distill"]).endswith("no teacher.  [default: 0.0; at least 0, at most 1]")
    assert sentence(fields["gate_lr"]).endswith("[default: by the number of steps]")
    assert sentence(fields["freeze_weights"]).endswith("[default: off]")
    # What keeps slips of the keyboard out is not worth reading.
    assert (fields["params"].metadata[0].ge, bounds_text(known_bounds(fields["params"]))) == (1e-4, "at most 1")
    assert [option_name(name, fields[name]) for name in ("kv_cache", "hard")] == ["--kv-cache", ""]
    assert option_name("source", DataRecipe.model_fields["source"]) == "--data"
    assert option_name("prune", Recipe.model_fields["prune"]) == ""
    assert "steps" not in own_fields(PruneRecipe) and "steps" in own_fields(PhaseRecipe)


def test_steps_that_grow_with_the_phase_are_counted_in_steps() -> None:
    scaled = {name for name, field in PruneRecipe.model_fields.items() if about(field, "scaled_from") is not None}
    assert scaled == {"steps", "warmup_steps", "l0_warmup_steps", "ramp_steps", "eval_every"}
    assert {about(PruneRecipe.model_fields[name], "unit") for name in scaled} == {"steps"}
