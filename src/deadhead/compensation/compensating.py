"""Compensation: fit the output projections of a cut model to the dense model's outputs, layer by layer.

For each projection W, with inputs x and targets y, tokens weighted by w: W ← (Σ w y xᵀ + λ W)(Σ w x xᵀ + λ)⁻¹.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from deadhead.attaching import gates_of, require_cuttable
from deadhead.compensation.calibration import Calibration, distance, divided, held_out_loss, held_out_states
from deadhead.compensation.fitting import fit_layer, never_run
from deadhead.compensation.record import Compensation, FittedLayer, taken_back
from deadhead.compensation.streams import Stream, stream_of, whole_stream
from deadhead.compensation.sublayers import Sublayer, find_sublayers, layers_path
from deadhead.data.shares import ALONE, Shares
from deadhead.errors import InputError, typed_but
from deadhead.layouts import own_config
from deadhead.measure.losses import Batches
from deadhead.modes import evaluating, restored_on_failure, seeded, uncompiled

_log = logging.getLogger(__name__)


@typed_but("model", "dense", "batches")
def compensate(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Batches,
    *,
    text: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compensation:
    """Fit the output projections of a cut model, and their biases, to the dense model's outputs, in place.

    Layers are fitted in order; each fit sees the outputs of the fitted layers before it. Every eighth row of the text
    is held out: no fit sees it, and the ridge and the target of each fit are chosen on it. A projection that does not
    improve on held-out text is left alone, bit for bit. So is the whole model if its held-out loss does not fall.

        dense = deadhead.load(folder)
        model = deadhead.cut(deadhead.load(folder), plan)
        deadhead.compensate(model, dense, batches)

    Args:
        model: cut from `dense`, by any plan.
        dense: the model before the cut, in the same dtype and on the same device. It is not changed.
        batches: calibration text: dictionaries with `input_ids` (B, T) and the other inputs that `score_heads` takes.
            For a model that does not predict the next token, the inputs that it reads.
        text: a name for the calibration text, which goes into the model's configuration.
        progress: called with the number of projections done and to do.

    Returns:
        What was fitted, and how much it improved the model. If the fits were kept, `model.config.compensation` records
            them too.

    Raises:
        UnsupportedModel: one of the models is quantised, offloaded or wrapped, or is not a transformers model.
        InputError: a model has gates or adapters, the models do not fit each other, or there are fewer than two rows
            of text.
    """
    return compensate_from(model, dense, batches, text=text, progress=progress, consume=False)


def compensate_from(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Batches,
    *,
    text: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    consume: bool,
    shares: Shares = ALONE,
) -> Compensation:
    """Do as `compensate` does; with `consume`, each layer of the dense model is freed once it is no longer needed.

    If several processes compensate the same model together, each runs its share of the batches, and all of them get the
    weights that the main process fits.
    """
    _require_pair(model, dense)
    sublayers = find_sublayers(model, dense)
    # Tensors that are made under torch.inference_mode() can never learn.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        restored_on_failure(model),
        evaluating(model, dense),
        uncompiled(),
        seeded(),
        torch.autocast(model.device.type, enabled=False),
    ):
        calibration = divided(model, batches, shares)
        error, measure = _judge(model, dense, calibration)
        before = error()
        old = [(model.get_submodule(each.path), dict(model.get_submodule(each.path)._parameters)) for each in sublayers]
        layers, tokens = _fit_all(model, dense, sublayers, calibration, progress, consume=consume)
        after = error() if any(layer.fitted for layer in layers) else before
        kept = after < before
        if not kept:
            for output, parameters in old:
                output._parameters.update(parameters)
            layers = taken_back(layers)
        found = Compensation(
            layers=tuple(layers),
            measure=measure,
            before=before,
            after=after,
            kept=kept,
            tokens=tokens[0],
            held_out=tokens[1],
        )
        if kept:
            own_config(model)
            about = {} if text is None else {"text": text}
            model.config.compensation = found.to_dict() | about
    for layer in found.layers:
        _log.debug("%s: %s", layer.path, "fitted" if layer.fitted else f"not fitted: {layer.reason}")
    what = "compensated" if kept else "compensation was taken back"
    _log.info("%s: held-out %s %.4g, was %.4g, on %d tokens", what, found.measure, after, before, found.held_out)
    return found


def _require_pair(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    for each, name in ((model, "model"), (dense, "dense model")):
        require_cuttable(each, "Compensation")
        if gates_of(each) is not None:
            remedy = "cut it first: deadhead.cut(model, gates.plan())" if each is model else "deadhead.detach(dense)"
            raise InputError(f"Compensation is for models without gates, but the {name} has some; {remedy}.")
        if any(hasattr(module, "base_layer") for module in each.modules()):
            raise InputError(
                f"The {name} still has PEFT adapters, which would be added to a fitted weight; merge them first: "
                "model = model.merge_and_unload()."
            )
    if model is dense:
        raise InputError("Compensation needs the cut model and the model before the cut, but got one model for both.")
    if model.dtype != dense.dtype or model.device != dense.device:
        raise InputError(
            f"The dense model must be of the cut one's dtype and on its device ({model.dtype}, {model.device}), but it "
            f"is {dense.dtype} on {dense.device}; convert it: dense.to(model.device, model.dtype)."
        )


def _judge(model: PreTrainedModel, dense: PreTrainedModel, calibration: Calibration) -> tuple[Callable[[], float], str]:
    """Return a function that measures the model's error on held-out text in all processes, and the error's name."""
    shares = calibration.shares
    if model.can_generate():
        return (lambda: shares.agreed(held_out_loss(model, calibration))), "loss"
    goal = held_out_states(dense, calibration)
    return (lambda: shares.agreed(distance(held_out_states(model, calibration), goal, shares))), "distance"


def _fit_all(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    sublayers: list[Sublayer],
    calibration: Calibration,
    progress: Callable[[int, int], None],
    *,
    consume: bool,
) -> tuple[list[FittedLayer], tuple[int, int]]:
    """Fit every projection; return the result for each, and the numbers of tokens fitted to and held out."""
    stream, other = _streams(model, dense, sublayers, calibration)
    found: dict[str, FittedLayer] = {}
    tokens = (0, 0)
    for index in range(len(stream.paths)):
        report = partial(_add, progress, len(found), len(sublayers))
        fits = fit_layer(stream, other, index, sublayers, calibration, report)
        found |= fits.layers
        tokens = fits.tokens or tokens
        if index + 1 < len(stream.paths):
            fits.advance()
        if consume and not stream.is_whole:
            other.release(index)
    return [*found.values(), *never_run(sublayers, found)], tokens


def _add(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _streams(
    model: PreTrainedModel, dense: PreTrainedModel, sublayers: list[Sublayer], calibration: Calibration
) -> tuple[Stream, Stream]:
    layers = layers_path(dense, [sublayer.path for sublayer in sublayers])
    pair = stream_of(model, calibration, layers), stream_of(dense, calibration, layers)
    if calibration.shares.any(any(stream.is_whole for stream in pair)):
        pair = whole_stream(model, calibration), whole_stream(dense, calibration)
    return pair
