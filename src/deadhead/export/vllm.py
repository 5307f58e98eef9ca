"""Run a checkpoint in vLLM, in a separate process and, if needed, a separate environment.

vLLM needs other versions of deadhead's dependencies. So the process runs a program that imports nothing of deadhead,
and loads the checkpoint with the modelling files beside it, as a server does with `--trust-remote-code`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from deadhead.errors import ExportError, InputError, UnsupportedModel, is_installed
from deadhead.export.agreement import LIKELIEST, Reference
from deadhead.models import OWN_TYPES
from deadhead.models.pruned.modeling_pruned import TYPE_PREFIX, PrunedModel, stock_class

PYTHON = "DEADHEAD_VLLM_PYTHON"
"""Environment variable that names the Python of an environment with vLLM."""

# Types whose attention takes the shape of its output from that output itself; vLLM gives it flat.
_OTHER_FORMS = ("gpt2",)
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
# One process, without the network; as much memory for keys and values as a short text takes on a CPU (GiB).
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def find_python(given: Path | None) -> Path | None:
    """Return the Python to run vLLM with: the given one, that of the environment variable, or this one.

    None is returned if this one has no vLLM.

    Raises:
        InputError: the Python that is given, or named by the variable, has no vLLM.
    """
    named = given or (Path(os.environ[PYTHON]) if os.environ.get(PYTHON) else None)
    if named is None:
        return Path(sys.executable) if is_installed("vllm") else None
    try:
        found = subprocess.run([str(named), "-c", _HAS_VLLM], capture_output=True)
    except OSError as error:
        raise InputError(
            f"The Python of an environment with vLLM was expected, but {named} is no program that runs here "
            f"({error.strerror})."
        ) from error
    if found.returncode:
        raise InputError(f"The Python of an environment with vLLM was expected, but {named} has no vLLM.")
    return named.absolute()


def require_servable(model: PreTrainedModel) -> None:
    """Check what vLLM's loader of transformers' models requires, as far as this can be checked here.

    Raises:
        UnsupportedModel: vLLM cannot run the model; the message says why.
    """
    name = stock_class(type(model)).__name__
    if model.config.model_type in OWN_TYPES:
        reason = "its attention is of its own kind, which vLLM has nothing to run with"
    elif model.config.is_encoder_decoder:
        reason = "vLLM runs no models with an encoder and a decoder"
    elif not model.can_generate():
        reason = "it does not continue texts; only such models are checked there"
    elif not isinstance(model, PrunedModel) or model.config.head_plan is None:
        return
    elif not type(model).is_backend_compatible():
        reason = "transformers' code of it does not call attention in the way that vLLM can replace"
    elif model.config.model_type.removeprefix(TYPE_PREFIX) in _OTHER_FORMS:
        reason = "transformers' code of it takes attention's output in a form that vLLM does not give"
    elif not model.config.plans_layers:
        reason = "its configuration cannot tell vLLM how many heads each layer has"
    else:
        return
    raise UnsupportedModel(f"{name} cannot be served by vLLM: {reason}.")


def read_likeliest(
    python: Path, path: Path, reference: Reference, dtype: str
) -> tuple[str, list[int], list[dict[int, float]]]:
    """Run the reference's prompt and greedy continuation in vLLM, in that precision (its default would halve float32).

    Returns:
        vLLM's version, its C tokens, and for each of the T + C − 1 positions the log-probabilities of the likeliest.

    Raises:
        ExportError: vLLM could not run the checkpoint.
    """
    answered, version = run(python, [likeliest_job(path, reference, dtype)])
    return version, *likeliest_of(answered[0])


def likeliest_job(path: Path, reference: Reference, dtype: str) -> dict[str, Any]:
    """Return the job of reading a reference's prompt in a checkpoint and continuing it (see `vllm_process.py`)."""
    return {
        "path": str(path.absolute()),
        "prompts": [reference.prompt_T.tolist()],
        "max_tokens": len(reference.continuation_C),
        "likeliest": min(LIKELIEST, reference.logits.shape[1]),
        "engine": {"dtype": dtype, "max_model_len": len(reference.ids) + 1, "enforce_eager": True},
    }


def likeliest_of(answer: dict[str, Any]) -> tuple[list[int], list[dict[int, float]]]:
    """Return the tokens of a job's first text, and by position the log-probabilities of the likeliest."""
    found = answer["texts"][0]
    positions = [{int(token): value for token, value in each.items()} for each in found["log_probabilities"]]
    return found["tokens"], positions


def run(python: Path, jobs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Run jobs in a process with vLLM (see `vllm_process.py`); return the result of each, and vLLM's version.

    Raises:
        ExportError: vLLM could not run one of them.
    """
    program = files("deadhead.export").joinpath("vllm_process.py").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        # Not run as a file: modules beside it, such as onnx.py, would be taken for the libraries of their names.
        answered = Path(folder) / "out.json"
        result = subprocess.run(
            [str(python), "-c", program, str(answered)],
            input=json.dumps(list(jobs)),
            capture_output=True,
            text=True,
            errors="replace",
            cwd=folder,
            env={**_SETTINGS, **os.environ},
        )
        if result.returncode or not answered.exists():
            raise ExportError(
                f"vLLM could not run the model: {_reason(result)}; nothing was left at the place of the export."
            )
        found = json.loads(answered.read_text(encoding="utf-8"))
    return found["answers"], found["version"]


def _reason(result: subprocess.CompletedProcess[str]) -> str:
    """Return the reason that vLLM gave last."""
    if result.returncode < 0:
        return f"its process ended by signal {-result.returncode}"
    lines = [line.strip() for line in result.stderr.splitlines()]
    errors = [line for line in lines if "Error: " in line and not line.startswith("File ")]
    # What is raised last often says only that something failed before.
    said = next((line for line in reversed(errors) if "See root cause above" not in line), "")
    return said.rstrip(".") or f"its process ended with code {result.returncode}"
