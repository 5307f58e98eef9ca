"""Layouts: one file for each way in which architectures keep their heads, listed here."""

from __future__ import annotations

from transformers import PreTrainedModel

from deadhead.errors import UnsupportedModel
from deadhead.layouts.all_attention import AllAttentionLayout
from deadhead.layouts.base import BLOCK_GATE, HEAD_GATE, Layout, Selection, Site, head_columns
from deadhead.layouts.hugging_face import HuggingFaceLayout

# The first that matches is taken.
_LAYOUTS: list[Layout] = [AllAttentionLayout(), HuggingFaceLayout()]


def find_layout(model: PreTrainedModel) -> Layout:
    """Return the layout of `model`.

    Raises:
        UnsupportedModel: no layout describes it.
    """
    for layout in _LAYOUTS:
        if layout.matches(model):
            return layout
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnsupportedModel(
        f"A PreTrainedModel of transformers was expected, but a model of type {kind!r} came; to add an architecture, "
        "describe it in a file of deadhead/layouts."
    )


__all__ = ["BLOCK_GATE", "HEAD_GATE", "Layout", "Selection", "Site", "find_layout", "head_columns"]
