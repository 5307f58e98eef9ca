"""The files for people in a checkpoint: its model card, and the licence files of the base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedModel

from deadhead.compensation.record import card_line
from deadhead.disk.hub import is_name, quick
from deadhead.layouts import find_layout
from deadhead.layouts.base import TAGS
from deadhead.layouts.classes import auto_name
from deadhead.layouts.stock import why_not_stock
from deadhead.measure.cost import model_cost

# Every model card of ours has these tags, also of a model that is not cut; a folder without them is not overwritten.
_OURS = TAGS[:2]
TAG = json.dumps(_OURS).strip("[]")
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
# The parts of the base model's card that remain true for the cut model.
_KEPT_METADATA = ("license", "license_name", "license_link", "language", "base_model")


def copy_licences(base: str | Path | None, folder: Path) -> None:
    """Copy the licence files of the folder that a model was made from; a model from the hub has none here."""
    for file in Path(base).iterdir() if base is not None and Path(base).is_dir() else ():
        if file.name.upper().startswith(LICENCES) and file.is_file():
            shutil.copy2(file, folder / file.name)


def _origin(base: str | Path | None) -> dict[str, Any]:
    """Return what the new card takes over from the base model's: licence, languages, and the model's origin."""
    if base is None:
        return {}
    name = str(base) if is_name(base) else None
    metadata: dict[str, Any] = {}
    # A card that cannot be fetched, or is not YAML, is no reason to lose a trained model.
    with suppress(Exception), quick(base):
        card = Path(base) / "README.md" if name is None else Path(hf_hub_download(name, "README.md"))
        metadata = metadata_load(card) or {}
    # YAML takes the code of Norwegian, no, for a truth value.
    languages = metadata.get("language")
    if isinstance(languages, list):
        metadata["language"] = ["no" if each is False else each for each in languages]
    elif languages is False:
        metadata["language"] = "no"
    kept = {key: metadata[key] for key in _KEPT_METADATA if _is_text(metadata.get(key))}
    return kept | ({} if name is None else {"base_model": name})


def _is_text(value: Any) -> bool:
    """Return whether a value is what the hub expects of what is kept: a text that is not empty, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(each, str) and each for each in values)


def model_card(
    model: PreTrainedModel,
    base: str | Path | None,
    metrics: Mapping[str, float] | None = None,
    about: str | None = None,
) -> str:
    """Return the text of a model's card; arguments as in `checkpoint.save`."""
    cost, plan = model_cost(model), find_layout(model).recorded_plan(model)
    if about is None:
        what = "Attention heads" if plan is None or plan.hidden_units is None else "Heads and hidden units"
        cut = f"{what} of this model were found dead and cut off by deadhead."
        about = "A model that deadhead has not cut." if plan is None else cut
    is_stock = type(model).__module__.startswith("transformers.")
    auto = auto_name(model)
    code = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("PATH")']
    if not is_stock and auto.startswith("Auto"):
        code[-1] = f'model = {auto}.from_pretrained("PATH", trust_remote_code=True)  # or import deadhead first'
    elif not is_stock:
        code = ["import deadhead", "", 'model = deadhead.load("PATH")']
    front: dict[str, Any] = {
        **_origin(base),
        "library_name": "transformers",
        "tags": [*(_OURS if plan is None else TAGS)],
    }
    if auto == "AutoModelForCausalLM":
        front["pipeline_tag"] = "text-generation"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        "---",
        f"# {model.config.model_type}",
        "",
        about,
        "",
        f"- heads a layer: {cost.heads}",
        *([f"- hidden units a layer: {cost.hidden_units}"] if plan is not None and plan.hidden_units else []),
        f"- parameters: {cost.parameters:,}",
        f"- FLOPs a token: {cost.flops_per_token:,.0f}",
        *(f"- {name}: {value:.4g}" for name, value in (metrics or {}).items()),
        *([f"- {card_line(noted)}"] if (noted := getattr(model.config, "compensation", None)) else []),
        "",
        "```python",
        *code,
        "```",
        *(["", f"It has modelling code of its own, because {why}."] if (why := why_not_stock(model)) else []),
        "",
    ]
    return "\n".join(lines)
