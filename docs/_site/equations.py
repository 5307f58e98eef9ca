"""Turns equations, $…$ and $$…$$ in the pages, into MathML, which browsers show without a program."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# As pymdownx.arithmatex leaves them in its generic form.
_EQUATION = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Convert the equations of one page."""
    return _EQUATION.sub(lambda found: _mathml(found, page.file.src_uri), html)


def _mathml(found: re.Match[str], place: str) -> str:
    latex = html.unescape(found["latex"]).strip()
    mathml = convert(latex, display="inline" if found["tag"] == "span" else "block")
    if "\\" in mathml:
        # A command that the converter does not know stays as it is.
        raise PluginError(f"{place}: this equation has a command that latex2mathml does not know: {latex}")
    # Browsers would draw the bars of a norm as high as the line, one lower than the other.
    mathml = mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')
    return mathml if found["tag"] == "span" else f'<div class="equation">{mathml}</div>'
