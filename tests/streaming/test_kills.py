"""A streamed cut that is killed, before any change that it makes to files, and resumed: the same files in the end."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._kills import before_changes
from benchmarks._tiny_models import scramble
from deadhead import HeadPlan, InputError
from deadhead.streaming.cutting import cut_checkpoint
from tests.small_runs import tree

_PLAN = HeadPlan(kept={0: [1], 2: []}, total=dict.fromkeys(range(3), 4), unit="kv_group")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint in four shards."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    folder = tmp_path_factory.mktemp("kills") / "source"
    model = LlamaForCausalLM(config)
    scramble(model, 0)
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


def _in_a_child(source: Path, out: Path, *, resume: bool, kill_at: int | None, count_in: Path) -> int:
    """Cut in a child process, which is killed before its change number `kill_at`; return its exit code."""
    process = os.fork()
    if process == 0:
        code, changes = 1, 0
        try:
            # The parent's threads are not here: what would share work among them waits for ever.
            torch.set_num_threads(1)

            def act(count: int) -> None:
                nonlocal changes
                changes = count
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            before_changes(out.parent, act)
            cut_checkpoint(source, _PLAN, out, stream=True, resume=resume)
            code = 0
            count_in.write_text(str(changes))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.full), 5])
def test_killed_before_a_change(every: int, source: Path, tmp_path: Path) -> None:
    """Of files and folders; the cut that resumes is killed a little later, until one comes to its end."""
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    assert _in_a_child(source, whole, resume=False, kill_at=None, count_in=tmp_path / "count") == 0
    expected, changes = tree(whole), int((tmp_path / "count").read_text())
    assert changes > 20
    killed = 0
    for first in range(1, changes + 1, every):
        kill_at = first
        out = tmp_path / f"{first}" / "out"
        out.parent.mkdir()
        work = out.with_name("out.work")
        code = _in_a_child(source, out, resume=False, kill_at=kill_at, count_in=tmp_path / "count")
        # Threads change files side by side, so a cut may make fewer changes than another.
        assert code in (0, -signal.SIGKILL)
        while code:
            killed += 1
            resume = (work / "cut.json").exists()
            assert resume or not work.exists() or not any(work.glob("*.safetensors*"))
            kill_at += 9
            code = _in_a_child(source, out, resume=work.exists(), kill_at=kill_at, count_in=tmp_path / "count")
            assert code in (0, -signal.SIGKILL)
            if code and not work.exists() and out.exists():
                break
        assert tree(out) == expected
    assert killed >= changes // every - 1


def test_another_source_is_not_resumed(source: Path, tmp_path: Path) -> None:
    """A model that was changed since, or another plan."""
    place, out = tmp_path / "source", tmp_path / "out"
    place.mkdir()
    for path in source.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    assert _in_a_child(place, out, resume=False, kill_at=8, count_in=tmp_path / "count") == -signal.SIGKILL
    assert (tmp_path / "out.work" / "cut.json").exists()
    with pytest.raises(InputError, match="left from a cut by another plan, or of a model that was changed since"):
        cut_checkpoint(place, HeadPlan.keep_all(_PLAN.total, unit="kv_group"), out, stream=True, resume=True)
    os.utime(place / "config.json", (0, 0))
    with pytest.raises(InputError, match="left from a cut by another plan, or of a model that was changed since"):
        cut_checkpoint(place, _PLAN, out, stream=True, resume=True)
    assert not out.exists()


def test_two_at_once(source: Path, tmp_path: Path) -> None:
    """The second is refused while the first goes on."""
    out, refusals = tmp_path / "out", []

    def report(what: str, done: int, of: int) -> None:
        if what == "copying" and not refusals:
            with pytest.raises(InputError) as caught:
                cut_checkpoint(source, _PLAN, out, stream=True, resume=True)
            refusals.append(str(caught.value))

    cut_checkpoint(source, _PLAN, out, stream=True, progress=report)
    assert "Another process is cutting into" in refusals[0]
    assert out.is_dir() and not (tmp_path / "out.work").exists()
