"""Warns of lists that GitHub shows as lists and Python's Markdown does not; a strict build fails then."""

from __future__ import annotations

import logging
import re
from typing import Any

_log = logging.getLogger("mkdocs.hooks.lists")

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
_NEARER = re.compile(r"^ {1,3}(?:[-*+]|\d+\.) .*", re.MULTILINE)
_CODE = re.compile(r"<pre.*?</pre>", re.DOTALL)
_SWALLOWED = re.compile(r"^(?:[-*+]|\d\.) .*", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Look for items that would become items of the list around theirs."""
    for line in _NEARER.findall(_FENCE.sub("", markdown)):
        _log.warning("%s: indent the items of a list in a list by four spaces: %s", page.file.src_uri, line)


def on_page_content(html: str, page: Any, **_: Any) -> None:
    """Look for items that became text of the paragraph before them."""
    for line in _SWALLOWED.findall(_CODE.sub("", html)):
        _log.warning("%s: leave an empty line before this item of a list: %s", page.file.src_uri, line)
