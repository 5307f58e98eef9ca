"""Compare SmolLM2-135M pruned by deadhead and by what others ship, on texts and BLiMP.

A cell is a method at one size, from one draw of the calibration text: 352 rows of 256 tokens of WikiText-2's validation
text. Draws begin 336 rows apart, as many as the text has room for. All methods read the same rows; methods that need
gradients or rank units for deadhead's compensation read only the first 40. Deadhead's methods are compensated; others
are as their authors ship them. A recovered cell continues from its method's model: it distils from the dense model, in
bfloat16 mixed precision, on that text and on books, row by row.

No method reads what is measured: the first 96 rows of 256 tokens of WikiText-2's test text, the same tokens in 24 rows
of 1,024, the first 24 rows of the last tenth of the books, and pairs of sentences of BLiMP. Losses of the same rows are
compared in pairs; the standard error is over rows, not over draws. Memory is the peak beyond the libraries, and
includes the dense model of 0.5 GB.

    python benchmarks/llm_table.py --corpora DIR [--blimp DIR] [--methods …] [--shares …] [--draws 0 1 2]
    python benchmarks/llm_table.py --corpora DIR --heads-only --methods gates taylor flap --shares 0.8 0.6
    python benchmarks/llm_table.py --corpora DIR --recover 250 --methods sizes flap+grail
    python benchmarks/llm_table.py [--picture FILE.png]     # show the results so far

DIR holds `wikitext2-valid.txt`, `wikitext2-test.txt` and `books.txt`. A cell is a file in `benchmarks/results/llm`,
which is kept with the program, so that the hours of a table can be spent on different days. Cells that exist are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import deadhead
from benchmarks._all_attention import machine
from benchmarks._llm_metrics import blimp, row_losses
from benchmarks._llm_others import SHIPPED
from benchmarks._llm_tables import DENSE, Cell, draw, found_in, short_table, table
from benchmarks._sweep import run_all
from benchmarks.llm import (
    BATCH,
    LENGTH,
    METHODS,
    OTHERS,
    SHARES,
    Point,
    Setting,
    batches,
    choose,
    peak,
    prepared,
    recipe_of,
    rows_of,
    tiny,
)
from deadhead.compensation.compensating import compensate_from
from deadhead.data import TokenStream
from deadhead.data.tokenizer import load_tokenizer
from deadhead.disk.files import write_json
from deadhead.measure.cost import model_cost
from deadhead.plans.kinds import ONE_SHOT
from deadhead.training import PhaseRun, PruneRecipe, train
from deadhead.training.phases.compensating import dense_copy
from deadhead.training.phases.defaults import recovery

RESULTS = Path(__file__).parent / "results" / "llm"
# Others that take gradients, for which their authors read a few thousand tokens; all else of others reads all rows.
BY_GRADIENTS = ("llm-pruner", "llm-pruner-everywhere", "torch-pruning")
DRAWS = 3
# Rows that the validation text has, and those from one draw to the next.
ROWS, APART = 1024, 336
# The share of the books that no method reads.
UNREAD = 0.1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What is read and measured. Sizes are in rows of 256 tokens, except `long`, in rows of 1,024.

    Args:
        model: folder of the dense model, with its tokenizer.
        corpora: folder of the texts.
        pairs: folder of BLiMP's paradigms; None leaves them out.
        fitted: rows of a draw; rankings, and others' methods that use gradients, read the first `scored`.
        apart: rows from one draw to the next.
        steps: steps of gates and of sizes, of four rows each.
        paired: pairs of each paradigm.
        models: folder for pruned models, which may recover later.
    """

    model: Path
    corpora: Path
    pairs: Path | None
    models: Path
    scored: int = 40
    fitted: int = 352
    apart: int = APART
    steps: int = 80
    tested: int = 96
    long: int = 24
    novels: int = 24
    paired: int = 50

    @property
    def numbers(self) -> dict[str, int]:
        """The numbers that all cells of a table have in common."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}

    def kept(self, cell: Cell) -> Path:
        """Return the folder of a cell's pruned model, before any recovery."""
        return self.models / replace(cell, recovered=0).name

    def valid(self, first: int, count: int) -> Tensor:
        """Return rows of the text that methods may read."""
        return rows_of(self.corpora / "wikitext2-valid.txt", self.model, first, count)

    def books(self, *, unread: bool) -> Path:
        """Return a file of the books' last tenth, which no method reads, or of what is before it."""
        text = (self.corpora / "books.txt").read_text(encoding="utf-8")
        cut = round((1 - UNREAD) * len(text))
        path = self.model.parent / f"books-{'unread' if unread else 'read'}.txt"
        path.write_text(text[cut:] if unread else text[:cut], encoding="utf-8")
        return path


