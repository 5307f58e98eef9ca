"""Several processes learn what one does that has all their rows: the same gates, the same weights, the same plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deadhead
from tests.training.launching import launch
from tests.training.world import run

pytestmark = pytest.mark.slow

# Float32 sums in another order. Gates are of size 2, and move by up to 0.3 a step.
_TOLERANCE = {"gates": 2e-5, "weights": 1e-5, "difference": 1e-5, "noise": 1e-6}


def _of_several(count: int, folder: Path, *, few: bool) -> list[dict[str, Tensor]]:
    """Return what each of several processes found."""
    done = launch(folder, "-m", "tests.training.world", str(folder), *(["few"] if few else []), count=count)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"rank{rank} of {count}.safetensors") for rank in range(count)]


def _require_same(found: list[dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    """All processes agree to the bit, noise included, and with one process to float tolerance; decisions are equal."""
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in other.items():
            assert torch.equal(value, found[0][key]), key
    for key, value in found[0].items():
        kind = key.split("/")[1]
        if kind == "open":
            assert torch.equal(value, alone[key]), key
        else:
            torch.testing.assert_close(
                value, alone[key], rtol=0, atol=_TOLERANCE[kind], msg=lambda m, k=key: f"{k}: {m}"
            )
    for name in {key.split("/")[0] for key in found[0] if "/gates/" in key}:
        rows = [value for key, value in found[0].items() if key.startswith(f"{name}/gates/")]
        assert float((torch.cat(rows) - 2).abs().max()) > 0.1, f"the gates of {name} learned nothing"
        measured = [value for key, value in found[0].items() if key.startswith(f"{name}/difference/")]
        assert float(torch.cat(measured).max()) > 0


def test_two_processes(tmp_path: Path) -> None:
    """Data parallel and under FSDP2, with gradient accumulation; trainings by a Trainer also stop and go on."""
    alone, found = load_file(run(tmp_path, few=True)), _of_several(2, tmp_path, few=True)
    _require_same(found, alone)
    # One draw for each forward. Twelve steps of two micro-batches, of which each third has one: the text ends there.
    assert len(found[0]["llama accumulated/noise"]) == 20
    assert len(found[0]["llama accumulated/noise"].unique(dim=0)) == 20
    for part in ("gates/0", "gates/1", "weights/model.embed_tokens.weight"):
        assert torch.equal(found[0][f"resumed/{part}"], found[0][f"sharded/{part}"])
        assert torch.equal(found[0][f"whole resumed/{part}"], found[0][f"whole/{part}"])
    for name in ("sharded", "whole"):
        plans = [deadhead.HeadPlan.from_json(tmp_path / f"{name} of {count}" / "plan.json") for count in (1, 2)]
        assert plans[0] == plans[1] and 2 * sum(plans[0].heads) == sum(plans[0].total.values())


@pytest.mark.full
def test_two_and_four_processes(tmp_path: Path) -> None:
    """Every way to train gates, and weights alone, where a batch in two parts is the same as the whole."""
    alone = load_file(run(tmp_path, few=False))
    for count in (2, 4):
        _require_same(_of_several(count, tmp_path, few=False), alone)
    for key, value in alone.items():
        if key.startswith("dense/"):
            parts = alone[key.replace("dense/", "dense in parts/")]
            torch.testing.assert_close(value, parts, rtol=0, atol=_TOLERANCE["weights"])
