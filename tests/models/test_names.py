"""What decides by the name of a class or a model type takes cut models, and deadhead's own, for what they are."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto

from benchmarks._tiny_models import tiny_model
from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM, TransformerXLConfig, TransformerXLForCausalLM
from tests.models.test_pruned import small_model


def own_model(config_class: Any, model_class: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "memory_length": 24}
    return model_class(config_class(**sizes))


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(("[UNK]", "[PAD]", "[MASK]", "a", "b"))}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]")


CAUSAL = {
    "llama": lambda: small_model("llama"),
    "gpt2": lambda: small_model("gpt2"),
    "qwen3": lambda: small_model("qwen3"),
    "all-attention": lambda: own_model(AllAttentionConfig, AllAttentionForCausalLM),
    "transformer-xl": lambda: own_model(TransformerXLConfig, TransformerXLForCausalLM),
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_label_smoothing_shifts_the_labels(kind: str, tmp_path: Path) -> None:
    """Without the shift a model learns to repeat its input."""
    model = CAUSAL[kind]()
    ids = torch.arange(5, 13).repeat(3)
    arguments = TrainingArguments(
        str(tmp_path),
        label_smoothing_factor=0.1,
        max_steps=60,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows: Any = [{"input_ids": ids, "labels": ids}] * 120
    Trainer(model, arguments, train_dataset=rows).train()
    with torch.no_grad():
        found = model.eval()(input_ids=ids[None]).logits[0].argmax(-1)
    assert float((found[8:-1] == ids[9:]).float().mean()) > 0.9


@pytest.mark.parametrize("kind", CAUSAL)
def test_tables_of_transformers_list_the_model(kind: str) -> None:
    model = CAUSAL[kind]()
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type] == type(model).__name__


@pytest.mark.parametrize(
    ("model_type", "auto", "task"),
    [
        ("llama", "AutoModelForCausalLM", "text-generation"),
        ("bert", "AutoModelForMaskedLM", "fill-mask"),
        ("bert", "AutoModelForSequenceClassification", "text-classification"),
        ("bert", "AutoModelForTokenClassification", "token-classification"),
    ],
)
def test_pipelines_accept_a_cut_model(
    model_type: str, auto: str, task: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_model(model_type).config
    config.is_decoder = False
    model = getattr(modeling_auto, auto).from_config(config)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.ERROR, logger="transformers"):
        pipeline(task, model=model, tokenizer=word_tokenizer())
    assert "is not supported" not in caplog.text


def test_stock_models_keep_their_places_in_the_tables() -> None:
    small_model("llama")
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["llama"] == "LlamaForCausalLM"
    assert type(tiny_model("llama")).__name__ == "LlamaForCausalLM"
