"""The table of a run's stages, and the lines below it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from deadhead.report.tables import forecast_sentence, stages_table, verdict
from deadhead.training.runs.forecast import Part


def _stage(heads: list[int], **changes: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "heads": heads,
        "parameters": 1_000_000,
        "flops_per_token": 2_000_000.0,
        "perplexity": 10.0,
        "word_perplexity": 100.0,
        "bits_per_byte": 2.5,
        "tokens_per_second": 1000.0,
        "steps": 1200,
    }
    return {**values, **changes}


def _summary(**changes: Any) -> dict[str, Any]:
    final = _stage(
        [1, 3], parameters=700_000, flops_per_token=1_000_000.0, perplexity=11.0, tokens_per_second=1500.0, steps=2000
    )
    summary = {
        "data": {"source": "stdlib"},
        "dense": _stage([4, 4]),
        "gated": _stage([1, 3], perplexity=12.5),
        "cut": {**final, "perplexity": 12.5},
        "finetuned": final,
        "control": _stage([4, 4], perplexity=10.5, steps=2000),
    }
    return {**summary, **changes}


def _printed(summary: dict[str, Any], width: int = 200) -> str:
    output = io.StringIO()
    Console(file=output, width=width).print(stages_table(summary))
    return output.getvalue()


def test_the_table_has_every_stage_with_its_numbers() -> None:
    stages = ("dense", "gated", "cut", "finetuned", "control")
    rows = {line.split()[0]: line.split()[1:] for line in _printed(_summary()).splitlines() if line.strip()}
    assert rows["dense"] == ["1,200", "4", "4", "1,000,000", "2.000", "10.000", "2.500", "1,000"]
    assert rows["finetuned"] == ["2,000", "1", "3", "700,000", "1.000", "11.000", "2.500", "1,500"]
    assert rows["control"][5] == "10.500"
    assert [name for name in rows if name in stages] == list(stages)


@pytest.mark.parametrize("layers", [1, 2, 8])
def test_no_number_is_cut_off_in_a_terminal_of_80_columns(layers: int) -> None:
    summary = _summary()
    for stage in ("dense", "gated", "cut", "finetuned", "control"):
        summary[stage] = {**summary[stage], "heads": summary[stage]["heads"] * layers, "parameters": 36_123_456}
    text = _printed(summary, 80)
    assert "…" not in text
    assert text.count("36,123,456") == 5
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_control_is_left_out_where_there_is_none() -> None:
    summary = _summary()
    del summary["control"]
    assert "control" not in _printed(summary)
    assert "Perplexity" not in verdict(summary)


def test_the_verdict_says_what_was_gained_and_lost() -> None:
    first, second, third = verdict(_summary()).splitlines()
    assert first == "50% of the heads and 30% of the parameters are gone."
    assert second == (
        "50% of the FLOPs are gone, which allows 2.00 times the speed; measured: 1.50 times (efficiency 0.75)."
    )
    assert third == "Perplexity 11.000, 4.8% above the 10.500 of the dense model trained for as many steps."


@pytest.mark.parametrize(("perplexity", "words"), [(9.975, "5.0% below"), (11.55, "10.0% above")])
def test_above_and_below(perplexity: float, words: str) -> None:
    summary = _summary()
    summary["finetuned"] = {**summary["finetuned"], "perplexity": perplexity}
    assert words in verdict(summary)


def test_equal_perplexity_is_neither_above_nor_below() -> None:
    summary = _summary()
    summary["finetuned"] = {**summary["finetuned"], "perplexity": 10.5}
    assert "below" not in verdict(summary)
    assert "above" not in verdict(summary)


def test_a_part_that_needs_more_memory_than_there_is_says_what_needs_less() -> None:
    parts = [
        Part(what="rank units", seconds=30, memory=3 * 10**9, remedy="stream"),
        Part(what="recover", seconds=7200, memory=9 * 10**9, remedy="give a lora_rank"),
    ]
    enough = forecast_sentence(parts, 10 * 10**9)
    told = "To do: rank units (less than a minute, 3.00 GB of memory), then recover (about 2.0 h, 9.00 GB of memory);"
    assert enough.startswith(told) and "free" not in enough
    assert forecast_sentence(parts, 8 * 10**9) == (
        f"{enough} Only 8.00 GB of memory are free; to use less, give a lora_rank."
    )
