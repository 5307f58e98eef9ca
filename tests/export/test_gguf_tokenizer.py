"""Tokenizers in GGUF files: llama.cpp gives the same tokens, or the tokenizer is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import deadhead
from deadhead.data import load_text
from deadhead.export import gguf_tokenizer
from deadhead.export.gguf_tokenizer import TEXTS, read_tokenizer
from tests.export.small import dense_model
from tests.export.test_gguf import needs_llama_cpp
from tests.small_runs import write_prose


def _trained(*steps: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    return fast


def _split(name: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    pattern = next(pattern for pattern, known in gguf_tokenizer._SPLITS.items() if known == name)
    if pattern is None:
        return (pre_tokenizers.ByteLevel(add_prefix_space=False),)
    return (
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


@needs_llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "qwen2"])
def test_llama_cpp_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    """Learned merges reach across what the three ways of splitting keep apart."""
    tokenizer = _fast(_trained(*_split(name)))
    assert read_tokenizer(tokenizer, 410)["tokenizer_pre"] == name
    model = dense_model("llama", vocab_size=410)
    deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32", tokenizer=tokenizer)


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_our_own_tokenizers(kind: str, tmp_path: Path) -> None:
    _, tokenizer = load_text(str(write_prose(tmp_path)), tokenizer=kind, vocab_size=300 if kind == "bpe" else None)
    model = dense_model("llama", vocab_size=len(tokenizer))
    # Of a tokenizer that llama.cpp reads otherwise no file stays.
    deadhead.export_model(model, tmp_path / "model.gguf", to="gguf", kind="f32", tokenizer=tokenizer)
    assert (tmp_path / "model.gguf").is_file()


@needs_llama_cpp
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told the wrong way of splitting, llama.cpp gives other tokens, and the file does not stay."""
    tokenizer = _fast(_trained(*_split("llama-bpe")))
    monkeypatch.setattr(gguf_tokenizer, "_split_of", lambda _: "gpt-2")
    with pytest.raises(deadhead.InputError, match="into other tokens than this tokenizer does; .*--no-tokenizer"):
        deadhead.export_model(
            dense_model("llama", vocab_size=410), tmp_path / "model.gguf", to="gguf", kind="f32", tokenizer=tokenizer
        )
    assert not list(tmp_path.iterdir())


def test_what_goes_into_the_file() -> None:
    tokenizer = _fast(_trained(*_split("gpt-2")))
    found = read_tokenizer(tokenizer, 410)
    assert len(found["token_list"]) == len(found["token_types"]) == 410
    assert found["token_list"][0] == "<s>"
    assert found["token_types"][0] == 3
    assert found["token_types"][-1] == 5  # rows of the model that no token has
    assert {name: token for name, token in found.items() if name.endswith("_token_id")} == {"bos_token_id": 0}
    assert not found["add_bos_token"]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>")), "this one is of type WordLevel"),
        (Tokenizer(models.Unigram([("<s>", 0.0), ("a", 0.0)], unk_id=0)), "this one is of type Unigram"),
        (_trained(*_split("gpt-2"), normalizer=normalizers.Lowercase()), "changes the text"),
        (_trained(pre_tokenizers.ByteLevel(add_prefix_space=True)), "in a way that llama.cpp does not have"),
        (
            _trained(pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)),
            "by a pattern that llama.cpp does not have",
        ),
    ],
)
def test_other_tokenizers_are_refused(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(deadhead.InputError, match=message):
        read_tokenizer(_fast(tokenizer), 1000)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    with pytest.raises(deadhead.InputError, match="but the model's vocabulary ends at 99"):
        read_tokenizer(_fast(_trained(*_split("gpt-2"))), 100)
