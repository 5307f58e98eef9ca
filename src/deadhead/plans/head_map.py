"""The head map: layers × heads, kept and cut, and the course of each gate over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.disk.files import no_space_is_input_error
from deadhead.errors import require_extra
from deadhead.plans.plan import HeadPlan, Layer

# Okabe and Ito's blue and orange can be told apart by the colour-blind, and in print by lightness.
_KEPT, _CUT = "#0072b2", "#e69f00"


def head_map_text(plan: HeadPlan) -> str:
    """Return the head map as characters: one line a layer, ■ a head that stays, · one that goes, and blocks counted."""
    blocks = {} if plan.blocks is None else plan.blocks.total
    layers = [*plan.total, *(layer for layer in blocks if layer not in plan.total)]
    width = max(len(str(layer)) for layer in layers)
    lines = []
    for layer in layers:
        count = plan.total.get(layer, 0)
        kept = set(plan.kept.get(layer, ()))
        row = " ".join("■" if head in kept else "·" for head in range(count))
        lines.append(f"layer {layer!s:>{width}}  {row}  {_count_text(plan, layer)}".rstrip())
    return "\n".join(lines)


def _count_text(plan: HeadPlan, layer: Layer) -> str:
    """Return how many heads and blocks of a layer stay, of how many."""
    parts = [f"{len(plan.kept[layer])}/{plan.total[layer]}"] if layer in plan.total else []
    if plan.blocks is not None and layer in plan.blocks.total:
        parts.append(f"blocks {len(plan.blocks.kept[layer])}/{plan.blocks.total[layer]}")
    return ", ".join(parts)


def gate_courses(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[list[float]]]]:
    """Return the logged steps, and by layer the open probability of each head at each of them.

    Args:
        metrics: lines of metrics.jsonl.
    """
    lines = [line for line in metrics if "open_probability" in line]
    layers = _sizes(lines[0]) if lines else {}
    # Of gates on another model, or in blocks of another size, there is no course to show with these.
    lines = [line for line in lines if _sizes(line) == layers]
    steps = [int(line["step"]) for line in lines]
    return steps, {layer: [line["open_probability"][layer] for line in lines] for layer in layers}


def _sizes(line: Mapping[str, Any]) -> dict[str, int]:
    return {layer: len(row) for layer, row in line["open_probability"].items()}


def head_map_image(open_probability: Sequence[Sequence[float]], *, side: int = 16) -> np.ndarray:
    """Return the gates as pixels, a row a layer: filled blue as they are open, framed in orange where they are shut.

    Args:
        open_probability: one row a layer, one number a gate.
        side: of a gate's square, in pixels.

    Returns:
        (layers · side, most gates · side, 3) bytes.
    """
    kept, cut = (np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) for colour in (_KEPT, _CUT))
    image = np.full((len(open_probability) * side, max(map(len, open_probability)) * side, 3), 255, dtype=np.uint8)
    for row, chances in enumerate(open_probability):
        for column, chance in enumerate(chances):
            square = image[row * side : (row + 1) * side - 1, column * side : (column + 1) * side - 1]
            square[:] = kept if chance >= 0.5 else cut
            square[2:-2, 2:-2] = 255 + (kept - 255) * chance
    return image


def save_head_map(plan: HeadPlan, metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the head map and, if the metrics have them, the courses of the gates, into a PNG.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    require_extra("report", "matplotlib", what="A picture of the head map")
    # The object interface: pyplot would keep state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, courses = gate_courses(metrics)
    layers = list(plan.total)
    most = max(plan.total.values())
    figure = Figure(figsize=(11, 1.6 + 0.75 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(layers), 2, width_ratios=[1, 1.4])
    heads = figure.add_subplot(grid[:, 0])
    for row, layer in enumerate(layers):
        kept = set(plan.kept[layer])
        for head in range(plan.total[layer]):
            stays = head in kept
            colour = _KEPT if stays else "white"
            heads.add_patch(
                _square(head, row, facecolor=colour, edgecolor=_KEPT if stays else _CUT, hatch=None if stays else "xx")
            )
        heads.text(most + 0.1, row + 0.5, _count_text(plan, layer), va="center")
    # So wide that the text beside the squares fits.
    room = 0.9 if plan.blocks is None else 0.9 + 0.35 * most
    heads.set(xlim=(0, most + room), ylim=(len(layers), 0), aspect="equal", xlabel="head", ylabel="layer")
    heads.set_xticks([head + 0.5 for head in range(most)], [str(head) for head in range(most)])
    heads.set_yticks([row + 0.5 for row in range(len(layers))], [str(layer) for layer in layers])
    heads.tick_params(length=0)
    for spine in heads.spines.values():
        spine.set_visible(False)
    heads.set_title(
        f"{sum(plan.heads)} of {sum(plan.total.values())} heads stay (filled), the others are cut (hatched)"
    )

    shared = None
    for row, layer in enumerate(layers):
        course = figure.add_subplot(grid[row, 1], sharex=shared)
        shared = shared or course
        kept = set(plan.kept[layer])
        values = courses.get(str(layer), [])
        for head in range(plan.total[layer] if values and len(values[0]) == plan.total[layer] else 0):
            stays = head in kept
            line = [point[head] for point in values]
            course.plot(steps, line, color=_KEPT if stays else _CUT, linestyle="-" if stays else "--", linewidth=1.2)
        course.axhline(0.5, color="grey", linewidth=0.6)
        course.set(ylim=(-0.03, 1.03), yticks=[0, 1], ylabel=f"layer {layer}")
        course.tick_params(labelbottom=row == len(layers) - 1)
        if row == 0:
            course.set_title("chance that each head is open in a training draw (dashed: cut)", fontsize=11)
        if row == len(layers) - 1:
            course.set_xlabel("step of the phase with gates")
    with no_space_is_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(str(path), dpi=120)


def _square(column: int, row: int, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, linewidth=1.5, **style)
