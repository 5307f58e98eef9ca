"""Random inputs to run a model on (text, images, sound), made from what its class and configuration declare.

Dimensions: B examples, T tokens, F frames, C channels, M numbers a frame of sound.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deadhead.errors import UnsupportedModel, first_line
from deadhead.models.pruned.structure import text_stack
from deadhead.modes import evaluating

# What a model may read beside text, though its signature does not ask for it.
_NO_TEXT = frozenset(("pixel_values", "image", "bbox", "visual_embeds", "visual_feats", "input_values"))
_FRAMES, _PATCHES = 16, 4


@torch.no_grad()
def require_runnable(model: PreTrainedModel) -> None:
    """Check that a model runs on made inputs, as the check of a cut needs; models of text alone do.

    Raises:
        UnsupportedModel: the model does not.
    """
    stack = runner(model)
    if _main_input(stack) != "input_ids" or _NO_TEXT & inspect.signature(stack.forward).parameters.keys():
        with evaluating(model):
            run(stack, made_inputs(stack, 1, _FRAMES))


def runner(model: PreTrainedModel) -> nn.Module:
    """Return what a check runs: the part with the heads, or the whole model if that part reads hidden states."""
    stack = text_stack(model)
    return stack if _needed(stack).keys() <= _MAKERS.keys() else model


def run(stack: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model and return its output; UnsupportedModel if it fails or its first value is not a tensor."""
    try:
        output = stack(**inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a model's own code fails in many ways
        raise UnsupportedModel(
            f"The model, a {type(stack).__name__}, does not run on the {', '.join(inputs)} that deadhead makes up "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    if not isinstance(output[0], Tensor):
        raise UnsupportedModel(
            f"The model, a {type(stack).__name__}, returns no tensor first, so that it could not be checked or timed."
        )
    return output


def made_inputs(stack: nn.Module, count: int, length: int) -> dict[str, Tensor]:
    """Return `count` random examples of each input that `stack` needs, the same at every call.

    It needs its main input and the inputs without a default. Texts have `length` tokens. Images and sounds have the
    size in the configuration, and the dtype and device of the weights.

    Raises:
        UnsupportedModel: an input cannot be made.
    """
    owner: Any = stack
    needed = _needed(stack)
    if unknown := [name for name in needed if name not in _MAKERS]:
        raise UnsupportedModel(
            f"The model, a {type(stack).__name__}, cannot be run without {unknown[0]}, which deadhead cannot make up."
        )
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in needed:
        if name == "input_ids":
            made[name] = made_tokens(owner, count, length)
        else:
            values = torch.randn((count, *_MAKERS[name](owner.config)), generator=generator).to(owner.dtype)
            made[name] = values.to(owner.device)
    return made


def made_tokens(model: PreTrainedModel, count: int, length: int) -> Tensor:
    """Return `count` texts of `length` random tokens, (B, T), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (count, length), generator=generator).to(model.device)


@torch.no_grad()
def positions_read(model: PreTrainedModel, length: int) -> int:
    """Return the number of positions in a model's layers for one example: tokens of a text, patches or frames."""
    if model.can_generate():
        return length
    stack = runner(model)
    with evaluating(model):
        output = run(stack, made_inputs(stack, 1, length) | {"output_hidden_states": True})
    return int(output.hidden_states[-1].shape[1])


def _needed(stack: nn.Module) -> dict[str, None]:
    """Return the names of the inputs that a model must be given, the main one first."""
    parameters = inspect.signature(stack.forward).parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return dict.fromkeys([_main_input(stack), *(each.name for each in named if each.default is each.empty)])


def _main_input(stack: nn.Module) -> str:
    return str(getattr(stack, "main_input_name", "input_ids"))


def _declared(config: PreTrainedConfig, *names: str) -> Any:
    """Return the first of some settings that a configuration, or one of a part of the model in it, has; else None."""
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    found = (getattr(owner, name, None) for owner in (config, *parts) for name in names)
    return next((value for value in found if value is not None), None)


def _image(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return (C, height, width), of a video (F, C, height, width)."""
    patch = _declared(config, "patch_size")
    size = _declared(config, "image_size", "crop_size") or _PATCHES * (patch if isinstance(patch, int) else 16)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _declared(config, "num_channels", "in_channels", "in_chans") or 3
    frames = _declared(config, "num_frames", "frames_per_clip")
    return (*([frames] if frames else []), channels, height, width)


def _wave_or_frames(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return (samples,), or (F, M) where the configuration says how many numbers a frame has."""
    mel = _declared(config, "num_mel_bins")
    if mel is not None:
        return (_declared(config, "max_length") or _FRAMES, mel)
    # So many samples become some frames, whatever the convolutions before the layers.
    strides = _declared(config, "conv_stride") or (_FRAMES,)
    return (_FRAMES * math.prod(strides) * 2,)


def _features(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return (F, M), or (M, F) for models of a fixed number of frames, of which the first convolution makes half."""
    positions = _declared(config, "max_source_positions")
    mel = _declared(config, "feature_projection_input_dim", "num_mel_bins", "input_feat_per_channel") or 80
    return (mel, 2 * positions) if positions is not None else (4 * _FRAMES, mel)


_MAKERS: dict[str, Callable[[PreTrainedConfig], tuple[int, ...]]] = {
    "input_ids": lambda config: (),
    "pixel_values": _image,
    "pixel_values_videos": _image,
    "input_values": _wave_or_frames,
    "input_features": _features,
}
