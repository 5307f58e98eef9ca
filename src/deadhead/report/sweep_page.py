"""The result of a sweep, to choose a model by: a table for the terminal, and a page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from deadhead.report.page import rendered

if TYPE_CHECKING:
    from deadhead.measure.replies import Reply

_NAMES = ("", "parameters", "MFLOP/tok", "speed", "perplexity", "more", "")
# How near models are to the dense one on its replies, and how they repeat themselves in their own, where they reply.
_REPLY_NAMES = ("", "KL", "same token", "repetition")
_SHOWN = 3
# Control characters, but for a tab and the end of a line, and halves of characters.
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_LEFT_OF = {
    "params": "the parameters",
    "flops": "a token's FLOPs",
    "kv_cache": "the key/value cache",
    "sparsity": "the heads that go",
    "speedup": "the dense model's speed",
}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 480.0, 300.0, 56.0, 28.0, 250.0
_TICKS = 5


def _budget_of(found: Mapping[str, Any]) -> str:
    """Return what the budgets of a sweep refer to."""
    return "the blocks' parameters" if found["of"] == "blocks" else _LEFT_OF[found["kind"]]


def _point_rows(found: Mapping[str, Any]) -> list[tuple[list[str], bool]]:
    """Return the cells of each point under `_NAMES`, the dense model first, and whether it is the picked one."""
    rows = []
    for point in _points(found):
        is_picked = point["asked"] is not None and point["asked"] == found["picked"]
        loss = point.get("loss")
        cells = [
            point["path"],
            f"{point['parameters']:,}",
            f"{point['flops_per_token'] / 1e6:,.3f}",
            f"{point['speedup']:.2f} ×",
            _number(point.get("perplexity")),
            "–" if loss is None else f"{loss:+.1%}" if math.isfinite(loss) else "∞",
            "picked" if is_picked else "",
        ]
        rows.append((cells, is_picked))
    return rows


def _reply_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of each point under `_REPLY_NAMES`; empty if no model replied."""

    def cell(value: float | None, kind: str) -> str:
        # JSON has null for what is not finite.
        return "∞" if value is None or not math.isfinite(value) else format(value, kind)

    kinds = {"divergence": ".4f", "agreement": ".1%", "repetition": ".1%"}
    return [
        [point["path"], *(cell(said[name], kind) if name in said else "–" for name, kind in kinds.items())]
        for point in _points(found)
        if (said := point.get("replies")) is not None
    ]


def _points(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    dense = {**found["dense"], "asked": None, "speedup": 1.0, "path": "dense"}
    return [dense, *found["points"]]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}" if math.isfinite(value) else "∞"


def _picked_sentence(found: Mapping[str, Any]) -> str:
    """Return a sentence on the smallest point within the tolerated loss; empty if no loss was given."""
    if found["max_loss"] is None:
        return ""
    most = f"a perplexity at most {found['max_loss']:.1%} above the dense model's"
    return (
        f"No model has {most}." if found["picked"] is None else f"The smallest model with {most}: {found['picked']:g}."
    )


def sweep_table(found: Mapping[str, Any], place: str) -> Table:
    """Return a table of a sweep's models: cost, speed and quality."""
    lines = [
        _picked_sentence(found),
        f"The number in each name refers to {_budget_of(found)}.",
        f"The models and their page are in {escape(place)}.",
    ]
    return _table(_NAMES, [cells for cells, _ in _point_rows(found)], "\n".join(filter(None, lines)))


def replies_table(found: Mapping[str, Any]) -> Table | None:
    """Return a table of how close the models' replies are to the dense model's; None if there are no replies."""
    rows = _reply_rows(found)
    return _table(_REPLY_NAMES, rows, _replies_sentence(found)) if rows else None


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=caption, caption_justify="left")
    for name in names:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*map(escape, cells))
    return table


def _replies_sentence(found: Mapping[str, Any]) -> str:
    """Return the explanation of the columns on replies."""
    return (
        f"KL, in nats a token, and how often both models predict the same token: on the dense model's "
        f"{found['dense']['replies']['count']} replies. Repetition: 4-grams that occurred before in the same reply, in "
        "each model's own replies."
    )


