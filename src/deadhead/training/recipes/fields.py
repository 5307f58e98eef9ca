"""What fields of recipes say of themselves. Options, help, tables and docstrings are made of it, so it stands once."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo


def setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    unset: str = "",
    option: str | None = None,
    first: bool = False,
    scaled_from: int | None = None,
    **bounds: Any,
) -> Any:
    """Return a field of a recipe.

    Args:
        default: the value where a recipe says nothing.
        description: one plain sentence.
        unit: what its numbers count, in one word.
        unset: what a default of None stands for.
        option: its option on the command line. None: its name with dashes; "": it has none.
        first: whether it is among the settings that people need first, so that help shows it before the others.
        scaled_from: for steps that grow and shrink with the phase (`--scale-steps`): the fewest there may be then.
        bounds: what pydantic's `Field` takes: ge, gt, le, lt and others.
    """
    extra: dict[str, Any] = {"unit": unit, "unset": unset, "option": option, "first": first, "scaled_from": scaled_from}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def own_fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a section that it does not inherit."""
    inherited = {name for base in section.__bases__ for name in getattr(base, "model_fields", ())}
    return {name: field for name, field in section.model_fields.items() if name not in inherited}


def about(field: FieldInfo, what: str) -> Any:
    """Return what `setting` was told of a field; None for fields that were made without it."""
    return field.json_schema_extra.get(what) if isinstance(field.json_schema_extra, dict) else None


def option_name(name: str, field: FieldInfo) -> str:
    """Return a field's option on the command line, or "" for fields that have none."""
    if not isinstance(field.json_schema_extra, dict):
        return ""
    option = about(field, "option")
    return f"--{name.replace('_', '-')}" if option is None else str(option)


def kind(field: FieldInfo) -> Any:
    """Return the type of a field's values other than None."""
    given = tuple(inner for inner in get_args(field.annotation) if inner is not NoneType)
    return given[0] if NoneType in get_args(field.annotation) else field.annotation


def bounds(field: FieldInfo) -> dict[str, float]:
    """Return the bounds of a field's values by their names: ge, gt, le, lt."""
    names = ("ge", "gt", "le", "lt")
    return {name: getattr(bound, name) for bound in field.metadata for name in names if hasattr(bound, name)}


def known_bounds(field: FieldInfo) -> dict[str, float]:
    """Return the bounds that say what a field means. Others only keep slips of the keyboard out."""
    return {name: bound for name, bound in bounds(field).items() if bound == int(bound) and abs(bound) <= 100}


def default_text(field: FieldInfo) -> str:
    """Return a field's default in words; nothing where there is none, or where it needs no words."""
    if field.default is None:
        return str(about(field, "unset") or "")
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default) if isinstance(field.default, (int, float, str)) else ""


def bounds_text(given: dict[str, float]) -> str:
    """Return bounds in words."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return ", ".join(f"{words[name]} {bound:,.12g}" for name, bound in given.items())


def sentence(field: FieldInfo) -> str:
    """Return a field's description with its default, and its bounds where it has an upper one that says something."""
    default, known = default_text(field), known_bounds(field)
    limits = bounds_text(known) if {"le", "lt"} & set(known) else ""
    facts = "; ".join(filter(None, [default and f"default: {default}", limits]))
    return f"{field.description}  [{facts}]" if facts else str(field.description)
