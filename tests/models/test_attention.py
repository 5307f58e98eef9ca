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
from deadhead.models.all_attention.merged import few_attention, merged_attention
from tests.random_models import difference

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
        # As of a model that some vectors have been cut out of.
        persistent_scale=3.0,
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


def _explicit(operands: Operands, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return Σ z e^s v / Σ z e^s, all columns side by side, and e^s / Σ z e^s of the persistent ones, (B, H, T, N)."""
    q_BHTE, keys_BHES = operands.content_q_BHTE * operands.scale, operands.k_BHSE.transpose(-1, -2)
    context = (q_BHTE @ keys_BHES + operands.context_bias()).exp()
    persistent = (operands.persistent_q_BHTE @ operands.persistent_k_HNE.transpose(-1, -2)).exp()
    weights = torch.cat([context, persistent * (z if z.ndim == 1 else z[:, None, None])], dim=-1)
    values = operands.persistent_v_HNE * operands.persistent_scale
    attended = weights @ torch.cat([operands.v_BHSE, values.expand(len(q_BHTE), -1, -1, -1)], dim=2)
    total = weights.sum(-1, keepdim=True)
    return (attended / total).transpose(1, 2), persistent / total


def _gated(operands: Operands, z: list[float] | Tensor) -> Operands:
    return replace(operands, z_N=torch.as_tensor(z, dtype=torch.float64).requires_grad_())


def _assert_same_gradients(found: Tensor, expected: Tensor, operands: Operands, allowed: float = 1e-9) -> None:
    assert difference(found, expected) <= allowed
    tensors = _tensors(operands)
    assert "z_N" in tensors
    upstream = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    references = torch.autograd.grad(expected, list(tensors.values()), upstream)
    for (name, value), reference in zip(tensors.items(), references, strict=True):
        gradient = torch.autograd.grad(found, value, upstream, retain_graph=True)[0]
        # A query that sees only itself has none at all.
        largest = max(1.0, float(reference.abs().max()))
        assert float((gradient - reference).abs().max()) <= allowed * largest, name


@pytest.mark.parametrize("kind", ["relative", "rotary", "padded"])
@pytest.mark.parametrize("own", [False, True])
def test_gates_multiply_the_exponentials(kind: str, own: bool) -> None:
    """Soft values, and for each text its own."""
    shape = (2, 6, 11, 6)
    z = torch.tensor([[0.0, 1.0, 0.3, 0.0, 0.8, 1.0, 0.1], [0.5, 0.0, 1.0, 1.0, 0.0, 0.2, 0.0]])
    operands = _gated(_operands(shape, kind), z if own else z[0])
    assert operands.z_N is not None
    found, weights = eager_attention(operands, need_weights=True)
    expected, shares = _explicit(operands, operands.z_N)
    _assert_same_gradients(found, expected, operands)
    assert weights is not None
    z_BN = operands.z_N.expand(2, 7)
    assert difference(weights[..., -7:], shares * z_BN[:, None, None]) <= 1e-9


@shapes
@pytest.mark.parametrize("kind", ["relative", "rotary"])
@pytest.mark.parametrize("z", [[1, 0, 0, 1, 1, 0, 1], [0] * 7, [1] * 7], ids=["some", "none", "all"])
@pytest.mark.parametrize("capacity", [2**20, 150, 1])
def test_blocks_of_any_size_give_shut_gates_their_gradients_too(
    capacity: int, z: list[float], kind: str, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "_CAPACITY", capacity)
    operands = _gated(_operands(shape, kind), z)
    assert operands.z_N is not None
    _assert_same_gradients(blocked_attention(operands), _explicit(operands, operands.z_N)[0], operands)


@pytest.mark.parametrize("attend", [blocked_attention, lambda operands: eager_attention(operands)[0]])
def test_gradients_by_gates_are_finite_differences(attend: Any) -> None:
    operands = _gated(_operands((2, 4, 7, 4), "relative"), [1, 0, 1, 0, 0, 1, 1])
    assert operands.z_N is not None
    attended = attend(operands)
    upstream = torch.randn(attended.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (gradient_N,) = torch.autograd.grad(attended, operands.z_N, upstream)
    for place, step in enumerate(1e-6 * torch.eye(7, dtype=torch.float64)):
        with torch.no_grad():
            more, less = (_explicit(operands, operands.z_N + sign * step)[0] for sign in (1, -1))
        slope = float(((more - less) * upstream).sum()) / 2e-6
        assert float(gradient_N[place]) == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_shut_gates_have_the_gradient_of_the_mean_over_their_own_dropout() -> None:
    operands = _gated(replace(_operands((2, 4, 7, 4), "relative"), dropout=0.3), [1, 0, 1, 0, 0, 1, 1])
    assert operands.z_N is not None
    torch.manual_seed(3)
    attended_BTHE = blocked_attention(operands)
    g_BTHE = torch.randn(attended_BTHE.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (gradient_N,) = torch.autograd.grad(attended_BTHE, operands.z_N, g_BTHE)
    with torch.no_grad():
        _, p_BHTN = _explicit(operands, operands.z_N)
        along_BTHN = torch.einsum("bthe,hne->bthn", g_BTHE, operands.persistent_v_HNE) * operands.persistent_scale
        slope_BTHN = along_BTHN - (g_BTHE * attended_BTHE).sum(-1, keepdim=True)
        expected_N = (p_BHTN.transpose(1, 2) * slope_BTHN).sum((0, 1, 2))
    is_shut = operands.z_N == 0
    assert difference(gradient_N[is_shut], expected_N[is_shut]) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attend", [blocked_attention, lambda operands: eager_attention(operands)[0]])
def test_a_shut_vector_with_an_enormous_score_spoils_nothing(attend: Any, dtype: torch.dtype) -> None:
    operands = _operands((2, 4, 7, 4), "relative", dtype)
    with torch.no_grad():
        operands.persistent_k_HNE[:, 2] *= 1000
    without = replace(
        operands,
        persistent_k_HNE=operands.persistent_k_HNE[:, [0, 1, 3, 4, 5, 6]],
        persistent_v_HNE=operands.persistent_v_HNE[:, [0, 1, 3, 4, 5, 6]],
    )
    z = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.float32).requires_grad_()
    operands = replace(operands, z_N=z)
    found = attend(operands)
    assert difference(found, attend(without)) <= {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    gradients = torch.autograd.grad(found.float().sum(), list(_tensors(operands).values()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


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
