"""A state dict of the authors' code becomes a model of ours that computes the same and can do all that ours can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import deadhead
from deadhead.cli import execute
from deadhead.convert import GATES, convert_state, read_state
from deadhead.data import load_tokenizer
from deadhead.errors import InputError
from tests.authors import CUTOFFS, VOCABULARY, WIDTH, State, authors_state, plain_names, random_model, write_state
from tests.helpers import difference
from tests.small import write_prose


@pytest.fixture(scope="module")
def reference(reference_dir: Path) -> State:
    with np.load(reference_dir / "peer_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def _of_reference(reference: State, case: str = "gateA") -> State:
    state = {name.removeprefix("sd/"): value for name, value in reference.items() if name.startswith("sd/")}
    if case != "off":
        for layer, log_alpha in enumerate(reference[f"{case}/gate_params"]):
            state[f"layers.{layer}.attn.gate.gate.data"] = log_alpha
    return state


def _run(*arguments: object) -> None:
    assert execute([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("ending", [".pt", ".pth", ".bin", ".safetensors", ".npz"])
def test_every_kind_of_file_gives_the_same_tensors(ending: str, tmp_path: Path) -> None:
    state = authors_state(random_model(tie_word_embeddings=False))
    found = read_state(write_state(state, tmp_path / f"state{ending}"))
    assert found.keys() == plain_names(state).keys()
    assert all(torch.equal(found[name], value) for name, value in plain_names(state).items())


def test_other_precisions_become_float32(tmp_path: Path) -> None:
    state = {
        name: value.to(torch.bfloat16) for name, value in authors_state(random_model(tie_word_embeddings=False)).items()
    }
    found = read_state(write_state(state, tmp_path / "state.pt"))
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize("ending", [".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("case", ["off", "gateA", "gateB"])
def test_the_authors_tensors(
    case: str, ending: str, reference: State, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real file through the command, and the logits that their code computed."""
    state = write_state(_of_reference(reference, case), tmp_path / f"state{ending}")
    _run("convert", state, "--out", tmp_path / "model", "--json", *(["--no-gates"] if case == "off" else []))
    result = json.loads(capfd.readouterr().out)
    assert (result["memory_length"], result["segment_length"], result["positions"]) == (16, 16, 32)
    assert (result["gated"], result["tokenizer"], result["vocab_size"]) == (case != "off", False, 100)
    ids = reference["input"]
    expected = torch.cat([reference[f"{case}/logits{segment}"] for segment in range(2)], dim=1)
    with torch.no_grad():
        if case == "off":
            model = deadhead.load(tmp_path / "model")
        else:
            model, gates = deadhead.load_gated(tmp_path / "model")
            assert gates.config == GATES
            closed = int(reference[f"{case}/closed_heads"])
            assert sum(gates.plan().heads) == sum(result["heads"]) == 12 - closed
            assert difference(gates.l0(), reference[f"{case}/l0"]) <= 1e-5
            for values, log_alpha in zip(gates.log_alpha().values(), reference[f"{case}/gate_params"], strict=True):
                torch.testing.assert_close(values, log_alpha, rtol=1e-6, atol=1e-6)
        assert difference(model(input_ids=ids[:, :32]).logits, expected) <= 1e-5
        if case == "off":
            return
        _run("convert", state, "--out", tmp_path / "cut", "--cut", "--json")
        cut = json.loads(capfd.readouterr().out)
        assert cut["heads"] == result["heads"] and cut["parameters"] < result["parameters"] and not cut["gated"]
        model = deadhead.load(tmp_path / "cut")
        assert [len(model.config.layer_heads(layer)) for layer in range(3)] == cut["heads"]
        assert difference(model(input_ids=ids[:, :32]).logits, expected) <= 1e-5


def test_gated_trained_on_cut_and_reloaded(reference: State, tmp_path: Path) -> None:
    converted = convert_state(plain_names(_of_reference(reference)))
    model, gates, ids = converted.model, converted.attach(), reference["input"]
    before = model.model.layers[0].attention.q_proj.weight.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for step in range(2):
        gates.begin_step(step)
        loss = model(input_ids=ids[:, :16], shift_labels=ids[:, 1:17]).loss + 0.02 * gates.l0()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all() and not torch.equal(before, model.model.layers[0].attention.q_proj.weight)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        deadhead.cut(model, gates.plan())
        deadhead.save(model, tmp_path / "cut")
        found = deadhead.load(tmp_path / "cut")(input_ids=ids).logits
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("cutoffs", [None, CUTOFFS])
def test_there_and_back(cutoffs: list[int] | None, tmp_path: Path) -> None:
    model = random_model(adaptive_cutoffs=cutoffs, tie_word_embeddings=cutoffs is not None)
    state = write_state(authors_state(model), tmp_path / "state.pt")
    _run("convert", state, "--out", tmp_path / "model", "--memory-length", 8, "--dropout", 0.1)
    loaded, gates = deadhead.load_gated(tmp_path / "model")
    config: Any = loaded.config
    assert gates.plan().heads == [3, 3]
    assert (config.adaptive_cutoffs, config.memory_length, config.segment_length) == (cutoffs, 8, 8)
    assert config.hidden_dropout == config.embedding_dropout == config.output_dropout == 0.1
    ids = torch.arange(VOCABULARY).view(2, -1)
    again = deadhead.load(tmp_path / "model")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)
    if cutoffs is not None:
        embedding: Any = again.get_input_embeddings()
        output: Any = again.get_output_embeddings()
        assert output.tables[1].weight is embedding.tables[1].weight
        assert output.projections[1].weight is embedding.projections[1].weight
        assert output.projections[0].weight is not embedding.projections[0].weight


