"""`deadhead compare`: what it says of each model is what the other commands say of it; what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deadhead
from deadhead.cli import execute
from tests.cli.conftest import Command
from tests.small_runs import save_small_llama


@pytest.fixture(scope="module")
def half(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the Llama's groups, and the same in float64 under another name."""
    folder = tmp_path_factory.mktemp("half")
    model = deadhead.load(given / "llama")
    gates = deadhead.attach(model)
    plan = gates.choices.plan({key: [0] for key in gates.choices.counts})
    deadhead.detach(model)
    deadhead.save(deadhead.cut(model, plan), folder / "half", tokenizer=deadhead.data.load_tokenizer(given / "llama"))
    return folder / "half"


def test_each_model_as_other_commands_measure_it(given: Path, half: Path, command: Command) -> None:
    text = ("--data", given / "prose.txt", "--window", 32, "--limit", 400)
    found = command.json("compare", given / "llama", half, *text)["models"]
    assert [*found] == [str(given / "llama"), str(half)]
    for name, values in found.items():
        measured = command.json("eval", name, *text)
        assert values["perplexity"] == pytest.approx(measured["perplexity"]) and values["tokens"] == measured["tokens"]
        inspected = command.json("inspect", name)
        assert (values["parameters"], values["heads"]) == (inspected["parameters"], inspected["heads"])
        assert values["tokens_per_second"] > 0
    first, cut = found.values()
    assert "divergence" not in first and cut["divergence"] > 0 and 0 <= cut["agreement"] <= 1
    output = command("compare", given / "llama", half, *text)
    assert f"{cut['divergence']:.4f}" in output and f"{first['perplexity']:,.3f}" in output


def test_models_that_read_other_tokens_have_no_distance(given: Path, tmp_path: Path, command: Command) -> None:
    """Bits a byte compare all the same."""
    found = command.json(
        *("compare", given / "model", given / "llama"), *("--data", given / "prose.txt", "--limit", 200)
    )["models"]
    ours, llama = found.values()
    assert llama["divergence"] is None and llama["agreement"] is None and ours["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("llama",), "Two or more different models were expected"),
        (("llama", "llama"), "Two or more different models were expected"),
        (("llama", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_compared(
    names: tuple[str, ...], message: str, given: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["compare", *(given / name for name in names), "--data", given / "prose.txt"]
    assert execute([str(word) for word in words]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.slow
def test_a_model_of_another_vocabulary(given: Path, tmp_path: Path, command: Command) -> None:
    _, tokenizer = deadhead.data.load_text(str(given / "prose.txt"), tokenizer="bpe", vocab_size=300)
    save_small_llama(tmp_path / "other", given / "prose.txt", tokenizer)
    found = command.json("compare", given / "llama", tmp_path / "other", "--data", given / "prose.txt", "--limit", 200)
    assert [values.get("divergence") for values in found["models"].values()] == [None, None]
