"""The walk of transformers' causal language models: the usual ones always, all of them under the marker `full`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).parents[2]
_WORK = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "gpt_neox", "opt", "phi", "phi3", "bert", "falcon")
_REFUSED = {"mamba": "attention", "bloom": "", "olmo2": "norm"}


def _walk(*arguments: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "benchmarks/registry.py", "--json", *arguments],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT / "src")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {outcome["model_type"]: outcome for outcome in outcomes}


def _assert_works(outcome: dict[str, Any]) -> None:
    assert outcome["state"] == "works", outcome
    assert outcome["reloads"], outcome
    assert outcome["generates"], outcome
    assert outcome["difference"] <= 1e-5, outcome
    assert outcome["layers"] > 0, outcome


def test_the_usual_types() -> None:
    outcomes = _walk(*_WORK, *_REFUSED)
    for model_type in _WORK:
        _assert_works(outcomes[model_type])
    for model_type, word in _REFUSED.items():
        assert outcomes[model_type]["state"] == "refused", outcomes[model_type]
        assert word in outcomes[model_type]["reason"]


@pytest.mark.full
def test_no_type_is_silently_wrong() -> None:
    """Every type that can be built works or is refused with a reason; at least 130 work."""
    outcomes = _walk()
    works = [outcome for outcome in outcomes.values() if outcome["state"] == "works"]
    assert len(works) >= 130
    for outcome in works:
        _assert_works(outcome)
    for outcome in outcomes.values():
        assert outcome["state"] != "wrong", outcome
        assert outcome["state"] == "works" or outcome["reason"], outcome
