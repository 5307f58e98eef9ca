"""Write a model in a runtime's format, run it there, and keep it only if it computes what the model computes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.attaching import gates_of
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.card import copy_licences
from deadhead.disk.files import no_space_is_input_error, remove_left_overs, write_json
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, UnsupportedModel, is_installed, require_extra, typed
from deadhead.export import flat, gguf, llama_cpp, onnx, vllm
from deadhead.export.agreement import (
    Agreement,
    Reference,
    compare,
    compare_likeliest,
    first_output,
    make_reference,
)
from deadhead.export.gguf_tokenizer import TEXTS, read_tokenizer
from deadhead.export.padded import pad_to_stock
from deadhead.models.pruned.modeling_pruned import TYPE_PREFIX, PrunedModel, stock_class
from deadhead.modes import evaluating

_log = logging.getLogger(__name__)

FORMATS = ("gguf", "onnx", "openvino", "padded", "vllm")
# Formats that are checkpoints of transformers, which keep the model's precision.
_CHECKPOINTS = ("padded", "vllm")
# Largest max|Δ| / max|reference| of logits that counts as the same function, by the type of the weights. llama.cpp
# also rounds the numbers that it multiplies by quantised weights; its own quantiser need only give finite numbers.
_TOLERANCE = {"f32": 1e-4, "f16": 2e-2, "bf16": 1e-1, "q8_0": 0.25}
_OPENVINO = "openvino_model.xml"
_Base = str | Path | None


@dataclass(frozen=True)
class Exported:
    """An exported model, and how far it was checked.

    Args:
        path: the file or folder.
        form: the format, one of `FORMATS`.
        kind: type of the weights.
        detail: the architecture that it was written as.
        num_bytes: size of the model alone, in bytes.
        agreements: how near each runtime came to PyTorch.
        unchecked: why no runtime was tried; None if one was.
    """

    path: Path
    form: str
    kind: str
    detail: str
    num_bytes: int
    agreements: tuple[Agreement, ...]
    unchecked: str | None = None


@typed
def export_model(
    model: PreTrainedModel,
    out: str | Path,
    *,
    to: str,
    kind: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: str | Path | None = None,
    python: Path | None = None,
) -> Exported:
    """Write a model in the format of a runtime, and check it in that runtime if it is installed.

    Args:
        model: dense or cut, on the CPU. It must be in float32, except for "padded" and "vllm", which take any
            precision.
        out: the new file for "gguf", the new folder for the other formats.
        to: "gguf" (llama.cpp), "onnx", "openvino", "vllm" (a checkpoint as `deadhead.save` writes it, tried in vLLM) or
            "padded" (a checkpoint of the stock architecture, for servers that take no other).
        kind: for "gguf" only, the type of the weights: f32, f16 (the default), bf16, q8_0, or a type that llama.cpp's
            quantiser makes.
        tokenizer: goes into the file, or beside it.
        base: the checkpoint that the model was loaded from; its licence files go into the folder.
        python: for "vllm" only, the Python of an environment with vLLM. None takes the one in the environment variable
            DEADHEAD_VLLM_PYTHON, or the current one.

    Returns:
        What was written, and how near the runtimes came to PyTorch.

    Raises:
        InputError: `out` already exists, a library is missing, the disk is full, or the model has gates or adapters,
            or is on another device or in another precision.
        UnsupportedModel: the model or the tokenizer cannot be written in this format; the message says why.
        ExportError: the exported model does not compute what the model computes; the export was removed.
    """
    out = Path(out)
    require_exportable(out, to=to, kind=kind, python=python)
    _require_exportable(model, to)
    writers: dict[str, Callable[..., Exported]] = {"padded": _padded, "vllm": partial(_vllm, python=python)}
    with evaluating(model), no_space_is_input_error(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_left_overs(out.parent, out.name)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.", ignore_cleanup_errors=True) as folder:
            place = Path(folder, out.name)
            if to == "gguf":
                exported = _gguf(model, out, place, kind or "f16", tokenizer)
            else:
                place.mkdir()
                exported = writers.get(to, partial(_flat, to=to))(model, out, place, tokenizer, base)
            place.rename(out)
    _log.info("exported %s to %s: %s", type(model).__name__, out, exported.unchecked or "checked in its runtime")
    return exported


def require_exportable(out: Path, *, to: str, kind: str | None, python: Path | None = None) -> None:
    """Check format, type, place and libraries, which need no model; InputError if something is wrong."""
    if to not in FORMATS:
        raise InputError(f"A format was expected ({', '.join(FORMATS)}), but got {to!r}.")
    if python is not None and to != "vllm":
        raise InputError(f"Another Python can be set for vllm only, not for {to}; leave {python} out.")
    if to == "vllm":
        vllm.find_python(python)
    if kind is not None and to != "gguf":
        raise InputError(f"A type of weights can be set for gguf only, not for {to}; leave {kind!r} out.")
    if to == "gguf" and out.suffix != ".gguf":
        raise InputError(f"A file name that ends in .gguf was expected, but got {out}.")
    if checked_path(out).exists() or out.is_symlink():
        raise InputError(f"There is something at {out} already; remove it or choose another place.")
    if to == "gguf":
        require_extra("gguf", "gguf", what="Export to GGUF")
        if kind is not None and kind not in gguf.TYPES:
            llama_cpp.require_quantizer(kind)
    if to in ("onnx", "openvino"):
        require_extra("onnx", "onnx", "onnxscript", what=f"Export to {to}")
    if to == "openvino":
        require_extra("openvino", "openvino", what="Export to openvino")


def _require_exportable(model: PreTrainedModel, to: str) -> None:
    if gates_of(model) is not None:
        raise InputError(
            "The model has gates, which no runtime knows; cut it first: deadhead.cut(model, gates.plan())."
        )
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise InputError("The model has PEFT adapters; merge them first: model = model.merge_and_unload().")
    if model.device.type != "cpu":
        raise InputError(f"A model on the CPU was expected, but this one is on {model.device}; call model.cpu() first.")
    if to == "vllm":
        vllm.require_servable(model)
    if to != "padded" and not model.can_generate():
        raise UnsupportedModel(
            f"A language model that continues texts was expected, but {type(model).__name__} does not; only such are "
            f"exported to {to}, others to padded."
        )
    if to not in _CHECKPOINTS and model.dtype != torch.float32:
        raise InputError(
            f"A model in float32 was expected, but this one is in {model.dtype}; load it so: "
            "deadhead.load(path, dtype=torch.float32)."
        )


def _gguf(
    model: PreTrainedModel, out: Path, place: Path, kind: str, tokenizer: PreTrainedTokenizerBase | None
) -> Exported:
    is_ours = kind in gguf.TYPES
    plan = gguf.plan_file(model)
    vocabulary = None if tokenizer is None else read_tokenizer(tokenizer, model.config.vocab_size)
    written = place if is_ours else place.with_suffix(".f16.gguf")
    gguf.write_gguf(model, written, plan, kind=kind if is_ours else "f16", name=out.stem, tokenizer=vocabulary)
    if not is_installed("llama_cpp"):
        reason = "llama.cpp is not installed (pip install 'deadhead[llama-cpp]')"
        return Exported(out, "gguf", kind, plan.architecture, written.stat().st_size, (), reason)
    reference = make_reference(model)
    # The quantiser's input must be right; its output can only be asked to run.
    agreement = _in_llama_cpp(written, reference, _TOLERANCE.get(kind, _TOLERANCE["f16"]), tokenizer)
    if not is_ours:
        llama_cpp.quantize(written, place, kind)
        written.unlink()
        agreement = _in_llama_cpp(place, reference, float("inf"), None)
    return Exported(out, "gguf", kind, plan.architecture, place.stat().st_size, (agreement,))


def _in_llama_cpp(
    path: Path, reference: Reference, tolerance: float, tokenizer: PreTrainedTokenizerBase | None
) -> Agreement:
    asked = TEXTS if tokenizer is not None else ()
    logits, tokens = llama_cpp.read_logits(path, reference.prompt_T, reference.continuation_C[:-1], asked)
    for text, found in zip(asked, tokens, strict=True):
        expected = tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[misc]
        if list(expected) != found:
            raise InputError(
                f"llama.cpp splits the text {text!r} into other tokens than this tokenizer does; export without it "
                "(--no-tokenizer) and give the runtime token ids."
            )
    return compare(reference, logits, runtime=f"llama-cpp-python {version('llama-cpp-python')}", tolerance=tolerance)


def _flat(
    model: PreTrainedModel, out: Path, place: Path, tokenizer: PreTrainedTokenizerBase | None, base: _Base, *, to: str
) -> Exported:
    graph = onnx.flat_model(model)
    reference = make_reference(model)
    onnx.write_onnx(graph, place / onnx.FILE)
    runtime, file = "onnxruntime", place / onnx.FILE
    if to == "openvino":
        runtime, file = "openvino", place / _OPENVINO
        import openvino

        openvino.save_model(openvino.convert_model(str(place / onnx.FILE)), str(file), compress_to_fp16=False)
        for left in place.glob(f"{onnx.FILE}*"):
            left.unlink()
    agreements = (flat.check(file, reference, runtime, _TOLERANCE["f32"]),) if is_installed(runtime) else ()
    size = sum(path.stat().st_size for path in place.iterdir())
    write_json(place / "config.json", _plain_config(model))
    if to == "onnx":
        write_json(place / onnx.GENAI_FILE, onnx.genai_config(model))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(place)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(place))
    copy_licences(base, place)
    unchecked = None if agreements else f"{runtime} is not installed (pip install 'deadhead[{to}]')"
    return Exported(out, to, "f32", type(model).__name__, size, agreements, unchecked)


def _plain_config(model: PreTrainedModel) -> dict[str, object]:
    """Return the configuration for programs that only read its numbers: with the stock type, without code."""
    values: dict[str, object] = model.config.to_diff_dict()
    values.pop("auto_map", None)
    if isinstance(model, PrunedModel):
        values["model_type"] = model.config.model_type.removeprefix(TYPE_PREFIX)
    return {**values, "architectures": [stock_class(type(model)).__name__]}


def _padded(
    model: PreTrainedModel, out: Path, place: Path, tokenizer: PreTrainedTokenizerBase | None, base: _Base
) -> Exported:
    stock, reference = pad_to_stock(model), make_reference(model)
    logits = _stock_logits(lambda: stock, model, reference.ids)
    checkpoint.save(stock, place, tokenizer=tokenizer, base=base, about=_ABOUT)
    # As a server loads it: with neither our classes nor the checkpoint's code.
    load = partial(type(stock).from_pretrained, place, dtype=model.dtype)
    reloaded = _stock_logits(load, model, reference.ids)
    kind, tolerance = _precision(model)
    name = f"transformers {transformers.__version__}, {type(stock).__name__}"
    agreement = compare(reference, logits, runtime=name, tolerance=tolerance)
    # Compared with a tolerance, because the address of a file's memory map decides the last bit.
    compare(reference, reloaded, runtime=f"{name}, reloaded", tolerance=tolerance)
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    return Exported(out, "padded", kind, type(stock).__name__, size, (agreement,))


def _vllm(
    model: PreTrainedModel,
    out: Path,
    place: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    base: _Base,
    *,
    python: Path | None,
) -> Exported:
    checkpoint.save(model, place, tokenizer=tokenizer, base=base)
    kind, tolerance = _precision(model)
    size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    exported = Exported(out, "vllm", kind, type(model).__name__, size, ())
    found = vllm.find_python(python)
    if found is None:
        reason = f"vLLM is not installed here; name the Python of an environment that has it (--python, {vllm.PYTHON})"
        return replace(exported, unchecked=reason)
    reference = make_reference(model)
    version, tokens, positions = vllm.read_likeliest(found, place, reference, kind)
    agreement = compare_likeliest(reference, tokens, positions, runtime=f"vLLM {version}", tolerance=tolerance)
    return replace(exported, agreements=(agreement,))


def _precision(model: PreTrainedModel) -> tuple[str, float]:
    """Return the name of the weights' dtype, and the tolerance for a runtime in that dtype."""
    is_exact = model.dtype in (torch.float32, torch.float64)
    return str(model.dtype).removeprefix("torch."), _TOLERANCE["f32" if is_exact else "bf16"]


def _stock_logits(load: Callable[[], Any], model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Run the padded `model`; an error of transformers' code, at sizes it was not made for, becomes a refusal."""
    try:
        stock = load().eval()
        with torch.inference_mode():
            found = first_output(stock, torch.from_numpy(ids)[None])[0].float().numpy()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise UnsupportedModel(
            f"{stock_class(type(model)).__name__} cannot be padded: its code does not load or run such a model "
            f"({type(error).__name__})."
        ) from error
    return found


_ABOUT = (
    "A model whose attention heads deadhead has cut, padded with zeros so that all layers are alike again: it computes "
    "what the cut model does, in its stock architecture, and costs more."
)
