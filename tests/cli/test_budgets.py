"""Budgets on the command line: asked, reached, kept beside the checkpoint; dry runs; what does not go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from deadhead import HeadPlan
from deadhead.cli import execute
from tests.cli.conftest import Command
from tests.cli.test_commands import _STEPS

_SHORT = (*_STEPS, "--sequence-length", 24)


@pytest.mark.parametrize(
    ("flag", "value", "kind"), [("--params", 0.7, "params"), ("--flops", 0.6, "flops"), ("--kv-cache", 0.5, "kv_cache")]
)
def test_what_is_asked_for_is_reached_and_counted(
    flag: str, value: float, kind: str, given: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    result = command.json(
        *("prune", "--model", given / "llama", "--data", given / "prose.txt", "--out", out, flag, value), *_SHORT
    )
    budget = result["budget"]
    assert (budget["kind"], budget["asked"]) == (kind, value)
    assert 0.5 * value < budget["reached"] <= value
    length = () if kind == "params" else ("--length", 24)
    before, after = (command.json("inspect", model, *length) for model in (given / "llama", out))
    name = {"params": "parameters", "flops": "flops_per_token", "kv_cache": "kv_cache_bytes"}[kind]
    assert after[name] / before[name] == pytest.approx(budget["reached"])
    plan = HeadPlan.from_json(out / "head_plan.json")
    assert (plan.hidden_units is not None) == (kind != "kv_cache") == ("hidden_units" in result)
    if plan.hidden_units is not None:
        assert result["hidden_units"] == after["hidden_units"] == plan.hidden_units.counts
        assert f"hidden units a layer: {plan.hidden_units.counts}" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_speedup_is_measured_and_its_latencies_are_kept(given: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    result = command.json(
        *("prune", "--model", given / "llama", "--data", given / "prose.txt", "--out", out, "--speedup", 1.05),
        *("--budget-batch-size", 2, "--budget-length", 16, *_SHORT),
    )
    # How fast so small a model is depends on what else the machine does: the speedup must be there, not be any number.
    assert (result["budget"]["kind"], result["budget"]["asked"]) == ("speedup", 1.05)
    assert result["budget"]["reached"] > 0
    # The plan's model was predicted from what was measured, too.
    inspected = command.json(
        *("inspect", given / "llama", "--plan", out / "head_plan.json", "--latency", out / "latency.json")
    )
    assert inspected["predicted_speedup"] >= 1.0
    assert inspected["layouts"][0]["parameters"] == result["parameters"]
    text = command("inspect", given / "llama", "--plan", out / "head_plan.json")
    assert "--plan" in text and "hidden units" in text
    assert "hidden_units" in result


def test_gates_of_a_budget_are_saved_and_cut_later(given: Path, tmp_path: Path, command: Command) -> None:
    result = command.json(
        *("prune", "--model", given / "llama", "--data", given / "prose.txt", "--out", tmp_path / "gated"),
        *("--params", 0.7, "--no-cut", *_SHORT),
    )
    import deadhead

    model, gates = deadhead.load_gated(tmp_path / "gated")
    assert gates.plan().heads == result["heads"]
    units = gates.plan().hidden_units
    assert units is not None and units.counts == result["hidden_units"]
    deadhead.cut(model, gates.plan())
    gates.plan().to_json(tmp_path / "plan.json")
    cut = command.json("cut", given / "llama", "--plan", tmp_path / "plan.json", "--out", tmp_path / "cut")
    assert cut["after"]["parameters"] / cut["before"]["parameters"] == pytest.approx(result["budget"]["reached"])


@pytest.mark.parametrize(
    "options", [("--params", 0.6), ("--flops", 0.6, "--no-blocks"), ("--sparsity", 0.5), ("--kv-cache", 0.5), ()]
)
def test_a_dry_run_says_what_would_be_left_and_writes_nothing(
    options: tuple[Any, ...], given: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    call = ("prune", "--model", given / "llama", "--out", out, "--dry-run", *options)
    found = command.json(*call, "--criterion", "gates")
    assert not out.exists() and not list(tmp_path.iterdir())
    inspected = command.json("inspect", given / "llama", "--length", found["length"])
    assert found["dense"] == {name: inspected[name] for name in found["dense"]}
    assert found["memory"]["total"] > found["memory"]["weights"] > 4 * found["dense"]["parameters"] * 0.99
    assert found["least"]["parameters"] < found["dense"]["parameters"]
    if options:
        plan = HeadPlan.from_dict(found["example"])
        assert plan.heads == found["pruned"]["heads"]
        assert found["least"]["parameters"] <= found["pruned"]["parameters"] < found["dense"]["parameters"]
        assert found["reached"] <= options[1] + 1e-9 or options[0] == "--sparsity"
    else:
        assert found["example"] is None
    output = command(*call, "--criterion", "gates")
    assert "Memory to train gates" in output and "parameters" in output
    assert [part["what"].split(" in ")[0] for part in found["parts"]] == ["train gates and weights", _FIT]


_FIT = "fit what is left to the dense model on 512 rows"


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ((), "learn the sizes of layers' parts in 80 steps of 4 × 128 tokens"),
        (("--fast",), "rank units by reconstruction from 8 batches of 16 × 128 tokens"),
        (("--criterion", "magnitude"), "rank units by magnitude"),
        (("--freeze-weights", "--steps", 7), "train gates alone in 7 steps of 16 × 128 tokens"),
    ],
)
def test_what_will_be_done_and_how_long_it_takes(
    options: tuple[Any, ...], first: str, given: Path, command: Command
) -> None:
    call = ("prune", "--model", given / "llama", "--params", 0.6, "--dry-run", "--recover", 5, *options)
    found = command.json(*call)
    rows = 4 if not options else 16
    assert [part["what"] for part in found["parts"]] == [first, _FIT, f"recover in 5 steps of {rows} × 128 tokens"]
    assert all(part["seconds"] >= 0 for part in found["parts"]) and (found["memory"] is None) == ("gates" not in first)
    output = command(*call)
    assert output.rstrip().endswith("in total on this machine, without reading the text and measuring on it.")
    one = re.escape(f"To do: {first}") + r" \(less than a minute, [0-9.]+ [MG]B of memory\), " + re.escape(_FIT)
    assert re.search(one + r" \(less than a minute, [0-9.]+ [MG]B of memory\), then recover", output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--params 0.5 --flops 0.5", "asks for params and flops"),
        ("--params 0.01", "cannot be reached: without any heads and blocks the model would be at 0"),
        ("--params 0.01 --no-blocks", "without any heads the model .* add blocks"),
        ("--params 0", "greater than or equal to 0.0001"),
        ("--kv-cache 0.5 --blocks", "blocks hold no key/value cache"),
        ("--flops 0.5 --criterion topk", "criterion topk holds a share of the heads"),
        ("--flops 0.5 --ranking layer", "ranking layer holds a share of the heads"),
        (
            "--flops 0.5 --block-size 50",
            "block size must lie between 1 and the width of the layers, 48, but it is 50; 4 would do",
        ),
        ("--block-size 4 --no-blocks", "switched off"),
        ("--speedup 0.5", "--speedup"),
    ],
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_what_cannot_be_had_is_refused(
    options: str, message: str, dry: str, given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = (
        f"prune --model {given / 'llama'} --data {given / 'prose.txt'} --out {out} --steps 2 --batch-size 2 {options}"
    )
    code = execute([*line.split(), *dry.split()])
    error = capfd.readouterr().err
    assert code == 2, error
    assert re.search(message, error), error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["--dry-run", "", "--stream --criterion flap", "--stream --criterion flap --dry-run"])
def test_what_would_take_too_much_memory_is_refused(
    how: str, given: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = f"prune --model {given / 'llama'} --data {given / 'prose.txt'} --out {tmp_path / 'out'} --params 0.7 {how}"
    assert execute([*line.split(), "--max-memory", "20kB", "--quiet"]) == 2
    error = capfd.readouterr().err
    assert re.fullmatch(r".*takes about .* of memory, more than the max_memory of 0.019 MiB; .*\.\n", error), error
    assert not list(tmp_path.iterdir())
    assert execute([*line.split(), "--max-memory", "some"]) == 2
    assert "a size such as 4GiB or 500MB was expected, but 'some' was given" in capfd.readouterr().err
