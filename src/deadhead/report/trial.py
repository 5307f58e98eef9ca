"""A model whose heads can be switched off and on: its perplexity on held-out text and its continuation of a prompt."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deadhead.attaching import attach
from deadhead.checkpoints import checkpoint
from deadhead.checkpoints.declared import has_gates
from deadhead.data import TokenStream, load_text, load_tokenizer
from deadhead.errors import InputError
from deadhead.gates.gates import HeadGates
from deadhead.layouts import find_layout
from deadhead.measure.evaluation import evaluate
from deadhead.measure.generate import generate_text
from deadhead.modes import best_device
from deadhead.plans.choices import Choices
from deadhead.plans.plan import HeadPlan, UnitKey
from deadhead.plans.unit_plan import is_count
from deadhead.report.attention import run_attention
from deadhead.report.run_facts import checkpoints_in, plan_in
from deadhead.training.recipes.recipe import DataRecipe

_NEW_TOKENS = 120
_LONGEST_PROMPT = 2000


@dataclass
class _Loaded:
    name: str
    model: PreTrainedModel
    gates: HeadGates
    tokenizer: PreTrainedTokenizerBase
    text: TokenStream
    whole: float


class Trial:
    """The models of a run, or a checkpoint, with gates that the page's user can switch.

    One model is in memory at a time, and one request is served at a time. `tokens` of the text's held-out part are
    scored; `cache` may hold its tokens already. All methods raise InputError for an invalid request.
    """

    def __init__(self, folder: Path, data: DataRecipe, *, cache: Path | None = None, tokens: int = 2048) -> None:
        self.folder = folder
        self.data = data
        self.cache = cache
        self.tokens = tokens
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None

    @property
    def models(self) -> dict[str, Path]:
        """Folders of the models that exist, by name; those with gates come first."""
        return checkpoints_in(self.folder, {"gated": "gated", "dense": "dense", "model": "."})

    def describe(self, name: str) -> dict[str, Any]:
        """Load a model; return its folder, its unit and, by layer, its units and those that the plan keeps."""
        with self._lock:
            gates = self._load(name).gates
            plan = plan_in(self.folder)
            planned = {} if plan is None else _places(gates.choices, plan)
            return {
                "folder": str(self.models[name]),
                "unit": gates.unit,
                "layers": [
                    {
                        "key": str(key),
                        "layer": str(key.layer),
                        "what": key.kind,
                        "total": gates.choices.total[key] if key.kind == "head" else len(members),
                        "present": list(gates.choices.units[key] if key.kind == "head" else range(len(members))),
                        "planned": planned.get(key),
                    }
                    for key, members in gates.choices.members.items()
                ],
            }

    def measure(self, name: str, kept: Mapping[str, Sequence[int]], prompt: str) -> dict[str, Any]:
        """Switch off all units except some; return the perplexity, the continuation of a prompt and the head plan.

        For a key that is not in `kept`, all units are on.
        """
        if len(prompt) > _LONGEST_PROMPT:
            raise InputError(
                f"A prompt of at most {_LONGEST_PROMPT} characters was expected, but got {len(prompt)}; shorten it."
            )
        with self._lock:
            loaded = self._load(name)
            gates = loaded.gates
            asked = {UnitKey.parse(key): units for key, units in kept.items()}
            plan = gates.choices.plan_of(_units(gates.choices, asked), output_scale=gates.config.output_scale)
            gates.set_plan(plan)
            return {
                "perplexity": evaluate(loaded.model, loaded.text, limit=self.tokens).perplexity,
                "whole": loaded.whole,
                "continuation": generate_text(loaded.model, loaded.tokenizer, prompt, max_new_tokens=_NEW_TOKENS),
                "on": sum(int(gate.is_open.sum()) for _, gate in gates),
                "total": sum(gates.choices.total[key] if key.kind == "head" else gate.num_heads for key, gate in gates),
                "plan": plan.to_dict(),
            }

    def attention(self, sentence: str) -> dict[str, Any]:
        """Return the attention patterns of every model that exists, by its name on the page."""
        with self._lock:
            return run_attention(self.folder, sentence)

    def _load(self, name: str) -> _Loaded:
        if self._loaded is not None and self._loaded.name == name:
            return self._loaded
        folder = self.models.get(name)
        if folder is None:
            raise InputError(f"There is no model {name!r} here; choose one of: {', '.join(self.models) or 'none yet'}.")
        self._loaded = None
        if has_gates(folder):
            model, gates = checkpoint.load_gated(folder)
        else:
            # Fresh ones, on what the run's plan counts.
            model = checkpoint.load(folder)
            plan = plan_in(self.folder) or find_layout(model).recorded_plan(model)
            hidden = plan is not None and plan.hidden_units is not None
            gates = attach(model, unit=None if plan is None else plan.unit, blocks=hidden)
        model.to(best_device())  # type: ignore[arg-type]
        tokenizer = load_tokenizer(folder)
        text, _ = load_text(
            self.data.source,
            tokenizer=tokenizer,
            **self.data.reading,
            cache_dir=self.cache if self.cache is not None and self.cache.is_dir() else None,
        )
        gates.set_plan(gates.choices.plan({}, output_scale=gates.config.output_scale))
        valid = text.splits["valid"]
        whole = evaluate(model, valid, limit=self.tokens).perplexity
        self._loaded = _Loaded(name, model, gates, tokenizer, valid, whole)
        return self._loaded


def _places(choices: Choices, plan: HeadPlan) -> dict[UnitKey, list[int]]:
    """Return the units that a plan of this model keeps, as the page counts: heads of the dense model, blocks by index.

    If the plan keeps a part of a block, hidden units are left out.
    """
    units = choices.kept_units(plan)
    heads = {key: list(kept) for key, kept in units.items() if key.kind == "head"}
    if not choices.fits(plan):
        return heads
    kept = choices.kept(plan)
    return heads | {key: kept_H.nonzero().flatten().tolist() for key, kept_H in kept.items() if key.kind == "block"}


def _units(choices: Choices, asked: Mapping[UnitKey, Sequence[int]]) -> dict[UnitKey, Sequence[int]]:
    """Return the units that stay, from heads and blocks as the page counts them."""
    found: dict[UnitKey, Sequence[int]] = {}
    for key, places in asked.items():
        if key not in choices.members:
            raise InputError(f"The model has no layer {str(key)!r}.")
        found[key] = places
        if key.kind == "block":
            blocks = choices.members[key]
            if not isinstance(places, list) or not all(is_count(place) and place < len(blocks) for place in places):
                raise InputError(
                    f"The blocks to keep in layer {key.layer} must be a list of numbers below {len(blocks)}."
                )
            found[key] = [unit for place in places for unit in blocks[place]]
    return found
