"""Save and load models, dense, gated or cut: safetensors, one folder, complete or absent."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deadhead.attaching import gates_of, is_gate
from deadhead.checkpoints.card import LICENCES, TAG, copy_licences, model_card
from deadhead.checkpoints.declared import GATES_FILE, has_gates, require_config
from deadhead.checkpoints.declared import PLAN_FILE as PLAN_FILE
from deadhead.checkpoints.gate_files import (
    has_gates_among_weights,
    load_gates,
    load_gates_among_weights,
    save_gates,
)
from deadhead.checkpoints.gguf_model import read_gguf_config, read_gguf_model
from deadhead.checkpoints.guard import guarded_config, misshapen, require_sound
from deadhead.checkpoints.load_report import without_load_report
from deadhead.checkpoints.quantised import forget_dequantised, require_readable
from deadhead.disk.checksums import CHECKSUMS_FILE, changed_file, read_checksums, write_checksums
from deadhead.disk.files import replaced_folder, require_replaceable, write_text
from deadhead.disk.gguf import gguf_file
from deadhead.disk.hub import is_name, quick, require_had
from deadhead.disk.places import checked_path
from deadhead.errors import InputError, first_line, typed
from deadhead.gates.gates import HeadGates
from deadhead.gates.sharding import require_whole
from deadhead.layouts import find_layout
from deadhead.layouts.base import TAGS
from deadhead.layouts.classes import model_class
from deadhead.layouts.refusals import require_model, require_untied, require_weights
from deadhead.measure.cost import skeleton

_log = logging.getLogger(__name__)

# What decides what a model computes; people may edit the rest.
_VERIFIED = {".safetensors", ".json", ".model", ".txt"}
_NOT_VERIFIED = {"generation_config.json"}
_ENDINGS = {".safetensors", ".json", ".jsonl", ".jinja", ".py", ".md", ".txt", ".model"}


@typed
def save(
    model: PreTrainedModel,
    path: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metrics: Mapping[str, float] | None = None,
    base: str | Path | None = None,
    files: Sequence[Path] = (),
    about: str | None = None,
) -> None:
    """Write a checkpoint folder that transformers' Auto class for the model loads; its card says which.

    It holds the weights, the configuration, the modelling files (for places without deadhead), the head plan of a cut
    model, the gates of a gated one (whose weights are then those of the ungated model), tokenizer and model card.

    Args:
        model: dense, gated or cut.
        path: the folder; a checkpoint that is there already is replaced as a whole.
        tokenizer: written beside the model.
        metrics: measured numbers for the model card, such as {"perplexity": 5.9}.
        base: folder or name of the model it was made of; its licence and name go into the card, its licence files
            beside it.
        files: files and folders to copy; those that don't exist are left out.
        about: what the card says the model is; by default whether deadhead has cut it.

    Raises:
        InputError: `path` holds something else, cannot be written, or the device is full; or the weights are not whole
            in this process, or only a model inside of `model` was cut.
        UnsupportedModel: two places in the model share a weight, and its configuration does not say so.
    """
    path = checked_path(path)
    require_model(model)
    require_weights(model, "Saving")
    require_whole(
        model,
        "Saving",
        "gather them by get_model_state_dict of torch.distributed.checkpoint.state_dict, load them into a whole model, "
        "and save that",
    )
    require_untied(model)
    require_ours_or_free(path)
    if base is not None:
        checked_path(base)
    # A cut that the configuration does not tell of is no model to be loaded again.
    find_layout(model).recorded_plan(model)
    gates = gates_of(model)
    with replaced_folder(path) as folder:
        weights = {name: value for name, value in model.state_dict().items() if not is_gate(name)}
        model.save_pretrained(folder, state_dict=weights)
        if gates is not None:
            save_gates(gates, folder)
        for file in files:
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif file.exists():
                shutil.copy2(file, folder / file.name)
        save_beside(model, folder, tokenizer, base, metrics=metrics, about=about)
        write_checksums(folder)
    _log.info("saved %s to %s", type(model).__name__, path)


def save_beside(
    model: PreTrainedModel, path: Path, tokenizer: PreTrainedTokenizerBase | None, base: str | Path | None, **card: Any
) -> None:
    """Write what `save` writes besides what `save_pretrained` does, which needs no weights; arguments as there."""
    plan = find_layout(model).recorded_plan(model)
    if plan is not None:
        plan.to_json(path / PLAN_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))
    copy_licences(base, path)
    write_text(path / "README.md", model_card(model, base, **card))


def require_no_model(work: Path, source: Path | None) -> None:
    """Check that the folder of unfinished work, which goes at the end, is not, and does not hold, a model.

    Raises:
        InputError: it is the model that is read, the model lies in it, or it holds another.
    """
    place = None if source is None else source.resolve()
    if place is not None and (place == work or work in place.parents):
        raise InputError(
            f"{source} is the model, and would be removed: {work} is where unfinished work is kept; choose another out "
            "(--out)."
        )
    if (work / "config.json").exists():
        raise InputError(f"{work}, where unfinished work is kept, holds a model; choose another out (--out).")


def require_ours_or_free(path: Path) -> None:
    """Check that a checkpoint may be written to `path`: nothing is there, or a checkpoint that deadhead wrote.

    Raises:
        InputError: something else is there, other programs' models included.
    """
    require_replaceable(path, ("config.json",))
    card = path / "README.md"
    if (path / "config.json").exists() and not (card.is_file() and TAG in card.read_text("utf-8", errors="replace")):
        raise InputError(f"{path} holds a model that deadhead did not write; choose another place.")
    for entry in path.iterdir() if path.is_dir() else ():
        known = entry.name in ("tensorboard", CHECKSUMS_FILE) or entry.name.upper().startswith(LICENCES)
        if not known and entry.suffix not in _ENDINGS:
            raise InputError(f"{path} holds {entry.name} beside a checkpoint of deadhead; choose another place.")


def named_device(device: str | torch.device) -> torch.device:
    """Return a device by its name, such as "cpu" or "cuda".

    Raises:
        InputError: there is no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in known or (found.index or 0) >= max(1, torch.accelerator.device_count()):
        raise InputError(
            f"A device was expected ({' or '.join(known)} on this machine), but {str(device)!r} was given."
        )
    return found


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return a type of weights by its name, such as "bfloat16".

    Raises:
        InputError: there is no such type.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = types.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (*types.values(), torch.float64):
        raise InputError(f"A dtype was expected ({', '.join(types)}), but {str(dtype)!r} was given.")
    return found


