"""Files that would touch another if anything in them were run: for tests that it is not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


class _Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def write_pickle(path: Path, mark: Path, *, plainly: bool = False) -> None:
    """Write a pickle that makes `mark` when it is read, in torch's own format or plainly."""
    if plainly:
        path.write_bytes(pickle.dumps(_Bomb(mark)))
    else:
        torch.save({"state": _Bomb(mark)}, path)


def write_code(folder: Path, mark: Path) -> dict[str, str]:
    """Write a module that makes `mark` when it is imported; return an `auto_map` that names it for everything."""
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import GPT2Config as Config, GPT2LMHeadModel as Model, PreTrainedTokenizerFast as Words\n"
    )
    return {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Words", "evil.Words"],  # type: ignore[dict-item]
    }
