"""Warns of lists that GitHub shows as lists and Python's Markdown does not; a strict build fails then."""

from __future__ import annotations

import logging
import re
from typing import Any

_log = logging.getLogger("mkdocs.hooks.lists")

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
_ITEM = re.compile(r"( *)([-*+]|\d+\.) ")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Look at the lists of one page."""
    before = ""
    for line in _FENCE.sub("", markdown).splitlines():
        item = _ITEM.match(line)
        if item and 0 < len(item[1]) < 4:
            _log.warning("%s: indent the items of a list in a list by four spaces: %s", page.file.src_uri, line)
        if item and not item[1] and before and not before.startswith(" ") and not _ITEM.match(before):
            _log.warning("%s: leave an empty line before a list: %s", page.file.src_uri, line)
        before = line
