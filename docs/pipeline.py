"""Draws pipeline.svg beside this file, the steps of a pruning: python docs/pipeline.py."""

from __future__ import annotations

from pathlib import Path
from textwrap import wrap

PICTURE = Path(__file__).with_suffix(".svg")

_STEPS = (
    ("Read", "the dense model, its tokenizer, and a calibration text", "always"),
    ("Choose", "the heads and hidden units that matter least", "always"),
    ("Check", "run the model with their gates closed, keep the outputs", "always"),
    ("Cut", "remove them; the outputs must stay the same", "always"),
    ("Compensate", "fit what is left to the dense model’s outputs", "default for pretrained models"),
    ("Recover", "train the small model to predict as the dense one does", "with --recover N"),
    ("Export", "write it for llama.cpp, ONNX Runtime or OpenVINO", "deadhead export"),
)
_WIDTH, _ROW, _BOX, _HEIGHT, _MARGIN = 540, 94, 170, 66, 12
_LETTERS = 36
# Boxes of steps that always run, and of those that do not. Both are seen on light and on dark grounds.
_ALWAYS, _OPTIONAL, _PANEL, _INK, _NOTE, _LINE = "#3f51b5", "#00796b", "#f5f6fb", "#22252f", "#5a6078", "#8a90a6"


def picture() -> str:
    """Return the picture as SVG."""
    height = _ROW * len(_STEPS) - (_ROW - _HEIGHT) + 2 * _MARGIN
    middle = _MARGIN + _BOX / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" role="img">',
        "<title>The steps of a pruning: " + ", ".join(name.lower() for name, *_ in _STEPS) + "</title>",
        f'<rect width="{_WIDTH}" height="{height}" rx="8" fill="{_PANEL}"/>',
    ]
    for number, (name, what, when) in enumerate(_STEPS):
        top = _MARGIN + number * _ROW
        if number:
            tip = top - 3
            parts.append(f'<path d="M{middle} {top - _ROW + _HEIGHT}V{tip - 8}" stroke="{_LINE}" stroke-width="3"/>')
            parts.append(f'<path d="M{middle - 8} {tip - 10}h16l-8 10z" fill="{_LINE}"/>')
        colour = _ALWAYS if when == "always" else _OPTIONAL
        parts += [
            f'<rect x="{_MARGIN}" y="{top}" width="{_BOX}" height="{_HEIGHT}" rx="6" fill="{colour}"/>',
            _text(middle, top + 41, name, size=24, colour="white", more='text-anchor="middle"'),
        ]
        lines = [(line, 18, _INK) for line in wrap(what, _LETTERS)] + [(when, 16, _NOTE)]
        first = top + _HEIGHT / 2 + 6 - 11 * (len(lines) - 1)
        for index, (line, size, ink) in enumerate(lines):
            parts.append(_text(_MARGIN + _BOX + 16, first + 22 * index, line, size=size, colour=ink))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, words: str, *, size: float, colour: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" {more}>{words}</text>'


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
