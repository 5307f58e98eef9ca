"""The paper's experiments: each way gives a model of the right steps and size, points are kept, tables compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import _paper_tables, paper
from benchmarks._paper import ARCHITECTURES, SHAPES, WAYS, Budget, fresh, measure_point, prune_recipe, train_dense
from deadhead.data import load_text
from deadhead.measure.cost import model_cost
from tests.small_runs import write_prose

pytestmark = pytest.mark.slow

_BUDGET = Budget(dense=2, prune=3, finetune=2, tokens=200)
_TINY = SHAPES["tiny"]
# So fast that gates close in three steps.
_FAST = replace(_TINY, learning_rate=0.2)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int, Path]:
    """Return a text, its vocabulary, and a folder with a dense model of each architecture."""
    folder = tmp_path_factory.mktemp("paper")
    text, tokenizer = load_text(str(write_prose(folder, 20_000)), tokenizer="byte")
    for name in ARCHITECTURES:
        train_dense(name, _TINY, 0, text=text, vocab_size=len(tokenizer), steps=_BUDGET.dense, folder=folder / name)
    return text, len(tokenizer), folder


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_takes_the_same_steps(way: str, given: tuple[Any, int, Path]) -> None:
    text, vocab_size, folder = given
    architecture = "transformer-xl" if way == "paper" else "all-attention"
    found = measure_point(
        architecture,
        _FAST if WAYS[way].kind == "pruned" else _TINY,
        WAYS[way],
        2.0,
        0,
        text=text,
        vocab_size=vocab_size,
        dense=folder / architecture,
        budget=_BUDGET,
    )
    assert found["steps"] == 7 and found["after"] > 1
    assert len(found["heads"]) == _TINY.layers
    assert (found["gated"] is None) == (WAYS[way].kind != "pruned")
    if WAYS[way].kind == "pruned":
        # The cut takes heads, and changes nothing.
        assert found["sparsity"] > 0
        assert found["cut"] == pytest.approx(found["gated"], rel=1e-5)
    elif WAYS[way].kind == "dense":
        assert found["sparsity"] == 0
    else:
        assert found["heads"] == [2, 2] and found["sparsity"] == 0.5


def test_a_way_changes_of_the_papers_recipe_what_it_names_and_nothing_else() -> None:
    paper_way = prune_recipe(_TINY, Budget(), WAYS["paper"], 0.02).model_dump()
    assert (paper_way["l0_warmup_steps"], paper_way["init"], paper_way["output_scale"]) == (100, 2.0, True)
    assert paper_way["gate_lr"] == 0 and paper_way["weighting"] == "plain" and paper_way["sparsity"] is None
    for name, way in WAYS.items():
        if way.kind == "pruned":
            changed = prune_recipe(_TINY, Budget(), way, 0.02).model_dump()
            assert {key for key in changed if changed[key] != paper_way[key]} == set(way.options), name


def test_both_architectures_are_of_one_size_and_a_small_one_has_the_heads_asked_for() -> None:
    costs = [model_cost(fresh(name, SHAPES["small"], 257, 0)) for name in ARCHITECTURES]
    assert abs(costs[0].parameters / costs[1].parameters - 1) < 0.01
    assert model_cost(fresh("all-attention", _TINY, 257, 0, heads=3)).heads == [3, 3]


def test_the_curve_comes_first_and_the_baseline_is_there_for_it_only() -> None:
    todo = paper.points(ARCHITECTURES, list(WAYS), None, (0, 1), heads=8)
    curve = [point for point in todo if point.way in ("dense", "paper")]
    assert todo[: len(curve)] == curve and len(curve) == 2 * (2 + sum(map(len, paper.L0.values())))
    assert {point.way for point in todo if point.architecture == "transformer-xl"} == {"dense", "paper"}
    assert {point.amount for point in todo if point.way == "from scratch"} == {8, 6, 4, 2}
    assert {point.amount for point in todo if point.way == "no warm-up"} == {paper.ABLATION_L0}
    assert {point.amount for point in todo if point.way == "no initialisation"} == {0.06, 0.01}


def test_a_stopped_sweep_goes_on_and_other_settings_are_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = write_prose(tmp_path, 20_000)
    sweep = paper.Sweep(shape="tiny", budget=_BUDGET, data=str(text), out=tmp_path / "out")
    todo = paper.points(("all-attention",), ("dense", "paper"), (0.1,), (0,), heads=4)
    done: list[paper.Point] = []
    whole = paper._measure

    def stopped(point: paper.Point, sweep: paper.Sweep) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(point)
        whole(point, sweep)

    def run_here(function: Any, calls: Any, **_: Any) -> None:
        for call in calls:
            function(*call)

    monkeypatch.setattr(paper, "run_all", run_here)
    monkeypatch.setattr(paper, "_measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        paper.measure(todo, sweep, 1, 1, Console(quiet=True))
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "points").iterdir()}
    assert len(kept) == 1
    monkeypatch.setattr(paper, "_measure", whole)
    paper.measure(todo, sweep, 1, 1, Console(quiet=True))
    now = {path: path.read_bytes() for path in (tmp_path / "out" / "points").iterdir()}
    assert len(now) == 2 and kept.items() <= now.items()
    sha256 = sweep.text()[0].sha256
    assert all(paper._kept(point, sweep, sha256) for point in todo)
    longer = paper.Sweep(shape="tiny", budget=Budget(dense=3), data=str(text), out=tmp_path / "out")
    assert not any(paper._kept(point, longer, sha256) or paper._kept(point, sweep, "other") for point in todo)
    folders = {s.dense("all-attention", 0, text) for s, text in ((sweep, sha256), (sweep, "other"), (longer, sha256))}
    assert len(folders) == 3


def _point(architecture: str, way: str, amount: float, sparsity: float, after: float, seed: int = 0) -> dict[str, Any]:
    left = sparsity if architecture == "all-attention" else sparsity / 2
    return {
        "architecture": architecture,
        "way": way,
        "amount": amount,
        "seed": seed,
        "sparsity": sparsity,
        "parameters": 1e6 * (1 - left),
        "gated": None if way in ("dense", "from scratch") else 2 * after,
        "cut": None if way in ("dense", "from scratch") else 2.002 * after,
        "after": after,
    }


_FOUND = [
    _point("all-attention", "dense", 0, 0.0, 4.0),
    _point("all-attention", "paper", 0.01, 0.2, 4.0),
    _point("all-attention", "paper", 0.02, 0.6, 9.0),
    _point("all-attention", "no warm-up", 0.02, 0.4, 6.6),
    _point("all-attention", "from scratch", 4, 0.4, 5.0),
    _point("transformer-xl", "dense", 0, 0.0, 5.0),
    _point("transformer-xl", "paper", 0.01, 0.5, 7.2),
]


def test_perplexities_are_read_off_a_seeds_own_curve() -> None:
    at = _paper_tables.interpolated
    assert at(_FOUND, "all-attention", 0, "sparsity", 0.2) == pytest.approx(4.0)
    # Halfway between 4 and 9 the geometric mean stands.
    assert at(_FOUND, "all-attention", 0, "sparsity", 0.4) == pytest.approx(6.0)
    assert at(_FOUND, "all-attention", 0, "parameters", 6e5) == pytest.approx(6.0)
    assert at(_FOUND, "all-attention", 0, "sparsity", 0.7) is None
    assert at(_FOUND, "all-attention", 1, "sparsity", 0.2) is None
    # One that lost no head is no part of the curve.
    idle = [*_FOUND, _point("all-attention", "paper", 0.001, 0.0, 5.0)]
    for key, value in (("sparsity", 0.1), ("parameters", 9e5)):
        assert at(idle, "all-attention", 0, key, value) == pytest.approx(4.0)


def test_tables() -> None:
    curve = _paper_tables.curve_table(_FOUND)
    assert "| all-attention | 0.02 | 60 (1) | 400 (1) | 18.00 (1) | 9.000 (1) | +125.0 (1) |" in curve
    assert _paper_tables.same_function(_FOUND).endswith("4 models: perplexities differ by 1e-03 at most.")
    sizes = _paper_tables.size_table(_FOUND)
    assert "| 100% | 4.000 (1) | 5.000 (1) | -20.0 (1) |" in sizes
    # Halfway from 5 to 7.2 stands 6; ours at 43 % is 57.5 % of the way from 4 to 9, in logarithms.
    claim = _paper_tables.equal_quality(_FOUND)
    assert "43 % of its heads gone: 6.376 (1); Transformer-XL with 25 % gone: 6.000 (1)" in claim
    assert "%: +6.3 (1)" in claim
    ablation = _paper_tables.ablation_table(_FOUND)
    assert "| no warm-up | 0.02 | 40 (1) | 13.20 (1) | 6.600 (1) | +10.0 (1) |" in ablation
    assert "| paper | 0.01 |" not in ablation
    scratch = _paper_tables.scratch_table(_FOUND)
    assert "| all-attention | 4 | 600 | 5.000 (1) | 6.000 (1) | +20.0 (1) |" in scratch


def test_figures(tmp_path: Path) -> None:
    _paper_tables.draw(_FOUND, tmp_path, "paper")
    assert {path.name for path in tmp_path.iterdir()} == {"paper_curve.png", "paper_ablation.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_spread() -> None:
    assert _paper_tables.spread([1.0, 2.0, 3.0], ".1f") == "2.0 ± 1.0"
    assert _paper_tables.spread([1.0, None, None], "+.1f") == "+1.0 (1)"
    assert _paper_tables.spread([None]) == "–"
