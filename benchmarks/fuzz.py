"""Read randomly damaged copies of the files that deadhead parses: each gives a value or one sentence, nothing else.

The files are recipes, plans, gates, metrics, summaries, latencies, checksums, configurations, shards and their index.
Bits flip; bytes are removed, added and cut off; values of JSON become others. If a file gives neither a value nor a
sentence, or takes seconds, the program prints its bytes and exits with 1.

    python benchmarks/fuzz.py [--files N] [--seed N] [--only KIND] [--quick]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks._fuzz import fuzz, targets


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000, help="damaged files of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only kinds whose name begins with this")
    parser.add_argument("--quick", action="store_true", help="200 files of each kind")
    arguments = parser.parse_args()
    count = 200 if arguments.quick else arguments.files
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    console, faults = Console(width=110), []
    table = Table(title=f"{count} damaged files of each kind, seed {arguments.seed}")
    for column in ("file", "read all the same", "one sentence", "faults", "slowest, ms"):
        table.add_column(column, justify="left" if column == "file" else "right")
    with tempfile.TemporaryDirectory() as temporary:
        for target in targets(Path(temporary)):
            if not target.name.startswith(arguments.only):
                continue
            found = fuzz(target, count, arguments.seed)
            faults += found.faults
            row = (found.read, found.refused, len(found.faults), f"{found.slowest * 1e3:.0f}")
            table.add_row(target.name, *map(str, row))
    console.print(table)
    for fault in faults[:20]:
        print(fault, file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
