"""Options made from the fields of recipes, and help that shows the options that people need first before the others."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from copy import copy
from typing import Annotated, Any, Optional, get_args, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from deadhead.training.recipes.fields import about, kind, known_bounds, option_name, own_fields, sentence

_FURTHER = "Further settings"
# Characters of a list of choices that stands beside an option.
_LONGEST_CHOICES = 50

Command = Callable[..., None]


class PhaseCommand(TyperCommand):
    """A command whose help lists further settings under a separate heading."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under their headings. The help of a field already states its default and bounds."""
        for heading in (None, _FURTHER):
            options = [one for one in self.get_params(ctx) if getattr(one, "rich_help_panel", None) == heading]
            rows = [
                (record[0], f"{getattr(one, 'help', '')}{'  [required]' if one.required else ''}")
                for one in options
                if (record := one.get_help_record(ctx)) is not None
            ]
            with formatter.section(heading or "Options"):
                formatter.write_dl(rows)


def takes_settings(*sections: type[BaseModel], without: tuple[str, ...], also: Command) -> Callable[[Command], Command]:
    """Return a decorator that gives a command an option for each field of sections of a recipe.

    The command gets the values that were given as `settings`, by the fields' names. Help lists options that come before
    `settings` in the command's signature first, with the fields that people need first, and options that come after
    `settings` with the other fields.

    Args:
        sections: sections of a recipe; the fields that a section does not inherit come first.
        without: names of fields that get no option.
        also: a function whose options the command gets too, in place of its `**` argument.
    """
    named = [pair for section in sections for pair in own_fields(section).items()]
    named += [pair for section in sections for pair in section.model_fields.items() if pair not in named]
    # Help may speak of options that the command has in a form of its own.
    spoken = {name: field for name, field in named if option_name(name, field)}
    fields = {name: field for name, field in spoken.items() if name not in without}

    def decorate(command: Command) -> Command:
        hints = {**get_type_hints(also, include_extras=True), **get_type_hints(command, include_extras=True)}
        parameters: list[inspect.Parameter] = []
        is_first = True
        *own, _ = inspect.signature(command).parameters.values()
        for parameter in (*own, *inspect.signature(also).parameters.values()):
            if parameter.name == "settings":
                parameters += [_parameter(name, field, spoken) for name, field in fields.items()]
                is_first = False
                continue
            values, info = get_args(hints[parameter.name])
            if not is_first:
                info = copy(info)
                info.rich_help_panel = _FURTHER
            parameters.append(parameter.replace(annotation=Annotated[values, info], kind=parameter.KEYWORD_ONLY))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            settings = {name: value for name in fields if (value := given.pop(name)) is not None}
            command(**given, settings=settings)

        # What typer reads.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _with_options(text: str, fields: Mapping[str, FieldInfo]) -> str:
    """Replace the names of fields in a text by their options: `steps` and gate_lr become --steps and --gate-lr."""

    def option(found: re.Match[str]) -> str:
        name = found[0].strip("`")
        return option_name(name, fields[name]) if name in fields else found[0]

    return re.sub(r"`\w+`|\b\w+_\w+\b", option, text)


def _parameter(name: str, field: FieldInfo, fields: Mapping[str, FieldInfo]) -> inspect.Parameter:
    """Return the parameter of a command for a field; its value is None if the option is not given."""
    option, values = option_name(name, field), kind(field)
    is_number = values in (int, float)
    limits = known_bounds(field) if is_number else {}
    unit = about(field, "unit") or ("number" if is_number else "text")
    text, metavar = _with_options(sentence(field), fields), unit.upper() if is_number or values is str else None
    if len("|".join(map(str, choices := get_args(values)))) > _LONGEST_CHOICES:
        # A terminal does not break such a list.
        text, metavar = f"{text}  One of {', '.join(map(str, choices))}.", "NAME"
    info = typer.Option(
        f"{option}/--no-{option[2:]}" if values is bool else option,
        help=text,
        # Typer's ranges include their ends; a recipe refuses those that do not belong to it, and what slips reach.
        min=limits.get("ge"),
        max=limits.get("le"),
        metavar=metavar,
        rich_help_panel=None if about(field, "first") else _FURTHER,
    )
    annotation = Annotated[Optional[values], info]  # type: ignore[valid-type]  # noqa: UP045
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
