"""The three tokenizers: lossless or by the convention, the same everywhere, the same after saving."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from deadhead.data import Corpus, build_tokenizer, load_tokenizer, open_corpus
from deadhead.data.encoders import Encoder
from deadhead.errors import InputError

TEXT = "the cat and the dog saw <unk> and the cat\n\nthe dog ran — fast\n" * 40
SAMPLES = ["the cat\n", "Ünïcode 😀 <eos> a  b\t\r\n , 's .", "", "the <unk> <eos> <unk>x\x1ccat\x85dog"]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return open_corpus(str(path), valid_share=0, test_share=0)


@pytest.fixture(scope="module")
def tokenizers(corpus: Corpus) -> dict[str, PreTrainedTokenizerFast]:
    sizes = {"byte": None, "bpe": 280, "word": None}
    return {kind: build_tokenizer(kind, corpus, vocab_size=size) for kind, size in sizes.items()}


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def test_byte_ids_are_the_bytes(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    byte = tokenizers["byte"]
    assert len(byte) == 257
    assert byte.eos_token_id == byte.pad_token_id == byte.bos_token_id == 256
    for sample in [*SAMPLES, bytes(range(128)).decode()]:
        assert ids(byte, sample) == list(sample.encode())


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_bytes_and_byte_pairs_lose_nothing(kind: str, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers[kind]

    @settings(max_examples=60)
    @given(UNICODE | st.sampled_from(SAMPLES))
    def check(text: str) -> None:
        encoded = ids(tokenizer, text)
        assert tokenizer.decode(encoded) == text
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text

    check()


def test_bpe_learns_and_is_deterministic(corpus: Corpus, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    bpe = tokenizers["bpe"]
    assert len(bpe) == 280
    assert len(ids(bpe, "the cat and the dog")) < 10
    assert bpe.eos_token_id == bpe.pad_token_id
    again = build_tokenizer("bpe", corpus, vocab_size=280)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()


def test_words_are_ranked_by_frequency(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    vocabulary = sorted(tokenizers["word"].get_vocab().items(), key=lambda item: item[1])
    # In a repetition: the 4; <eos> 3; and, cat, dog 2; <unk>, fast, ran, saw, — 1.
    assert [word for word, _ in vocabulary] == "the <eos> and cat dog <unk> fast ran saw —".split()  # noqa: SIM905


def test_words_follow_the_wikitext_convention(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    word = tokenizers["word"]
    text = "the  cat\n\nthe <unk> bird <eos> the<unk> cat\x1cdog\u3000dog\r\n"
    expected = "the cat <eos> <eos> the <unk> <unk> <eos> <unk> cat dog dog <eos>"
    assert word.convert_ids_to_tokens(ids(word, text)) == expected.split()
    assert word.decode(ids(word, text)) == expected


def test_a_limited_vocabulary_of_words_keeps_the_frequent_ones(corpus: Corpus) -> None:
    word = build_tokenizer("word", corpus, vocab_size=4)
    # <unk> now stands for all but the two: 1 and 8 others in a repetition.
    assert word.get_vocab() == {"<unk>": 0, "the": 1, "<eos>": 2, "and": 3}
    assert ids(word, "the dog and\n") == [1, 0, 3, 2]


def test_words_that_a_piece_would_cut_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("word " * 50, encoding="utf-8")
    monkeypatch.setattr("deadhead.data.pieces.PIECE_BYTES", 16)
    corpus = open_corpus(str(tmp_path / "a.txt"), valid_share=0, test_share=0)
    assert set(build_tokenizer("word", corpus).get_vocab()) == {"word", "<eos>", "<unk>"}


_ADDED = ["<|user|>", "<call>"]


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("how", ["extra", "named", "listed"])
@pytest.mark.parametrize("kind", ["byte", "bpe", "word"])
def test_added_special_tokens_are_one_id(kind: str, how: str, loaded: bool, corpus: Corpus, tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerBase = build_tokenizer(kind, corpus, vocab_size=280 if kind == "bpe" else None)
    if loaded:
        tokenizer.save_pretrained(str(tmp_path / "before"))
        tokenizer = load_tokenizer(tmp_path / "before")
    size = len(tokenizer)
    if how == "extra":
        tokenizer.add_special_tokens({"additional_special_tokens": _ADDED})
    elif how == "named":
        tokenizer.add_special_tokens({"pad_token": _ADDED[0], "cls_token": _ADDED[1]})
    else:
        tokenizer.add_tokens(_ADDED, special_tokens=True)
    text = "<|user|>the cat<call>dog"
    expected = [size, *ids(tokenizer, "the cat"), size + 1, *ids(tokenizer, "dog")]
    assert ids(tokenizer, text) == expected
    assert Encoder(tokenizer)([text])[0].tolist() == expected
    tokenizer.save_pretrained(str(tmp_path / "after"))
    for again in (load_tokenizer(tmp_path / "after"), PreTrainedTokenizerFast.from_pretrained(tmp_path / "after")):
        assert ids(again, text) == expected
    assert copy.deepcopy(tokenizer)(text)["input_ids"] == expected


@pytest.mark.slow
def test_saved_tokenizers_give_the_same_ids_in_another_process(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / kind)
        assert ids(load_tokenizer(tmp_path / kind), SAMPLES[1]) == ids(tokenizer, SAMPLES[1])
    program = """
import json, sys
from transformers import AutoTokenizer
texts = json.loads(sys.argv[2])
found = {}
for kind in ("byte", "bpe", "word"):
    tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{kind}")
    encoded = tokenizer(texts)["input_ids"]
    found[kind] = [encoded, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.batch_decode(encoded)]
    tokenizer("a word " * 20_000)
print(json.dumps(found))
"""
    command = [sys.executable, "-c", program, str(tmp_path), json.dumps(SAMPLES)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "longer than" not in result.stderr
    for kind, (encoded, eos, pad, decoded) in json.loads(result.stdout).items():
        tokenizer = tokenizers[kind]
        assert encoded == [ids(tokenizer, sample) for sample in SAMPLES]
        assert (eos, pad) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert kind == "word" or decoded == SAMPLES


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("char", None, r"\(byte, bpe, word\), but got 'char'"),
        ("byte", 300, "has 257 tokens"),
        ("bpe", 257, "at least 258"),
        ("word", 2, "at least 3"),
    ],
)
def test_what_cannot_be_built_is_refused(corpus: Corpus, kind: str, size: int | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        build_tokenizer(kind, corpus, vocab_size=size)


def test_a_text_without_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n" * 100, encoding="utf-8")
    with pytest.raises(InputError, match="Words were expected"):
        build_tokenizer("word", open_corpus(str(tmp_path / "a.txt")))


def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"A tokenizer was expected at .*, but there are no files of one, such as"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(InputError, match="could not be loaded"):
        load_tokenizer(tmp_path)
