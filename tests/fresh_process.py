"""Load checkpoints in a fresh process, where deadhead is installed and where it is not, and run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import deadhead.models

WAYS = ("with deadhead", "without deadhead")
# NAME → {NAME.logits, NAME.tokens} of every checkpoint below the folder given.
_SCRIPT = """
import sys, torch
from pathlib import Path
folder, out, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
if how == "with deadhead":
    import deadhead
    options = {}
else:
    sys.modules["deadhead"] = None  # importing it raises ImportError, wherever it may be installed
    options = {"trust_remote_code": True}
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.load(folder / "ids.pt")
found = {}
for path in sorted(path for path in folder.iterdir() if path.is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, local_files_only=True, **options)
    assert not any(info.values()), (path.name, info)
    package = "deadhead." if how == "with deadhead" else "transformers_modules."
    assert type(model).__module__.startswith(package), type(model)
    with torch.no_grad():
        found[path.name + ".logits"] = model(input_ids=ids).logits.contiguous()
    found[path.name + ".tokens"] = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
save_file(found, out)
"""

# As a server of stock models loads them: without deadhead, trusting no code. PATH → logits.
_STOCK_SCRIPT = """
import sys, torch
sys.modules["deadhead"] = None  # importing it raises ImportError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
found = {}
for path in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, local_files_only=True)
    assert not any(info.values()), (path, info)
    assert type(model).__module__.startswith("transformers.models."), type(model)
    with torch.no_grad():
        found[path] = model(input_ids=torch.load(sys.argv[1])).logits.contiguous()
save_file(found, sys.argv[2])
"""


def stock_logits(paths: Iterable[Path], ids: Tensor, folder: Path) -> dict[str, Tensor]:
    """Return by path the logits of stock models; their classes are transformers', and every tensor is theirs."""
    torch.save(ids, folder / "ids.pt")
    command = [sys.executable, "-I", "-c", _STOCK_SCRIPT, str(folder / "ids.pt"), str(folder / "out")]
    command += map(str, paths)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "out")


def in_a_fresh_process(folder: Path, how: str, work: Path) -> dict[str, torch.Tensor]:
    """Return logits and greedy tokens of every checkpoint in `folder`, for the ids in its ids.pt.

    Args:
        folder: of checkpoint folders.
        how: one of `WAYS`; without deadhead the checkpoints' own code is trusted and run.
        work: an empty folder.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    if how == "with deadhead":
        environment["PYTHONPATH"] = str(Path(deadhead.models.__file__).parents[2])
    isolated = [] if how == "with deadhead" else ["-I"]
    done = subprocess.run(
        [sys.executable, *isolated, "-c", _SCRIPT, str(folder), str(work / "out.safetensors"), how],
        env=environment,
        cwd=work,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # transformers warns of missing, unexpected or newly initialised weights on stderr.
    for word in ("warn", "missing", "unexpected", "newly initialized"):
        assert word not in done.stderr.lower(), done.stderr
    return load_file(work / "out.safetensors")
