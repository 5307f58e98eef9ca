"""Writes recipes.md beside this file, from the fields of recipes: python docs/recipes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deadhead.training.recipes.fields import about, bounds, bounds_text, kind, option_name, own_fields
from deadhead.training.recipes.recipe import DataRecipe, ModelRecipe, PhaseRecipe, PruneRecipe, PublishedModel, Recipe

PAGE = Path(__file__).with_suffix(".md")

_HEAD = """<!-- Written by `python docs/recipes.py` from the fields of recipes; change them, not this page. -->

# Recipe fields

This page lists every field of a recipe, the TOML file that describes a run
([an example](training.md#one-recipe-all-phases)). All fields are optional, except those whose default is "required".

You can also set a field that has an option with `deadhead train`, `prune` or `finetune`; their `--help` shows the same
text. In Python the sections are classes, and `help(deadhead.training.PruneRecipe)` describes their fields:

```python
from deadhead.training import PruneRecipe

print(PruneRecipe.model_fields["kv_cache"].description)
```
"""

_SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("The run", "At the top of the file, before the first section.", Recipe),
    ("`[model]`", "", ModelRecipe),
    ("`[data]`", "", DataRecipe),
    ("`[train]`, `[prune]`, `[finetune]`", "", PhaseRecipe),
    ("`[prune]` only", "Set at most one budget: sparsity, params, flops, kv_cache, memory or speedup.", PruneRecipe),
    (
        "`[[published]]`",
        "One table for each published model; only `deadhead inspect` reads them.",
        PublishedModel,
    ),
)


def page() -> str:
    """Return the text of recipes.md."""
    parts = [_HEAD]
    for title, note, section in _SECTIONS:
        fields = [
            (name, field)
            for name, field in own_fields(section).items()
            if not isinstance(field.default, (BaseModel, list))
        ]
        rows = ["| field | values | default | description | option |", "|---|---|---|---|---|"]
        rows += [f"| {' | '.join(_row(name, field))} |" for name, field in fields]
        parts.append(
            "\n\n".join(
                filter(None, [f"## {title}", (section.__doc__ or "").partition("\n")[0], note, "\n".join(rows)])
            )
            + "\n"
        )
    return "\n".join(parts)


def _row(name: str, field: FieldInfo) -> tuple[str, ...]:
    option = option_name(name, field)
    return (
        f"`{field.alias or name}`",
        _values(field),
        _default(field),
        str(field.description),
        f"`{option}`" if option else "",
    )


def _values(field: FieldInfo) -> str:
    values = kind(field)
    if choices := get_args(values):
        return "a list of whole numbers" if choices == (int,) else ", ".join(f"`{choice}`" for choice in choices)
    names: dict[Any, str] = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    unit = about(field, "unit")
    named = names[values] if not unit else unit if values is float else f"{names[values]} of {unit}"
    return ", ".join(filter(None, [named, bounds_text(bounds(field))]))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return about(field, "unset") or "none" if field.default is None else f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
