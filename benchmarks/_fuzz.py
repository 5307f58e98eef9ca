"""Damage to the files that deadhead parses itself. Reading one gives a value or one sentence, nothing else."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deadhead
from benchmarks._tiny_models import tiny_model
from deadhead.attaching import detach
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.declared import GATES_FILE
from deadhead.checkpoints.gate_files import GATES_CONFIG_FILE, load_gates, save_gates
from deadhead.disk.checksums import CHECKSUMS_FILE, read_checksums
from deadhead.disk.stored import read_stored
from deadhead.errors import InputError
from deadhead.measure.cost import config_cost
from deadhead.measure.latency import Latency
from deadhead.plans.picture import gate_courses
from deadhead.plans.plan import HeadPlan
from deadhead.plans.unit_plan import UnitPlan
from deadhead.report.run_facts import RunFacts, sibling_points
from deadhead.report.tables import stages_table
from deadhead.training.callbacks.metrics import read_metrics
from deadhead.training.recipes.reading import load_recipe, to_toml
from deadhead.training.recipes.recipe import Recipe
from deadhead.training.runs.summary import read_summary, write_summary

# What stands in files of all kinds, and what parsers stumble over.
_WORDS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"null",
    b"true",
    b"NaN",
    b"-1",
    b"1e999",
    b"0x1",
    b"\\u0000",
    b"\xff",
]
_WORDS += [b"\n", b"=", b"'", b"\x00", b"9" * 400, b"[" * 3000, b"\xf0\x9f\xa5\x80", b"../", b"\x1b[2J"]
_ODD: list[Any] = [None, True, -1, 0, 1.5, math.nan, math.inf, 10**30, 10**400, "", "a", "\0", "../../x", [], {}, [[]]]
_SLOW = 5.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """A file to damage, and the function that reads it.

    Args:
        name: of the kind of file.
        path: of the file, which is valid at first.
        read: reads the file and checks the result.
    """

    name: str
    path: Path
    read: Callable[[], object]


def targets(place: Path) -> Iterator[Target]:
    """Write valid files into a folder, and yield a target for each."""
    recipe = place / "recipe.toml"
    recipe.write_text(to_toml(Recipe()))
    yield Target(name="recipe", path=recipe, read=lambda: to_toml(load_recipe(recipe)))

    units = UnitPlan.of_blocks(size=4, kept={0: [1]}, total={0: 2, 1: 2})
    plan = HeadPlan(kept={0: [0, 2], 1: []}, total={0: 4, 1: 4}, hidden_units=units)
    plan.to_json(place / "head_plan.json")
    yield Target(name="head plan", path=place / "head_plan.json", read=lambda: _used(place / "head_plan.json"))

    model = tiny_model("llama")
    gates = deadhead.attach(model)
    save_gates(gates, place)
    detach(model)

    def load() -> None:
        try:
            load_gates(model, place).plan()
        finally:
            detach(model)

    yield Target(name="gate constants", path=place / GATES_CONFIG_FILE, read=load)
    yield Target(name="gate values", path=place / GATES_FILE, read=load)

    metrics = place / "metrics.jsonl"
    line = {"phase": "prune", "step": 1, "loss": 2.5, "heads": [4, 3], "seconds": 0.1}
    line |= {"open_probability": {"0": [0.5] * 4, "1": [0.1] * 4}, "output_difference": {"0": [0.5] * 4}}
    metrics.write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(1, 6)))
    yield Target(name="metrics", path=metrics, read=lambda: gate_courses(read_metrics(metrics)))

    run = place / "run"
    run.mkdir()
    for name in ("recipe.toml", "metrics.jsonl"):
        shutil.copy(place / name, run / name)
    stage = {"heads": [4, 4], "parameters": 9, "flops_per_token": 9.0, "perplexity": 3.0, "bits_per_byte": 1.0}
    stage |= {"tokens_per_second": 5.0, "steps": 3}
    stages = dict.fromkeys(("dense", "gated", "cut", "finetuned", "control"), stage)
    data = {"source": "a", "sha256": "b" * 64, "tokens": 3}
    budget = {"kind": "sparsity", "asked": 0.5, "reached": 0.5}
    write_summary(
        run, {**stages, "data": data, "budget": budget, "samples": {"dense": "x"}, "versions": {"torch": "2"}}
    )
    # Without its checksum, by which every change would be seen.
    (run / "summary.json").write_text(json.dumps(read_summary(run)))
    plan.to_json(run / "head_plan.json")
    for name in ("summary.json", "metrics.jsonl", "recipe.toml", "head_plan.json"):
        yield Target(name=f"run: {name}", path=run / name, read=lambda: _shown(run))

    latency = place / "latency.json"
    curve = {"0.0": 0.2, "0.5": 0.6}
    kinds = {"device": "cpu", "threads": 2, "dtype": "float32", "model_type": "llama", "unit": "kv_group"}
    sizes = {"workload": "prefill", "batch_size": 2, "length": 9, "new_tokens": 16}
    tables = {"seconds": {"heads": curve}, "units": {"0": 4, "1": 4}, "weights": {"0": 0.5, "1": 0.5}}
    latency.write_text(json.dumps({**kinds, **sizes, **tables, "dense": 1.0}))
    counted = HeadPlan(kept={0: [0]}, total={0: 4, 1: 4})
    yield Target(name="latencies", path=latency, read=lambda: Latency.from_json(latency).predict(counted))

    whole = place / "whole"
    deadhead.save(model, whole)
    yield Target(name="checksums", path=whole / CHECKSUMS_FILE, read=lambda: read_checksums(whole))
    config = place / "config" / "config.json"
    config.parent.mkdir()
    shutil.copy(whole / "config.json", config)
    yield Target(name="configuration", path=config, read=lambda: config_cost(checkpoint.load_config(config.parent)))

    shards = place / "shards"
    model.save_pretrained(shards, max_shard_size="20KB")
    yield Target(name="index", path=shards / "model.safetensors.index.json", read=lambda: read_stored(shards))
    first = sorted(shards.glob("*.safetensors"))[0]
    yield Target(name="header of a shard", path=first, read=lambda: read_stored(shards))


def _used(path: Path) -> None:
    plan = HeadPlan.from_json(path)
    assert HeadPlan.from_dict(plan.to_dict()) == plan
    str(plan)


def _shown(run: Path) -> None:
    facts = RunFacts(run)
    facts.update()
    sibling_points(facts)
    stages_table(facts.facts["summary"])
    json.dumps(facts.facts)


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with some damage: to bits and bytes, or, of JSON, to values."""
    if data.lstrip()[:1] in (b"{", b"[") and draw.random() < 0.5:
        try:
            return json.dumps(_changed_value(json.loads(data), draw)).encode()
        except ValueError:
            pass  # lines of JSON, or a number that is written nowhere
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 5, 20])):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + draw.randrange(1, 40)] = b""
        elif kind == 2:
            changed[place:place] = draw.choice(_WORDS)
        elif kind == 3:
            changed[place : place + 1] = draw.choice(_WORDS)
        elif kind == 4:
            begin = draw.randrange(len(changed) + 1)
            changed[place:place] = changed[begin : begin + draw.randrange(1, 200)]
        elif draw.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def _changed_value(value: Any, draw: random.Random) -> Any:
    """Return a copy of a JSON value in which one inner value is changed, removed or doubled."""
    places = list(_places(value))
    if not places:
        return draw.choice(_ODD)
    value = copy.deepcopy(value)
    path = draw.choice(places)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    kind = draw.randrange(4)
    if kind == 0:
        del inner[path[-1]]
    elif kind == 1 and isinstance(inner, dict):
        inner[str(draw.choice(_ODD))] = inner.pop(path[-1])
    else:
        inner[path[-1]] = draw.choice(_ODD)
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield (*path, key)
        yield from _places(inner, (*path, key))


