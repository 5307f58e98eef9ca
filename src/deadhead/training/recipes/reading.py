"""Recipes read, changed and written as TOML. What is wrong with one is said in one sentence."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from deadhead.disk.reading import read_text, shown
from deadhead.errors import InputError
from deadhead.plans.kinds import BUDGET_KINDS
from deadhead.training.recipes.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_S = TypeVar("_S", bound=BaseModel)

# What the recipes' own checks found, by the types of their errors.
_FOUND = {
    "no_sparsity": "does not say how many heads go",
    "budgets": "does not go together",
    "foreign": "has layers of two kinds",
}


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file.

    Raises:
        InputError: the file cannot be read or is not TOML, or a key or value is not one of a recipe.
    """
    return parse_recipe(read_text(Path(path), what="recipe"), name=str(path))


def parse_recipe(text: str, *, name: str) -> Recipe:
    """Read a recipe from TOML text; `name` says in messages where it came from."""
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"The recipe {name} is not TOML: {error}.") from None
    except RecursionError:
        raise InputError(f"The recipe {name} is not TOML that can be read: it is nested too deep.") from None
    except ValidationError as error:
        raise InputError(f"The recipe {name} {explained(error, Recipe)}.") from None
    except ValueError:
        raise InputError(f"The recipe {name} has a number or a date that cannot be: too many digits, say.") from None


def changed(section: _S, **values: Any) -> _S:
    """Return a copy of a recipe or section with some values changed (None leaves a value as it is).

    Raises:
        InputError: a value is not allowed.
    """
    given = {name: value for name, value in values.items() if value is not None}
    # What was not said stays unsaid: some defaults depend on that.
    begun = section.model_dump(exclude_unset=True)
    if not given.keys().isdisjoint(BUDGET_KINDS):
        # A budget that the section has does not hold where another is asked for.
        begun = {name: value for name, value in begun.items() if name not in BUDGET_KINDS}
    try:
        return type(section).model_validate({**begun, **given})
    except ValidationError as error:
        raise InputError(f"This run's setting {explained(error, type(section))}.") from None


def explained(error: ValidationError, root: type[BaseModel]) -> str:
    """Say in one clause what the first problem is; an unknown key gets the nearest known one."""
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = [field.alias or key for key, field in _section(root, where[:-1]).model_fields.items()]
        near = difflib.get_close_matches(where[-1][:100], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"has an unknown key {shown('.'.join(where))}; {hint}"
    expected = first["msg"][0].lower() + first["msg"][1:]
    if first["type"] in _FOUND:
        return f"{_FOUND[first['type']]}: {expected}"
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
        for name in ("tokenizer", "vocab_size"):
            dumped["data"].pop(name, None)
    if recipe.dense_phase is None:
        del dumped["train"]
    lines = [f"{name} = {value(item)}" for name, item in dumped.items() if not isinstance(item, (dict, list))]
    tables = [(f"[{name}]", item) for name, item in dumped.items() if isinstance(item, dict)]
    tables += [(f"[[{name}]]", entry) for name, item in dumped.items() if isinstance(item, list) for entry in item]
    for title, table in tables:
        lines += ["", title, *(f"{key} = {value(item)}" for key, item in table.items())]
    return "\n".join(lines) + "\n"
