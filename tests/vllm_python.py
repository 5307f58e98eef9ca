"""The environment with vLLM, which is not that of the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deadhead.export import vllm

VLLM_PYTHON = Path(os.environ.get(vllm.PYTHON) or Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python")
needs_vllm = pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="there is no environment with vLLM (make vllm)")
