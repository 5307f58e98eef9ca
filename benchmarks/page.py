"""Measure the size of a run's page with all of 50,000 steps logged, and the time a browser takes to open it."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _browser import MISSING, launch_options

from deadhead.report.writing import report_run


def write_run(folder: Path, *, steps: int, layers: int, heads: int) -> None:
    """Write the folder of a pruning phase that logged every step; the values are made up, their number is not."""
    random = np.random.default_rng(0)
    drift = random.normal(size=(layers, heads))
    chances = np.zeros((layers, heads))
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            chances = 1 / (1 + np.exp(-(2 + (10 * drift - 4) * step / steps)))
            line = {
                "phase": "prune",
                "step": step,
                "loss": 2 + np.exp(-5 * step / steps) + 0.1 * random.random(),
                "l0": chances.sum(),
                "lambda": 0.01 * min(1.0, 10 * step / steps),
                "sparsity": (chances < 0.5).mean(),
                "open_probability": {str(layer): row.round(6).tolist() for layer, row in enumerate(chances)},
                "output_difference": {str(layer): abs(row).round(6).tolist() for layer, row in enumerate(drift)},
            }
            file.write(json.dumps(line) + "\n")
    kept = {str(layer): np.flatnonzero(row >= 0.5).tolist() for layer, row in enumerate(chances)}
    plan = {"version": 1, "unit": "head", "total": dict.fromkeys(kept, heads), "kept": kept, "output_scale": False}
    (folder / "head_plan.json").write_text(json.dumps(plan), encoding="utf-8")


def open_times(page: Path, repeats: int, launch: dict[str, Any]) -> dict[str, float]:
    """Return medians in seconds from the beginning of the navigation: all loaded, a chart drawn."""
    from playwright.sync_api import sync_playwright

    times: dict[str, list[float]] = {"loaded": [], "first chart": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**launch)
        for _ in range(repeats):
            # Tall enough that the first chart is in view.
            context = browser.new_context(viewport={"width": 1280, "height": 1600})
            tab = context.new_page()
            tab.goto("about:blank")
            begin = time.perf_counter()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-ready]", state="attached")
            times["loaded"].append(time.perf_counter() - begin)
            tab.wait_for_selector("[data-chart=training] .drawing .mark", state="attached")
            times["first chart"].append(time.perf_counter() - begin)
            context.close()
        browser.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few steps, opened once")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.repeats = 500, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        write_run(folder, steps=options.steps, layers=options.layers, heads=options.heads)
        logged = (folder / "metrics.jsonl").stat().st_size
        begin = time.perf_counter()
        written = report_run(folder, attention=False)
        seconds = time.perf_counter() - begin
        shape = f"{options.layers} × {options.heads} heads"
        print(f"{options.steps:,} steps of {shape}, metrics.jsonl {logged / 1e6:.0f} MB")
        print(f"page {written.bytes / 1e6:.2f} MB, written in {seconds:.1f} s")
        launch = launch_options()
        if launch is None:
            print(MISSING)
            return
        for name, value in open_times(written.path, options.repeats, launch).items():
            print(f"{name:>12} after {value:.2f} s")


if __name__ == "__main__":
    main()