@dataclass
class Outcome:
    """The results of damaging one file repeatedly.

    Args:
        read: number of damaged files that were still read.
        refused: number of files that gave a sentence.
        faults: what was neither, as text, with the bytes; nothing is among them that took long for no reason.
        slowest: seconds of the slowest.
    """

    read: int = 0
    refused: int = 0
    faults: list[str] = None  # type: ignore[assignment]
    slowest: float = 0.0

    def __post_init__(self) -> None:
        self.faults = self.faults or []


def fuzz(target: Target, count: int, seed: int) -> Outcome:
    """Damage a target's file `count` times, each anew from what it was, and read it."""
    good, draw, found = target.path.read_bytes(), random.Random(f"{target.name} {seed}"), Outcome()
    target.read()
    for _ in range(count):
        data = damaged(good, draw)
        target.path.write_bytes(data)
        begin = time.perf_counter()
        try:
            target.read()
            found.read += 1
        except InputError as error:
            found.refused += 1
            if not str(error) or "\n" in str(error):
                found.faults.append(f"{target.name}: not one line: {str(error)!r}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            found.faults.append(
                f"{target.name}: {type(error).__name__}: {str(error)[:200]} "
                f"({Path(where.filename).name}:{where.lineno}) from {data[:2000]!r}"
            )
        seconds = time.perf_counter() - begin
        found.slowest = max(found.slowest, seconds)
        if seconds > _SLOW:
            found.faults.append(f"{target.name}: took {seconds:.1f} s from {data[:2000]!r}")
    target.path.write_bytes(good)
    return found
