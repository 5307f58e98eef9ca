"""A checkpoint pruned layer by layer: what pruning in memory gives, stopped and resumed too; and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import deadhead
from benchmarks._kills import before_changes
from benchmarks._tiny_models import CAUSAL_TYPES, scramble, tiny_model
from deadhead import InputError
from deadhead.cli import execute
from deadhead.plans.kinds import ONE_SHOT
from deadhead.streaming import layer_fits
from deadhead.training.runs.streamed import prune_checkpoint
from tests.small_runs import save_small_llama, save_small_model, stream, tree, weights, write_prose

_SIZES: Any = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES, num_attention_heads=8, num_key_value_heads=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}
_HOW: dict[str, Any] = {
    "of": "blocks",
    "steps": 3,
    "batch_size": 4,
    "sequence_length": 12,
    "compensate_rows": 24,
}
# Projections of all heads in one, experts that files have one by one, caps and norms, tied embeddings, biases.
_FEW = ("falcon", "gemma2", "mixtral", "opt", "phi3", "qwen3")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a checkpoint of each kind, in shards."""
    folder = tmp_path_factory.mktemp("streamed")
    for kind, make in _MODELS.items():
        model = make()
        scramble(model, 0)
        model.save_pretrained(folder / kind, max_shard_size="20KB")
    return folder


def _require_same(source: Path, folder: Path, **how: Any) -> Any:
    """Prune in both ways; the plans, the configurations and, but for rounding, the weights must be the same."""
    text = stream(2000)
    in_memory = deadhead.prune(source, text, out=folder / "in_memory", **{**_HOW, **how})
    streamed = prune_checkpoint(source, text, out=folder / "streamed", **{**_HOW, **how})
    assert (streamed.plan, streamed.budget) == (in_memory.plan, in_memory.budget)
    costs = (streamed.cut.before, in_memory.costs.before), (streamed.cut.after, in_memory.costs.after)
    assert all(one.parameters == other.parameters for one, other in costs)
    found, expected = weights(folder / "streamed"), weights(folder / "in_memory")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    configs = [json.loads((folder / name / "config.json").read_text()) for name in ("streamed", "in_memory")]
    fitted = [config.pop("compensation", {}) for config in configs]
    assert configs[0] == configs[1]
    for name in ("text", "measure"):
        assert fitted[0].pop(name, None) == fitted[1].pop(name, None)
    assert fitted[0] == pytest.approx(fitted[1], rel=1e-5)
    assert not (folder / "streamed.work").exists()
    return streamed


@pytest.mark.parametrize("criterion", ONE_SHOT)
@pytest.mark.parametrize("kind", _MODELS)
def test_as_in_memory(kind: str, criterion: str, sources: Path, tmp_path: Path) -> None:
    found = _require_same(sources / kind, tmp_path, criterion=criterion, params=0.6)
    assert found.compensation is not None
    # What was written runs.
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits = [deadhead.load(tmp_path / name)(input_ids=ids).logits for name in ("streamed", "in_memory")]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", _MODELS)
def test_layers_without_heads_and_without_hidden_units(kind: str, sources: Path, tmp_path: Path) -> None:
    found = _require_same(sources / kind, tmp_path, criterion="influence", params=0.2)
    assert 0 in found.cut.after.heads and 0 in found.cut.after.hidden_units
    assert any(found.cut.after.heads)


