"""All ways to attend compute the same as the plain one: in blocks of any size, merged, and for few queries."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deadhead.models.all_attention import blocked, merged
from deadhead.models.all_attention.attention import Operands, eager_attention, sdpa_attention
from deadhead.models.all_attention.blocked import blocked_attention
from deadhead.models.all_attention.blocks import Blocking
from deadhead.models.all_attention.dropout import Dropout, draw_kept
from deadhead.models.all_attention.few import few_attention
from deadhead.models.all_attention.merged import merged_attention
from tests.helpers import difference

_HEADS, _WIDTH, _PERSISTENT = 3, 4, 7
# (batch, queries, context, window): memory full, partly and not there; queries far beyond the window.
_SHAPES = [(2, 6, 11, 6), (3, 6, 6, 6), (2, 5, 8, 6), (2, 200, 203, 4), (4, 1, 6, 6), (1, 1, 1, 9)]
shapes = pytest.mark.parametrize("shape", _SHAPES, ids=str)
kinds = pytest.mark.parametrize("kind", ["relative", "rotary", "padded", "without persistent"])
# Scores a block may have: everything at once; some heads; some texts of a head; some queries of a text.
capacities = pytest.mark.parametrize("capacity", [2**20, 700, 150, 1])


def _operands(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype = torch.float64) -> Operands:
    batch, queries, context, window = shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    q_BHTE, own = random(batch, _HEADS, queries, _WIDTH), random(batch, _HEADS, queries, _WIDTH)
    is_rotary = kind == "rotary"
    persistent = 0 if kind == "without persistent" else _PERSISTENT
    padding_BS = None
    if kind == "padded":
        # No query may be left without anything to see but persistent vectors, which is fine, and padding.
        padding_BS = torch.arange(context)[None] < torch.arange(batch)[:, None]
    return Operands(
        q_BHTE=q_BHTE,
        persistent_q_BHTE=own if is_rotary else q_BHTE,
        k_BHSE=random(batch, _HEADS, context, _WIDTH),
        v_BHSE=random(batch, _HEADS, context, _WIDTH),
        r_HWE=None if is_rotary else random(_HEADS, window, _WIDTH),
        content_bias_HE=None if is_rotary else random(_HEADS, _WIDTH),
        position_bias_HE=None if is_rotary else random(_HEADS, _WIDTH),
        persistent_k_HNE=random(_HEADS, persistent, _WIDTH),
        persistent_v_HNE=random(_HEADS, persistent, _WIDTH),
        window=window,
        padding_BS=padding_BS,
    )


def _tensors(operands: Operands) -> dict[str, Tensor]:
    tensors = {name: value for name, value in vars(operands).items() if isinstance(value, Tensor) and value.numel()}
    found = {name: value for name, value in tensors.items() if value.requires_grad}
    if operands.persistent_q_BHTE is operands.q_BHTE:
        del found["persistent_q_BHTE"]
    return found


@shapes
@kinds
@capacities
def test_blocks_of_any_size_attend_and_differentiate_like_the_plain_softmax(
    capacity: int, kind: str, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_CAPACITY", capacity)
    operands = _operands(shape, kind)
    expected, _ = eager_attention(operands)
    found = blocked_attention(operands)
    assert difference(found, expected) <= 1e-10
    tensors = _tensors(operands)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    references = torch.autograd.grad(expected, list(tensors.values()), upstream)
    gradients = torch.autograd.grad(found, list(tensors.values()), upstream)
    for name, gradient, reference in zip(tensors, gradients, references, strict=True):
        assert difference(gradient, reference) <= 1e-10, name


@shapes
@kinds
@capacities
@torch.no_grad()
def test_evaluation_attends_like_the_plain_softmax(
    capacity: int, kind: str, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "_CAPACITY", capacity)
    operands = _operands(shape, kind)
    expected, _ = eager_attention(operands)
    for attend in (merged_attention, few_attention, sdpa_attention):
        # Twice: the second time finds memory that the first has written to.
        for _ in range(2):
            assert difference(attend(operands), expected) <= 1e-6, attend.__name__


@pytest.mark.parametrize("capacity", [2**20, 150])
@pytest.mark.parametrize("kind", ["relative", "rotary"])
def test_gradients_under_dropout_are_those_of_what_was_dropped(
    kind: str, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite differences of the same draw."""
    monkeypatch.setattr(blocked, "_CAPACITY", capacity)
    operands = replace(_operands((2, 4, 7, 4), kind), dropout=0.3)
    tensors = _tensors(operands)

    def attend(*values: Tensor) -> Tensor:
        torch.manual_seed(3)
        changed: dict[str, Any] = dict(zip(tensors, values, strict=True))
        if kind != "rotary":
            changed["persistent_q_BHTE"] = changed["q_BHTE"]
        return blocked_attention(replace(operands, **changed))

    assert torch.autograd.gradcheck(attend, tuple(tensors.values()), fast_mode=True)


