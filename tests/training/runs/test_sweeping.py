"""A sweep: each point is what a single phase makes of its budget, killed or not, and what may not be asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import deadhead
from deadhead import InputError
from deadhead.data import TokenStream, load_tokenizer
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.disk.reading import read_object
from deadhead.measure.replies import compare_replies
from deadhead.plans.plan import HeadPlan
from deadhead.training.runs import sweeping
from tests.random_models import tiny_model
from tests.small_runs import Killed, assert_same_tensors, weights

_SMALL: dict[str, Any] = {"steps": 4, "batch_size": 2, "sequence_length": 24, "of": "blocks", "compensate_rows": 8}
_SHARES = [0.85, 0.6, 0.7]


def _sweep(place: Path, out: Path, **settings: Any) -> sweeping.Sweep:
    return deadhead.sweep(
        place / "llama", str(place / "prose.txt"), out=out, **{"params": _SHARES, **_SMALL, **settings}
    )


def _plans(out: Path) -> list[HeadPlan]:
    return [HeadPlan.from_dict(plan) for plan in read_object(out / "plans.json", what="plans")["plans"]]


@pytest.mark.parametrize("criterion", ["reconstruction", pytest.param("taylor", marks=pytest.mark.slow)])
def test_each_point_is_what_a_single_phase_makes(place: Path, tmp_path: Path, criterion: Any) -> None:
    """A ranking does not change with the budget, so the phases of a sweep are those that one would have alone."""
    found = _sweep(place, tmp_path / "all", criterion=criterion, max_loss=1e3)
    assert [point["asked"] for point in found.points] == [0.85, 0.7, 0.6] and found.picked == 0.6
    for point in found.points:
        alone = deadhead.prune(
            place / "llama",
            str(place / "prose.txt"),
            params=point["asked"],
            criterion=criterion,
            out=tmp_path / point["path"],
            **_SMALL,
        )
        assert_same_tensors(weights(tmp_path / "all" / point["path"]), weights(tmp_path / point["path"]))
        assert alone.measured is not None
        assert point["perplexity"] == pytest.approx(alone.measured.after.perplexity)
        assert point["loss"] == pytest.approx(alone.measured.after.perplexity / alone.measured.before.perplexity - 1)
        assert point["reached"] == alone.budget["reached"] <= point["asked"]  # type: ignore[index]
        assert point["parameters"] == alone.costs.after.parameters < found.dense["parameters"]
    assert json.loads((tmp_path / "all" / "sweep.json").read_text()) == found.to_dict()
    assert {path.name for path in (tmp_path / "all").iterdir()} == {
        *("sweep.json", "plans.json", "settings.json", "params-0.85", "params-0.7", "params-0.6")
    }


def test_sizes_go_on_from_one_budget_to_the_next(place: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    found = _sweep(place, tmp_path / "out", progress=lambda name, done, total, _: told.append((name, done, total)))
    assert read_object(tmp_path / "out" / "settings.json", what="settings")["recipes"][0]["criterion"] == "sizes"
    assert ("learning sizes", 8, 8) in told and ("learning sizes for the next budget", 2, 2) in told
    assert [point["parameters"] for point in found.points] == sorted(
        (point["parameters"] for point in found.points), reverse=True
    )
    assert found.picked is None and found.max_loss is None


@pytest.mark.parametrize(
    ("criterion", "at"),
    [
        (None, "a plan"),
        pytest.param(None, "its recovery", marks=pytest.mark.slow),
        pytest.param("reconstruction", "a model", marks=pytest.mark.slow),
        pytest.param("reconstruction", "its recovery", marks=pytest.mark.slow),
    ],
)
def test_a_sweep_that_was_killed_goes_on_to_the_same(place: Path, tmp_path: Path, criterion: Any, at: str) -> None:
    settings: dict[str, Any] = {"criterion": criterion, "recover": 4, "save_every": 1, "learning_rate": 1e-3}
    whole = _sweep(place, tmp_path / "whole", **settings)
    names = {
        "a plan": "learning sizes for the next budget",
        "a model": "params-0.7: compensating",
        "its recovery": "params-0.7: recover",
    }
    seen: list[str] = []

    def kill(name: str, *of: Any) -> None:
        seen.append(name)
        if name == names[at] and seen.count(name) == 2:
            raise Killed

    with pytest.raises(Killed):
        _sweep(place, tmp_path / "killed", progress=kill, **settings)
    with pytest.raises(InputError, match="exists already; continue with resume"):
        _sweep(place, tmp_path / "killed", **settings)
    with pytest.raises(InputError, match="other settings"):
        _sweep(place, tmp_path / "killed", resume=True, seed=5, **settings)
    found = _sweep(place, tmp_path / "killed", resume=True, **settings)
    for point, other in zip(whole.points, found.points, strict=True):
        same = ("asked", "path", "parameters", "heads", "perplexity", "unrecovered_perplexity")
        assert {name: point[name] for name in same} == {name: other[name] for name in same}
        assert_same_tensors(weights(tmp_path / "whole" / point["path"]), weights(tmp_path / "killed" / point["path"]))
    assert _plans(tmp_path / "whole") == _plans(tmp_path / "killed")


@pytest.mark.slow
def test_models_reply_and_nothing_else_is_done_again(place: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def stop(name: str, *of: Any) -> None:
        told.append(name)
        if name == "params-0.85: comparing replies":
            raise Killed

    out, settings = tmp_path / "out", {"params": [0.85, 0.6], "criterion": "reconstruction"}
    with pytest.raises(Killed):
        _sweep(place, out, progress=stop, replies=True, **settings)
    assert "dense: replies" in told and "params-0.6: compensating" in told and "params-0.6: replies" not in told
    told.clear()
    found = _sweep(place, out, resume=True, replies=True, progress=lambda name, *_: told.append(name), **settings)
    assert {"params-0.85: replies", "params-0.6: replies"} <= {*told}
    assert not {"dense: replies", "params-0.85: compensating", "params-0.6: compensating"} & {*told}
    kept = read_object(out / "replies.json", what="replies")
    assert [*kept] == ["dense", "params-0.85", "params-0.6"]

    names = {"dense": place / "llama"} | {point["path"]: out / point["path"] for point in found.points}
    models = {name: deadhead.load(path) for name, path in names.items()}
    expected = compare_replies(models, {name: load_tokenizer(path) for name, path in names.items()})
    for values in (found.dense | {"path": "dense"}, *found.points):
        theirs = expected[values["path"]]
        assert [reply["text"] for reply in kept[values["path"]]] == [reply.text for reply in theirs.replies]
        assert values["replies"].keys() == theirs.values.keys()
        for key, value in theirs.values.items():
            assert values["replies"][key] == pytest.approx(value, rel=1e-4)
    # They may be left out of it again.
    assert _sweep(place, out, resume=True, **settings).points == found.points


@pytest.mark.slow
def test_damaged_replies_are_told_of_and_written_anew(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"params": [0.8], "criterion": "reconstruction"}
    found = _sweep(place, tmp_path / "out", **settings)
    (tmp_path / "out" / "replies.json").write_text('{"dense": 5}')
    with pytest.raises(InputError, match="A list of models' replies was expected in .* delete it"):
        _sweep(place, tmp_path / "out", resume=True, replies=True, **settings)
    (tmp_path / "out" / "replies.json").unlink()
    again = _sweep(place, tmp_path / "out", resume=True, replies=True, **settings)
    assert "replies" in again.points[0] and again.points[0]["parameters"] == found.points[0]["parameters"]


def test_replies_need_a_tokenizer(place: Path, tmp_path: Path) -> None:
    config = deadhead.load(place / "llama").config
    config._name_or_path = ""
    model = LlamaForCausalLM(config)
    text = TokenStream(tokens=np.arange(2000) % 200, num_bytes=2000, num_words=400)
    with pytest.raises(InputError, match="need the model's tokenizer"):
        deadhead.sweep(model, text, params=[0.8], out=tmp_path / "out", replies=True, **_SMALL)
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_compared_is_refused_before_anything_is_chosen(place: Path, tmp_path: Path) -> None:
    model = tiny_model(vocab_size=260, adaptive_cutoffs=(100,))
    text = TokenStream(tokens=np.arange(2000) % 200, num_bytes=2000, num_words=400)
    settings: dict[str, Any] = {"criterion": "taylor", "steps": 2, "batch_size": 2}
    with pytest.raises(InputError, match="an adaptive softmax does not compute; leave them out"):
        deadhead.sweep(
            model, text, params=[0.8], out=tmp_path / "out", replies=True, tokenizer=byte_tokenizer(), **settings
        )
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_not_done_again(place: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"criterion": "reconstruction"}
    whole = _sweep(place, tmp_path / "out", **settings)
    told: list[str] = []
    loss = whole.points[0]["loss"]
    again = _sweep(
        place, tmp_path / "out", resume=True, max_loss=loss, progress=lambda name, *_: told.append(name), **settings
    )
    assert again.points == whole.points and again.picked == 0.85
    assert {name for name in told if not name.startswith("reading text")} == set()


def test_a_model_in_memory_stays_as_it_is(place: Path, tmp_path: Path) -> None:
    model = deadhead.load(place / "llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    deadhead.sweep(
        model, str(place / "prose.txt"), kv_cache=[0.9, 0.5], out=tmp_path / "out", **{**_SMALL, "of": "all"}
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_of_deadheads_own_are_ranked_by_taylor(place: Path, tmp_path: Path) -> None:
    found = deadhead.sweep(
        place / "ours", str(place / "prose.txt"), sparsity=[0.5, 0.25], out=tmp_path / "out", steps=2, batch_size=2
    )
    settings = read_object(tmp_path / "out" / "settings.json", what="settings")
    assert settings["recipes"][0]["criterion"] == "taylor"
    assert [point["asked"] for point in found.points] == [0.25, 0.5]
    assert sum(found.points[1]["heads"]) < sum(found.points[0]["heads"]) < sum(found.dense["heads"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"params": None}, r"in \[0.9, 0.8\], but got None"),
        ({"params": 0.8}, r"in \[0.9, 0.8\], but got 0.8"),
        ({"params": []}, r"in \[0.9, 0.8\], but got \[\]"),
        ({"params": [0.9, True]}, "must be a list of numbers"),
        ({"params": [0.9, 1.5]}, "1.5"),
        ({"flops": [0.9]}, "but params and flops were given"),
        ({"criterion": "gates"}, "gates trains for one budget; choose another"),
        ({"max_loss": -0.1}, "share of at least 0"),
        ({"resume": True}, "There is nothing to resume"),
        ({"params": [0.8, 0.01], "of": "all"}, "cannot be reached"),
        ({"out": None}, "name one with out"),
    ],
)
def test_what_cannot_be_swept_leaves_nothing(
    place: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _sweep(place, **{"out": tmp_path / "out", **settings})
    assert not (tmp_path / "out").exists()


def test_the_model_may_write_the_text_of_a_sweep(place: Path, tmp_path: Path) -> None:
    told: list[list[str]] = []
    found = deadhead.sweep(
        place / "llama",
        "self",
        params=[0.85, 0.7],
        out=tmp_path / "out",
        criterion="reconstruction",
        announce=lambda parts: told.append([part.what for part in parts]),
        **_SMALL,
    )
    assert [point["asked"] for point in found.points] == [0.85, 0.7] and "perplexity" in found.dense
    # What will be done is said once, for both.
    (parts,) = told
    assert parts[0].startswith("write ") and parts[-1].endswith("2 times")