def read(model: PreTrainedModel, texts: Texts) -> dict[str, Any]:
    """Return a model's measurements: losses of rows by text, and BLiMP's shares by paradigm."""
    test = texts.corpora / "wikitext2-test.txt"
    rows = {
        "wikitext2": rows_of(test, texts.model, 0, texts.tested),
        "long": rows_of(test, texts.model, 0, 4 * texts.long).reshape(-1, 4 * LENGTH),
        "books": rows_of(texts.books(unread=True), texts.model, 0, texts.novels),
    }
    # Six digits are as many as a sum in float32 has.
    found = {name: [round(loss, 6) for loss in row_losses(model, each)] for name, each in rows.items()}
    pairs = {}
    if texts.pairs is not None:
        pairs = blimp(model, load_tokenizer(texts.model), sorted(texts.pairs.glob("*.jsonl")), texts.paired)
    return {"losses": found, "blimp": pairs}


def prune(model: PreTrainedModel, cell: Cell, texts: Texts) -> None:
    """Prune a model in place by a cell's method and size."""
    rows = texts.valid(cell.draw * texts.apart, texts.fitted)
    if cell.method in OTHERS:
        SHIPPED[cell.method](model, batches(rows[: texts.scored] if cell.method in BY_GRADIENTS else rows), cell.share)
        return
    point = Point(share=cell.share, criterion=cell.method, heads_only=cell.heads_only)
    setting = Setting(
        model=texts.model,
        valid=texts.corpora / "wikitext2-valid.txt",
        test=None,
        scored=texts.scored,
        fitted=texts.fitted,
        # There it is a number for gates, of which sizes make half.
        steps=texts.steps * (2 if cell.method == "sizes" else 1),
    )
    dense = dense_copy(model, recipe_of(point, setting))
    deadhead.cut(model, choose(model, point, rows, setting))
    compensate_from(model, dense, batches(rows), consume=True)


