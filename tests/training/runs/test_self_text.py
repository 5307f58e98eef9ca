"""`--data self`: what a model writes before it is pruned, how much, kept and read again, and who may not write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import deadhead
from deadhead import InputError
from deadhead.cli import execute
from deadhead.data import TokenizedCorpus, load_text, load_tokenizer
from deadhead.measure.self_generated import write_text
from deadhead.training import PhaseRecipe, PruneRecipe
from deadhead.training.recipes.recipe import DataRecipe, Recipe
from deadhead.training.runs import self_text, single
from deadhead.training.runs.forecast import forecast
from deadhead.training.runs.options import Options
from deadhead.training.runs.run import Run
from deadhead.training.runs.self_text import FILE, is_self, rows_to_write
from deadhead.training.runs.single import run_single
from tests.small_runs import assert_same_tensors, framed_tokenizer, save_small_llama, tree, weights, write_prose

_SMALL: dict[str, Any] = {
    "params": 0.8,
    "criterion": "taylor",
    "steps": 2,
    "batch_size": 2,
    "sequence_length": 16,
    "compensate_rows": 6,
}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return what is written from now on."""
    found: list[torch.Tensor] = []

    def noting(*args: Any, **named: Any) -> torch.Tensor:
        found.append(write_text(*args, **named))
        return found[-1]

    monkeypatch.setattr(self_text, "write_text", noting)
    return found


def test_a_model_is_pruned_by_what_it_wrote(place: Path, written: list[torch.Tensor]) -> None:
    said: list[Any] = []
    told: list[str] = []
    found = deadhead.prune(
        place / "llama", "self", recover=1, announce=said.extend, progress=lambda name, *_: told.append(name), **_SMALL
    )
    # Rows for compensation, the most that is read, and to be measured on.
    expected = write_text(deadhead.load(place / "llama"), load_tokenizer(place / "llama"), rows=10, length=16)
    assert len(written) == 1 and torch.equal(written[0], expected)
    assert found.measured is not None and found.measured.before.tokens == 4 * 16 - 1
    assert found.compensation is not None and found.unrecovered is not None
    # Said once, before it was written.
    assert [part.what.split()[0] for part in said] == ["write", "rank", "fit", "recover"]
    assert said[0].what == "write 10 rows of 16 tokens of its own" and said[0].seconds > 0
    assert told[0] == "writing text, tokens"


