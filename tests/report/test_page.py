"""The page as text: whole in itself, and what comes from a run never becomes part of its code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deadhead.report.page import render_page

_FACTS: dict[str, Any] = {
    "name": "run",
    "finished": False,
    "recipe": "",
    "summary": {},
    "verdict": "",
    "phases": [],
    "unit": "head",
    "gates": {"steps": [], "layers": []},
    "costs": {},
    "points": [],
}


class _Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def _page(name: str = "run", **facts: Any) -> _Reader:
    return _Reader(render_page([{"facts": {**_FACTS, "name": name, **facts}, "others": [], "attention": None}]))


def test_nothing_is_fetched_and_only_our_scripts_run() -> None:
    page = _page()
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value == "data:,", f"<{tag} {name}={value}>"
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy and "connect-src 'none'" in policy
    hashes = set(re.findall("'sha256-([^']+)'", policy))
    assert "unsafe-eval" not in policy and "unsafe-inline" not in policy.split("style-src")[0]
    data, *code = page.scripts
    assert hashes == {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in code}
    assert json.loads(data)["live"] is False


@settings(max_examples=30, deadline=None)
@given(st.text(st.sampled_from("<>/!-&\"'\u2028scriptSCRIPT{}%$\\\n x"), max_size=40), st.text(max_size=20))
def test_text_of_a_run_stays_text(name: str, text: str) -> None:
    ordinary = _page()
    page = _page(name, recipe=text + "</script><script>alert(1)</script>", summary={"samples": {name: "<!--" + text}})
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in ordinary.tags]
    assert page.scripts[1:] == ordinary.scripts[1:]
    found = json.loads(page.scripts[0])["runs"][0]["facts"]
    assert (found["name"], found["summary"]["samples"]) == (name, {name: "<!--" + text})


def test_numbers_that_json_lacks() -> None:
    found = json.loads(_page(summary={"dense": {"perplexity": float("inf"), "loss": float("nan")}}).scripts[0])
    assert found["runs"][0]["facts"]["summary"]["dense"] == {"perplexity": None, "loss": None}


def test_every_term_is_explained_once() -> None:
    page = _page()
    used = {a["data-term"] for _, a in page.tags if "data-term" in a}
    explained = [a["id"] for _, a in page.tags if (a.get("id") or "").startswith("term-")]
    assert {f"term-{key}" for key in used} <= set(explained)
    assert len(explained) == len(set(explained)) >= 18
