"""Warns of public names that no page of the API shows, and of those without a docstring; a strict build fails then."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import griffe

_log = logging.getLogger("mkdocs.hooks.public_names")

_ROOT = Path(__file__).parents[2]
# Every name in the `__all__` of these is public.
_PACKAGES = ("deadhead", "deadhead.data", "deadhead.layouts", "deadhead.models", "deadhead.training")
_SHOWN = re.compile(r"^::: (\S+)", re.MULTILINE)


def on_pre_build(config: Any) -> None:
    """Compare the pages with the package, whose code is read and, but for two short files, not run."""
    pages = sorted((_ROOT / "docs" / "api").glob("*.md"))
    shown = [name for page in pages for name in _SHOWN.findall(page.read_text(encoding="utf-8"))]
    package = griffe.load("deadhead", search_paths=[_ROOT / "src"], docstring_parser="google")
    homes = {_home(package, name) for name in shown}
    for name in _public(package):
        if _home(package, name) not in homes:
            _log.warning("%s is public, but no page in docs/api shows it", name)
    for name in shown:
        for place in _undocumented(package[name.removeprefix("deadhead.")]):
            _log.warning("%s has no docstring", place)


def _public(package: Any) -> Iterator[str]:
    for name in _PACKAGES:
        module = package if name == "deadhead" else package[name.removeprefix("deadhead.")]
        # Those that load a name when it is first used make their list.
        yield from (f"{name}.{each}" for each in module.exports or import_module(name).__all__)


def _home(package: Any, name: str) -> str:
    found = package[name.removeprefix("deadhead.")]
    return str(found.final_target.path if found.is_alias else found.path)


def _undocumented(found: Any) -> Iterator[str]:
    if not found.docstring:
        yield found.path
    if found.is_class:
        members = found.members.values()
        methods = [one for one in members if not one.name.startswith("_") and not one.is_alias]
        yield from (one.path for one in methods if (one.is_function or "property" in one.labels) and not one.docstring)
