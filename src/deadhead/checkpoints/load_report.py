"""Transformers' table of missing and unexpected tensors, which `checkpoint.load` reports in a sentence instead."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# States of a tensor for which transformers raises an error that only refers to the table.
_POINTED_TO = "MISMATCH", "CONVERSION"


@contextmanager
def without_load_report() -> Iterator[None]:
    """Make transformers load models in this thread without the table, unless an error will refer to it."""
    logger, here = logging.getLogger("transformers.modeling_utils"), threading.get_ident()

    def passes(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return record.thread != here or "LOAD REPORT" not in said or any(word in said for word in _POINTED_TO)

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)
