"""Token ids on disk: right, counted, made once, whole or absent."""

from __future__ import annotations

import errno
import gc
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from deadhead.data import Corpus, build_tokenizer, open_corpus, tokenize_corpus, tokens
from deadhead.data.encoders import Encoder
from deadhead.errors import InputError

TEXT = "the cat — and\nthe dog\n\n" * 60


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return open_corpus(str(path))


@pytest.fixture(params=["byte", "bpe", "word"])
def tokenizer(request: pytest.FixtureRequest, corpus: Corpus) -> PreTrainedTokenizerFast:
    return build_tokenizer(request.param, corpus, vocab_size=300 if request.param == "bpe" else None)


def test_tokens_are_those_of_the_whole_text(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenized = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path / "cache")
    assert tokenized.sha256 == corpus.sha256()
    for split, stream in tokenized.splits.items():
        text = "".join(corpus.documents(split))
        assert stream.tokens.dtype == np.uint16
        assert stream.tokens.tolist() == tokenizer(text)["input_ids"]
        assert stream.num_bytes == len(text.encode())
        is_word = "<unk>" in tokenizer.get_vocab()
        assert stream.num_words == len(text.split()) + (text.count("\n") if is_word else 0)


def test_counts_and_tokens_are_the_same_in_small_pieces(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tokenize_corpus(corpus, tokenizer, cache_dir=None)
    monkeypatch.setattr("deadhead.data.pieces.PIECE_BYTES", 7)
    monkeypatch.setattr("deadhead.data.encoders._BATCH_CHARACTERS", 20)
    pieces = tokenize_corpus(corpus, tokenizer, cache_dir=None)
    assert len(list(corpus.documents("train"))) > 20
    for split, stream in whole.splits.items():
        other = pieces.splits[split]
        assert (other.num_bytes, other.num_words) == (stream.num_bytes, stream.num_words)
        encoder = Encoder(tokenizer)
        if encoder.is_bytes or encoder.is_words:  # byte pairs may differ at a cut
            np.testing.assert_array_equal(other.tokens, stream.tokens)


def test_progress_ends_with_all_of_the_text(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deadhead.data.pieces.PIECE_BYTES", 100)
    monkeypatch.setattr("deadhead.data.encoders._BATCH_CHARACTERS", 100)
    told: list[tuple[int, int]] = []
    settings = {"cache_dir": tmp_path / "cache", "progress": lambda done, total: told.append((done, total))}
    tokenize_corpus(corpus, tokenizer, **settings)
    size = len(TEXT.encode()) // 1000
    assert corpus.num_bytes == len(TEXT.encode())
    assert told == sorted(told)
    assert told[0][0] < told[-1][0]
    assert told[-1] == (size, size)
    told.clear()
    tokenize_corpus(corpus, tokenizer, **settings)
    assert not told, "what is in the cache is not tokenised again"


def test_documents_of_a_directory_are_separated(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"{name}{name}", encoding="utf-8")
    corpus = open_corpus(str(tmp_path), valid_share=0, test_share=0)
    tokenized = tokenize_corpus(corpus, build_tokenizer("byte", corpus), cache_dir=None)
    train = tokenized.splits["train"]
    assert train.tokens.tolist() == [97, 97, 256, 98, 98, 256]
    assert (train.num_bytes, train.num_words) == (4, 2)
    assert len(tokenized.splits["valid"].tokens) == 0


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{index}" for index in range(66_000)), encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "a.txt"), valid_share=0, test_share=0)
    tokenizer = build_tokenizer("word", corpus)
    train = tokenize_corpus(corpus, tokenizer, cache_dir=None).splits["train"]
    assert train.tokens.dtype == np.uint32
    assert tokenizer.convert_ids_to_tokens(int(train.tokens[65_990])) == "w65990"


def test_the_cache_is_used_again_until_text_or_tokenizer_change(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    byte = build_tokenizer("byte", corpus)
    first = tokenize_corpus(corpus, byte, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_write_splits", None)  # would fail if called
        again = tokenize_corpus(corpus, byte, cache_dir=cache)
    assert again.splits["train"].tokens.tolist() == first.splits["train"].tokens.tolist()
    assert again.splits["train"].num_words == first.splits["train"].num_words
    tokenize_corpus(corpus, build_tokenizer("word", corpus), cache_dir=cache)
    tokenize_corpus(open_corpus(corpus.name, test_share=0.2), byte, cache_dir=cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize(
    "damage", ["short file", "flipped bit", "other count", "no checksums", "no meta", "bad meta", "other fingerprint"]
)
def test_a_damaged_cache_is_made_anew(corpus: Corpus, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    byte = build_tokenizer("byte", corpus)
    expected = tokenize_corpus(corpus, byte, cache_dir=cache).splits["train"].tokens.tolist()
    (folder,) = cache.iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    if damage == "short file":
        (folder / "train.bin").write_bytes(b"\0\0")
    elif damage == "flipped bit":
        data = bytearray((folder / "train.bin").read_bytes())
        data[len(data) // 2 & ~1] ^= 1
        (folder / "train.bin").write_bytes(data)
    elif damage == "other count":
        meta_text = (folder / "meta.json").read_text()
        (folder / "meta.json").write_text(meta_text.replace('"words": 1', '"words": 2'))
        assert (folder / "meta.json").read_text() != meta_text
    elif damage == "no checksums":
        (folder / "SHA256SUMS").unlink()
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "bad meta":
        (folder / "meta.json").write_text("{")
    else:
        (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": "0"}))
    assert tokenize_corpus(corpus, byte, cache_dir=cache).splits["train"].tokens.tolist() == expected
    assert json.loads((folder / "meta.json").read_text()) == meta
    assert list(cache.iterdir()) == [folder]


def test_another_process_may_be_first(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte = build_tokenizer("byte", corpus)
    write = tokens._write_splits
    made = []

    def write_late(*args: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "_write_splits", write)
            made.append(tokenize_corpus(corpus, byte, cache_dir=tmp_path / "cache"))
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tokens, "_write_splits", write_late)
    second = tokenize_corpus(corpus, byte, cache_dir=tmp_path / "cache")
    assert second.splits["train"].tokens.tolist() == made[0].splits["train"].tokens.tolist()
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("cached", [True, False])
def test_a_full_disk_leaves_nothing_half_written(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    class Full(BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    true_open = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: Full() if mode == "wb" else true_open(path, mode))
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cache = tmp_path / "cache" if cached else None
    with pytest.raises(InputError, match="No space is left on the device while writing"):
        tokenize_corpus(corpus, build_tokenizer("byte", corpus), cache_dir=cache)
    assert not any((tmp_path / "tmp").iterdir())
    assert cache is None or not any(cache.iterdir())


def test_a_file_in_the_place_of_the_cache_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a file of that name is in the way"):
        tokenize_corpus(corpus, build_tokenizer("byte", corpus), cache_dir=tmp_path / "a.txt")


def test_without_a_cache_files_go_with_the_object(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    tokenized = tokenize_corpus(corpus, build_tokenizer("byte", corpus), cache_dir=None)
    assert isinstance(tokenized.splits["train"].tokens, np.memmap)
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del tokenized
    gc.collect()
    assert not any((tmp_path / "tmp").iterdir())
