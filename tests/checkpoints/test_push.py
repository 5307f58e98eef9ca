"""What an upload to the Hugging Face hub sends: a server on this machine stands for the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import deadhead
from tests.hub_stand_in import hub_stand_in
from tests.small_runs import save_small_llama, write_prose

# Of layers that differ, and of layers that are alike: those with modelling files of their own, and stock models.
_KEPT = {"unlike": {0: [0], 1: [0, 1], 2: []}, "alike": {0: [0], 1: [1], 2: [0]}}
_PUSH = 'import deadhead; deadhead.load("small").push_to_hub("small", token="hf_none")'
_UPLOAD = """
from huggingface_hub import HfApi
HfApi(token="hf_none").upload_folder(repo_id="someone/small", folder_path="small")
"""


def _uploaded(program: str, folder: Path) -> Path:
    """Run a program that uploads; return a folder of what it sent."""
    with hub_stand_in() as (address, files):
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    there = folder / "there"
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    return there


@pytest.mark.slow
@pytest.mark.parametrize("program", [_PUSH, _UPLOAD], ids=["push_to_hub", "upload_folder"])
@pytest.mark.parametrize("kept", [*_KEPT])
def test_what_is_sent_is_the_model(program: str, kept: str, tmp_path: Path) -> None:
    model, tokenizer = save_small_llama(tmp_path / "llama", write_prose(tmp_path))
    plan = deadhead.HeadPlan(kept=_KEPT[kept], total=dict.fromkeys(range(3), 2), unit="kv_group")
    deadhead.save(deadhead.cut(model, plan), tmp_path / "small", tokenizer=tokenizer, base="someone/large")
    there = _uploaded(program, tmp_path)
    names = {path.name for path in there.iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= names
    assert any(name.startswith("modeling_") for name in names) == (kept == "unlike")
    if program == _UPLOAD:
        assert names == {path.name for path in (tmp_path / "small").iterdir()}
    card = ModelCard.load(there / "README.md")
    assert {"deadhead", "pruned-attention-heads", "pruned"} <= set(card.data.tags or [])
    assert card.data.library_name == "transformers"
    if program == _UPLOAD:
        assert (card.data.base_model, card.data.pipeline_tag) == ("someone/large", "text-generation")
    ids = torch.arange(12)[None]
    (there / "SHA256SUMS").unlink(missing_ok=True)
    assert torch.equal(deadhead.load(there)(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