@typed
def load(
    path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Load a model from a checkpoint folder, a GGUF file, or by its name on the Hugging Face hub, in evaluation mode.

    Its class is the one that its configuration names, of a language model, an encoder or a classifier, say. It never
    runs code that a checkpoint brings along. A gated checkpoint that `save` wrote gives the ungated model; `load_gated`
    gives both.

    Args:
        path: the folder, file or name. Weights of a GGUF file, quantised ones too, become plain numbers again.
        dtype: of the weights, such as "bfloat16"; None: as they were saved, or float32 for those of a GGUF file.
        device: where they go, such as "cuda"; None: the CPU.

    Raises:
        InputError: there is no checkpoint, it is cut short, its tensors are not those its configuration asks for, or a
            Trainer wrote it with gates on.
        UnsupportedModel: transformers has no class for it.
    """
    model, is_gated = _load(path, dtype, device)
    if is_gated:
        raise _with_gates_on(path)
    return model


def _with_gates_on(path: str | Path) -> InputError:
    return InputError(
        f"The checkpoint {path} was saved with gates on, and they are among its weights; open it with "
        "deadhead.load_gated, which gives model and gates."
    )


def _load(
    path: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, bool]:
    """Load as `load` does, and tell whether there are gates among the weights, which are left out."""
    dtype = None if dtype is None else named_dtype(dtype)
    device = None if device is None else named_device(device)
    if (file := gguf_file(path)) is not None:
        read: Any = read_gguf_model(file, dtype)
        return read if device is None else read.to(device), False
    name = str(path)
    local = Path(path).is_dir()
    if not local and not is_name(path):
        raise _no_folder(path)
    if local:
        if has_gates(path) and not (Path(path) / "config.json").exists():
            raise InputError(
                f"{path} holds gates without the model that they were trained on; load that, and put them on it with "
                "deadhead.checkpoints.gate_files.load_gates(model, folder)."
            )
        _require_unchanged(Path(path))
    config = require_sound(Path(path)) if local else load_config(path)
    require_readable(config, path)
    try:
        with quick(path), without_load_report():
            loaded: Any = model_class(config).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=local,
                use_safetensors=True,
            )
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(f"The weights in {path} are damaged or cut short: {error}.") from error
    except RuntimeError as error:
        reason = (misshapen(Path(path)) if local else "") or first_line(error)
        raise InputError(f"The weights in {path} do not fit its configuration: {reason}.") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if not local:
            raise _no_such_name(path, error) from error
        raise InputError(f"The checkpoint {path} cannot be loaded: {first_line(error)}.") from error
    model, info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    of_gates = {name for name in info["unexpected_keys"] if is_gate(str(name))}
    info["unexpected_keys"] = set(info["unexpected_keys"]) - of_gates
    info["unexpected_keys"] -= _of_other_heads(model, bool(info["unexpected_keys"]))
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            first = sorted(str(item) for item in info[problem])[0]
            raise InputError(
                f"The weights in {path} are not those of its configuration: {problem[:-5]} tensor {first}."
            )
    model.eval()
    if getattr(model.config, "head_plan", None) is not None:
        model.add_model_tags([*TAGS])
    _log.info("loaded %s from %s", type(model).__name__, path)
    return model if device is None else model.to(device), bool(of_gates)  # type: ignore[arg-type]


def _of_other_heads(model: PreTrainedModel, wanted: bool) -> set[str]:
    """Return the tensors that the model's type had in pre-training, which files of BERT, say, hold beside its own."""
    config = model.config
    if not wanted or type(config) not in AutoModelForPreTraining._model_mapping:
        return set()
    with torch.device("meta"):
        return {*AutoModelForPreTraining.from_config(config).state_dict()}


def _require_unchanged(folder: Path) -> None:
    """Check weights, configuration, plan, gates and tokenizer against the checksums saved with them, if any."""
    names = [name for name in read_checksums(folder) if Path(name).suffix in _VERIFIED and name not in _NOT_VERIFIED]
    changed = changed_file(folder, among=names)
    if changed is not None:
        raise InputError(
            f"{folder / changed} is not what was saved there, so says its checksum in {CHECKSUMS_FILE}: it is damaged "
            f"or was changed; restore it, or, if the change is meant, delete {CHECKSUMS_FILE}."
        )


def load_config(path: str | Path) -> PreTrainedConfig:
    """Load a model's configuration from a checkpoint folder, its file, a GGUF file, or by its name on the hub.

    Raises:
        InputError: there is none, it cannot be used, or it is of a model that cannot be.
    """
    if (file := gguf_file(path)) is not None:
        return read_gguf_config(file)
    if not is_name(path):
        if not Path(path).is_dir() and not (Path(path).is_file() and Path(path).suffix == ".json"):
            raise _no_folder(path)
        return guarded_config(Path(path))[0]
    require_had(path)
    try:
        with quick(path):
            config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_such_name(path, error) from error
    return config


def load_skeleton(path: str | Path) -> PreTrainedModel:
    """Load a model without its weights, by which much can be told before they are read.

    Raises:
        InputError: see `load_config`.
        UnsupportedModel: the weights are quantised, and cannot be read here.
    """
    config = load_config(path)
    require_readable(config, path)
    forget_dequantised(config)
    return skeleton(config)


def _no_folder(path: str | Path) -> InputError:
    place = Path(path)
    what = f"that is a file; name the folder that it lies in, {place.parent}" if place.exists() else "there is none"
    return InputError(f"A checkpoint folder was expected at {path}, but {what}.")


def _no_such_name(path: str | Path, error: Exception) -> InputError:
    return InputError(
        f"There is no folder {path}, and the Hugging Face hub gave no model of that name: {first_line(error)}."
    )


@typed
def load_gated(
    path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, HeadGates]:
    """Load a model and its gates from a folder that was saved with gates on, by `save`, a Trainer or `save_pretrained`.

    Args:
        path: the folder.
        dtype: of the weights, as in `load`; gates stay float32.
        device: where both go, as in `load`.

    Raises:
        InputError: the folder has no gates, or it cannot be loaded.
    """
    path = checked_path(path)
    if path.is_dir() and not has_gates(path):
        require_config(path)
        if has_gates_among_weights(path):
            model, _ = _load(path, dtype, device)
            return model, load_gates_among_weights(model, path)
        raise InputError(f"The checkpoint {path} has no gates ({GATES_FILE} is missing); load it with deadhead.load.")
    model, _ = _load(path, dtype, device)
    return model, load_gates(model, path)
