"""Continuing a text."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

import deadhead
from deadhead import HeadPlan, InputError
from deadhead.data import load_text
from deadhead.measure.generate import generate_text
from deadhead.models import AllAttentionForCausalLM
from tests.random_models import tiny_model
from tests.small_runs import framed_tokenizer, write_prose


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_text(str(write_prose(tmp_path_factory.mktemp("text"))), tokenizer="bpe", vocab_size=270)[1]


@pytest.fixture
def model() -> AllAttentionForCausalLM:
    return tiny_model(vocab_size=270)


def test_greedy_is_the_likeliest_token_each_time(
    model: AllAttentionForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    text = generate_text(model, tokenizer, "the cat", max_new_tokens=12, temperature=0)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text.startswith("the cat")


def test_sampling_depends_on_the_seed_alone(model: AllAttentionForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = []
    for process_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(process_seed)
        texts.append(generate_text(model, tokenizer, "a dog", max_new_tokens=20, temperature=1.5, seed=seed))
    assert texts[0] == texts[1] != texts[2]


def test_the_process_random_state_is_left_alone(
    model: AllAttentionForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    generate_text(model, tokenizer, "a", max_new_tokens=3)
    assert torch.equal(torch.rand(3), expected)


def test_a_cut_model_goes_on_like_its_gated_self(
    model: AllAttentionForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = HeadPlan(kept={0: (), 1: (2,)}, total=dict.fromkeys(range(3), 4))
    deadhead.attach(model).set_plan(plan)
    gated = generate_text(model, tokenizer, "the", max_new_tokens=20, temperature=0)
    assert generate_text(deadhead.cut(model, plan), tokenizer, "the", max_new_tokens=20, temperature=0) == gated


def test_at_most_so_many_tokens(model: AllAttentionForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    text = generate_text(model, tokenizer, "cat", max_new_tokens=1, temperature=0)
    assert len(text) > len("cat")
    longest = max(len(token) for token in tokenizer.get_vocab())
    assert len(text) <= len("cat") + longest


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "A prompt of at least one token was expected, but it is empty"),
        ("a", {"temperature": -0.1}, "temperature must be 0 or lie between 0.001 and 1000, but it is -0.1"),
        ("a", {"temperature": float("nan")}, "temperature must be 0 or lie between 0.001 and 1000, but it is nan"),
        ("a", {"max_new_tokens": 0}, "At least one new token is needed, but got 0"),
    ],
)
def test_bad_input(
    prompt: str,
    options: dict[str, float],
    message: str,
    model: AllAttentionForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(InputError, match=message):
        generate_text(model, tokenizer, prompt, **options)  # type: ignore[arg-type]


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    """Ids outside the table would crash, or on a GPU corrupt the process."""
    with pytest.raises(InputError, match="vocabulary"):
        generate_text(tiny_model(vocab_size=29), tokenizer, "zebra", max_new_tokens=2)


@pytest.mark.parametrize("frame", ["bos", "cls and sep", "none"])
def test_a_prompt_begins_as_the_tokenizer_begins_a_text_and_does_not_end(frame: str) -> None:
    tokenizer = framed_tokenizer(frame)
    model = tiny_model(vocab_size=len(tokenizer))
    begin = {"bos": [tokenizer.bos_token_id], "cls and sep": [tokenizer.cls_token_id], "none": []}[frame]
    ids = torch.tensor([[*begin, *b"the cat"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].argmax()
    text = generate_text(model, tokenizer, "the cat", max_new_tokens=1, temperature=0)
    assert text == tokenizer.decode([*ids[0].tolist(), int(expected)], skip_special_tokens=True)


@pytest.mark.parametrize("asked", [6, 7, 2**24])
def test_a_text_ends_within_the_models_positions(asked: int, tokenizer: PreTrainedTokenizerBase) -> None:
    config = GPT2Config(vocab_size=270, n_embd=8, n_layer=1, n_head=2, n_positions=7, eos_token_id=None)
    network = GPT2LMHeadModel(config)
    assert len(tokenizer("a").input_ids) == 1
    if asked == 6:
        generate_text(network, tokenizer, "a", max_new_tokens=asked)
        return
    with pytest.raises(InputError, match="The prompt with the new tokens would have .* has 7 positions"):
        generate_text(network, tokenizer, "a", max_new_tokens=asked)
