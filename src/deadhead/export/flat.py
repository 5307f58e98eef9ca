"""Run an ONNX file in ONNX Runtime or OpenVINO, in a session that keeps the key/value cache.

Dimensions: B texts, T new tokens, S tokens so far, V vocabulary.
"""

from __future__ import annotations

from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deadhead.errors import ExportError, first_line, require_extra
from deadhead.export.agreement import Agreement, Reference, compare

_PAST, _PRESENT = "past_key_values.", "present."
# Padding tokens on the left of a check's second text.
_PADDING = 3


class FlatSession:
    """An exported model and its key/value cache in a runtime.

    Args:
        path: the ONNX file that `export_model` wrote, or for OpenVINO its `.xml` file.
        runtime: "onnxruntime" or "openvino".
        threads: threads that the runtime uses; with 0 it chooses their number.

    Raises:
        InputError: the runtime is not installed.
        ExportError: the runtime cannot load the file.
    """

    def __init__(self, path: Path, runtime: str = "onnxruntime", *, threads: int = 0) -> None:
        require_extra("openvino" if runtime == "openvino" else "onnx", runtime, what=f"Running {path}")
        self.name = f"{runtime} {version(runtime)}"
        self._run, shapes = (_onnxruntime if runtime == "onnxruntime" else _openvino)(path, threads)
        self._past_sizes = {name: (shape[1], shape[3]) for name, shape in shapes.items() if name.startswith(_PAST)}
        self._inputs = set(shapes)
        self.forget()

    def forget(self) -> None:
        """Begin a new text."""
        self._past: dict[str, np.ndarray] = {}
        self._mask_BS: np.ndarray | None = None

    def read(self, ids_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
        """Read more tokens, which continue those read before, and return their logits.

        Args:
            ids_BT: int64 (B, T), the tokens.
            mask_BT: int64 (B, T), 0 for padding, which must be on the left of a text; None if there is none.

        Returns:
            Logits of each token, (B, T, V).
        """
        batch, new = ids_BT.shape
        mask_BT = np.ones((batch, new), dtype=np.int64) if mask_BT is None else mask_BT
        if self._mask_BS is None:
            sizes = self._past_sizes.items()
            self._past = {name: np.zeros((batch, heads, 0, width), dtype=np.float32) for name, (heads, width) in sizes}
        self._mask_BS = mask_BT if self._mask_BS is None else np.concatenate([self._mask_BS, mask_BT], axis=1)
        positions = np.maximum(self._mask_BS.cumsum(1) - 1, 0)[:, -new:]
        feed = {"input_ids": ids_BT, "attention_mask": self._mask_BS, "position_ids": positions, **self._past}
        found = self._run({name: value for name, value in feed.items() if name in self._inputs})
        self._past = {name: found[_PRESENT + name.removeprefix(_PAST)] for name in self._past_sizes}
        return found["logits"]


def _onnxruntime(path: Path, threads: int) -> tuple[Any, dict[str, list[Any]]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load the file: {first_line(error)}.") from error
    outputs = [output.name for output in session.get_outputs()]
    shapes = {given.name: given.shape for given in session.get_inputs()}
    return lambda feed: dict(zip(outputs, session.run(outputs, feed), strict=True)), shapes


def _openvino(path: Path, threads: int) -> tuple[Any, dict[str, list[Any]]]:
    import openvino

    # By default it may round to bfloat16 if the processor supports that.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:
        raise ExportError(f"OpenVINO cannot load the file: {first_line(error)}.") from error
    shapes = {
        given.get_any_name(): [d.get_length() if d.is_static else -1 for d in given.partial_shape]
        for given in compiled.inputs
    }
    request = compiled.create_infer_request()
    return lambda feed: {port.get_any_name(): np.array(value) for port, value in request.infer(feed).items()}, shapes


def check(path: Path, reference: Reference, runtime: str, tolerance: float) -> Agreement:
    """Check a file in its runtime: run the reference's text, in two pieces and then token by token.

    A second text, padded on the left, runs beside it.

    Raises:
        ExportError: the runtime cannot run the file, or computes something else.
    """
    session = FlatSession(path, runtime)
    ids, half = reference.ids, len(reference.prompt_T) // 2
    padding = min(_PADDING, half)
    ids_BT = np.stack([ids, np.concatenate([np.zeros(padding, dtype=ids.dtype), ids[: len(ids) - padding]])])
    mask_BT = np.ones_like(ids_BT)
    mask_BT[1, :padding] = 0
    ends = pairwise([0, half, *range(len(reference.prompt_T), len(ids) + 1)])
    try:
        parts = [session.read(ids_BT[:, start:end], mask_BT[:, start:end]) for start, end in ends]
    except Exception as error:
        raise ExportError(f"{session.name} cannot run the file: {first_line(error)}.") from error
    logits = np.concatenate(parts, axis=1)
    # The padded text's tokens are shifted right; those that it lost at the end are taken from the other text.
    padded = np.concatenate([logits[1, padding:], logits[0, len(ids) - padding :]])
    found = [compare(reference, row, runtime=session.name, tolerance=tolerance) for row in (logits[0], padded)]
    return max(found, key=lambda agreement: agreement.logit_difference)