def recover(model: PreTrainedModel, dense: PreTrainedModel, cell: Cell, texts: Texts) -> None:
    """Train a pruned model on the dense model's distribution, in place; every other row is from the books."""
    count, most = 2 * cell.recovered, min(ROWS, 2 * cell.recovered)
    wiki = texts.valid(0, most).repeat(-(-count // most), 1)[:count]
    books = rows_of(texts.books(unread=False), texts.model, 0, count)
    tokens = torch.stack([wiki, books], dim=1).flatten()
    asked = PruneRecipe(batch_size=BATCH, sequence_length=LENGTH, bf16=True)
    text = TokenStream(tokens=tokens.numpy(), num_bytes=1, num_words=1)
    train(model, text, recovery(asked, cell.recovered, model), PhaseRun(teacher=dense))


def measure(cell: Cell, texts: Texts, results: Path) -> None:
    """Measure one cell and write it down."""
    base = peak()
    model = deadhead.load(texts.model)
    kept = texts.kept(cell)
    clock, processor = time.perf_counter(), time.process_time()
    if cell.recovered:
        dense, model = model, deadhead.load(kept)
        recover(model, dense, cell, texts)
    elif cell.method != DENSE:
        prune(model, cell, texts)
    seconds = {"wall": time.perf_counter() - clock, "cores": time.process_time() - processor}
    peak_bytes = peak() - base
    # FLAP's biases are none that a configuration tells of.
    if not cell.recovered and cell.method not in (DENSE, "flap-as-shipped"):
        deadhead.save(model, kept, tokenizer=load_tokenizer(texts.model))
    cost = model_cost(model)
    sizes = {"parameters": cost.parameters, "heads": cost.heads, "hidden_units": cost.hidden_units}
    # Minutes of processors that differ are no minutes to compare.
    on = {"processor": torch.backends.cpu.get_cpu_capability()}
    found = {**read(model, texts), "seconds": seconds, "peak_bytes": peak_bytes, **on, **sizes}
    write_json(results / f"{cell.name}.json", {**asdict(cell), **texts.numbers, **found})


def _can_begin(cell: Cell, texts: Texts) -> bool:
    return not cell.recovered or texts.kept(cell).is_dir()


def is_measured(cell: Cell, texts: Texts, results: Path) -> bool:
    """Tell whether a cell was measured, with these numbers."""
    path = results / f"{cell.name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return all(known.get(name) == value for name, value in texts.numbers.items())


def _quick(folder: Path) -> tuple[Texts, list[Cell]]:
    """Return a setup that takes seconds: a tiny random model with texts and pairs of its own."""
    setting = tiny(folder)
    letters = setting.valid.read_text(encoding="utf-8")
    for name, times in (("wikitext2-valid", 1), ("wikitext2-test", 1), ("books", 4)):
        (folder / f"{name}.txt").write_text(letters * times, encoding="utf-8")
    pairs = folder / "pairs"
    pairs.mkdir()
    lines = [
        json.dumps({"sentence_good": letters[i : i + 9], "sentence_bad": letters[i + 9 : i + 18]}) for i in range(4)
    ]
    (pairs / "letters.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sizes = {"scored": 2, "fitted": 8, "apart": 4, "steps": 4, "tested": 3, "long": 1, "novels": 2, "paired": 3}
    texts = Texts(model=setting.model, corpora=folder, pairs=pairs, models=folder / "models", **sizes)
    first = Cell(method="sizes", share=0.8)
    others = [Cell(method="wanda-sp", share=0.8), Cell(method="taylor", share=0.5, heads_only=True)]
    return texts, [Cell(method=DENSE), first, *others, replace(first, recovered=2)]


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="Compare deadhead and other methods on a real model.")
    parser.add_argument("--corpora", type=Path, help="folder of the texts; without it nothing is measured")
    parser.add_argument("--blimp", type=Path, help="folder of BLiMP's paradigms")
    parser.add_argument("--methods", nargs="+", choices=(*METHODS, *OTHERS), default=["sizes", *OTHERS])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="shares of the blocks' parameters left")
    parser.add_argument(
        "--draws", nargs="+", type=int, choices=range(DRAWS), default=[0], help="draws of the calibration text"
    )
    parser.add_argument("--heads-only", action="store_true", help="count shares of KV groups")
    parser.add_argument(
        "--recover", type=int, default=0, metavar="STEPS", help="steps of recovery, from models that were measured"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/llm"), help="folder for models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for cells")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw perplexity against the share removed")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        results, texts, cells = options.results, None, []
        if options.quick:
            results = Path(temporary) / "results"
            texts, cells = _quick(Path(temporary))
        elif options.corpora is not None:
            if options.heads_only and not set(options.methods) <= {"gates", *ONE_SHOT}:
                parser.error("with --heads-only name methods that choose heads alone: gates, or a ranking of ours")
            models = options.out / "models"
            model = prepared(None, options.out)
            texts = Texts(model=model, corpora=options.corpora, pairs=options.blimp, models=models)
            cells = [Cell(method=DENSE)] + [
                Cell(method=method, share=share, draw=draw, heads_only=options.heads_only, recovered=options.recover)
                for draw in options.draws
                for share in options.shares
                for method in options.methods
            ]
        calls = []
        if texts is not None:
            calls = [(cell, texts, results) for cell in cells if not is_measured(cell, texts, results)]
            if options.recover and (unkept := [str(cell) for cell, *_ in calls if not _can_begin(cell, texts)]):
                parser.error(f"no pruned model to go on from is in {options.out}: {', '.join(unkept)}")
        run_all(measure, calls, jobs=1, what="cells", console=console, threads=os.cpu_count() or 1, calls_each=1)
        console.print(f"{machine()}, float32 but for recovery", markup=False)
        found = found_in(results)
        console.print(table(found) or "No cell was measured yet.", markup=False, soft_wrap=True)
        console.print(short_table(found), markup=False, soft_wrap=True)
        if options.picture is not None:
            draw(found, options.picture)


if __name__ == "__main__":
    main()
