"""The page of a run: one self-contained HTML file without network requests."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from deadhead import __version__
from deadhead.disk.files import finite

# In the order in which one needs the other.
_SCRIPTS = ("text.js", "head_map.js", "drawing.js", "charts.js", "run_view.js", "trial.js", "main.js")


def render_page(runs: Sequence[dict[str, Any]], *, live: bool = False) -> str:
    """Return the page as HTML; a `live` page asks its server for updates.

    Each run has ``facts`` (see `RunFacts`), the points of ``others`` (see `sibling_points`), and ``attention`` patterns
    by model, or None.
    """
    return rendered(
        "page.html",
        policy=page_policy(live=live),
        title=", ".join(run["facts"]["name"] for run in runs),
        script=Markup(_script()),
        data=Markup(_script_json({"live": live, "runs": list(runs)})),
    )


def rendered(name: str, **values: Any) -> str:
    """Return a page made from the template of this name, with the common style."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    style = Markup(_asset("page.css"))
    return environment.from_string(_asset(name)).render(style=style, version=__version__, **values)


@cache
def page_policy(*, live: bool) -> str:
    """Return the content security policy: only the page's own script runs, and only a live page sends requests."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


@cache
def _script() -> str:
    """Return the page's script in the form that the page contains."""
    # What would end the element can only stand in strings and comments.
    return "\n".join(_asset(name) for name in _SCRIPTS).replace("</script", "<\\/script")


@cache
def _asset(name: str) -> str:
    return (importlib.resources.files("deadhead.report") / "assets" / name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    """Return JSON that is safe in a script element: nothing in it begins a tag or ends a line of the script."""
    text = json.dumps(finite(value), allow_nan=False, separators=(",", ":"))
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
