"""Two processes share a text out, and come to what one comes to: plans, fitted weights, and the end of a failure."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deadhead.plans.kinds import READS_TEXT
from tests.training import sharing
from tests.training.launching import launch

pytestmark = pytest.mark.slow

Found = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """Return what one process found, and what each of two."""
    folder = tmp_path_factory.mktemp("sharing")
    sharing.run(folder)
    done = launch(folder, "-m", "tests.training.sharing", str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("rank0 of 1", "rank0 of 2", "rank1 of 2")
    return [
        (json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")) for name in names
    ]


@pytest.mark.parametrize("kind", sharing.KINDS)
@pytest.mark.parametrize("criterion", READS_TEXT)
def test_the_plan_is_the_same_and_no_batch_is_read_twice(found: list[Found], kind: str, criterion: str) -> None:
    alone, main, other = (values[f"{kind} {criterion}"] for values, _ in found)
    assert main["plan"] == other["plan"] == alone["plan"]
    # Three batches, of which the main process has the first.
    assert (alone["read"], main["read"], other["read"]) == (3, 2, 1)
    assert main["told"] == other["told"] == alone["told"] == [["scoring units", done, 3] for done in range(4)]


@pytest.mark.parametrize("kind", sharing.KINDS)
def test_gates_lean_alike(found: list[Found], kind: str) -> None:
    alone, main, other = (values[f"{kind} leaning"] for values, _ in found)
    assert main == other and main["blocks"] == alone["blocks"]
    for key, values in alone["scores"].items():
        assert main["scores"][key] == pytest.approx(values, rel=1e-3)


def test_a_model_with_memory_reads_all_of_the_text(found: list[Found]) -> None:
    alone, main, other = (values["memory"] for values, _ in found)
    assert alone == main == other


@pytest.mark.parametrize("case", [*(f"{kind} 48" for kind in sharing.COMPENSATED), "llama 2"])
def test_fitted_weights_are_the_same(found: list[Found], case: str) -> None:
    alone, main, other = (values[f"{case} compensated"] for values, _ in found)
    assert main["record"] == other["record"] and main["config"] == other["config"]
    mine, its = main["record"], alone["record"]
    for name in ("measure", "kept", "tokens", "held_out"):
        assert mine[name] == its[name]
    assert mine["before"] == pytest.approx(its["before"], rel=1e-5)
    assert mine["after"] == pytest.approx(its["after"], rel=1e-4)
    for one, each in zip(mine["layers"], its["layers"], strict=True):
        assert [one[name] for name in ("path", "fitted", "reason", "ridge", "share")] == [
            each[name] for name in ("path", "fitted", "reason", "ridge", "share")
        ]
    if case.startswith("all-attention"):
        assert main["read"] == other["read"] == alone["read"]
    elif case != "llama 2":
        assert max(main["read"], other["read"]) < 0.6 * alone["read"]


def test_weights_are_equal_to_the_bit_among_processes_and_but_for_rounding_to_those_of_one(found: list[Found]) -> None:
    (_, alone), (_, main), (_, other) = found
    assert alone.keys() == main.keys() == other.keys()
    for name, value in alone.items():
        assert torch.equal(main[name], other[name]), name
        torch.testing.assert_close(main[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_one_call_prunes_and_compensates_alike(found: list[Found]) -> None:
    alone, main, other = (values["pruned"] for values, _ in found)
    assert main == other and main["plan"] == alone["plan"]
    assert main["after"] == pytest.approx(alone["after"], rel=1e-4)


@pytest.mark.parametrize("name", sharing.FAILURES)
def test_a_failure_of_one_process_ends_the_work_of_all(found: list[Found], name: str) -> None:
    kind, failing = name.split()[0], int(name.split()[2])
    for rank, (values, _) in enumerate(found[1:]):
        error, words, cause = values["failures"][name]
        if rank == failing:
            assert (error, cause) == (kind, "NoneType")
        elif kind == "InputError":
            assert (error, words, cause) == ("InputError", "Bad.", "FailedElsewhere")
        else:
            assert error == "FailedElsewhere"
        # The processes are still connected.
        assert values["goes on"] == 2
