"""Find which of transformers' causal language models can be gated, cut, reloaded and generate, and why others cannot.

    python benchmarks/registry.py [TYPE …] [--quick] [--markdown docs/architectures.md]

For every type, the program builds a tiny random model and cuts it by a random plan of heads, and of feed-forward blocks
if it has any, that empties the first layer. It checks that the gated model computes what the cut model does (whole,
cached, left-padded), that the removal changes the outputs at all, that the saved model reloads bit for bit, and that it
generates the same tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import random
import re
import resource
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deadhead
from benchmarks._tiny_models import CAUSAL_TYPES, VOCABULARY, tiny_model

_QUICK = ("llama", "gpt2", "gpt_neox", "phi3", "bert", "deepseek_v3", "mamba")
_TOLERANCE = 1e-5
_MEMORY = 16 << 30


@dataclass(kw_only=True)
class Outcome:
    """The result for one type.

    Args:
        model_type: transformers' name.
        state: "works", "refused" (one sentence, nothing changed), "wrong", or "not built".
        unit: the unit that a gate opens and closes.
        layers: layers whose heads can be pruned.
        block_layers: feed-forward layers whose hidden units can.
        difference: max|Δ| / max|reference| of the cut model's logits.
        reloads: whether the saved model's logits are the same bits.
        generates: whether greedy tokens from the cache are the same.
        reason: why the type does not work.
    """

    model_type: str
    state: str
    unit: str = ""
    layers: int = 0
    block_layers: int = 0
    difference: float = 0.0
    reloads: bool = False
    generates: bool = False
    reason: str = ""


def try_type(model_type: str, seed: int = 0) -> Outcome:
    """Gate, cut, save, reload and run a tiny model of a type."""
    try:
        model: Any = tiny_model(model_type, seed=seed)
        ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            dense = model(input_ids=ids).logits
    except Exception as error:
        return Outcome(model_type=model_type, state="not built", reason=_sentence(error))
    try:
        try:
            gates = deadhead.attach(model, blocks=True)
        except deadhead.UnsupportedModel:
            gates = deadhead.attach(model)
        plan = _random_plan(gates, seed)
        gates.set_plan(plan)
        gated = copy.deepcopy(model)
        deadhead.cut(model, plan)
    except deadhead.errors.CutError:
        return Outcome(
            model_type=model_type,
            state="refused",
            reason="gated and cut model differ: the cut noticed, and put the model back",
        )
    except deadhead.UnsupportedModel as error:
        return Outcome(model_type=model_type, state="refused", reason=str(error).partition(": ")[2] or str(error))
    blocks = 0 if plan.hidden_units is None else len(plan.hidden_units.total)
    outcome = Outcome(
        model_type=model_type, state="works", unit=gates.unit, layers=len(plan.total), block_layers=blocks
    )
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = gated(input_ids=ids).logits
        pairs = [(model(input_ids=ids).logits, expected), (_cached(model, ids), _cached(gated, ids))]
        with contextlib.suppress(TypeError, ValueError):
            padded = [m(input_ids=ids, attention_mask=mask).logits[:, 4:] for m in (model, gated)]
            pairs.append((padded[0], padded[1]))
    outcome.difference = max(_relative(a, b) for a, b in pairs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        outcome.reloads = torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    outcome.generates = all(torch.equal(_greedy(m, ids), _greedy(gated, ids)) for m in (model, again))
    if outcome.difference > _TOLERANCE or _relative(dense, expected) < 1e-3:
        outcome.state = "wrong"
        outcome.reason = f"differs by {outcome.difference:.1e}; the cut shows by {_relative(dense, expected):.1e}"
    elif not outcome.reloads and not _stock_reloads(model_type, seed, ids):
        outcome.state, outcome.reason = "not built", "transformers' own model does not reload as it was saved"
    elif not (outcome.reloads and outcome.generates):
        outcome.state, outcome.reason = "wrong", "does not reload or generate as it should"
    return outcome


def _stock_reloads(model_type: str, seed: int, ids: Tensor) -> bool:
    model: Any = tiny_model(model_type, seed=seed)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
        return torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def _random_plan(gates: deadhead.HeadGates, seed: int) -> deadhead.HeadPlan:
    """Return a plan that empties the first layer, and keeps at least one head and cuts at least one in another."""
    draw = random.Random(seed)
    kept = {
        key: sorted(draw.sample(range(n), draw.randint(1, max(1, n - 1)))) for key, n in gates.choices.counts.items()
    }
    for keys in ([key for key in kept if key.kind == kind] for kind in ("head", "block")):
        kept |= {key: [] for key in keys[:1]}
    return gates.choices.plan(kept)


def _cached(model: Any, ids: Tensor) -> Tensor:
    """Return logits of the text read in three pieces."""
    cache, pieces = None, []
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        try:
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        except (TypeError, ValueError):
            return model(input_ids=ids).logits
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return model(input_ids=ids).logits
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def _greedy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    try:
        return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # type: ignore[operator]
    except Exception as error:
        return torch.tensor([len(_sentence(error))])


def _relative(values: Tensor, reference: Tensor) -> float:
    return float((values - reference).abs().max() / reference.abs().max())


def _sentence(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:160]


def _markdown(outcomes: list[Outcome], counts: Counter[str]) -> str:
    total = ", ".join(f"{state} {count}" for state, count in counts.most_common())
    lines = [
        f"{len(outcomes)} model types of transformers {transformers.__version__}: {total}. Largest difference of "
        f"logits {max((o.difference for o in outcomes if o.state == 'works'), default=0):.1e}.",
        "",
        "| type | state | gates on | layers | with blocks | largest difference | reloads | generates | why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    marks = {True: "yes", False: "no"}
    for o in outcomes:
        tried = o.state in ("works", "wrong")
        found = (f"{o.difference:.0e}", marks[o.reloads], marks[o.generates]) if tried else ("", "", "")
        cells = (
            o.model_type,
            o.state,
            o.unit,
            str(o.layers or ""),
            str(o.block_layers or ""),
            *found,
            re.sub(r"[|`]", " ", o.reason),
        )
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the walk and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types (default: the whole registry)")
    parser.add_argument("--quick", action="store_true", help="a handful of types")
    parser.add_argument("--seeds", type=int, default=1, help="number of random models and plans for each type")
    parser.add_argument("--markdown", type=Path, help="write the table into this file, between its markers")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each type")
    args = parser.parse_args()
    # A configuration that ignores its tiny sizes must not take the machine with it.
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    outcomes = []
    for model_type in args.types or (_QUICK if args.quick else CAUSAL_TYPES):
        for seed in range(args.seeds):
            try:
                outcome = try_type(model_type, seed)
            except Exception as error:
                outcome = Outcome(model_type=model_type, state="wrong", reason=_sentence(error))
            if outcome.state != "works":
                break
        outcomes.append(outcome)
        if args.json:
            print(json.dumps(asdict(outcome)), flush=True)
        else:
            print(
                f"{outcome.state:9} {model_type:26} {outcome.unit:8} {outcome.difference:.1e} {outcome.reason}",
                flush=True,
            )
    counts = Counter(outcome.state for outcome in outcomes)
    if not args.json:
        print(", ".join(f"{state}: {count}" for state, count in counts.most_common()))
    if args.markdown:
        text = args.markdown.read_text("utf-8")
        begin, end = "<!-- registry -->\n", "<!-- /registry -->\n"
        before, _, rest = text.partition(begin)
        args.markdown.write_text(before + begin + _markdown(outcomes, counts) + end + rest.partition(end)[2], "utf-8")


if __name__ == "__main__":
    main()