@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"kv_cache": 0.5}, {"flops": 0.7}, {"memory": "90kB"}])
def test_other_budgets(how: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    _require_same(sources / "llama", tmp_path, criterion="wanda", **{"of": "all", **how})


@pytest.mark.parametrize("how", [{"compensate": False}, {"unit": "head"}, {"blocks": False}, {"block_size": 5}])
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
def test_other_settings(how: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    found = _require_same(sources / "llama", tmp_path, criterion="flap", params=0.8, **how)
    assert (found.compensation is None) == (how == {"compensate": False})


def _require_same_family(model_type: str, criterion: str, folder: Path) -> None:
    tiny_model(model_type, seed=0).save_pretrained(folder / "source", max_shard_size="20KB")
    _require_same(folder / "source", folder, criterion=criterion, params=0.85)


@pytest.mark.parametrize("model_type", _FEW)
def test_architectures(model_type: str, tmp_path: Path) -> None:
    _require_same_family(model_type, "reconstruction", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("criterion", ["flap", "second-order"])
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_every_architecture(model_type: str, criterion: str, tmp_path: Path) -> None:
    try:
        _require_same_family(model_type, criterion, tmp_path)
    except (InputError, deadhead.UnsupportedModel) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("criterion", ["flap", "second-order"])
def test_stopped_at_every_layer_and_resumed(criterion: str, sources: Path, tmp_path: Path) -> None:
    """The same bytes in the end, and nothing is done twice."""
    text, told = stream(2000), []

    class Stop(BaseException):
        pass

    def prune(out: Path, *, resume: bool, stop_at: int | None) -> list[tuple[Any, ...]]:
        told.clear()

        def progress(*what: Any) -> None:
            told.append(what[:3])
            if len(told) == stop_at and what[0] not in ("copying", "checking"):
                raise Stop

        how = {**_HOW, "criterion": criterion, "params": 0.7, "resume": resume, "progress": progress}
        prune_checkpoint(sources / "llama", text, out=out, **how)
        return list(told)

    every = [what for what in prune(tmp_path / "whole", resume=False, stop_at=None) if "layers" in what[0]]
    assert len(every) == (6 if criterion == "flap" else 9)
    done = []
    for attempt in range(len(every)):
        with pytest.raises(Stop):
            prune(tmp_path / "out", resume=attempt > 0, stop_at=1)
        done += [what for what in told if "layers" in what[0]]
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="left from a stopped phase; continue it with resume"):
        prune(tmp_path / "out", resume=False, stop_at=None)
    prune(tmp_path / "out", resume=True, stop_at=None)
    done += [what for what in told if "layers" in what[0]]
    assert done == every
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


@pytest.mark.slow
def test_killed_before_a_change_and_resumed(sources: Path, tmp_path: Path) -> None:
    """Of files and folders, by SIGKILL, every time a little later: the same files in the end."""

    def in_a_child(out: Path, *, resume: bool, kill_at: int | None) -> int:
        process = os.fork()
        if process == 0:
            try:
                torch.set_num_threads(1)

                def act(count: int) -> None:
                    if count == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

                before_changes(out.parent, act)
                how = {**_HOW, "criterion": "wanda", "params": 0.7, "resume": resume}
                prune_checkpoint(sources / "llama", stream(2000), out=out, **how)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    (tmp_path / "whole").mkdir()
    assert in_a_child(tmp_path / "whole" / "out", resume=False, kill_at=None) == 0
    (tmp_path / "killed").mkdir()
    out, kills, kill_at = tmp_path / "killed" / "out", 0, 3
    while code := in_a_child(out, resume=out.with_name("out.work").exists(), kill_at=kill_at):
        assert code == -signal.SIGKILL
        kills, kill_at = kills + 1, kill_at + 7
    assert kills > 5
    assert tree(out) == tree(tmp_path / "whole" / "out")
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_other_settings_are_not_resumed(sources: Path, tmp_path: Path) -> None:
    how = {**_HOW, "criterion": "flap", "out": tmp_path / "out"}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(sources / "llama", stream(2000), params=0.7, progress=stop, **how)
    with pytest.raises(InputError, match="left from a phase with other settings, another text"):
        prune_checkpoint(sources / "llama", stream(2000), params=0.6, resume=True, **how)
    with pytest.raises(InputError, match="left from a phase with other settings, another text"):
        prune_checkpoint(sources / "llama", stream(2000, seed=1), params=0.7, resume=True, **how)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), r"is left of a phase, but its settings\.json is missing; delete .* to begin anew"),
        (lambda path: path.write_text("{"), r"is not JSON.*; delete .* to begin anew"),
    ],
)
def test_work_without_its_settings_is_not_resumed(
    damage: Callable[[Path], object], expected: str, sources: Path, tmp_path: Path
) -> None:
    how = {**_HOW, "criterion": "flap", "params": 0.7, "out": tmp_path / "out"}

    def stop(name: str, done: int, *_: Any) -> None:
        if done > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(sources / "llama", stream(2000), progress=stop, **how)
    damage(tmp_path / "out.work" / "settings.json")
    kept = tree(tmp_path / "out.work")
    with pytest.raises(InputError, match=expected):
        prune_checkpoint(sources / "llama", stream(2000), resume=True, **how)
    assert tree(tmp_path / "out.work") == kept


