"""Models that read images or sound: cut as those that read text are, checked on inputs made up, and reloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deadhead
from benchmarks._tiny_models import scramble
from deadhead.attaching import attach
from deadhead.cutting import cut
from deadhead.errors import UnsupportedModel
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.layouts.inputs import made_inputs, runner
from tests.random_models import difference

_LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
_IMAGES = {**_LAYERS, "image_size": 16, "patch_size": 8}
_WAVES = {
    **_LAYERS,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_SPECTROGRAMS = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 12,
}
# Class, configuration, and the Auto class that reloads it.
READERS: dict[str, tuple[dict[str, Any], str]] = {
    "ViTForImageClassification": (_IMAGES, "AutoModelForImageClassification"),
    "DeiTForImageClassification": ({**_IMAGES, "num_channels": 1}, "AutoModelForImageClassification"),
    "Dinov2Model": (_IMAGES, "AutoModel"),
    "ViTMAEModel": ({**_IMAGES, "image_size": 32}, "AutoModel"),
    "DINOv3ViTModel": (_IMAGES, "AutoModel"),
    "BeitForImageClassification": (_IMAGES, "AutoModelForImageClassification"),
    "CLIPVisionModel": ({**_IMAGES, "projection_dim": 16}, "AutoModel"),
    "SiglipVisionModel": (_IMAGES, "AutoModel"),
    "ASTForAudioClassification": (
        {**_LAYERS, "num_mel_bins": 16, "max_length": 24, "patch_size": 8},
        "AutoModelForAudioClassification",
    ),
    "Wav2Vec2ForCTC": ({**_WAVES, "vocab_size": 32}, "AutoModelForCTC"),
    "HubertForSequenceClassification": ({**_WAVES, "classifier_proj_size": 16}, "AutoModelForAudioClassification"),
    "WhisperForAudioClassification": (_SPECTROGRAMS, "AutoModelForAudioClassification"),
}


def reader(name: str, dtype: torch.dtype = torch.float32) -> Any:
    kind: Any = getattr(transformers, name)
    config = kind.config_class(**READERS[name][0])
    for setting in ("hidden_dropout_prob", "apply_spec_augment"):
        if hasattr(config, setting):
            setattr(config, setting, type(getattr(config, setting))(0))
    model = kind(config).eval()
    scramble(model, 0)
    return model.to(dtype)


@pytest.mark.parametrize("name", READERS)
def test_what_reads_images_or_sound_is_cut_checked_and_reloaded(name: str, tmp_path: Path) -> None:
    model = reader(name)
    gates = attach(model, blocks=1)
    kept = {key: units[1:] if key.kind == "block" else units[::2] for key, units in gates.choices.units.items()}
    plan = gates.choices.plan_of({**kept, next(iter(kept)): ()})
    inputs = made_inputs(runner(model), 2, 8)

    def outputs(of: Any) -> torch.Tensor:
        # ViTMAE leaves out patches at random.
        torch.manual_seed(0)
        with torch.no_grad():
            return of(**inputs)[0]

    dense = outputs(model)
    gates.set_plan(plan)
    expected = outputs(model)
    assert difference(expected, dense) > 1e-2
    assert difference(outputs(cut(model, plan)), expected) <= 1e-5
    deadhead.save(model, tmp_path / "small")
    again = getattr(transformers, READERS[name][1]).from_pretrained(tmp_path / "small").eval()
    assert type(again) is type(model) and torch.equal(outputs(again), outputs(model))


def test_a_wrong_cut_of_such_a_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from deadhead.models.pruned import shrinking

    model = reader("ViTForImageClassification")
    gates = attach(model)
    before = copy.deepcopy(model.state_dict())
    plan = gates.choices.plan_of({key: units[:2] for key, units in gates.choices.units.items()})
    original = shrinking.rows_of

    def reversed_queries(attention: Any, order: str, rows: int, kept: Any) -> torch.Tensor:
        found = original(attention, order, rows, kept)
        return found.flip(0) if order == "query" else found

    monkeypatch.setattr(shrinking, "rows_of", reversed_queries)
    with pytest.raises(deadhead.errors.CutError, match="differs"):
        cut(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class _AsksForMore(transformers.ViTModel):
    def forward(self, pixel_values: torch.Tensor, depth_map: torch.Tensor, **kwargs: Any) -> Any:
        return super().forward(pixel_values)


class _DoesNotRun(transformers.ViTModel):
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        raise ValueError("There must be two images." + " They must be of one size." * 100)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (_AsksForMore, "cannot be run without depth_map, which deadhead cannot make up"),
        (_DoesNotRun, r"does not run on the pixel_values .*\(ValueError: There must be two images"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_at_the_door(
    kind: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HuggingFaceLayout, "require_reloadable", lambda *_: None)
    model: nn.Module = kind(kind.config_class(**_IMAGES))
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        attach(model)
    assert len(str(caught.value)) <= 300
    assert not any("head_gate" in name for name, _ in model.named_modules())
