"""Transformers' table of the tensors that a model lacks or leaves, which `checkpoint.load` tells in a sentence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# States of a tensor at which transformers raises an error that says no more than where to look.
_POINTED_TO = "MISMATCH", "CONVERSION"


@contextmanager
def without_load_report() -> Iterator[None]:
    """Let transformers load a model in this thread without the table, unless an error is going to point to it."""
    logger, here = logging.getLogger("transformers.modeling_utils"), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return record.thread != here or "LOAD REPORT" not in said or any(word in said for word in _POINTED_TO)

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
