"""Programs that torchrun starts in several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def launch(place: Path, *program: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder in several processes, of one thread each; it may import the tests."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)]),
    }
    return subprocess.run([*command, *program], cwd=place, env=environment, capture_output=True, text=True, timeout=400)
