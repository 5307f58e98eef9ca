"""A cost model of this machine: the time that a model takes, as a function of the units that each layer keeps.

The units of all layers are thinned out together, heads and hidden units separately, and the whole model is timed each
time beside the dense one. So a layer's time includes everything that goes with it, such as memory traffic, and no layer
has to run alone. The time saved is divided among layers by the FLOPs that they lose.
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

# The shares of its units that every layer keeps, in the models that are timed beside the dense one.
_SHARES = (0.0, 0.25, 0.5, 0.75)
# Seconds that the measurement should take, and how often each model is timed, at least and at most.
_SECONDS = 40.0
_REPEATS = (4, 60)
# Layers have fewer heads, and texts fewer tokens.
_MOST = 2**24
_Count = Annotated[int, Field(ge=1, le=_MOST)]
# A UnitKey, which is a string in JSON.
_Key = Annotated[Any, BeforeValidator(UnitKey.parse)]
_Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Measured times of a model with fewer and fewer units, on one machine, for one workload.

    Args:
        device: name of the processor or GPU that ran the model.
        threads: threads of the CPU.
        dtype: precision of the weights.
        model_type: transformers' name of the architecture.
        unit: what a head's index names.
        workload: see `deadhead.measure.timing`.
        batch_size: texts at once.
        length: tokens of a text.
        new_tokens: tokens that "decode" adds to each text.
        dense: median seconds of the model as it is.
        seconds: for "heads" and "blocks" (of hidden units), median seconds by the share of units that each layer keeps.
        units: number of units by key; hidden units only if they were thinned out too.
        weights: by key, the layer's share of the time that goes with all heads, or all hidden units.
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
        """Return seconds as a sum over layers: linear between measured shares, and never less for more units."""
        tables: dict[UnitKey, torch.Tensor] = {}
        for key, count in self.units.items():
            measured = sorted((float(share), seconds) for share, seconds in self.seconds[f"{key.kind}s"].items())
            shares = torch.tensor([*(share for share, _ in measured), 1.0], dtype=torch.float64)
            seconds = torch.tensor([*(value for _, value in measured), self.dense], dtype=torch.float64)
            # More units cannot take less time; if they seem to, it is noise. So make times monotonic, beginning with
            # the dense model's, which is the most reliable.
            seconds = seconds.clamp(max=self.dense).flip(0).cummin(0).values.flip(0)
            saved = seconds - seconds[0]
            kept = torch.arange(count + 1, dtype=torch.float64) / count
            place = torch.searchsorted(shares, kept, right=True).clamp(1, len(shares) - 1)
            low, high = shares[place - 1], shares[place]
            part = (kept - low) / (high - low)
            tables[key] = self.weights[key] * (saved[place - 1] * (1 - part) + saved[place] * part)
        return UnitCosts(fixed=self.dense - sum(float(table[-1]) for table in tables.values()), tables=tables)

    def predict(self, plan: HeadPlan) -> float:
        """Return the predicted seconds of the model after a cut by a plan."""
        kept = plan.units
        return self.costs().of({key: len(kept.get(key, range(count))) for key, count in self.units.items()})

    def speedup(self, plan: HeadPlan) -> float:
        """Return how many times as fast the model is predicted to be after a cut by a plan."""
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
        """Check that the times were measured for `model`, on this machine and with these settings.

        Raises:
            InputError: they were not; the message names the first difference.
        """
        asked = {"workload": workload, "batch_size": batch_size, "length": length}
        for name, value in (_setting(model, unit, hidden=hidden) | asked).items():
            known = getattr(self, name)
            if known != value:
                if name == "units":
                    known, value = _written(known), _written(value)
                raise InputError(
                    f"The latencies were measured with {name.replace('_', ' ')} {known!r}, but this is {value!r}; "
                    "delete latency.json to measure again."
                )

    def to_json(self, path: str | Path) -> None:
        """Write the latencies to a JSON file, completely or not at all."""
        write_json(Path(path), asdict(self) | {name: _written(getattr(self, name)) for name in ("units", "weights")})

    @classmethod
    def from_json(cls, path: str | Path) -> Latency:
        """Read latencies from a JSON file.

        Raises:
            InputError: the file is missing, is not JSON or holds something else.
        """
        values = read_object(Path(path), what="list of latencies")
        try:
            # From JSON text, even a strict check makes a dataclass.
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
    """Return values by key in the form that files have."""
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
    """Measure how long a model takes with fewer and fewer units in its layers.

    The model is timed on the device that it is on, and is not changed. The workload is one of those of `bench`. Unless
    `repeats` is set, models are repeated as often as fits into most of a minute. `progress` is called with the rounds
    done and to do.

    Raises:
        InputError: a number is below 1, the model has too few positions, or it has no such unit.
        UnsupportedModel: the model has no units to thin out.
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
            # A small number of units cannot be divided exactly.
            true = sum(weights[key] * count / setting["units"][key] for key, count in thinned.items() if key in weights)
            if thinned and true < 1:
                models[f"{kind}s {true}"] = pruned_copy(model, choices.plan_of(kept))
    how: dict[str, Any] = {"workload": workload, "batch_size": batch_size, "length": length, "new_tokens": new_tokens}
    if repeats is None:
        once = bench({"dense": models["dense"]}, repeats=1, **how)["dense"].seconds * len(models)
        repeats = min(max(round(_SECONDS / max(once, 1e-6)), _REPEATS[0]), _REPEATS[1])
        # A slow period then spoils one round of three; if a round takes long, there is time for one only.
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
    """Return each layer's share of the FLOPs of all heads, or of all hidden units."""
    costs = counted_costs(model, "flops", unit=unit, hidden=hidden, length=max(1, length // 2))
    whole = {key: float(table[-1]) for key, table in costs.tables.items()}
    sums = {kind: sum(value for key, value in whole.items() if key.kind == kind) for kind in ("head", "block")}
    return {key: value / sums[key.kind] for key, value in whole.items()}


def _setting(model: PreTrainedModel, unit: Any, *, hidden: bool) -> dict[str, Any]:
    """Return the properties of model and machine that measured times depend on."""
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