def test_the_seed_decides_and_a_phase_with_out_gives_the_same(
    place: Path, tmp_path: Path, written: list[torch.Tensor]
) -> None:
    deadhead.prune(place / "llama", DataRecipe(source="self"), out=tmp_path / "one", seed=3, **_SMALL)
    deadhead.prune(deadhead.load(place / "llama"), "self", tokenizer=load_tokenizer(place / "llama"), seed=3, **_SMALL)
    deadhead.prune(place / "llama", "self", seed=4, **_SMALL)
    assert torch.equal(written[0], written[1]) and not torch.equal(written[0], written[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_a_stopped_phase_reads_what_was_written(
    place: Path, tmp_path: Path, written: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {**_SMALL, "out": tmp_path / "out"}
    with monkeypatch.context() as patch:
        patch.setattr(single, "prune_in_place", _raise(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            deadhead.prune(place / "llama", "self", **common)
    kept = tmp_path / "out.work" / FILE
    before = kept.read_bytes()
    with pytest.raises(InputError, match="other settings"):
        deadhead.prune(place / "llama", "self", resume=True, seed=1, **common)
    assert kept.read_bytes() == before
    # Other bytes are not taken for what was written.
    kept.write_bytes(save({"tokens": load_file(kept)["tokens"] + 1}, metadata={"asked": "{}", "sha256": "0"}))
    with pytest.raises(InputError, match="is damaged; delete"):
        deadhead.prune(place / "llama", "self", resume=True, **common)
    kept.write_bytes(before[:-3])
    with pytest.raises(InputError, match="is damaged; delete"):
        deadhead.prune(place / "llama", "self", resume=True, **common)
    kept.write_bytes(before)
    said: list[Any] = []
    found = deadhead.prune(place / "llama", "self", resume=True, announce=said.extend, **common)
    assert len(written) == 1 and [part.what.split()[0] for part in said] == ["rank", "fit"]
    whole = deadhead.prune(place / "llama", "self", **{**common, "out": tmp_path / "whole"})
    assert_same_tensors(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert found.measured is not None and whole.measured is not None
    assert found.measured.after.perplexity == whole.measured.after.perplexity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_what_is_refused_leaves_no_text(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "prune_in_place", _raise(InputError("no")))
    with pytest.raises(InputError, match="no"):
        deadhead.prune(place / "llama", "self", out=tmp_path / "out", **_SMALL)
    assert not list(tmp_path.iterdir())


def _raise(error: BaseException | type[BaseException]) -> Any:
    def raising(*_: Any, **__: Any) -> Any:
        raise error

    return raising


def test_a_model_with_segment_memory(place: Path, written: list[torch.Tensor]) -> None:
    found = deadhead.prune(
        place / "ours", "self", sparsity=0.5, steps=3, batch_size=2, compensate=True, compensate_rows=64
    )
    assert sum(found.plan.heads) == 4 and found.compensation is not None
    # 64 rows to fit to and 8 to measure on, of 8 tokens each, in long texts side by side.
    assert [tuple(rows.shape) for rows in written] == [(32, 18)]
    assert found.measured is not None and found.measured.before.tokens == 8 * 8 - 1


def test_what_begins_each_row_is_written_once(tmp_path: Path) -> None:
    save_small_llama(tmp_path / "llama", write_prose(tmp_path), framed_tokenizer("bos"))
    model, tokenizer = deadhead.load(tmp_path / "llama"), load_tokenizer(tmp_path / "llama")
    recipe = PruneRecipe(**_SMALL)
    text = self_text.self_text(model, tokenizer, recipe, tmp_path, seed=0, begin=lambda: None, progress=lambda *_: None)
    rows = write_text(model, tokenizer, rows=10, length=16)
    begins = tokenizer.convert_tokens_to_ids("<bos>")
    assert text.valid is not None and text.train.prefix == text.valid.prefix == (begins,)
    assert np.array_equal(text.valid.tokens, rows[6:, 1:].flatten())
    assert np.array_equal(text.train.tokens, [*rows[:6, 1:].flatten().tolist(), rows[6, 1].item()])
    decoded = tokenizer.decode(rows[6:, 1:].flatten(), skip_special_tokens=True)
    assert (text.valid.num_bytes, text.valid.num_words) == (len(decoded.encode()), len(decoded.split()))
    # So a phase reads whole rows as they were written.
    read = single.segments(model, text.train, recipe, rows=2)
    assert [read[row]["input_ids"].tolist() for row in range(len(read))] == rows[:6].tolist()


def test_how_much_is_written(place: Path) -> None:
    model = deadhead.load(place / "llama")
    sizes = PruneRecipe(params=0.8, criterion="sizes")
    assert rows_to_write(model, sizes) == (512, 64)
    assert rows_to_write(model, sizes, recover=150) == (600, 75)
    assert rows_to_write(model, PruneRecipe(params=0.8, steps=300)) == (1024, 128)
    weightless = PruneRecipe(params=0.8, criterion="magnitude", compensate_rows=3, batch_size=1)
    assert rows_to_write(model, weightless) == (3, 4)
    assert rows_to_write(model, PhaseRecipe(steps=2, batch_size=3)) == (6, 4)
    parts = forecast(model, sizes, recover=150, writes=True)
    assert parts[0].what == "write 675 rows of 128 tokens of its own"
    assert [part.what for part in parts[1:]] == [part.what for part in forecast(model, sizes, recover=150)]


def test_a_teacher_writes_for_a_model_that_was_pruned(place: Path, written: list[torch.Tensor]) -> None:
    pruned = deadhead.prune(place / "llama", criterion="magnitude", sparsity=0.5)
    common: dict[str, Any] = {"steps": 2, "batch_size": 2, "sequence_length": 16, "tokenizer": pruned.tokenizer}
    with pytest.raises(InputError, match="learns nothing from its own text"):
        deadhead.finetune(pruned.model, "self", **common)
    deadhead.finetune(pruned.model, "self", teacher=place / "llama", distill=0.5, **common)
    dense = deadhead.load(place / "llama")
    assert torch.equal(written[0], write_text(dense, load_tokenizer(place / "llama"), rows=8, length=16))


def test_who_has_nobody_to_write_it(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="got self, which is text that deadhead prune has the model write"):
        load_text("self")
    for file in ("self", "./self"):
        Path("self").write_text("a few words of a text\n" * 20)
        assert is_self(file) == (file == "self")
    with pytest.raises(InputError, match=r"; the file of that name is \./self"):
        load_text("self")
    assert isinstance(load_text("./self")[0], TokenizedCorpus)
    with pytest.raises(InputError, match="learns nothing from its own text"):
        run_single("train", PhaseRecipe(), place / "ours", "self", Options())
    with pytest.raises(InputError, match="got self"):
        Run.start(Recipe.model_validate({"data": {"source": "self"}}), tmp_path / "run").execute()
    nowhere = deadhead.load(place / "llama")
    nowhere.name_or_path = nowhere.config._name_or_path = ""
    with pytest.raises(InputError, match="tokenizer is needed to write a text"):
        deadhead.prune(nowhere, "self", params=0.8)


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--data-format", "text"], "data_format"),
        (["--text-column", "x"], "text_column"),
        (["--answers-only"], "answers_only"),
    ],
)
def test_settings_that_read_a_text(
    option: list[str], name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--dry-run"], ["--out", str(tmp_path / "out")]):
        words = ["prune", "--model", str(place / "llama"), "--data", "self", "--params", "0.8", *option, *more]
        assert execute(words) == 2
        said = capsys.readouterr().err
        sentence = f"{name} is for a text that is read, but self is text that the model writes; leave {name} out."
        assert said == f"deadhead: {sentence}\n"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_would_be_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    words = ["prune", "--model", str(place / "llama"), "--data", "self", "--params", "0.8", "--dry-run"]
    assert execute(words) == 0
    assert "write 576 rows of 128 tokens of its own" in " ".join(capsys.readouterr().out.split())
    assert tree(place) == before
