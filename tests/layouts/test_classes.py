"""Models of every class: what their configuration names is loaded, cut, saved, loaded again, and named in the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig, PreTrainedModel

import deadhead
from deadhead.measure.cost import skeleton

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(name: str) -> PreTrainedModel:
    """Return a tiny model of a class of transformers."""
    torch.manual_seed(0)
    kind: Any = getattr(transformers, name)
    if name.startswith("Llava"):
        vision = transformers.CLIPVisionConfig(**_VISION, image_size=28, patch_size=14, projection_dim=16)
        config: Any = transformers.LlavaConfig(vision_config=vision, text_config=LlamaConfig(**_SIZES))
        config.image_token_index = 5
    elif name.startswith("Qwen2VL"):
        rope = {"type": "mrope", "mrope_section": [1, 1]}
        special = {f"{what}_token_id": 50 + at for at, what in enumerate(("vision_start", "vision_end", "vision"))}
        special |= {"image_token_id": 53, "video_token_id": 54}
        text = _SIZES | {"num_key_value_heads": 2, "rope_scaling": rope, "bos_token_id": 1, "eos_token_id": 2}
        depth = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=depth, **special)
    elif name.startswith("Qwen3_5"):
        text = _SIZES | {"num_key_value_heads": 2, "head_dim": 4, "layer_types": ["full_attention"] * 2}
        sight = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
        config = transformers.Qwen3_5Config(text_config=text, vision_config=sight)
    elif name.startswith("DistilBert"):
        config = transformers.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=4, hidden_dim=16)
    else:
        shared = {"num_key_value_heads": 2} if name.startswith("Qwen2") else {}
        config = kind.config_class(**_SIZES, **shared)
    return kind(config).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("BertModel", "AutoModel"),
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("BertForTokenClassification", "AutoModelForTokenClassification"),
        ("BertForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("BertForPreTraining", "AutoModelForPreTraining"),
        ("DistilBertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("RobertaForTokenClassification", "AutoModelForTokenClassification"),
        ("LlamaModel", "AutoModel"),
        ("LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("LlavaForConditionalGeneration", "AutoModelForImageTextToText"),
        ("Qwen2VLForConditionalGeneration", "AutoModelForImageTextToText"),
    ],
)
def test_loaded_cut_saved_and_loaded_again(name: str, auto: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "dense")
    loaded = deadhead.load(tmp_path / "dense")
    assert type(loaded) is type(model)
    gates = deadhead.attach(loaded)
    every = gates.plan()
    deadhead.detach(loaded)
    plan = deadhead.HeadPlan(kept={k: v[1:] for k, v in every.kept.items()}, total=every.total, unit=every.unit)
    cut = deadhead.cut(loaded, plan)
    deadhead.save(cut, tmp_path / "cut")
    again = deadhead.load(tmp_path / "cut")
    assert type(again) is type(cut) and type(again).__name__ == f"Deadhead{name}"
    assert f"from transformers import {auto}\n" in (tmp_path / "cut" / "README.md").read_text()
    ids = torch.arange(1, 13)[None]
    torch.testing.assert_close(again(input_ids=ids)[0], cut(input_ids=ids)[0])
    from_auto = getattr(transformers, auto).from_pretrained(tmp_path / "cut")
    assert type(from_auto) is type(again)
    # And straight from the folder, shard by shard.
    plan.to_json(tmp_path / "plan.json")
    deadhead.cut_checkpoint(tmp_path / "dense", plan, tmp_path / "streamed")
    assert type(deadhead.load(tmp_path / "streamed")) is type(cut)


def test_a_configuration_that_is_silent_is_of_a_language_model() -> None:
    assert type(skeleton(LlamaConfig(**_SIZES))).__name__ == "LlamaForCausalLM"
    silent: Any = transformers.DPRConfig(**{**_SIZES, "num_hidden_layers": 1})
    assert "DPR" in type(skeleton(silent)).__name__


def test_language_models_of_others_code_are_taken_for_ours() -> None:
    config: Any = LlamaConfig(**_SIZES, architectures=["TheirLlamaForCausalLM"])
    assert type(skeleton(config)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["TheirClassifier", "GPT2ForSequenceClassification", "AutoModel", "os", ""])
def test_a_class_that_is_not_of_the_type_is_refused_by_its_name(name: str) -> None:
    config: Any = BertConfig(**_SIZES, architectures=[name])
    with pytest.raises(deadhead.UnsupportedModel, match=f"names the class '{name}' in architectures"):
        skeleton(config)


def test_tensors_of_pre_training_beside_those_of_the_class_are_no_fault(tmp_path: Path) -> None:
    made("BertForPreTraining").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for name in ("BertForMaskedLM", "BertModel"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": [name]}))
        if name == "BertForMaskedLM":
            assert type(deadhead.load(tmp_path)).__name__ == name