def test_only_gradients_that_are_wanted_are_given() -> None:
    operands = _operands((2, 4, 7, 4), "relative")
    for frozen in ("persistent_k_HNE", "persistent_v_HNE", "k_BHSE", "r_HWE", "content_bias_HE"):
        value = getattr(operands, frozen).detach()
        blocked_attention(replace(operands, **{frozen: value})).sum().backward()
        assert value.grad is None
        assert operands.q_BHTE.grad is not None


@torch.no_grad()
def test_threads_do_not_share_memory() -> None:
    """Each finds its own result although all attend at once."""
    inputs = [_operands((4, 40, 45, 6), "relative", torch.float32) for _ in range(4)]
    for index, operands in enumerate(inputs):
        operands.q_BHTE.mul_(index + 1)
    expected = [merged_attention(operands) for operands in inputs]
    wrong = []

    def attend(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(30) if not torch.equal(merged_attention(inputs[index]), expected[index]))

    threads = [threading.Thread(target=attend, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_made_in_inference_mode_serves_outside_of_it() -> None:
    operands = _operands((4, 40, 45, 6), "relative", torch.float32)
    with torch.inference_mode():
        first = merged_attention(operands)
    with torch.no_grad():
        assert torch.equal(merged_attention(operands), first)


@pytest.mark.parametrize("capacity", [2**20, 5000, 700, 1])
def test_blocks_cover_every_head_text_and_query_once(capacity: int) -> None:
    sizes = {"heads": 5, "batch": 3, "queries": 150, "context": 170, "window": 21, "others": 7}
    blocking = Blocking(**sizes, capacity=capacity)
    seen = torch.zeros(5, 3, 150, dtype=torch.int)
    for block in blocking:
        seen[block.heads, block.texts, block.queries] += 1
        heads, texts, queries = block.shape
        assert heads * texts * queries * (block.columns + 7) <= blocking.size
        assert block.context.stop == 20 + block.queries.stop
    assert (seen == 1).all()


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.999, 1 / 256, 1e-4])
def test_dropout_keeps_the_share_it_should(p: float) -> None:
    torch.manual_seed(0)
    kept = draw_kept(torch.Size((2000, 1000)), p)
    assert kept.dtype == torch.uint8
    assert set(kept.unique().tolist()) <= {0, 1}
    share = 1 - kept.double().mean().item()
    # Rows of another threshold vary as a whole, by one step in 256 at most.
    assert abs(share - p) < 5 * (p * (1 - p) / 2e6) ** 0.5 + 5 * (1 / 256 / 2) / 2000**0.5


def test_dropout_is_that_of_torch_otherwise() -> None:
    torch.manual_seed(0)
    module, ones = Dropout(0.25), torch.ones(400, 300)
    dropped = module(ones)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert module.eval()(ones) is ones
    assert Dropout(0.0)(ones) is ones
