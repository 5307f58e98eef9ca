"""A sweep's table and page, of numbers and replies of all kinds."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from deadhead.measure.replies import Reply
from deadhead.report.sweep_page import render_sweep, replies_table

_VALUES = {"parameters": 100, "flops_per_token": 200, "perplexity": 10.0}
_FOUND: dict[str, Any] = {
    "kind": "params",
    "of": "model",
    "max_loss": None,
    "picked": None,
    "dense": {**_VALUES, "replies": {"repetition": 0.25, "count": 2, "tokens": 9}},
    "points": [
        {
            **_VALUES,
            "asked": 0.8,
            "path": "params-0.8",
            "speedup": 1.1,
            "loss": 0.1,
            # JSON has null for what is not finite.
            "replies": {"repetition": 0.5, "count": 2, "tokens": 9, "divergence": None, "agreement": 0.75},
        }
    ],
}


def _reply(text: str) -> Reply:
    return Reply(asked="<b>Why?</b>", prompt=(1,), tokens=(2,), text=text)


def test_replies_stand_on_the_page_as_text() -> None:
    said = {"dense": (_reply("<script>alert(1)</script>"),), "params-0.8": (_reply("a\x00b\ud800c\nd"),)}
    page = render_sweep(_FOUND, "sweep", said)
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;Why?" in page
    assert "a�b�c\nd" in page
    page.encode()


def test_what_is_not_finite_is_told() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(replies_table(_FOUND))
    (dense,), (pruned,) = (
        [line.split() for line in capture.get().splitlines() if line.strip().startswith(name)]
        for name in ("dense", "params-0.8")
    )
    assert dense == ["dense", "–", "–", "25.0%"] and pruned == ["params-0.8", "∞", "75.0%", "50.0%"]


def test_without_replies_there_is_no_table_of_them() -> None:
    bare = {**_FOUND, "dense": _VALUES, "points": []}
    assert replies_table(bare) is None and '<section class="reply">' not in render_sweep(bare, "sweep", {})
