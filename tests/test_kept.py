"""What a caller gives stays his: tokenizers, data sets, training arguments, texts and shared configurations."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import deadhead
from deadhead.data import TokenStream, load_text
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.measure.generate import generate_text

_SMALL: dict[str, Any] = {"steps": 1, "batch_size": 1, "sequence_length": 8, "device": "cpu"}
_PLAN = deadhead.HeadPlan(kept={0: (0,), 1: (0, 1)}, total={0: 2, 1: 2}, unit="kv_group")


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=262,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=16,
    )


def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def chatty() -> PreTrainedTokenizerFast:
    """Return a tokenizer that was set up by hand: padding on the left, a template, a token for padding."""
    made = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<eos>")
    made.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": [AddedToken("<a>", special=True)]})
    made.padding_side = made.truncation_side = "left"
    made.model_max_length = 5
    made.chat_template = "{% for m in messages %}<a>{{ m['content'] }}{% endfor %}"
    return made


def cutting() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose last use left it cutting and padding."""
    made = chatty()
    made(["a", "long text"], truncation=True, max_length=4, padding="max_length")
    return made


def strict() -> PreTrainedTokenizerFast:
    made = chatty()
    made.backend_tokenizer.enable_truncation(3)
    made.backend_tokenizer.enable_padding(length=7)
    made.split_special_tokens = True
    return made


_TOKENIZERS = {"plain": plain, "chatty": chatty, "cutting": cutting, "strict": strict}


def state_of(value: Any) -> Any:
    """Return all that an object holds, as plain values to be compared."""
    if isinstance(value, PreTrainedTokenizerFast):
        backend = value.backend_tokenizer
        own = {name: repr(item) for name, item in vars(value).items() if name != "_tokenizer"}
        written = json.loads(backend.to_str())
        # Every call of a tokenizer sets these two anew, and whether special tokens are split, as it is asked to.
        del written["truncation"], written["padding"]
        return own, written, value.padding_side, value.chat_template, len(value)
    if isinstance(value, TokenStream):
        return value.tokens.tobytes(), value.num_bytes, value.prefix
    return copy.deepcopy(value.to_dict())


_ACTIONS: dict[str, Callable[[LlamaForCausalLM, PreTrainedTokenizerFast, Path], object]] = {
    "load_text": lambda m, t, f: load_text(f / "a.txt", tokenizer=t),
    "load_text of a chat": lambda m, t, f: load_text(f / "a.jsonl", tokenizer=t, chat_template=f / "t.jinja"),
    "load_text of answers": lambda m, t, f: load_text(
        f / "a.jsonl", tokenizer=t, chat_template=f / "t.jinja", answers_only=True
    ),
    "prune": lambda m, t, f: deadhead.prune(m, f / "a.txt", tokenizer=t, sparsity=0.5, **_SMALL),
    "finetune": lambda m, t, f: deadhead.finetune(m, f / "a.txt", tokenizer=t, **_SMALL),
    "save": lambda m, t, f: deadhead.save(m, f / "o", tokenizer=t),
    "export": lambda m, t, f: deadhead.export_model(deadhead.cut(m, _PLAN), f / "o", to="padded", tokenizer=t),
    "generate": lambda m, t, f: generate_text(m, t, "a", max_new_tokens=2),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("words and words\n" * 30)
    rows = '{"prompt": "what", "completion": "that"}\n' * 30
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    return tmp_path


@pytest.mark.parametrize("kind", _TOKENIZERS)
@pytest.mark.parametrize("action", _ACTIONS)
def test_tokenizers(action: str, kind: str, folder: Path) -> None:
    tokenizer = _TOKENIZERS[kind]()
    before = state_of(tokenizer)
    _ACTIONS[action](LlamaForCausalLM(config()), tokenizer, folder)
    assert state_of(tokenizer) == before


def test_a_tokenizer_that_cuts_gives_all_of_a_text(folder: Path) -> None:
    expected = load_text(folder / "a.txt", tokenizer=chatty())[0].splits["train"].tokens
    for made in (cutting, strict):
        found = load_text(folder / "a.txt", tokenizer=made())[0].splits["train"].tokens
        np.testing.assert_array_equal(found, expected)


_TEXT = TokenStream(tokens=(np.arange(300) % 40).astype(np.uint16), num_bytes=300, num_words=60)
_ON_MODELS: dict[str, Callable[[LlamaForCausalLM, Path], object]] = {
    "attach": lambda m, f: deadhead.attach(m),
    "detach": lambda m, f: (deadhead.attach(m), deadhead.detach(m)),
    "cut": lambda m, f: deadhead.cut(m, _PLAN),
    "save": lambda m, f: deadhead.save(deadhead.cut(m, _PLAN), f / "o"),
    "load": lambda m, f: deadhead.load(f / "m"),
    "evaluate": lambda m, f: deadhead.evaluate(m, _TEXT),
    "prune": lambda m, f: deadhead.prune(m, _TEXT, sparsity=0.5, **_SMALL),
    "finetune": lambda m, f: deadhead.finetune(m, _TEXT, gradient_checkpointing=True, **_SMALL),
    "export": lambda m, f: deadhead.export_model(deadhead.cut(m, _PLAN), f / "o", to="padded"),
}


@pytest.mark.parametrize("action", _ON_MODELS)
def test_a_configuration_that_two_models_share_and_texts(action: str, tmp_path: Path) -> None:
    shared = config()
    model, other = LlamaForCausalLM(shared), LlamaForCausalLM(shared)
    assert model.config is other.config is shared
    model.save_pretrained(tmp_path / "m")
    before = state_of(shared), state_of(_TEXT), copy.deepcopy(other.generation_config.to_dict())
    _ON_MODELS[action](model, tmp_path)
    assert (state_of(shared), state_of(_TEXT), other.generation_config.to_dict()) == before
    other.save_pretrained(tmp_path / "other")
    LlamaForCausalLM.from_pretrained(tmp_path / "other")


def test_training_arguments_and_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})
    rows = rows.with_format("torch")
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    held = rows.format, rows.features, rows._fingerprint, rows.to_dict()
    model = LlamaForCausalLM(config())
    gates = deadhead.attach(model)

    def trained(callbacks: list[Any]) -> dict[str, Any]:
        theirs = copy.deepcopy(args)
        Trainer(model, theirs, train_dataset=rows, callbacks=callbacks).train()
        return theirs.to_dict()

    with_gates = trained([deadhead.SparsityCallback(gates, sparsity=0.5)])
    deadhead.cut(model, gates.plan())
    assert with_gates == trained([]) == args.to_dict()
    assert (rows.format, rows.features, rows._fingerprint, rows.to_dict()) == held
    assert torch.equal(rows[0]["input_ids"], torch.tensor([1, 2, 3, 4]))
