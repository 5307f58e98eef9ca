"""Layouts: a file for each way in which architectures store their heads. They are listed here."""

from __future__ import annotations

from transformers import PreTrainedModel

from deadhead.layouts.all_attention import AllAttentionLayout
from deadhead.layouts.base import BLOCK_GATE, HEAD_GATE, Layout, Selection, Site, head_columns, own_config
from deadhead.layouts.hugging_face import HuggingFaceLayout
from deadhead.layouts.refusals import require_model

# The first that matches is taken.
_LAYOUTS: list[Layout] = [AllAttentionLayout(), HuggingFaceLayout()]


def find_layout(model: PreTrainedModel) -> Layout:
    """Return the layout of `model`.

    Raises:
        UnsupportedModel: it is not a transformers model.
    """
    require_model(model)
    return next(layout for layout in _LAYOUTS if layout.matches(model))


__all__ = ["BLOCK_GATE", "HEAD_GATE", "Layout", "Selection", "Site", "find_layout", "head_columns", "own_config"]
