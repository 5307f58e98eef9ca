"""The head map as a picture: what stays, what is cut, and the course of each gate over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deadhead.disk.files import no_space_is_input_error
from deadhead.plans.head_map import count_text
from deadhead.plans.plan import HeadPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

# Okabe and Ito's blue and orange can be told apart by the colour-blind, and in print by lightness.
_KEPT, _CUT = "#0072b2", "#e69f00"


def gate_courses(metrics: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[list[float]]]]:
    """Return the steps in metrics.jsonl, and the open probability of each head at each step, by layer."""
    lines = [line for line in metrics if "open_probability" in line]
    layers = _sizes(lines[0]) if lines else {}
    # Gates of another model, or of blocks of another size, have no course that fits this map.
    lines = [line for line in lines if _sizes(line) == layers]
    steps = [int(line["step"]) for line in lines]
    return steps, {layer: [line["open_probability"][layer] for line in lines] for layer in layers}


def _sizes(line: Mapping[str, Any]) -> dict[str, int]:
    return {layer: len(row) for layer, row in line["open_probability"].items()}


def head_map_image(open_probability: Sequence[Sequence[float]], *, side: int = 16) -> np.ndarray:
    """Return the gates as pixels, one row a layer: open gates are filled blue, closed gates are framed orange.

    A gate is a square of `side` pixels; the shape is (layers · side, most gates · side, 3), in bytes.
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
    """Draw the head map into a PNG, with the courses of the gates if the metrics have them.

    Raises:
        InputError: the file cannot be written.
    """
    # The object interface: pyplot would keep state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = len(plan.total)
    figure = Figure(figsize=(11, 1.6 + 0.75 * layers), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(layers, 2, width_ratios=[1, 1.4])
    _draw_heads(figure, grid, plan)
    _draw_courses(figure, grid, plan, *gate_courses(metrics))
    with no_space_is_input_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(str(path), dpi=120)


def _draw_heads(figure: Figure, grid: GridSpec, plan: HeadPlan) -> None:
    from matplotlib.patches import Rectangle

    most = max(plan.total.values())
    heads = figure.add_subplot(grid[:, 0])
    for row, (layer, total) in enumerate(plan.total.items()):
        for head in range(total):
            place = head + 0.06, row + 0.06
            stays = head in plan.kept[layer]
            inside, edge, hatch = (_KEPT, _KEPT, None) if stays else ("white", _CUT, "xx")
            square = Rectangle(place, 0.88, 0.88, linewidth=1.5, facecolor=inside, edgecolor=edge, hatch=hatch)
            heads.add_patch(square)
        heads.text(most + 0.1, row + 0.5, count_text(plan, layer), va="center")
    # So wide that the text beside the squares fits.
    room = 0.9 if plan.hidden_units is None else 1.2 + 0.45 * most
    heads.set(xlim=(0, most + room), ylim=(len(plan.total), 0), aspect="equal", xlabel="head", ylabel="layer")
    heads.set_xticks([head + 0.5 for head in range(most)], [str(head) for head in range(most)])
    heads.set_yticks([row + 0.5 for row in range(len(plan.total))], [str(layer) for layer in plan.total])
    heads.tick_params(length=0)
    heads.spines[:].set_visible(False)
    heads.set_title(
        f"{sum(plan.heads)} of {sum(plan.total.values())} heads stay (filled), the others are cut (hatched)"
    )


def _draw_courses(
    figure: Figure, grid: GridSpec, plan: HeadPlan, steps: list[int], courses: dict[str, list[list[float]]]
) -> None:
    course = None
    for row, (layer, total) in enumerate(plan.total.items()):
        course = figure.add_subplot(grid[row, 1], sharex=course)
        values = courses.get(str(layer), [])
        for head in range(total if values and len(values[0]) == total else 0):
            colour, style = (_KEPT, "-") if head in plan.kept[layer] else (_CUT, "--")
            course.plot(steps, [point[head] for point in values], color=colour, linestyle=style, linewidth=1.2)
        course.axhline(0.5, color="grey", linewidth=0.6)
        course.set(ylim=(-0.03, 1.03), yticks=[0, 1], ylabel=f"layer {layer}")
        is_last = row == len(plan.total) - 1
        course.tick_params(labelbottom=is_last)
        if row == 0:
            course.set_title("chance that each head is open in a training draw (dashed: cut)", fontsize=11)
        if is_last:
            course.set_xlabel("step of the phase with gates")
