"""The normal equations against torch.linalg.lstsq, and the choice on held-out tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deadhead.compensation import solving
from deadhead.compensation.moments import HeldRows, Moments
from deadhead.compensation.solving import best_fit, ridge_fits
from deadhead.data.shares import Shares
from tests.threads import shared_by

N, D, R = 7, 5, 60


def tokens(seed: int, rows: int = R) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, outputs that depend on them but for noise, and weights."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (N, D))
    map_ND = torch.randn(N, D, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x, x @ map_ND + 0.5 * noise + 3, torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1


def moments(*parts: tuple[Tensor, list[Tensor], Tensor], has_bias: bool) -> Moments:
    found = Moments(N, D, len(parts[0][1]), has_bias=has_bias, device=torch.device("cpu"))
    for part in parts:
        found.add(*part)
    return found


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_a_ridge_fit_is_the_weighted_least_squares_one_drawn_to_the_weight_there_is(
    has_bias: bool, ridge: float
) -> None:
    x, y, w = tokens(0)
    weight = torch.randn(D, N + has_bias, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = moments((x[:20], [y[:20]], w[:20]), (x[20:], [y[20:]], w[20:]), has_bias=has_bias)
    (fit,) = ridge_fits(found, weight, ridge)  # type: ignore[misc]
    # Rows of √λ for each input that ask for the old weight. The bias has none.
    wide = torch.cat([x, torch.ones(R, int(has_bias), dtype=x.dtype)], dim=1)
    factor = (ridge * (x.square() * w[:, None]).sum(0).mean()).sqrt()
    pull = factor * torch.eye(N + has_bias, dtype=x.dtype)[:N]
    root = w.sqrt()[:, None]
    a, b = torch.cat([wide * root, pull]), torch.cat([y * root, factor * weight[:, :N].T])
    assert torch.allclose(fit, torch.linalg.lstsq(a, b).solution.T, atol=1e-9)


def test_an_error_is_that_of_the_tokens_themselves() -> None:
    x, y, w = tokens(0)
    other = y.flip(0)
    weight = torch.randn(D, N + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    second = torch.randn_like(weight)
    mixes = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 2.0]], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = moments((x, [y, other], w), has_bias=True).errors(torch.stack([weight, second]), mixes, shares)
    goal = 0.25 * y + 0.75 * other
    for error, (first, last) in zip(found, mixes, strict=True):
        mixed = first * weight + last * second
        given = x @ mixed[:, :N].T + mixed[:, N]
        expected = (w * (goal - given).square().sum(1)).sum() / (w * goal.square().sum(1)).sum()
        assert float(error) == pytest.approx(float(expected))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("outputs", [slice(None), slice(None, None, 2)])
def test_tokens_give_the_errors_that_their_moments_give(has_bias: bool, outputs: slice) -> None:
    x, y, w = tokens(0)
    rows = HeldRows(has_bias=has_bias)
    for part in (slice(20), slice(20, None)):
        rows.add(x[part], [y[part], y.flip(0)[part]], w[part])
    sums = moments((x, [y, y.flip(0)], w), has_bias=has_bias)
    weights = torch.randn(2, D, N + has_bias, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixes = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 2.0]], dtype=torch.float64)
    goal = torch.tensor([0.25, 0.75], dtype=torch.float64)
    mine, its = (each.errors(weights[:, outputs], mixes, goal, outputs) for each in (rows, sums))
    assert rows.tokens == sums.tokens == R
    # Of some outputs the errors of moments are so but for a factor and a constant.
    if outputs == slice(None):
        assert torch.allclose(mine, its, rtol=1e-9)
    assert mine.argsort().tolist() == its.argsort().tolist()
    steps = mine.diff() / its.diff()
    assert torch.allclose(steps, steps[:1].expand(2))


@pytest.mark.parametrize("kind", [Moments, HeldRows])
@pytest.mark.parametrize("sizes", [[25, 35], [60, 0, 0], [0, 17, 1, 42]])
def test_tokens_of_parts_give_the_errors_and_the_fit_of_the_whole(kind: type, sizes: list[int]) -> None:
    x, y, w = tokens(0)
    parts = [*zip(x.split(sizes), y.split(sizes), w.split(sizes), strict=True)]

    def part(shares: Shares) -> Moments | HeldRows:
        some_x, some_y, some_w = parts[shares.index]
        given = (some_x, [some_y, some_y.cos()], some_w)
        found = moments(given, has_bias=True) if kind is Moments else HeldRows(has_bias=True)
        if isinstance(found, HeldRows):
            found.add(*given)
        found.add_others(shares)
        return found

    whole = moments((x, [y, y.cos()], w), has_bias=True)
    weights = torch.randn(2, D, N + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mixes = torch.tensor([[1.0, 0.0], [0.3, 0.7]], dtype=torch.float64)
    goal = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = shared_by(len(sizes), part)
    for each in found:
        assert each.tokens == R and each.is_finite
        errors = each.errors(weights, mixes, goal)
        assert torch.allclose(errors, whole.errors(weights, mixes, goal), rtol=1e-9)
        assert torch.equal(errors, found[0].errors(weights, mixes, goal))
        if isinstance(each, Moments):
            fits, expected = (ridge_fits(one, weights[0], 0.1) for one in (each, whole))
            assert fits is not None and expected is not None and torch.allclose(fits, expected, rtol=1e-9)


def test_ridge_and_target_are_chosen_by_some_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y, w), (held_x, held_y, held_w) = tokens(0), tokens(5)
    fitted, held = moments((x, [y], w), has_bias=True), moments((held_x, [held_y], held_w), has_bias=True)
    weight = torch.zeros(D, N + 1, dtype=torch.float64)
    whole = best_fit(fitted, held, weight)
    monkeypatch.setattr(solving, "JUDGES", 2)
    some = best_fit(fitted, held, weight)
    assert whole is not None and some is not None
    fit = ridge_fits(fitted, weight, some.ridge)
    assert fit is not None and torch.allclose(some.weight_DN, fit[0], atol=1e-9)
    assert some.before == whole.before and some.after == pytest.approx(float(whole.after), rel=0.1)


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 8, 13])
def test_second_moments_are_computed_once_for_each_pair(width: int) -> None:
    x, y, w = tokens(0)
    wide = x.repeat(1, 5)[:, :width] + torch.randn(R, width, generator=torch.Generator().manual_seed(1)).to(x)
    found = Moments(width, D, 1, has_bias=False, device=x.device)
    found.add(wide, [y], w)
    assert torch.allclose(found.xx_NN, (wide * w[:, None]).T @ wide)


def test_the_fit_is_the_better_one_on_held_out_tokens() -> None:
    (x, y, w), (held_x, held_y, held_w) = tokens(0), tokens(5)
    fitted, held = moments((x, [y], w), has_bias=True), moments((held_x, [held_y], held_w), has_bias=True)
    weight = torch.zeros(D, N + 1, dtype=torch.float64)
    fit = best_fit(fitted, held, weight)
    assert fit is not None
    assert fit.after < 0.2 < fit.before == pytest.approx(1.0)
    # The best there is already: whatever is fitted to a few other tokens is worse.
    best = ridge_fits(held, weight, 0.0)
    assert best is not None
    few = moments((x[:9], [y[:9]], w[:9]), has_bias=True)
    assert best_fit(few, held, best[0]) is None


def test_few_tokens_are_fitted_with_a_large_ridge() -> None:
    x, y, w = tokens(0, rows=8)
    held_x, held_y, held_w = tokens(5, rows=500)
    near = ridge_fits(moments((held_x, [held_y], held_w), has_bias=True), torch.zeros(D, N + 1).double(), 0.0)
    assert near is not None
    fit = best_fit(
        moments((x, [y], w), has_bias=True), moments((held_x, [held_y], held_w), has_bias=True), 0.8 * near[0]
    )
    assert fit is None or fit.ridge >= 0.1


def test_the_target_is_mixed_where_that_is_better() -> None:
    (x, y, w), (held_x, held_y, held_w) = tokens(0), tokens(5)
    noise = 20 * torch.randn(R, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # The second target is what counts, but among the tokens to fit to it is full of noise.
    fitted = moments((x, [y, y + noise], w), has_bias=True)
    held = moments((held_x, [held_y, held_y], held_w), has_bias=True)
    fit = best_fit(fitted, held, torch.zeros(D, N + 1, dtype=torch.float64))
    assert fit is not None and fit.share == 0.0


def test_what_is_not_finite_is_not_fitted() -> None:
    x, y, w = tokens(0)
    spoilt = x.clone()
    spoilt[3] = float("inf")
    good, bad = (moments((each, [y], w), has_bias=False) for each in (x, spoilt))
    weight = torch.zeros(D, N, dtype=torch.float64)
    assert best_fit(bad, good, weight) is None
    assert best_fit(good, bad, weight) is None


def test_inputs_that_are_always_zero_are_left_alone() -> None:
    x, y, w = tokens(0)
    nothing = moments((torch.zeros_like(x), [y], w), has_bias=False)
    assert best_fit(nothing, nothing, torch.ones(D, N, dtype=torch.float64)) is None
