"""Models that the paper authors' released code trained, read from its state dict into ours.

Names and meanings of the tensors: `_entries`. Dimensions: V vocabulary, D width, L layers, H heads, E head width,
N persistent vectors, M memory, P rows of their position table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deadhead.attaching import attach
from deadhead.errors import InputError, own_sentence
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM

GATES = GateConfig(beta=0.333, output_scale=False)
"""The constants of the authors' gates."""

_SIGN = "layers.0.attn.q_proj.weight"
_TORCH = (".pt", ".pth", ".bin")
_DEEPEST = 5
# Parts of the adaptive softmax, by the names of their modules or of their tensors.
_ADAPTIVE = re.compile(r"((word_emb|criterion)\.(shortlist|tail\.[0-9]+)\.[01]|criterion\.cluster)")
_TIED = re.compile(r"(word_emb|criterion)\.(shortlist|tail\.[0-9]+)\.([01])\.weight")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict of the authors' code: `.pt`, `.pth`, `.bin`, `.safetensors` or `.npz`.

    A training checkpoint may hold it within other dictionaries. No code that a file brings along runs.

    Returns:
        Name → tensor, on the CPU and in float32; names without "module." before and ".data" behind.

    Raises:
        InputError: the file is missing, damaged, of another kind, holds more than tensors and plain values, or holds no
            such state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"A state dict was expected at {path}, but there is no such file.")
    readers: dict[str, Callable[[Path], Any]] = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys(_TORCH, _read_torch)
    if path.suffix not in readers:
        raise InputError(f"A state dict in a file ending in {', '.join(readers)} was expected, but {path} came.")
    found = list(_find(readers[path.suffix](path)))
    if not found:
        raise InputError(f"{path} holds no state dict of the paper authors' code: no tensor {_SIGN} is in it.")
    if len(found) > 1:
        places = ", ".join(place for place, _ in found)
        raise InputError(f"{path} holds {len(found)} state dicts ({places}); save the one that is meant alone.")
    ((_, values),) = found
    state: dict[str, Tensor] = {}
    for key, value in values.items():
        name = _plain(str(key))
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
            raise InputError(f"A tensor of floating-point numbers was expected for {name} in {path}; check the file.")
        if name in state:
            raise InputError(f"{path} holds the tensor {name} twice, with and without an ending or prefix.")
        state[name] = value.detach().float().contiguous()
        if not bool(state[name].isfinite().all()):
            raise InputError(f"The tensor {name} in {path} has values that are not finite; its training diverged.")
    return state


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in many kinds of errors
        raise InputError(
            f"{path} is damaged or holds more than tensors and plain values, and reading that could run any code; "
            "where you trust the file, save its state dict anew, tensors only: torch.save({name: tensor, …}, PATH)."
        ) from error


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"The state dict {path} is damaged or cut short: {error}.") from error


def _read_npz(path: Path) -> Any:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            prefix = "sd/" if any(name.startswith("sd/") for name in arrays.files) else ""
            names = [name for name in arrays.files if name.startswith(prefix)]
            return {name.removeprefix(prefix): torch.from_numpy(np.array(arrays[name])) for name in names}
    except Exception as error:  # zip files, arrays of objects and kinds of numbers each fail in their own way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(f"The state dict {path} cannot be read as arrays of numbers: {reason}.") from error


def _plain(name: str) -> str:
    name = name.removeprefix("module.").removesuffix(".data")
    return f"{name}.weight" if _ADAPTIVE.fullmatch(name) else name


