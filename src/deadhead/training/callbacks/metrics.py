"""Read a run's metrics.jsonl, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# No phase has more steps, see the recipe.
_LAST_STEP = 10**9


def parsed_line(line: str | bytes) -> dict[str, Any] | None:
    """Return a line of a metrics.jsonl as a dictionary, or None if no run of deadhead wrote that whole line.

    Values of gates are lists of numbers by layer; other values of a line may be anything.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not isinstance(values.get("phase"), str) or type(values.get("step")) is not int:
        return None
    if not 0 <= values["step"] <= _LAST_STEP:
        return None
    for name in ("open_probability", "output_difference"):
        rows = values.get(name, {})
        if not isinstance(rows, dict) or not all(map(_is_row, rows.values())):
            return None
    return values


def _is_row(row: Any) -> bool:
    kinds = set(map(type, row)) if isinstance(row, list) else {list}
    # An integer may have thousands of digits; no floating-point number has.
    return kinds <= {int, float} and (int not in kinds or max(map(abs, row)) < 2**63)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl as dictionaries, up to the first that is truncated or not deadhead's."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        values = parsed_line(line)
        if values is None:
            break
        lines.append(values)
    return lines