def render_sweep(found: Mapping[str, Any], title: str, replies: Mapping[str, Sequence[Reply]]) -> str:
    """Return a sweep's page as HTML, without scripts and without network requests.

    `replies` holds the replies of each model by its name; the first few are shown.
    """
    reply_rows = _reply_rows(found)
    measured = [point for point in _points(found) if math.isfinite(point.get("perplexity", math.inf))]
    charts = [
        _chart(found, measured, [point["parameters"] / 1e6 for point in measured], "parameters, millions"),
        _chart(found, measured, [point["flops_per_token"] / 1e6 for point in measured], "FLOPs a token, millions"),
        _chart(found, measured, [point["speedup"] for point in measured], "speedup over the dense model, measured"),
    ]
    return rendered(
        "sweep.html",
        title=title,
        what=_budget_of(found),
        sentence=_picked_sentence(found),
        charts=charts if measured else [],
        reply_names=_REPLY_NAMES,
        reply_rows=[{"cells": cells, "picked": False} for cells in reply_rows],
        reply_sentence=_replies_sentence(found) if reply_rows else "",
        shown=_shown(replies),
        names=_NAMES,
        rows=[{"cells": cells, "picked": is_picked} for cells, is_picked in _point_rows(found)],
    )


def _shown(replies: Mapping[str, Sequence[Reply]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the first prompts with the models' replies, without characters that a page cannot contain."""
    prompts = [reply.asked for reply in next(iter(replies.values()), ())][:_SHOWN]
    by_model = {name: {reply.asked: reply.text for reply in written} for name, written in replies.items()}
    return [
        (
            _NO_TEXT.sub("�", prompt),
            [(name, _NO_TEXT.sub("�", said[prompt])) for name, said in by_model.items() if prompt in said],
        )
        for prompt in prompts
    ]


def _chart(
    found: Mapping[str, Any], points: Sequence[Mapping[str, Any]], across: Sequence[float], name: str
) -> dict[str, Any]:
    """Return a chart of perplexity against another number, in the units of its picture."""
    up = [point["perplexity"] for point in points]
    limit = None
    if found["max_loss"] is not None and found["dense"].get("perplexity") is not None:
        limit = found["dense"]["perplexity"] * (1 + found["max_loss"])
        # A loss that is tolerated far above all points would press them together.
        limit = limit if limit <= 2 * max(up, default=0) else None
    xs, columns = _scaled(across, [], _LEFT + 20, _WIDTH - 20)
    ys, rows = _scaled(up, [] if limit is None else [limit], _BOTTOM, _TOP)
    dots = [
        {
            "x": x,
            "y": y,
            "name": "dense" if point["asked"] is None else f"{point['asked']:g}",
            "text": f"{value:,.4g} {name}, perplexity {point['perplexity']:,.3f}",
            "picked": point["asked"] is not None and point["asked"] == found["picked"],
        }
        for x, y, value, point in zip(xs, ys, across, points, strict=False)
    ]
    return {
        "title": f"Perplexity against {name}",
        "across": name,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "bottom": _BOTTOM,
        "rows": rows,
        "columns": columns,
        "limit": None if limit is None else ys[-1],
        "line": " ".join(f"{dot['x']},{dot['y']}" for dot in sorted(dots, key=lambda dot: dot["x"])),
        "dots": dots,
    }


def _scaled(
    values: Sequence[float], further: Sequence[float], begin: float, end: float
) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the positions of values between two ends of an axis, and its ticks with their texts."""
    everything = [*values, *further]
    low, high = min(everything, default=0.0), max(everything, default=1.0)
    span = high - low or 1.0

    def place(value: float) -> float:
        return round(begin + (end - begin) * (value - low) / span, 1)

    ticks = [low + span * tick / (_TICKS - 1) for tick in range(_TICKS)]
    return [place(value) for value in everything], [(place(tick), f"{tick:,.4g}") for tick in ticks]
