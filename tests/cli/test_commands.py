"""Every command on a tiny text, one after the other, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from transformers import AutoModelForCausalLM

import deadhead
from deadhead import HeadPlan
from deadhead.cli import execute
from deadhead.cli.run import _with_whole
from deadhead.data import load_tokenizer
from deadhead.plans.plan import UnitKey
from deadhead.training.recipes.reading import changed, parse_recipe, to_toml
from deadhead.training.recipes.recipe import Recipe
from tests.cli.conftest import Command
from tests.small_runs import assert_same_tensors, small_recipe, weights

_STEPS = ("--steps", "3", "--batch-size", "2")


def test_from_nothing_to_a_tuned_model(given: Path, tmp_path: Path, command: Command) -> None:
    text = given / "prose.txt"
    shape = ("--layers", 2, "--width", 32, "--heads", 4, "--persistent", 8, "--segment-length", 8, "--memory-length", 8)
    dense = command.json("train", "--data", text, "--out", tmp_path / "dense", *shape, *_STEPS)
    assert (dense["heads"], dense["steps"]) == ([4, 4], 3)
    assert deadhead.load(tmp_path / "dense").config.num_persistent == 8
    assert (tmp_path / "dense" / "metrics.jsonl").exists()
    assert list((tmp_path / "dense" / "tensorboard").glob("events*"))

    pruned = command.json(
        *("prune", "--model", tmp_path / "dense", "--data", text, "--out", tmp_path / "pruned", "--sparsity", 0.5),
        *(*_STEPS, "--gate-lr-scale", 100),
    )
    assert sum(pruned["heads"]) == 4
    assert pruned["parameters"] < dense["parameters"]
    plan = HeadPlan.from_json(tmp_path / "pruned" / "head_plan.json")
    assert plan.heads == pruned["heads"]

    tuned = command.json(
        "finetune", "--model", tmp_path / "pruned", "--data", text, "--out", tmp_path / "tuned", *_STEPS
    )
    assert tuned["heads"] == pruned["heads"]
    assert tuned["perplexity"] != pruned["perplexity"]
    assert HeadPlan.from_json(tmp_path / "tuned" / "head_plan.json") == plan

    measured = command.json("eval", tmp_path / "tuned", "--data", text)
    assert measured["perplexity"] == pytest.approx(tuned["perplexity"], rel=1e-5)
    assert set(measured) == {
        *("loss", "perplexity", "word_perplexity", "bits_per_byte", "tokens", "tokens_per_second"),
        *("rows", "length", "context", "prefix"),
    }
    inspected = command.json("inspect", tmp_path / "tuned")
    assert inspected["heads"] == plan.heads
    assert inspected["total_heads"] == [4, 4]
    assert inspected["parameters"] == tuned["parameters"]
    assert inspected["gated"] is False

    timed = command.json("bench", tmp_path / "tuned", "--dense", tmp_path / "dense", "--repeats", 2, "--length", 16)
    assert timed["speedup_the_flops_allow"] == dense["flops_per_token"] / tuned["flops_per_token"] > 1
    assert timed["efficiency"] == pytest.approx(timed["speedup"] / timed["speedup_the_flops_allow"])
    assert timed["speedup"] == pytest.approx(timed["dense"]["seconds"] / timed["model"]["seconds"])

    words = command.json("generate", tmp_path / "tuned", "--prompt", "the cat", "--max-new-tokens", 5)
    assert words["text"].startswith("the cat")
    # No work is left behind, and no half-written folder.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "pruned", "tuned"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert_same_tensors(loaded.state_dict(), deadhead.load(tmp_path / "tuned").state_dict())


def test_learned_ratio(given: Path, tmp_path: Path, command: Command) -> None:
    """With λ far too large every gate closes, with none every gate stays open."""
    common = ("prune", "--model", given / "model", "--data", given / "prose.txt", "--gate-lr", 10, *_STEPS)
    closed = command.json(*common, "--out", tmp_path / "closed", "--l0", 50, "--l0-warmup-steps", 0)
    assert closed["heads"] == [0, 0]
    assert command.json("inspect", tmp_path / "closed")["kv_cache_bytes"] == 0
    opened = command.json(*common, "--out", tmp_path / "open", "--l0", 0, "--init", 50)
    assert opened["heads"] == [4, 4]


@pytest.mark.parametrize(
    "criterion",
    [
        *("topk", "taylor", "output-difference", "flap", "magnitude", "random"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("wanda", "second-order", "reconstruction", "influence")
        ),
    ],
)
def test_other_criteria(criterion: str, given: Path, tmp_path: Path, command: Command) -> None:
    """Each cuts exactly the share asked for; a one-shot criterion leaves the weights that stay as they were."""
    common = ("prune", "--model", given / "model", "--data", given / "prose.txt", "--criterion", criterion)
    by_layer = command.json(
        *(*common, "--sparsity", 0.5, "--ranking", "layer", "--out", tmp_path / "by_layer", *_STEPS, "--seed", 3)
    )
    assert by_layer["heads"] == [2, 2]
    overall = command.json(*common, "--sparsity", 0.25, "--out", tmp_path / "overall", *_STEPS)
    assert sum(overall["heads"]) == 6
    assert overall["steps"] == (0 if criterion != "topk" else int(_STEPS[1]))
    plan = HeadPlan.from_json(tmp_path / "overall" / "head_plan.json")
    cut = deadhead.cut(deadhead.load(given / "model"), plan).state_dict()
    found = deadhead.load(tmp_path / "overall").state_dict()
    same = all(torch.equal(value, cut[name]) for name, value in found.items())
    assert same == (criterion != "topk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by_layer", "overall"]


def test_sizes_are_learned_and_the_weights_that_stay_are_not(
    given: Path, tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("prune", "--model", given / "llama", "--data", given / "prose.txt", "--criterion", "sizes", *_STEPS)
    found = command.json(*common, "--params", 0.7, "--of", "blocks", "--no-compensate", "--out", tmp_path / "small")
    assert found["steps"] == 0
    plan = HeadPlan.from_json(tmp_path / "small" / "head_plan.json")
    assert plan.hidden_units is not None
    cut = deadhead.cut(deadhead.load(given / "llama"), plan).state_dict()
    left = deadhead.load(tmp_path / "small").state_dict()
    assert cut.keys() == left.keys() and all(torch.equal(value, left[name]) for name, value in cut.items())
    refused = [str(each) for each in (*common, "--sparsity", 0.25, "--out", tmp_path / "none")]
    assert execute(refused) == 2
    assert "the criterion sizes learns by what units cost" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_fast_ranks_and_recover_goes_on(
    given: Path, tmp_path: Path, command: Command, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ("prune", "--model", given / "llama", "--data", given / "prose.txt", "--params", 0.7, *_STEPS)
    fast = command.json(*common, "--fast", "--no-compensate", "--out", tmp_path / "fast")
    ranked = command.json(*common, "--criterion", "reconstruction", "--no-compensate", "--out", tmp_path / "ranked")
    assert fast == ranked
    assert (tmp_path / "fast" / "head_plan.json").read_text() == (tmp_path / "ranked" / "head_plan.json").read_text()
    both = [str(each) for each in (*common, "--fast", "--criterion", "taylor", "--out", tmp_path / "none")]
    assert execute(both) == 2
    assert "--fast stands for --criterion reconstruction, but --criterion taylor is given" in capfd.readouterr().err
    found = command.json(*common, "--fast", "--recover", 3, "--out", tmp_path / "recovered")
    assert found["steps"] == 3 and found["unrecovered_perplexity"] != found["perplexity"]
    lines = (tmp_path / "recovered" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["phase"] for line in lines} == {"recover"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast", "ranked", "recovered"]


def test_a_command_says_what_it_will_do(given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("prune", "--model", given / "llama", "--data", given / "prose.txt", "--params", 0.7, *_STEPS)
    assert execute([str(word) for word in (*words, "--recover", 1, "--out", tmp_path / "out")]) == 0
    shown = capfd.readouterr()
    assert "To do: learn the sizes of layers' parts in" in shown.err and "then recover in 1 steps of" in shown.err
    assert "Before recovery: perplexity" in shown.out
    assert execute([str(word) for word in (*words, "--quiet", "--out", tmp_path / "quiet")]) == 0
    assert "To do:" not in capfd.readouterr().err


def test_what_is_measured_has_its_gates_on(given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Closed as training left them, in a folder of ours and among weights; a line says so."""
    model, tokenizer = deadhead.load(given / "model"), load_tokenizer(given / "model")
    for _, gate in deadhead.attach(model):
        gate.set_log_alpha(torch.tensor([-3.0] + [3.0] * (gate.num_heads - 1)))
    deadhead.save(model, tmp_path / "gated", tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    found = []
    for folder in (tmp_path / "gated", tmp_path / "theirs", given / "model"):
        capfd.readouterr()
        assert execute(["eval", str(folder), "--data", str(given / "prose.txt"), "--limit", "200", "--json"]) == 0
        output, errors = capfd.readouterr()
        assert ("has gates, which stay on here: " in errors) == (folder != given / "model")
        found.append(json.loads(output)["perplexity"])
    assert found[0] == found[1] != found[2]


def test_gates_kept(given: Path, tmp_path: Path, command: Command) -> None:
    result = command.json(
        *("prune", "--model", given / "model", "--data", given / "prose.txt", "--out", tmp_path / "gated"),
        *("--sparsity", 0.25, "--no-cut", "--no-output-scale", "--weighting", "output_difference", *_STEPS),
    )
    assert sum(result["heads"]) == 6
    model, gates = deadhead.load_gated(tmp_path / "gated")
    assert gates.plan().heads == result["heads"]
    assert not gates.config.output_scale
    assert float(gates.difference()[UnitKey("head", 0)].min()) > 0
    assert command.json("inspect", tmp_path / "gated")["gated"] is True
    assert "saved with gates on" in command("inspect", tmp_path / "gated")
    # Cut later, by the plan the gates have learned.
    gates.plan().to_json(tmp_path / "plan.json")
    command("cut", tmp_path / "gated", "--plan", tmp_path / "plan.json", "--out", tmp_path / "cut")
    deadhead.cut(model, gates.plan())
    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        torch.testing.assert_close(
            deadhead.load(tmp_path / "cut")(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5
        )


def test_cut_by_a_plan(given: Path, tmp_path: Path, command: Command) -> None:
    result = command.json("cut", given / "model", "--plan", given / "plan.json", "--out", tmp_path / "cut")
    assert result["before"]["heads"] == [4, 4]
    assert result["after"]["heads"] == [2, 0]
    assert deadhead.model_cost(deadhead.load(tmp_path / "cut")).heads == [2, 0]
    text = command("cut", given / "model", "--plan", given / "plan.json", "--out", tmp_path / "cut")
    assert "layer 0  · ■ ■ ·  2/4\nlayer 1  · · · ·  0/4\n" in text
    assert f"{result['before']['parameters']:,} → {result['after']['parameters']:,} parameters" in text
    # It has its tokenizer, and can be used at once.
    assert command("generate", tmp_path / "cut", "--prompt", "a", "--max-new-tokens", 2).startswith("a")


def test_tables(given: Path, command: Command) -> None:
    inspected = command("inspect", given / "model")
    assert inspected.startswith("layer 0  ■ ■ ■ ■  4/4\n")
    assert f"{deadhead.model_cost(deadhead.load(given / 'model')).parameters:,}" in inspected
    measured = command("eval", given / "model", "--data", given / "prose.txt", "--limit", 50, "--on", "test")
    assert measured.startswith("perplexity ")
    assert "; 50 tokens at " in measured
    timed = command("bench", given / "model", "--dense", given / "model", "--repeats", 1, "--length", 8)
    assert "the removed FLOPs allow 1.00" in timed


def test_generation_is_seeded(given: Path, command: Command) -> None:
    texts = [
        command("generate", given / "model", "--max-new-tokens", 9, "--seed", seed, "--prompt", "[bold]x")
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    # Square brackets are text, not markup.
    assert texts[0].startswith("[bold]x")


def test_a_phase_goes_on(given: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after its steps and before its checkpoint was written, `--resume` ends in the same weights."""
    common = ("finetune", "--model", given / "model", "--data", given / "prose.txt", "--save-every", 2, *_STEPS)
    command(*common, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("deadhead.checkpoints.checkpoint.save", stop)
        assert execute([str(word) for word in (*common, "--out", tmp_path / "stopped")]) == 130
    assert (tmp_path / "stopped.work" / "checkpoints").is_dir()
    assert not (tmp_path / "stopped").exists()
    command(*common, "--out", tmp_path / "stopped", "--resume")
    assert_same_tensors(weights(tmp_path / "stopped"), weights(tmp_path / "whole"))
    assert not (tmp_path / "stopped.work").exists()


def test_a_recipe_gives_what_the_options_do_not(given: Path, tmp_path: Path, command: Command) -> None:
    recipe = small_recipe(given / "prose.txt", model={"layers": 1, "persistent": 3})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    result = command.json(
        *("train", "--recipe", tmp_path / "r.toml", "--data", given / "prose.txt", "--out", tmp_path / "model"),
        *("--heads", 2, "--steps", 1),
    )
    assert (result["heads"], result["steps"]) == ([2], 1)
    assert deadhead.load(tmp_path / "model").config.num_persistent == 3


def _assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 100
    assert pixels.shape[1] > 500
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2]).tolist()}) > 3


def test_a_whole_run(given: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(given / "prose.txt", prune={"sparsity": 0.5}, control=True)
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    monkeypatch.chdir(tmp_path)
    text = command("run", "r.toml", "--quiet", "--scale-steps", 0.7)
    for words in ("What was cut, and what it cost", "control", "50% of the heads", "model continues:"):
        assert words in text
    run = tmp_path / "runs" / "small"
    summary = json.loads((run / "summary.json").read_text())
    # 3, 5 and 3 steps by 0.7, rounded.
    assert [summary[stage]["steps"] for stage in ("dense", "gated", "finetuned")] == [2, 6, 8]
    _assert_picture(run / "head_map.png")
    # Once more with --resume: nothing is trained again, the numbers are the same.
    again = command.json("run", "r.toml", "--scale-steps", 0.7, "--resume")
    assert again["finetuned"]["perplexity"] == summary["finetuned"]["perplexity"]


@pytest.mark.slow
def test_demo(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole story from the recipe that is installed: a hundredth of its steps, short measurements."""
    pytest.importorskip("deadhead.recipes", reason="deadhead is not installed, so its recipes are not where it looks.")
    monkeypatch.setattr(
        "deadhead.training.recipes.reading.parse_recipe",
        lambda text, name: changed(parse_recipe(text, name=name), evaluation_tokens=2000),
    )
    summary = command.json("demo", "--scale-steps", 0.01, "--out", tmp_path / "demo")
    assert set(summary) >= {"dense", "gated", "cut", "finetuned", "data", "versions", "samples"}
    assert summary["data"]["source"] == "stdlib"
    assert summary["cut"]["perplexity"] == pytest.approx(summary["gated"]["perplexity"], rel=1e-4)
    assert 0 < summary["finetuned"]["perplexity"] < 1000
    _assert_picture(tmp_path / "demo" / "head_map.png")
    assert HeadPlan.from_json(tmp_path / "demo" / "head_plan.json").heads == summary["cut"]["heads"]


@pytest.mark.slow
def test_another_architecture_than_the_recipes(given: Path, tmp_path: Path, command: Command) -> None:
    """What the recipe says of persistent vectors does not stand in the way."""
    (tmp_path / "small.toml").write_text(to_toml(small_recipe(given / "prose.txt")), encoding="utf-8")
    recipe = ("--recipe", tmp_path / "small.toml", "--data", given / "prose.txt", *_STEPS)
    command("train", *recipe, "--architecture", "transformer_xl", "--feed-forward", 24, "--out", tmp_path / "xl")
    config = deadhead.load(tmp_path / "xl").config
    assert (config.model_type, config.feed_forward_size) == ("deadhead_transformer_xl", 24)
    assert config.num_persistent == 0


def test_the_whole_run_has_a_line_of_its_own() -> None:
    """Its steps are those of all phases, and a phase that begins or is resumed counts those before it as done."""
    recipe = Recipe.model_validate(
        {
            "control": True,
            "train": {"steps": 5},
            "prune": {"steps": 3, "sparsity": 0.5},
            "finetune": {"steps": 4},
        }
    )
    reports: list[tuple[str, int, int]] = []
    report = _with_whole(lambda name, done, total, _: reports.append((name, done, total)), recipe)
    for phase, done, steps in (("evaluating dense", 1, 2), ("prune", 2, 3), ("control_finetune", 4, 4)):
        report(phase, done, steps, {})
    assert [said for said in reports if said[0] == "whole run"] == [
        ("whole run", done, 5 + 2 * (3 + 4)) for done in (0, 5 + 2, 19)
    ]
    assert ("evaluating dense", 1, 2) in reports and ("prune", 2, 3) in reports
