"""Token by token: every cache and every way of generating comes to what reading the whole text does."""

from __future__ import annotations

import copy
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, StaticCache

from deadhead.models.all_attention.cache import AppendingLayer
from deadhead.models.all_attention.projection import project
from tests.random_models import difference, tiny_model

positions = pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
_LENGTH = 17


def _text(batch: int = 2, length: int = _LENGTH) -> Tensor:
    return torch.randint(29, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _whole(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def _in_steps(model: Any, ids: Tensor, cache: Any, sizes: tuple[int, ...]) -> Tensor:
    logits, start = [], 0
    for size in sizes:
        outputs = model(input_ids=ids[:, start : start + size], past_key_values=cache, use_cache=True)
        logits.append(outputs.logits)
        start += size
    return torch.cat(logits, dim=1)


@positions
@pytest.mark.parametrize("attend_initial_memory", [False, True])
@pytest.mark.parametrize("kind", ["sliding", "unlimited", "static"])
def test_every_cache_reads_the_same(kind: str, position: str, attend_initial_memory: bool) -> None:
    model = tiny_model(position=position, attend_initial_memory=attend_initial_memory)
    ids = _text()
    caches = {
        "sliding": lambda: DynamicCache(config=model.config),
        "unlimited": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=_LENGTH),
    }
    expected = _whole(model, ids)
    for sizes in ((1,) * _LENGTH, (7, 1, 1, 1, 7)):
        assert difference(_in_steps(model, ids, caches[kind](), sizes), expected) <= 1e-5


@positions
def test_every_way_of_generating_gives_the_same_tokens(position: str) -> None:
    model = tiny_model(position=position)
    prompt = _text(1, 4)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, use_cache=False, **settings)
    other = tiny_model(seed=1, position=position, num_hidden_layers=1)
    ways: list[dict[str, Any]] = [
        {},
        {"cache_implementation": "static"},
        {"assistant_model": other},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "num_return_sequences": 1},
    ]
    for way in ways:
        assert torch.equal(model.generate(prompt, **way, **settings), expected), way


@positions
@pytest.mark.parametrize("attend_initial_memory", [False, True])
def test_padded_prompts_go_on_the_same_with_every_cache(position: str, attend_initial_memory: bool) -> None:
    model = tiny_model(position=position, attend_initial_memory=attend_initial_memory)
    prompts, mask = _text(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    short = model.generate(prompts[:1, 2:], attention_mask=mask[:1, 2:], use_cache=False, **settings)
    for way in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        found = model.generate(prompts, attention_mask=mask, **way, **settings)
        assert torch.equal(found[:1, 2:], short), way


@positions
def test_beams_are_those_of_whole_reading(position: str) -> None:
    """The cache's rows are put in another order after each token."""
    model = tiny_model(position=position)
    prompt = _text(2, 4)
    settings = {"max_new_tokens": 12, "num_beams": 3, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    cached, whole = model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(cached, whole)


def test_keys_and_values_are_appended_in_place_in_bounded_memory() -> None:
    model = tiny_model()
    ids = _text(2, 200)
    cache = DynamicCache(config=model.config)
    addresses = set()
    with torch.no_grad():
        for place in range(ids.shape[1]):
            model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            layer = cache.layers[0]
            assert isinstance(layer, AppendingLayer)
            assert layer.keys.shape[2] == min(place + 1, model.config.memory_length)
            assert layer.keys.untyped_storage().nbytes() <= 4 * 2 * 4 * 4 * (3 * model.config.memory_length + 3)
            addresses.add(layer.keys.untyped_storage().data_ptr())
    assert len(addresses) < 60
    assert cache.get_seq_length() == 200


def test_a_text_read_in_inference_mode_goes_on_outside_of_it() -> None:
    model = tiny_model()
    ids, cache = _text(), DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :9], past_key_values=cache, use_cache=True)
    assert difference(_in_steps(model, ids[:, 9:], cache, (1,) * 8), _whole(model, ids)[:, 9:]) <= 1e-5


def test_a_copy_of_the_cache_goes_its_own_way() -> None:
    model = tiny_model()
    ids, others = _text(), _text().flip(1)
    cache = DynamicCache(config=model.config)
    _in_steps(model, ids, cache, (9,))
    copied = copy.deepcopy(cache)
    first = _in_steps(model, ids[:, 9:], cache, (1,) * 8)
    second = _in_steps(model, others[:, 9:], copied, (1,) * 8)
    assert difference(first, _whole(model, ids)[:, 9:]) <= 1e-5
    assert difference(second, _whole(model, torch.cat([ids[:, :9], others[:, 9:]], dim=1))[:, 9:]) <= 1e-5


