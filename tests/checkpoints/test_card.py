"""The metadata of a model card is what the hub accepts, whatever stands in the base model's card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.checkpoints.card import model_card

_TAGS = ["deadhead", "pruned-attention-heads"]


def _metadata(text: str, folder: Path) -> dict[str, Any]:
    (folder / "card.md").write_text(text, encoding="utf-8")
    return ModelCard.load(folder / "card.md").data.to_dict()


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: apache-2.0\nlanguage: [en, de]", {"license": "apache-2.0", "language": ["en", "de"]}),
        ("language: no", {"language": "no"}),
        ("language:\n- en\n- no", {"language": ["en", "no"]}),
        ("license: other\nlicense_name: größer 😀", {"license": "other", "license_name": "größer 😀"}),
        ("base_model: [a/b, c/d]\ndatasets: [e/f]", {"base_model": ["a/b", "c/d"]}),
        ("license: 2024-01-01\nlicense_name: 1.0\nlanguage: []", {}),
        ("license: null\nbase_model: ''", {}),
        ("license: [", {}),
    ],
)
def test_what_is_kept_of_the_base_models_card(front: str, kept: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    of_ours = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": _TAGS}
    assert _metadata(model_card(tiny_model("llama"), tmp_path), tmp_path) == kept | of_ours


def test_only_cut_models_are_called_pruned(tmp_path: Path) -> None:
    model = tiny_model("llama")
    assert _metadata(model_card(model, None), tmp_path)["tags"] == _TAGS
    deadhead.cut(model, deadhead.attach(model).plan(sparsity=0.25))
    assert _metadata(model_card(model, None), tmp_path)["tags"] == [*_TAGS, "pruned"]
