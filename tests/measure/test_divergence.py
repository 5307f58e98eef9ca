"""KL and its gradient, against PyTorch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from deadhead.measure.divergence import divergence


def by_torch(logits_NV: Tensor, expected_NV: Tensor, temperature: float) -> Tensor:
    found_NV, wanted_NV = (
        log_softmax(values / temperature, dim=-1) for values in (logits_NV.float(), expected_NV.float())
    )
    return kl_div(found_NV, wanted_NV, reduction="sum", log_target=True)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_is_that_of_pytorch(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(7, 300)).to(dtype).requires_grad_()
    expected = (4 * torch.randn(7, 300)).to(dtype)
    given = logits.detach().clone(), expected.clone()

    found = divergence(logits, expected, temperature)
    (3 * found).backward()

    same = given[0].clone().requires_grad_()
    wanted = by_torch(same, expected, temperature)
    (3 * wanted).backward()
    assert logits.grad is not None and same.grad is not None
    tolerance = {torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=tolerance, atol=0)
    torch.testing.assert_close(logits.grad, same.grad, rtol=tolerance, atol=tolerance * float(same.grad.abs().max()))
    # Nothing that was given is written into.
    assert torch.equal(logits, given[0]) and torch.equal(expected, given[1])


@pytest.mark.parametrize("temperature", [0.5, 1.5, 3.0])
def test_distributions_that_are_near_are_told_apart_in_half_precision(temperature: float) -> None:
    """A temperature is of the logits as they are, not as half precision rounds what is left of them."""
    torch.manual_seed(0)
    expected = (6 * torch.randn(40, 200)).to(torch.bfloat16)
    logits = (expected + 0.05 * torch.randn(40, 200)).to(torch.bfloat16).requires_grad_()
    found = divergence(logits, expected, temperature)
    found.backward()

    same = logits.detach().float().requires_grad_()
    wanted = by_torch(same, expected, temperature)
    wanted.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert logits.grad is not None and same.grad is not None
    assert (logits.grad.float() - same.grad).norm() < 5e-3 * same.grad.norm()


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[40_000.0, 0.0, -40_000.0]], dtype=torch.float16)

    assert float(divergence(logits, logits.clone(), 0.5)) == 0


def test_equal_distributions_are_not_apart_at_all() -> None:
    logits = (100 * torch.randn(5, 70, generator=torch.Generator().manual_seed(1))).requires_grad_()

    found = divergence(logits, logits.detach())
    found.backward()

    assert float(found.detach()) == 0 and logits.grad is not None and not logits.grad.any()


def test_the_expected_distribution_learns_nothing() -> None:
    expected = torch.randn(3, 11, requires_grad=True)

    divergence(torch.randn(3, 11, requires_grad=True), expected).backward()

    assert expected.grad is None


def test_its_gradient_is_there_once() -> None:
    found = divergence(torch.randn(3, 11, requires_grad=True), torch.randn(3, 11))
    found.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="is there once; compute the divergence anew"):
        found.backward()
