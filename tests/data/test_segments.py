"""Segments: each row of a batch continues the same row of the batch before."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from deadhead.data import RowDataset, SegmentDataset, TokenStream
from deadhead.errors import InputError


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(0, 40))
def test_rows_are_contiguous_and_labels_are_next_tokens(rows: int, length: int, segments: int, tail: int) -> None:
    tail %= rows * length
    tokens = np.arange(rows * length * segments + 1 + tail, dtype=np.uint16)
    dataset = SegmentDataset(tokens, rows=rows, segment_length=length)
    assert len(dataset) == rows * segments
    for row in range(rows):
        items = [dataset[segment * rows + row] for segment in range(segments)]
        ids = torch.cat([item["input_ids"] for item in items]).tolist()
        start = row * length * segments
        assert ids == list(range(start, start + length * segments))
        assert torch.cat([item["labels"] for item in items]).tolist() == [token + 1 for token in ids]
        assert [bool(item["is_first"]) for item in items] == [True] + [False] * (segments - 1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sequential_loader_continues_each_row(processes: int) -> None:
    batch_size, length = 2, 3
    dataset = SegmentDataset(np.arange(61, dtype=np.uint16), rows=batch_size * processes, segment_length=length)
    batches = list(DataLoader(dataset, batch_size=batch_size))
    for process in range(processes):
        own = batches[process::processes]
        assert own[0]["is_first"].tolist() == [True] * batch_size
        for before, after in pairwise(own):
            assert not after["is_first"].any()
            assert torch.equal(after["input_ids"][:, 0], before["labels"][:, -1])


def test_items() -> None:
    item = SegmentDataset(np.array([65_535, 1, 2], dtype="<u2"), rows=1, segment_length=2)[0]
    assert item["input_ids"].tolist() == [65_535, 1]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
        "input_ids": (torch.int64, (2,)),
        "labels": (torch.int64, (2,)),
        "is_first": (torch.bool, ()),
    }


def test_it_ends() -> None:
    dataset = SegmentDataset(np.arange(7), rows=2, segment_length=3)
    assert [dataset[index]["input_ids"].tolist() for index in range(2)] == [[0, 1, 2], [3, 4, 5]]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset[index]


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(InputError, match="At least 33 tokens .* has 32; shorten segment_length or the batch size"):
        SegmentDataset(np.arange(32), rows=4, segment_length=8)
    assert len(SegmentDataset(np.arange(33), rows=4, segment_length=8)) == 4
    with pytest.raises(InputError, match="At least 1 row"):
        SegmentDataset(np.arange(32), rows=0, segment_length=8)


@pytest.mark.parametrize("prefix", [(), (7,), (7, 8)])
def test_rows_begin_with_the_prefix_and_cover_the_text_once(prefix: tuple[int, ...]) -> None:
    rows = RowDataset(np.arange(100, 131), length=6, prefix=prefix)
    items = [rows[index] for index in range(len(rows))]
    assert all(item["input_ids"].shape == item["scored"].shape == (6,) and bool(item["is_first"]) for item in items)
    assert all(item["input_ids"][~item["scored"]].tolist() == list(prefix) for item in items)
    text = torch.cat([item["input_ids"][item["scored"]] for item in items])
    assert text.tolist() == list(range(100, 100 + 30 // (6 - len(prefix)) * (6 - len(prefix))))


def test_a_row_that_the_prefix_fills_is_refused() -> None:
    with pytest.raises(InputError, match=r"longer than the 2 tokens .*\(--sequence-length\) of 2; choose"):
        RowDataset(np.arange(100), length=2, prefix=(7, 8))


@pytest.mark.parametrize("prefix", [(), (7,)])
def test_rows_without_a_token_that_counts_are_left_out(prefix: tuple[int, ...]) -> None:
    width = 4 - len(prefix)
    scored = np.zeros(8 * width + 1, dtype=np.bool_)
    # The first of a row can only be told from a prefix.
    scored[[width, 3 * width + 1, 3 * width + 2]] = True
    rows = RowDataset(np.arange(100, 100 + len(scored)), length=4, prefix=prefix, scored=scored)
    items = [rows[index] for index in range(len(rows))]
    chosen = ([[100 + width]] if prefix else []) + [[100 + 3 * width + 1, 100 + 3 * width + 2]]
    assert [item["input_ids"][item["scored"]].tolist() for item in items] == chosen
    with pytest.raises(IndexError):
        rows[len(rows)]
    with pytest.raises(InputError, match="expects answers in the text"):
        RowDataset(np.arange(50), length=4, prefix=prefix, scored=np.zeros(50, dtype=np.bool_))


@pytest.mark.parametrize("prefix", [(), (1, 2)])
def test_a_text_shorter_than_a_row_names_the_option_of_its_length(prefix: tuple[int, ...]) -> None:
    expected = rf"More than {8 - len(prefix)} tokens .* for a row of 8, but the text has 5; .*\(--sequence-length\)"
    with pytest.raises(InputError, match=expected):
        RowDataset(np.arange(5), length=8, prefix=prefix)


@pytest.mark.parametrize("tokens", [np.ones(9), np.ones((3, 3), dtype=int), np.array(["a"] * 9), np.ones(9) > 0])
def test_tokens_are_whole_numbers_in_one_row(tokens: np.ndarray) -> None:
    for made in (
        lambda: RowDataset(tokens, length=4),
        lambda: SegmentDataset(tokens, rows=1, segment_length=4),
        lambda: TokenStream(tokens=tokens, num_bytes=9, num_words=9),
    ):
        with pytest.raises(InputError, match="Tokens were expected as a one-dimensional array of whole numbers"):
            made()


def test_what_counts_is_a_truth_value_for_each_token() -> None:
    for scored in (np.ones(9), np.ones(8) > 0):
        with pytest.raises(InputError, match="scored must hold a bool for each of the 9 tokens"):
            RowDataset(np.arange(9), length=4, scored=scored)
