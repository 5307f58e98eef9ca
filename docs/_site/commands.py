"""Writes the reference of the command line from the commands themselves: cli.md shows what their help shows."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from deadhead.cli.app import app

_PAGE = "cli.md"
_OPTION = re.compile(r"(?<![\w`-])--?[a-z][\w-]*")


class _Tables:
    """Takes the rows that a command gives click's formatter of help, and makes tables of them."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Write what follows under a heading."""
        self.parts.append(f"| {name} | |\n|---|---|")
        yield

    def write_dl(self, rows: Sequence[tuple[str, str]], *_: Any) -> None:
        """Write the rows of one section."""
        self.parts[-1] += "".join(f"\n| {_code(names)} | {_prose(text)} |" for names, text in rows)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the commands behind what cli.md says."""
    return f"{markdown}\n\n{_reference()}\n" if page.file.src_uri == _PAGE else markdown


def _reference() -> str:
    group: Any = typer.main.get_command(app)
    parent = group.make_context("deadhead", ["--help"], resilient_parsing=True)
    return "\n\n".join(part for name in group.list_commands(parent) for part in _section(group, parent, name))


def _section(group: Any, parent: Any, name: str) -> Iterator[str]:
    command = group.get_command(parent, name)
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    yield f"## deadhead {name} {{#{name}}}"
    yield f"```text\ndeadhead {' '.join([name, *command.collect_usage_pieces(context)])}\n```"
    yield from (_prose(" ".join(paragraph.split())) for paragraph in command.help.split("\n\n"))
    tables = _Tables()
    command.format_options(context, tables)
    yield from tables.parts


def _code(text: str) -> str:
    """Return an option's names, and what it takes, as code; a table may break between them."""
    names, _, takes = html.escape(text).replace("|", "&#124;").partition(" &lt;")
    parts = [f'<code class="option">{name}</code>' for name in names.split(" / ")]
    return " / ".join(parts) + (f" <code>&lt;{takes}</code>" if takes else "")


def _prose(text: str) -> str:
    """Return text of a terminal as Markdown in a table: options as code, and nothing else with a meaning."""
    plain = re.sub(r"([\\*_`|$])", r"\\\1", html.escape(text, quote=False))
    return _OPTION.sub(lambda found: _code(found[0].replace("\\", "")), " ".join(plain.split()))
