"""Sums in chunks are the sums, with their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deadhead.measure import chunks
from deadhead.measure.chunks import sum_in_chunks


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "AT_ONCE", 12)


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, weight, other = (torch.randn(size, generator=generator) for size in ((10, 3), (4, 3), (10,)))
    return rows.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), other.to(dtype)


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_sums_and_gradients(learns: tuple[bool, bool]) -> None:
    rows, weight, other = tensors()
    rows.requires_grad_(learns[0]), weight.requires_grad_(learns[1])
    sizes = []

    def sums(rows: Tensor, other: Tensor) -> Tensor:
        sizes.append(len(rows))
        values = (rows @ weight.T).tanh() * other[:, None]
        return torch.stack([values.sum(), values.square().sum(), values.new_tensor(len(rows))])

    total, rest = sum_in_chunks(sums, rows, [other], width=4, weights=[weight])
    assert sizes == [3, 3, 3, 1]
    values = (rows @ weight.T).tanh() * other[:, None]
    assert total.item() == pytest.approx(values.sum().item(), rel=1e-12)
    assert rest.tolist() == pytest.approx([values.square().sum().item(), 10])
    assert not rest.requires_grad
    learning = [tensor for tensor in (rows, weight) if tensor.requires_grad]
    expected = torch.autograd.grad(3 * values.sum(), learning)
    for found, wanted in zip(torch.autograd.grad(3 * total, learning), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12)


def test_weights_with_one_gradient_between_them_and_without_any() -> None:
    rows, weight, _ = tensors()
    other, idle = (weight.detach().clone().requires_grad_() for _ in range(2))
    total, _ = sum_in_chunks(
        lambda rows: (rows @ (weight + other).T).exp().sum()[None], rows, width=4, weights=[weight, idle, other]
    )
    found = torch.autograd.grad(total, [weight, other, idle], allow_unused=True)
    (expected,) = torch.autograd.grad((rows @ (weight + other).T).exp().sum(), [weight])
    assert torch.allclose(found[0], expected, rtol=1e-12)
    assert torch.allclose(found[1], expected, rtol=1e-12)
    assert found[2] is None


def test_few_rows_are_one_chunk() -> None:
    rows, weight, _ = tensors()
    rows = rows[:3]
    total, _ = sum_in_chunks(lambda rows: (rows @ weight.T).exp().sum()[None], rows, width=4, weights=[weight])
    assert torch.equal(total, (rows @ weight.T).exp().sum())


def test_sums_in_half_precision_go_on_growing() -> None:
    """A thousand parts of 1/256 each would be lost beside 1 in bfloat16."""
    rows, weight = (
        torch.ones(3000, 1, dtype=torch.bfloat16),
        torch.ones(12, 1, dtype=torch.bfloat16, requires_grad=True),
    )
    total, _ = sum_in_chunks(lambda rows: (rows @ weight.T).float().sum()[None], rows, width=12, weights=[weight])
    (found,) = torch.autograd.grad(total, [weight])
    assert found.dtype == torch.bfloat16
    assert found.float().mean().item() == pytest.approx(3000, rel=0.01)


def test_gradients_are_there_once() -> None:
    rows, _, _ = tensors()
    total, _ = sum_in_chunks(lambda rows: rows.sum()[None], rows, width=4)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="are there once"):
        total.backward()
