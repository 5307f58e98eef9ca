"""A cost model of this machine: how long a model takes as a function of the units that each of its layers keeps.

Every layer's units are thinned out together, heads and hidden units apart, and the whole model is timed each time
beside the dense one: so a layer's time includes all that goes with it, memory traffic too, and no layer has to be
called by itself. What a unit saves is shared out among layers by the FLOPs that they lose.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, TypeAdapter
from transformers import PreTrainedModel

from deadhead.attaching import choices_of, has_blocks
from deadhead.cutting import pruned_copy
from deadhead.disk.files import write_json
from deadhead.disk.reading import read_object
from deadhead.errors import InputError
from deadhead.layouts import find_layout
from deadhead.measure.cost import counted_costs
from deadhead.measure.timing import NEW_TOKENS, Workload, bench, require_timed
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.unit_costs import UnitCosts

# Shares of its units that every layer keeps in the models that are timed, beside the dense one.
_SHARES = (0.0, 0.25, 0.5, 0.75)
# Seconds that the measuring is to take, and how often each model is timed, at least and at most.
_SECONDS = 40.0
_REPEATS = (4, 60)
# Layers have fewer heads, and texts fewer tokens.
_MOST = 2**24
_Count = Annotated[int, Field(ge=1, le=_MOST)]
# A UnitKey, which JSON text has as a string.
_Key = Annotated[Any, BeforeValidator(UnitKey.parse)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Measured times of a model as its units go, on one machine, for one workload.

    Args:
        device: where it was measured: the processor's or GPU's name.
        threads: of the CPU.
        dtype: precision of the weights.
        model_type: transformers' name of the architecture.
        unit: what a head's index names.
        workload: see `deadhead.measure.timing`.
        batch_size: texts at once.
        length: tokens of a text.
        new_tokens: that "decode" adds to each.
        dense: median seconds of the model as it is.
        seconds: by "heads" and "blocks" (of hidden units), median seconds by the share of units that every layer keeps.
        units: by key, how many units there are; hidden units only where they were thinned out too.
        weights: by key, what share of the time that goes with all heads, or all hidden units, goes with this layer's.
    """

    device: str
    threads: _Count
    dtype: str
    model_type: str
    unit: str
    workload: Workload
    batch_size: _Count
    length: _Count
    new_tokens: int
    dense: Annotated[_Number, Field(gt=0)]
    seconds: Mapping[str, Mapping[str, _Number]]
    units: Mapping[_Key, _Count]
    weights: Mapping[_Key, _Number]

    def costs(self) -> UnitCosts:
        """Return seconds as a sum over layers, a straight line between two measured shares, never falling."""
        tables: dict[UnitKey, torch.Tensor] = {}
        for key, count in self.units.items():
            measured = sorted((float(share), seconds) for share, seconds in self.seconds[f"{key.kind}s"].items())
            shares = torch.tensor([*(share for share, _ in measured), 1.0], dtype=torch.float64)
            seconds = torch.tensor([*(value for _, value in measured), self.dense], dtype=torch.float64)
            # More units do not take less time: what looks like it is noise. Counted back from the dense model's time,
            # the surest of them.
            seconds = seconds.clamp(max=self.dense).flip(0).cummin(0).values.flip(0)
            saved = seconds - seconds[0]
            kept = torch.arange(count + 1, dtype=torch.float64) / count
            place = torch.searchsorted(shares, kept, right=True).clamp(1, len(shares) - 1)
            low, high = shares[place - 1], shares[place]
            part = (kept - low) / (high - low)
            tables[key] = self.weights[key] * (saved[place - 1] * (1 - part) + saved[place] * part)
        return UnitCosts(fixed=self.dense - sum(float(table[-1]) for table in tables.values()), tables=tables)

    def predict(self, plan: HeadPlan) -> float:
        """Return the seconds that the model cut by a plan will take."""
        kept = plan.units
        return self.costs().of({key: len(kept.get(key, range(count))) for key, count in self.units.items()})

    def speedup(self, plan: HeadPlan) -> float:
        """Return how many times as fast the model cut by a plan will be."""
        return self.dense / self.predict(plan)

    def require(
        self,
        model: PreTrainedModel,
        *,
        unit: str | None,
        hidden: bool,
        workload: Workload,
        batch_size: int,
        length: int,
    ) -> None:
        """Check that this was measured of `model`, on this machine and in this way.

        Raises:
            InputError: it was not; the message names the first difference.
        """
        asked = {"workload": workload, "batch_size": batch_size, "length": length}
        for name, value in (_setting(model, unit, hidden=hidden) | asked).items():
            known = getattr(self, name)
            if known != value:
                if name == "units":
                    known, value = _written(known), _written(value)
                raise InputError(
                    f"The latencies were measured with {name.replace('_', ' ')} {known!r}, but this is {value!r}; "
                    "delete latency.json to measure anew."
                )

    def to_json(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all."""
        write_json(Path(path), asdict(self) | {name: _written(getattr(self, name)) for name in ("units", "weights")})

    @classmethod
    def from_json(cls, path: str | Path) -> Latency:
        """Read it from a file.

        Raises:
            InputError: the file is missing, is not JSON or holds something else.
        """
        values = read_object(Path(path), what="list of latencies")
        try:
            # Of JSON text even a strict check makes a dataclass.
            found = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
            shares = [float(share) for curve in found.seconds.values() for share in curve]
            are_in_bounds = all(0 <= share < 1 for share in shares) and sum(found.units.values()) <= _MOST
            if not are_in_bounds or set(found.units) != set(found.weights):
                raise ValueError("shares must be below 1, units few, and weights of the same layers")
            found.costs()
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise InputError(f"{path} does not hold latencies that deadhead measured; delete it.") from error
        return found


def _written(values: Mapping[UnitKey, Any]) -> dict[str, Any]:
    """Return values by key as a file has them."""
    return {str(key): value for key, value in values.items()}


def measure_latency(
    model: PreTrainedModel,
    *,
    unit: Any = None,
    hidden: bool = False,
    workload: Workload = "prefill",
    batch_size: int = 8,
    length: int = 128,
    new_tokens: int = NEW_TOKENS,
    repeats: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Latency:
    """Measure how long a model takes as the units of its layers go.

    The model is timed on the device it is on, and not changed. The workload is one of `bench`. Each model is repeated
    as often as fits into most of a minute, if `repeats` does not say. `progress` is told rounds done, and in all.

    Raises:
        InputError: a number is below 1, the model has too few positions, or the unit is not its own.
        UnsupportedModel: there is nothing to thin out.
    """
    require_timed(model, workload, length, new_tokens)
    layout = find_layout(model)
    setting = _setting(model, unit, hidden=hidden)
    sites = layout.all_sites(model, setting["unit"], hidden=hidden)
    choices = choices_of(sites, setting["unit"], hidden)
    weights = _weights(model, setting["unit"], length, hidden=hidden)
    models = {"dense": pruned_copy(model)}
    for kind in ("head", "block"):
        for share in _SHARES:
            thinned = {site.key: round(share * len(site.units)) for site in sites if site.key.kind == kind}
            kept = {site.key: site.units[: thinned.get(site.key)] for site in sites}
            # Few units cannot be halved exactly.
            true = sum(weights[key] * count / setting["units"][key] for key, count in thinned.items() if key in weights)
            if thinned and true < 1:
                models[f"{kind}s {true}"] = pruned_copy(model, choices.plan_of(kept))
    how: dict[str, Any] = {"workload": workload, "batch_size": batch_size, "length": length, "new_tokens": new_tokens}
    if repeats is None:
        once = bench({"dense": models["dense"]}, repeats=1, **how)["dense"].seconds * len(models)
        repeats = min(max(round(_SECONDS / max(once, 1e-6)), _REPEATS[0]), _REPEATS[1])
        # A slow spell then spoils one round of three; where a time is long, one round is all that can be afforded.
        rounds = [repeats // 3] * 3 if repeats >= 3 * _REPEATS[0] else [repeats]
    else:
        rounds = [repeats]
    found: dict[str, list[float]] = {name: [] for name in models}
    for done, count in enumerate(rounds):
        progress(done, len(rounds))
        for name, timing in bench(models, repeats=count, **how).items():
            found[name].append(timing.seconds)
    progress(len(rounds), len(rounds))
    dense = statistics.median(found.pop("dense"))
    seconds: dict[str, dict[str, float]] = {}
    for name, values in found.items():
        kind, kept_share = name.split()
        seconds.setdefault(kind, {})[kept_share] = statistics.median(values)
    return Latency(**setting, **how, dense=dense, seconds=seconds, weights=weights)


def _weights(model: PreTrainedModel, unit: Unit, length: int, *, hidden: bool) -> dict[UnitKey, float]:
    """Return each layer's share of what all layers' heads cost, or all their hidden units, in FLOPs."""
    costs = counted_costs(model, "flops", unit=unit, hidden=hidden, length=max(1, length // 2))
    whole = {key: float(table[-1]) for key, table in costs.tables.items()}
    sums = {kind: sum(value for key, value in whole.items() if key.kind == kind) for kind in ("head", "block")}
    return {key: value / sums[key.kind] for key, value in whole.items()}


def _setting(model: PreTrainedModel, unit: Any, *, hidden: bool) -> dict[str, Any]:
    """Return what measured times depend on, of the model and the machine."""
    layout = find_layout(model)
    unit = layout.choose_unit(model, unit, what="heads are cut by")
    has_blocks(layout, model, hidden)
    is_gpu = model.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(model.device) if is_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_type": model.config.model_type,
        "unit": unit,
        "units": {site.key: len(site.units) for site in layout.all_sites(model, unit, hidden=hidden) if site.units},
    }
