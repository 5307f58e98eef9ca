"""Save and load dense, gated and cut models: one folder with safetensors, written completely or not at all."""

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

# The files that decide what a model computes; people may edit the others.
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
    """Write a model to a checkpoint folder that an Auto class of transformers loads; the model card says which.

    The folder holds weights, configuration, tokenizer, model card, and the modelling files for machines without
    deadhead. A cut model adds its head plan. A gated model adds its gates; the weights are then those of the ungated
    model.

    Args:
        model: a dense, gated or cut model.
        path: the folder. A checkpoint that is already there is replaced as a whole.
        tokenizer: is saved beside the model.
        metrics: measured numbers for the model card, such as `{"perplexity": 5.9}`.
        base: folder or name of the model that this one was made from. The card gets its name and licence, and the
            folder gets its licence files.
        files: files and folders to copy into the checkpoint; those that don't exist are left out.
        about: the card's description of the model; by default it says whether deadhead has cut the model.

    Raises:
        InputError: `path` holds something else, cannot be written, or the disk is full; or this process does not have
            the whole weights, or only an inner model of `model` was cut.
        UnsupportedModel: two places in the model share a weight, but the configuration does not say so.
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
    # A cut that the configuration does not record could not be loaded again.
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
    """Write the files that `save` adds to those of `save_pretrained`; they need no weights. Arguments as in `save`."""
    plan = find_layout(model).recorded_plan(model)
    if plan is not None:
        plan.to_json(path / PLAN_FILE)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))
    copy_licences(base, path)
    write_text(path / "README.md", model_card(model, base, **card))


def require_no_model(work: Path, source: Path | None) -> None:
    """Check that the folder of unfinished work, which is removed at the end, neither is nor holds a model.

    Raises:
        InputError: the folder is the source model, contains it, or holds another model.
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
    """Check that a checkpoint may be written to `path`: it is free, or holds a checkpoint that deadhead wrote.

    Raises:
        InputError: `path` holds something else, such as a model that another program wrote.
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
    """Return the device with a name such as "cpu" or "cuda".

    Raises:
        InputError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in known or (found.index or 0) >= max(1, torch.accelerator.device_count()):
        raise InputError(f"A device was expected ({' or '.join(known)} on this machine), but got {str(device)!r}.")
    return found


def named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the dtype of weights with a name such as "bfloat16".

    Raises:
        InputError: weights cannot have this dtype.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    found = types.get(dtype) if isinstance(dtype, str) else dtype
    if found not in (*types.values(), torch.float64):
        raise InputError(f"A dtype was expected ({', '.join(types)}), but got {str(dtype)!r}.")
    return found


@typed
def load(
    path: str | Path, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> PreTrainedModel:
    """Load a model in evaluation mode, from a checkpoint folder, a GGUF file or the Hugging Face hub.

    The model gets the class that its configuration names, for example a language model, an encoder or a classifier.
    Code that comes with a checkpoint never runs. From a gated checkpoint that `save` wrote, this function loads the
    ungated model; `load_gated` loads model and gates.

    Args:
        path: the folder, the file, or the model's name on the hub. The weights of a GGUF file become plain numbers
            again, quantised ones too.
        dtype: dtype of the weights, such as "bfloat16". None keeps the saved one, or takes float32 for a GGUF file.
        device: where the model goes, such as "cuda". None is the CPU.

    Returns:
        The model.

    Raises:
        InputError: there is no checkpoint, it is damaged or cut short, its tensors do not fit its configuration, or a
            Trainer wrote it with gates on.
        UnsupportedModel: transformers has no class for the model.
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
    """Load as `load` does, and return whether there were gates among the weights, which are left out."""
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
    """Return the names of the tensors that the model's type has in pre-training, which BERT's files hold, say."""
    config = model.config
    if not wanted or type(config) not in AutoModelForPreTraining._model_mapping:
        return set()
    with torch.device("meta"):
        return {*AutoModelForPreTraining.from_config(config).state_dict()}


def _require_unchanged(folder: Path) -> None:
    """Check weights, configuration, plan, gates and tokenizer against the checksums in the folder, if it has any."""
    names = [name for name in read_checksums(folder) if Path(name).suffix in _VERIFIED and name not in _NOT_VERIFIED]
    changed = changed_file(folder, among=names)
    if changed is not None:
        raise InputError(
            f"{folder / changed} is not what was saved there, by its checksum in {CHECKSUMS_FILE}: it is damaged "
            f"or was changed; restore it, or, if the change is meant, delete {CHECKSUMS_FILE}."
        )


def load_config(path: str | Path) -> PreTrainedConfig:
    """Load a model's configuration from a checkpoint folder, its config.json, a GGUF file, or the hub.

    Raises:
        InputError: there is no configuration, it cannot be used, or it describes an impossible model.
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
    """Make a model without weights, on the meta device, from a checkpoint's configuration.

    Raises:
        InputError: see `load_config`.
        UnsupportedModel: the weights are quantised and cannot be read here.
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
    """Load a model and its gates from a folder that was saved with gates on.

    `save`, a Trainer and `save_pretrained` all write such folders.

    Args:
        path: the folder.
        dtype: dtype of the weights, as in `load`; gates stay float32.
        device: where model and gates go, as in `load`.

    Returns:
        The model with its gates attached, and the gates.

    Raises:
        InputError: the folder has no gates, or cannot be loaded.
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
