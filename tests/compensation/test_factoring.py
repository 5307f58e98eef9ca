"""A matrix and its factor in the same room: what it solves, and that the matrix comes back."""

from __future__ import annotations

import pytest
import torch

from deadhead.compensation import factoring
from deadhead.compensation.factoring import factored


@pytest.mark.parametrize("width", [0, 1, 8, 9, 15, 16])
def test_block_by_block_it_solves_what_torch_does_and_the_matrix_comes_back(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factoring, "_WHOLE", 8)
    monkeypatch.setattr(factoring, "_BLOCK", 5)
    generator = torch.Generator().manual_seed(width)
    x_RN = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    y_MN = torch.randn(3, width, generator=generator, dtype=torch.float64)
    ridge_N = torch.rand(width, generator=generator, dtype=torch.float64)
    matrix_NN = x_RN.T @ x_RN
    matrix_NN = (matrix_NN + matrix_NN.T) / 2
    before_NN = matrix_NN.clone()
    with factored(matrix_NN, ridge_N) as solve:
        assert solve is not None
        first, second = solve(y_MN.clone()), solve(2 * y_MN)
    assert torch.equal(matrix_NN, before_NN)
    wanted = torch.linalg.solve(before_NN + ridge_N.diag(), y_MN, left=False)
    assert torch.allclose(first, wanted, atol=1e-9)
    assert torch.allclose(second, 2 * wanted, atol=1e-9)


@pytest.mark.parametrize("at", [0, 6, 11])
def test_what_is_not_positive_definite_is_not_solved_and_comes_back_too(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factoring, "_WHOLE", 8)
    monkeypatch.setattr(factoring, "_BLOCK", 5)
    matrix_NN = torch.eye(12, dtype=torch.float64) + 0.01
    matrix_NN[at, at] = -1.0
    before_NN = matrix_NN.clone()
    with factored(matrix_NN, torch.zeros(12, dtype=torch.float64)) as solve:
        assert solve is None
    assert torch.equal(matrix_NN, before_NN)