def test_fits_that_are_not_better_are_taken_back(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(layer_fits, "_loss", lambda *_: next(losses))
    how = {**_HOW, "criterion": "flap", "params": 0.7}
    found = prune_checkpoint(sources / "llama", stream(2000), out=tmp_path / "a", **how)
    assert found.compensation is not None and not found.compensation.kept
    assert not any(layer.fitted for layer in found.compensation.layers)
    prune_checkpoint(sources / "llama", stream(2000), out=tmp_path / "b", **{**how, "compensate": False})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"criterion": "gates"}, "The criterion gates needs the whole model in memory; layer by layer, choose one of"),
        ({"criterion": "sizes"}, "The criterion sizes needs the whole model in memory"),
        ({"speedup": 1.5, "params": None}, "A speedup is measured on the whole model in memory"),
        ({"recover": 3}, "recover is for pruning in memory, because layer by layer nothing is trained"),
        (
            {"dtype": "float16"},
            "dtype is for pruning in memory, because layer by layer weights stay as they were saved",
        ),
        ({"params": 0.01, "of": "all"}, "cannot be reached"),
        ({"sequence_length": 5000}, "positions"),
        ({"params": None}, "budget"),
        ({"nme": 1}, "unknown key 'nme'"),
    ],
)
def test_refusals(how: dict[str, Any], expected: str, sources: Path, tmp_path: Path) -> None:
    given = {name: value for name, value in {**_HOW, "params": 0.7, **how}.items() if value is not None}
    given = {name: value for name, value in given.items() if name != "of" or "params" in given}
    with pytest.raises(InputError, match=expected) as caught:
        prune_checkpoint(sources / "llama", stream(2000), out=tmp_path / "out", **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_model_that_lies_where_work_is_kept_is_not_lost(sources: Path, tmp_path: Path) -> None:
    """In memory, layer by layer, and cut by a plan."""
    shutil.copytree(sources / "llama", tmp_path / "x.work")
    shutil.copytree(sources / "llama", tmp_path / "y.work" / "model")
    before = tree(tmp_path)
    how = {**_HOW, "params": 0.7, "criterion": "flap"}
    plan = deadhead.HeadPlan.keep_all(dict.fromkeys(range(3), 4), unit="kv_group")
    for out, source in (("x", tmp_path / "x.work"), ("y", tmp_path / "y.work" / "model"), ("x", sources / "llama")):
        what = "is the model, and would be removed|where unfinished work is kept, holds a model"
        for resume in (False, True):
            with pytest.raises(InputError, match=what):
                prune_checkpoint(source, stream(2000), out=tmp_path / out, resume=resume, **how)
            with pytest.raises(InputError, match=what):
                deadhead.prune(source, stream(2000), out=tmp_path / out, resume=resume, **how)
            with pytest.raises(InputError, match=what):
                deadhead.cut_checkpoint(source, plan, tmp_path / out, stream=True, resume=resume)
    assert tree(tmp_path) == before


def test_a_source_that_is_changed_meanwhile_is_told_of(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "llama", tmp_path / "source")

    def change(name: str, done: int, total: int, logs: dict[str, Any]) -> None:
        if name == "compensating layers" and done == total:
            os.utime(tmp_path / "source" / "config.json", (0, 0))

    how = {**_HOW, "params": 0.7, "criterion": "flap", "progress": change}
    with pytest.raises(InputError, match="were changed during the pruning"):
        prune_checkpoint(tmp_path / "source", stream(2000), out=tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="there is no /proc here")
def test_a_place_where_nothing_can_be_made(sources: Path) -> None:
    with pytest.raises(InputError, match="/proc/x.work cannot be written: nothing can be made there"):
        prune_checkpoint(sources / "llama", stream(2000), out="/proc/x", params=0.7, criterion="flap")


def test_texts_and_models_that_do_not_do(sources: Path, tmp_path: Path) -> None:
    out, how = tmp_path / "out", {**_HOW, "params": 0.7}
    with pytest.raises(InputError, match="To write its own text a model must be in memory"):
        prune_checkpoint(sources / "llama", "self", out=out, **how)
    with pytest.raises(InputError, match="A text was expected for a model of type llama, but none was given"):
        prune_checkpoint(sources / "llama", out=out, **how)
    with pytest.raises(InputError):
        prune_checkpoint(sources / "llama", stream(10), out=out, **how)
    with pytest.raises(InputError, match="must not overwrite the model"):
        prune_checkpoint(sources / "llama", stream(2000), out=sources / "llama", **how)
    assert not out.exists() and not (tmp_path / "out.work").exists()
    with pytest.raises(InputError, match="nowhere"):
        prune_checkpoint(tmp_path / "nowhere", stream(2000), out=out, **how)
    ours = save_small_model(tmp_path / "ours", write_prose(tmp_path))
    with pytest.raises(
        InputError, match="cannot be pruned layer by layer, because models of type .*; prune it in memory"
    ):
        prune_checkpoint(ours, stream(2000), out=out, sparsity=0.5, criterion="magnitude")
    assert not out.exists() and not (tmp_path / "out.work").exists()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write_prose(tmp_path)
    save_small_llama(tmp_path / "llama", text)
    command = ["prune", "--model", str(tmp_path / "llama"), "--data", str(text), "--params", "0.8", "--stream"]
    command += ["--steps", "2", "--batch-size", "2", "--sequence-length", "24", "--compensate-rows", "16"]
    assert execute([*command, "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["streamed"] and found["budget"]["reached"] <= 0.8
    assert execute([*command, "--out", str(tmp_path / "other")]) == 0
    assert "heads a layer" in capsys.readouterr().out
    assert tree(tmp_path / "out") == tree(tmp_path / "other")
    assert execute([*command, "--out", str(tmp_path / "other"), "--resume"]) == 2
    assert "There is nothing to resume" in capsys.readouterr().err
    assert execute([*command, "--dry-run"]) == 0
    assert "rank units by reconstruction" in capsys.readouterr().out
    for more in (["--criterion", "gates"], ["--recover", "3"], ["--dtype", "float16"], ["--no-cut"]):
        assert execute([*command, "--dry-run", *more]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert execute([*command, "--out", str(tmp_path / "other"), "--no-cut"]) == 2
    assert "--stream uses none" in capsys.readouterr().err