def test_adaptive_embedding_and_softmax_as_their_names_say() -> None:
    """The embedding and the log-probabilities, computed from the state dict alone, word for word."""
    state = plain_names(authors_state(random_model(adaptive_cutoffs=CUTOFFS)))
    model = convert_state(state, memory_length=8).model
    edges = [*CUTOFFS, VOCABULARY]
    rows = [state["word_emb.shortlist.0.weight"] @ state["word_emb.shortlist.1.weight"].T]
    for tail in range(len(CUTOFFS)):
        rows.append(state[f"word_emb.tail.{tail}.0.weight"] @ state[f"word_emb.tail.{tail}.1.weight"].T)
    ids = torch.arange(VOCABULARY)
    with torch.no_grad():
        torch.testing.assert_close(model.model.embed_tokens(ids), torch.cat(rows), rtol=1e-5, atol=1e-5)

    hidden = torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(0))
    shortlist = functional.linear(
        functional.linear(hidden, state["criterion.shortlist.0.weight"]),
        state["criterion.shortlist.1.weight"],
        state["criterion.shortlist.1.bias"],
    )
    cluster = functional.linear(hidden, state["criterion.cluster.weight"], state["criterion.cluster.bias"])
    head = torch.cat([shortlist, cluster], dim=-1).log_softmax(-1)
    expected = torch.empty((5, VOCABULARY))
    for word in range(VOCABULARY):
        if word < edges[0]:
            expected[:, word] = head[:, word]
            continue
        tail = next(index for index in range(len(CUTOFFS)) if word < edges[index + 1])
        narrow = hidden @ state[f"criterion.tail.{tail}.0.weight"]
        logits = functional.linear(
            narrow, state[f"criterion.tail.{tail}.1.weight"], state[f"criterion.tail.{tail}.1.bias"]
        )
        expected[:, word] = head[:, edges[0] + tail] + logits.log_softmax(-1)[:, word - edges[tail]]
    with torch.no_grad():
        torch.testing.assert_close(model.lm_head(hidden[None])[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.exp().sum(-1), torch.ones(5))


def test_shared_tensors_may_be_written_once_and_modules_named(tmp_path: Path) -> None:
    """As safetensors' functions for models write them, and without the endings of single tensors."""
    whole = plain_names(authors_state(random_model(adaptive_cutoffs=CUTOFFS)))
    expected = convert_state(whole).model.state_dict()
    for module, table in (("word_emb", 0), ("criterion", 1)):
        once = {
            name: value
            for name, value in whole.items()
            if not name.startswith((f"{module}.tail", f"{module}.shortlist.{table}")) or name.endswith("bias")
        }
        assert len(once) == len(whole) - 7
        renamed = {
            name.removesuffix(".weight") if name.startswith(("word_emb", "criterion")) else name: value
            for name, value in once.items()
        }
        found = convert_state(read_state(write_state(renamed, tmp_path / f"{module}.pt"))).model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_with_a_vocabulary_the_model_is_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = write_prose(tmp_path, 3000)
    words = sorted(set(text.read_text().split()))
    words = ["<eos>", "<unk>", *words, *(f"word{number}" for number in range(VOCABULARY - 2 - len(words)))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    state = write_state(authors_state(random_model(adaptive_cutoffs=CUTOFFS)), tmp_path / "state.pt")
    _run("convert", state, "--out", tmp_path / "model", "--vocab", tmp_path / "vocab.txt", "--cut")
    assert "heads left a layer: 3 3 of 4 (cut off)" in capfd.readouterr().out
    assert len(load_tokenizer(tmp_path / "model")) == VOCABULARY
    assert deadhead.load(tmp_path / "model").config.eos_token_id == 0
    _run("eval", tmp_path / "model", "--data", text, "--json")
    assert json.loads(capfd.readouterr().out)["loss"] > 0
    steps = ("--data", text, "--steps", 2, "--batch-size", 2, "--json")
    _run("finetune", "--model", tmp_path / "model", "--out", tmp_path / "tuned", *steps)
    assert json.loads(capfd.readouterr().out)["heads"] == [3, 3]
    # A saved tokenizer serves as well.
    _run("convert", state, "--out", tmp_path / "again", "--tokenizer", tmp_path / "model", "--no-gates")
    output = capfd.readouterr().out
    assert "(no gates)" in output and "No tokenizer" not in output
    assert "memory 9, half of the 18 rows of the position table; segments of 9" in output
    # Without gates it is a dense model, which can be pruned like any other.
    _run("prune", "--model", tmp_path / "again", "--out", tmp_path / "pruned", "--sparsity", 0.5, *steps)
    assert sum(json.loads(capfd.readouterr().out)["heads"]) == 4
    _run("convert", state, "--out", tmp_path / "again")
    output = capfd.readouterr().out
    assert "deadhead eval, generate, prune and finetune will need one" in output
    assert "β of 0.333" in output
    parameters = deadhead.model_cost(deadhead.load(tmp_path / "model")).parameters
    assert f"Once cut (--cut): {parameters:,} parameters" in output


def test_what_attach_says_without_gates() -> None:
    state = plain_names(authors_state(random_model(tie_word_embeddings=False)))
    converted = convert_state({name: value for name, value in state.items() if not name.endswith("gate.gate")})
    assert converted.log_alpha is None and converted.positions == 18
    with pytest.raises(InputError, match="has no gates"):
        converted.attach()