def _find(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the mappings in which their first projection is, `value` itself or some within it, and where they are."""
    if not isinstance(value, Mapping) or len(path) > _DEEPEST:
        return
    if any(_plain(str(key)) == _SIGN for key in value):
        yield ".".join(path), value
        return
    for key, inner in value.items():
        yield from _find(inner, (*path, str(key)))


@dataclass(frozen=True)
class _Sizes:
    """What the shapes say. `bands` are the rows of shortlist and tails, empty for a plain softmax."""

    width: int
    layers: int
    heads: int
    persistent: int
    vocabulary: int
    positions: int
    bands: list[int] = field(default_factory=list)
    factor: int = 4

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> list[int]:
    if name not in state:
        raise InputError(f"The state dict has no tensor {name}, which a model of the paper's code has.")
    shape = list(state[name].shape)
    if len(shape) != dimensions or min(shape, default=0) < 1:
        raise InputError(
            f"The tensor {name} must have {dimensions} dimensions and none empty, but is of shape {shape}."
        )
    return shape


def _sizes(state: Mapping[str, Tensor]) -> _Sizes:
    _, positions, width = _shape(state, "pos_emb", 3)
    _, heads, persistent, head_width = _shape(state, "layers.0.attn.mem_k", 4)
    if heads * head_width != width:
        raise InputError(
            f"The tensors layers.0.attn.mem_k and pos_emb do not fit each other: {heads} heads of width {head_width} "
            f"do not make a width of {width}."
        )
    layers = {match[1] for name in state if (match := re.match(r"layers\.([0-9]+)\.", name))}
    common: dict[str, Any] = {"width": width, "layers": len(layers), "heads": heads, "persistent": persistent}
    if "word_emb.weight" in state:
        return _Sizes(**common, vocabulary=_shape(state, "word_emb.weight", 2)[0], positions=positions)
    bands = [_shape(state, "word_emb.shortlist.0.weight", 2)[0]]
    while not bands[1:] or f"word_emb.tail.{len(bands) - 1}.0.weight" in state:
        bands.append(_shape(state, f"word_emb.tail.{len(bands) - 1}.0.weight", 2)[0])
    factor = width // state["word_emb.tail.0.0.weight"].shape[1]
    return _Sizes(**common, vocabulary=sum(bands), positions=positions, bands=bands, factor=max(factor, 1))


_Entry = tuple[str, tuple[int, ...], str, Callable[[Tensor], Tensor]]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _entries(sizes: _Sizes, memory: int) -> Iterator[_Entry]:
    """Yield of every tensor their name and shape, our name, and what makes ours of theirs."""
    width, heads = sizes.width, sizes.heads
    # Their last row is distance 0, the one before it distance 1; ours holds the window's, in the same order.
    yield "pos_emb", (1, sizes.positions, width), "model.position_table", lambda table: table[0, -(memory + 1) :]
    for layer in range(sizes.layers):
        theirs, ours = f"layers.{layer}", f"model.layers.{layer}"
        for letter in "qkvr":
            weight = f"{letter}_proj.weight"
            yield f"{theirs}.attn.{weight}", (width, width), f"{ours}.attention.{weight}", _same
        for bias, name in (("content_bias", "r_query_bias"), ("position_bias", "r_pos_bias")):
            yield f"{theirs}.attn.{name}", (width,), f"{ours}.attention.{bias}", lambda flat: flat.view(heads, -1)
        shape = (1, heads, sizes.persistent, sizes.head_width)
        for letter in "kv":
            yield f"{theirs}.attn.mem_{letter}", shape, f"{ours}.attention.persistent_{letter}", lambda value: value[0]
        # Stored as w − 1.
        yield f"{theirs}.norm.weight", (width,), f"{ours}.norm.weight", lambda weight: weight + 1
        yield f"{theirs}.norm.bias", (width,), f"{ours}.norm.bias", _same
        yield f"{theirs}.projection.linear.weight", (width, width), f"{ours}.attention.o_proj.weight", _same
        yield f"{theirs}.projection.linear.bias", (width,), f"{ours}.attention.o_proj.bias", _same
    if sizes.bands:
        yield from _adaptive_entries(sizes)
        return
    table = (sizes.vocabulary, width)
    yield "word_emb.weight", table, "model.embed_tokens.weight", _same
    yield "criterion.project.weight", table, "lm_head.weight", _same
    yield "criterion.project.bias", table[:1], "lm_head.bias", _same


def _adaptive_entries(sizes: _Sizes) -> Iterator[_Entry]:
    tails = len(sizes.bands) - 1
    for rank, rows in enumerate(sizes.bands):
        narrow = sizes.width // sizes.factor**rank
        part = "shortlist" if rank == 0 else f"tail.{rank - 1}"
        projection = (sizes.width, narrow)
        for theirs, ours, table, project in (("word_emb", "model.embed_tokens", 0, 1), ("criterion", "lm_head", 1, 0)):
            yield f"{theirs}.{part}.{table}.weight", (rows, narrow), f"{ours}.tables.{rank}.weight", _same
            yield f"{theirs}.{part}.{project}.weight", projection, f"{ours}.projections.{rank}.weight", _same
        yield f"criterion.{part}.1.bias", (rows,), f"lm_head.tables.{rank}.bias", _same
    yield "criterion.cluster.weight", (tails, sizes.width), "lm_head.cluster.weight", _same
    yield "criterion.cluster.bias", (tails,), "lm_head.cluster.bias", _same


def _twin(name: str) -> str | None:
    """Return the name under which output or input hold the same tensor, or None if it is not shared.

    Tables and the tails' projections are shared, the shortlist's projections are not.
    """
    match = _TIED.fullmatch(name)
    if match is None:
        return None
    module, part, place = match.groups()
    is_table = (module == "word_emb") == (place == "0")
    if part == "shortlist" and not is_table:
        return None
    return f"{'criterion' if module == 'word_emb' else 'word_emb'}.{part}.{1 - int(place)}.weight"


def _require_tied(state: Mapping[str, Tensor]) -> None:
    for name in state:
        twin = _twin(name)
        if twin is not None and not torch.equal(state[name], state[twin]):
            first, second = sorted((name, twin), reverse=True)
            raise InputError(
                f"The tensors {first} and {second} must be equal, since input and output share them, but they differ."
            )


@dataclass(frozen=True)
class Converted:
    """A model of ours with the authors' weights.

    Args:
        model: dense, in evaluation mode.
        log_alpha: (H,) a layer, of their gates; None where the state dict has none.
        positions: P, distances their position table has; the model's memory is at most P − 1.
    """

    model: AllAttentionForCausalLM
    log_alpha: list[Tensor] | None
    positions: int

    def attach(self) -> HeadGates:
        """Attach gates that are as the authors' were, and return them.

        Raises:
            InputError: the state dict has none.
        """
        if self.log_alpha is None:
            raise InputError("The state dict has no gates (layers.0.attn.gate.gate is missing), so no head is closed.")
        gates = attach(self.model, config=GATES)
        for (_, gate), log_alpha_H in zip(gates, self.log_alpha, strict=True):
            gate.set_log_alpha(log_alpha_H)
        return gates


def convert_state(
    state: Mapping[str, Tensor],
    *,
    memory_length: int | None = None,
    segment_length: int | None = None,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    **special_tokens: int | None,
) -> Converted:
    """Make a model of ours of what `read_state` returned.

    Args:
        state: name → tensor.
        memory_length: M, which a state dict does not tell; None: half the position table's rows.
        segment_length: tokens a training step reads; None: as many as the memory holds.
        attention_dropout: of the attention weights, where the model is trained on; the paper's is 0.2.
        dropout: of embeddings, layers' outputs and the last hidden states; the paper's is 0.1.
        special_tokens: such as eos_token_id, of the tokenizer.

    Raises:
        InputError: a tensor is missing, unknown or of another shape, or the sizes do not fit each other.
    """
    # Of a tensor that input and output share, safetensors' own functions write one copy.
    state = {twin: value for name, value in state.items() if (twin := _twin(name)) is not None} | dict(state)
    sizes = _sizes(state)
    memory = max(sizes.positions // 2, 1) if memory_length is None else memory_length
    if memory >= sizes.positions:
        raise InputError(
            f"The position table has {sizes.positions} rows, one for the token itself, so the memory length can be at "
            f"most {sizes.positions - 1}, but it is {memory}."
        )
    gates = [f"layers.{layer}.attn.gate.gate" for layer in range(sizes.layers)]
    known = {name for name in gates if name in state}
    ours: dict[str, Tensor] = {}
    entries = list(_entries(sizes, memory))
    if known:
        # Where one layer has gates, each must.
        entries += [(name, (sizes.heads,), "", _same) for name in gates]
    for theirs, shape, name, convert in entries:
        if theirs not in state:
            raise InputError(f"The state dict has no tensor {theirs}, which a model of the paper's code has.")
        if tuple(state[theirs].shape) != shape:
            raise InputError(f"The tensor {theirs} must be of shape {shape}, but is of {tuple(state[theirs].shape)}.")
        known.add(theirs)
        if name:
            ours[name] = convert(state[theirs])
    if unknown := sorted(set(state) - known):
        raise InputError(f"The state dict has a tensor {unknown[0]}, which no model of the paper's code has.")
    _require_tied(state)
    make: Any = AllAttentionConfig
    try:
        config = make(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_persistent=sizes.persistent,
            memory_length=memory,
            segment_length=memory if segment_length is None else segment_length,
            position="learned",
            attend_initial_memory=True,
            final_layer_norm=False,
            lm_head_bias=True,
            tie_word_embeddings=bool(sizes.bands),
            adaptive_cutoffs=list(accumulate(sizes.bands[:-1])) or None,
            adaptive_factor=sizes.factor,
            attention_dropout=attention_dropout,
            hidden_dropout=dropout,
            embedding_dropout=dropout,
            output_dropout=dropout,
            **special_tokens,
        )
    except ValueError as error:
        raise InputError(f"The model of this state dict does not fit together: {own_sentence(error)}") from None
    model = AllAttentionForCausalLM(config)
    model.load_state_dict(ours, strict=True)
    model.eval()
    return Converted(model, [state[name] for name in gates] if gates[0] in state else None, sizes.positions)