def test_gradients_flow_through_a_cache() -> None:
    model = tiny_model()
    ids = _text()
    cached = DynamicCache(config=model.config)
    first = model(input_ids=ids[:, :9], past_key_values=cached, use_cache=True).logits
    second = model(input_ids=ids[:, 9:], past_key_values=cached, use_cache=True).logits
    weight = model.model.layers[0].attention.k_proj.weight
    (found,) = torch.autograd.grad(torch.cat([first, second], 1).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.square().sum(), weight)
    assert difference(found, expected) <= 1e-5


@pytest.mark.parametrize("trained", ["q_proj", "v_proj"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_flow_through_a_cache_whatever_learns(implementation: str, trained: str) -> None:
    model = tiny_model(attn_implementation=implementation, num_attention_heads=1, num_hidden_layers=1)
    model.requires_grad_(False)
    weight = getattr(model.model.layers[0].attention, trained).weight.requires_grad_()
    ids, cache = _text(1), DynamicCache(config=model.config)
    logits = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(5, dim=1)]
    (found,) = torch.autograd.grad(torch.cat(logits, 1).square().sum(), weight)
    (expected,) = torch.autograd.grad(model(input_ids=ids, use_cache=False).logits.square().sum(), weight)
    assert difference(found, expected) <= 1e-5


def test_a_longer_memory_may_be_read_with() -> None:
    for position in ("sinusoidal", "rotary"):
        model, longer = tiny_model(position=position), tiny_model(position=position, memory_length=9)
        model.config.memory_length = 9
        longer.load_state_dict(model.state_dict())
        ids = _text()
        assert difference(_whole(model, ids), _whole(longer, ids)) <= 1e-6
        cache = DynamicCache(config=model.config)
        assert difference(_in_steps(model, ids, cache, (9, *(1,) * 8)), _whole(longer, ids)) <= 1e-5


def test_weights_that_are_fetched_when_they_are_needed() -> None:
    model = tiny_model()
    ids = _text(1, 3)
    expected = _whole(model, ids)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert difference(_whole(offloaded, ids), expected) <= 1e-6


def test_no_logits_may_be_asked_for() -> None:
    logits = tiny_model()(input_ids=_text(), logits_to_keep=torch.tensor([], dtype=torch.long)).logits
    assert logits.shape == (2, 0, 29)


def test_keys_of_positions_are_those_of_the_weights_there_are() -> None:
    """They live as long as a cache: a new text after a training step must not meet the old ones."""
    model = tiny_model()
    ids = _text()
    _in_steps(model, ids, DynamicCache(config=model.config), (9, 8))
    with torch.no_grad():
        model.model.layers[0].attention.r_proj.weight.mul_(-1)
    assert difference(_in_steps(model, ids, DynamicCache(config=model.config), (9, 8)), _whole(model, ids)) <= 1e-5


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 8), (5, 7), (3, 40)])
def test_few_rows_are_projected_like_many(shape: tuple[int, int], bias: bool) -> None:
    projection = nn.Linear(24, 10, bias=bias).eval()
    hidden = torch.randn(*shape, 24)
    with torch.no_grad():
        assert difference(project(projection, hidden), projection(hidden)) <= 1e-6
        noted = []
        projection.register_forward_hook(lambda *_: noted.append(1))
        project(projection, hidden)
    assert noted, "hooks of others must be heard"


class _Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@positions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "length"), [(32, 96), (1, 1024)])
def test_evaluation_makes_nothing_of_the_size_of_all_scores(
    batch: int, length: int, dtype: torch.dtype, position: str
) -> None:
    heads, persistent = 8, 1024
    sizes = {"num_attention_heads": heads, "num_persistent": persistent, "memory_length": length}
    model = tiny_model(dtype=dtype, hidden_size=32, num_hidden_layers=1, position=position, **sizes)
    ids = _text(batch, 2 * length)
    scores = batch * heads * length * (2 * length + persistent)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        with _Largest() as largest:
            for part in ids.chunk(2, dim=1):
                model(input_ids=part, past_key_values=cache, use_cache=True)
    assert largest.numbers < scores / 10
