"""Run a GGUF file in llama.cpp, in a process of its own: a file that llama.cpp cannot read ends its process.

    python -m deadhead.export.llama_cpp OUT.npz < JOB.json

is that process.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.errors import ExportError, InputError, require_extra

_FLOAT32 = 0
# Types that want a matrix of importance, layers of experts, or another program.
_NOT_MADE = ("iq1_", "iq2_", "q2_k_s", "mxfp4", "nvfp4", "q1_0")


def require_quantizer(kind: str) -> None:
    """Raise an InputError if llama.cpp's quantiser is not installed or does not make this type."""
    require_extra("llama-cpp", "llama_cpp", what=f"Type {kind}, which llama.cpp's quantiser makes,")
    import llama_cpp

    prefix = "LLAMA_FTYPE_MOSTLY_"
    names = [name.removeprefix(prefix).lower() for name in dir(llama_cpp) if name.startswith(prefix)]
    types = [name for name in names if name != "f16" and not name.startswith(_NOT_MADE)]
    if kind not in types:
        raise InputError(f"A type was expected (f32, f16, {', '.join(types)}), but got {kind!r}.")


def read_logits(
    path: Path, prompt_T: np.ndarray, rest_C: np.ndarray, texts: Sequence[str] = ()
) -> tuple[np.ndarray, list[list[int]]]:
    """Read a prompt at once and the rest token by token, with a key/value cache in float32.

    Returns:
        the logits of every position, (T + C, V), and the tokens that the file's tokenizer gives each text.

    Raises:
        ExportError: llama.cpp could not read the file.
    """
    ids = {"prompt": prompt_T.tolist(), "rest": rest_C.tolist()}
    found = _run({"task": "logits", "path": str(path), **ids, "texts": list(texts)})
    return found["logits"], json.loads(found["tokens"].item())


def quantize(path: Path, out: Path, kind: str) -> None:
    """Write `out` with llama.cpp's own quantiser, from a file in float16 or float32, in a type such as "q4_k_m"."""
    _run({"task": "quantize", "path": str(path), "out": str(out), "kind": kind})


def _run(job: dict[str, Any]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        answered = Path(folder) / "out.npz"
        command = [sys.executable, "-m", "deadhead.export.llama_cpp", str(answered)]
        result = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, errors="replace")
        if result.returncode or not answered.exists():
            raise ExportError(
                f"llama.cpp could not use the file: {_reason(result)}; nothing was left at the place of the export."
            )
        with np.load(answered) as arrays:
            return dict(arrays)


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """Return llama.cpp's own message, which is printed before Python's."""
    if result.returncode < 0:
        return f"its process crashed ({signal.Signals(-result.returncode).name})"
    lines = [line.strip().rstrip(".!") for line in result.stderr.splitlines() if line.strip()]
    for mark in ("error loading model: ", "ERROR: ", "GGML_ASSERT"):
        for line in lines:
            if mark in line:
                return line.rpartition(mark)[2] or line
    return lines[-1] if lines else f"its process ended with code {result.returncode}"


def _logits(job: dict[str, Any]) -> dict[str, np.ndarray]:
    import llama_cpp

    ids, rest = job["prompt"], job["rest"]
    length = len(ids) + len(rest)
    # Kept from repacking quantised weights: its kernels for AMX crash on some virtual machines. Older versions take no
    # notice of it.
    library: Any = llama_cpp.llama_cpp
    params = library.llama_model_default_params()
    params.use_extra_bufts = False
    library.llama_model_default_params = lambda: params
    model = llama_cpp.Llama(job["path"], n_ctx=max(64, length), logits_all=True, type_k=_FLOAT32, type_v=_FLOAT32)
    model.eval(ids)
    for token in rest:
        model.eval([token])
    texts = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
    return {
        "logits": np.array(model.scores[:length], dtype=np.float32),
        "tokens": np.array(json.dumps(texts)),
    }


def _quantize(job: dict[str, Any]) -> dict[str, np.ndarray]:
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['kind'].upper()}")
    code = llama_cpp.llama_model_quantize(job["path"].encode(), job["out"].encode(), settings)
    if code:
        raise RuntimeError(f"the quantiser's error {code}")
    return {}


if __name__ == "__main__":
    task = json.load(sys.stdin)
    np.savez(sys.argv[1], **{"logits": _logits, "quantize": _quantize}[task["task"]](task))  # type: ignore[arg-type]
