"""Replies to prompts: against tokens chosen one by one, known sequences, and distributions of a model and itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks._tiny_models import scramble
from deadhead import InputError
from deadhead.data.asking import prompt_tokens, reads_alike
from deadhead.measure.greedy import Writer
from deadhead.measure.prompts import PROMPTS
from deadhead.measure.replies import Reply, compare_replies, repetition, reply_likeness, write_replies
from tests.random_models import assert_unchanged, snapshot, tiny_model
from tests.small_runs import framed_tokenizer

TOKENIZER = framed_tokenizer("bos")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ASKED = ("hi", "Tell me a joke.", "What is 2 plus 3?", "Why?", "Explain rain.")


def build(kind: str, seed: int = 0) -> Any:
    ends = {"bos_token_id": 0, "eos_token_id": None}
    if kind == "own":
        return tiny_model(seed, vocab_size=len(TOKENIZER))
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), **sizes, **ends))
    else:
        config: Any = LlamaConfig
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(config(vocab_size=len(TOKENIZER), num_key_value_heads=2, **sizes, **ends))
    scramble(model, seed)
    return model.eval()


def greedy(model: Any, prompt: tuple[int, ...], room: int) -> tuple[int, ...]:
    """The likeliest token each time, without a cache, padding or `generate`."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(room):
            likeliest = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, likeliest], dim=1)
            if int(likeliest) == TOKENIZER.eos_token_id:
                break
    return tuple(ids[0, len(prompt) :].tolist())


def reply(*tokens: int) -> Reply:
    return Reply(asked="", prompt=(1,), tokens=tokens, text="")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "own"])
def test_replies_written_side_by_side_are_those_written_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind)
    told: list[tuple[int, int]] = []
    found = write_replies(
        model, TOKENIZER, ASKED, max_new_tokens=12, batch_size=3, progress=lambda *done: told.append(done)
    )
    assert [each.asked for each in found] == list(ASKED)
    for each in found:
        assert each.prompt == (TOKENIZER.bos_token_id, *each.asked.encode())
        assert each.tokens == greedy(model, each.prompt, 12)
        assert each.text == TOKENIZER.decode(each.tokens, skip_special_tokens=True).strip()
    assert told[-1] == (24, 24) and len(told) > 12
    # A model that padding changes writes the same, prompts of one length at a time.
    monkeypatch.setattr(Writer, "is_indifferent_to_padding", lambda *_: False)
    assert write_replies(model, TOKENIZER, ASKED, max_new_tokens=12) == found


def test_padding_that_changes_a_model_is_noticed() -> None:
    model = build("gpt2")
    writer = Writer(model, [], 0)
    prompts = prompt_tokens(TOKENIZER, ASKED)
    with torch.no_grad():
        assert writer.is_indifferent_to_padding(prompts)
        forward = model.forward

        def deaf(attention_mask: Any = None, **given: Any) -> Any:
            return forward(**given)

        model.forward = deaf
        assert not Writer(model, [], 0).is_indifferent_to_padding(prompts)


def test_a_reply_ends_where_the_model_ends_it() -> None:
    model = build("llama")
    (free,) = write_replies(model, TOKENIZER, ("hi",), max_new_tokens=12)
    at = next(index for index in range(3, 12) if free.tokens[index] not in free.tokens[:index])
    model.generation_config.eos_token_id = [free.tokens[at], 5]
    (ended,) = write_replies(model, TOKENIZER, ("hi",), max_new_tokens=12)
    assert ended.tokens == free.tokens[: at + 1]


def test_the_models_own_settings_of_generation_do_not_count_and_stay() -> None:
    model = build("gpt2")
    plain = write_replies(model, TOKENIZER, ASKED[:2], max_new_tokens=12)
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.use_cache = 50.0, True, 3.0, False
    model.train()
    before = snapshot(model)
    assert write_replies(model, TOKENIZER, ASKED[:2], max_new_tokens=12) == plain
    assert_unchanged(model, before)
    assert model.training and model.generation_config is own and own.repetition_penalty == 50


def test_a_prompt_goes_through_the_chat_template() -> None:
    tokenizer = framed_tokenizer("bos")
    plain = prompt_tokens(tokenizer, ["hi"])
    tokenizer.chat_template = TEMPLATE
    # One BOS, though the template and the tokenizer both write it.
    assert prompt_tokens(tokenizer, ["hi"]) == [(tokenizer.bos_token_id, *b"[user]hi[assistant]")]
    assert plain == [(tokenizer.bos_token_id, *b"hi")]
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="conversation that the chat template takes was expected in a prompt"):
        prompt_tokens(tokenizer, ["hi"])


def test_a_tokenizer_without_a_token_to_pad_with() -> None:
    tokenizer = framed_tokenizer("none", eos=False)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    (found,) = write_replies(build("llama"), tokenizer, ("hi",), max_new_tokens=3)
    assert len(found.tokens) == 3 and tokenizer.pad_token_id is None


def test_few_positions() -> None:
    """Replies are as long as they can be, and prompts without room are left out."""
    model = build("gpt2")
    asked = ("a" * 10, "a" * 50, "a" * 55, "a" * 56, "a" * 80)
    found = write_replies(model, TOKENIZER, asked, max_new_tokens=40)
    assert [(each.asked, len(each.tokens)) for each in found] == [(asked[0], 40), (asked[1], 13), (asked[2], 8)]
    for each in found:
        assert each.tokens == greedy(model, each.prompt, len(each.tokens))
    assert len(write_replies(model, TOKENIZER, asked, max_new_tokens=40, positions=50)) == 1
    with pytest.raises(InputError, match="shortest has 81 tokens and the model 64 positions"):
        write_replies(model, TOKENIZER, asked[4:])


@pytest.mark.parametrize(
    ("replies", "share"),
    [
        ([], 0.0),
        ([reply(1, 2, 3)], 0.0),
        ([reply(*range(9))], 0.0),
        ([reply(*[7] * 10)], 6 / 7),
        # 1234 and 2341 come twice: 2 of 6.
        ([reply(1, 2, 3, 4, 1, 2, 3, 4, 1)], 2 / 6),
        # What another reply said is no repetition.
        ([reply(1, 2, 3, 4), reply(1, 2, 3, 4)], 0.0),
        ([reply(*[7] * 5), reply(1, 2, 3, 4)], 1 / 3),
    ],
)
def test_repetition_of_known_tokens(replies: list[Reply], share: float) -> None:
    assert repetition(replies) == pytest.approx(share)


@pytest.mark.parametrize("kinds", [("llama", "gpt2"), ("own", "own"), ("llama", "own"), ("gpt2", "llama")])
def test_likeness_counts_the_tokens_of_replies_alone(kinds: tuple[str, str]) -> None:
    model, reference = build(kinds[0], seed=1), build(kinds[1])
    replies = write_replies(reference, TOKENIZER, ASKED, max_new_tokens=9)
    found = reply_likeness(model, reference, replies)
    apart, same, count = 0.0, 0, 0
    for each in replies:
        ids = torch.tensor([(*each.prompt, *each.tokens)])
        places = slice(len(each.prompt) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            ours, theirs = (
                log_softmax(one(input_ids=ids, use_cache=False).logits[0, places].double(), -1)
                for one in (model, reference)
            )
        # The reference wrote what it holds to be the likeliest.
        assert tuple(theirs.argmax(-1).tolist()) == each.tokens
        apart += float((theirs.exp() * (theirs - ours)).sum())
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(each.tokens)
    assert (found.tokens, found.agreement) == (count, same / count)
    assert found.divergence == pytest.approx(apart / count, rel=1e-4) and found.divergence > 0


def test_models_compared_with_the_first() -> None:
    models = {"first": build("llama"), "same": build("llama"), "small": build("gpt2", 3), "alien": build("llama")}
    # One more token, which no text has.
    models["alien"].resize_token_embeddings(len(TOKENIZER) + 1, mean_resizing=False)
    tokenizers = dict.fromkeys(models, TOKENIZER)
    told: list[str] = []
    found = compare_replies(
        models, tokenizers, prompts=ASKED, max_new_tokens=60, progress=lambda name, *_: told.append(name)
    )
    first, same, small, alien = found.values()
    assert first.likeness is None and alien.likeness is None
    assert same.likeness is not None and small.likeness is not None
    assert same.likeness.divergence == pytest.approx(0, abs=1e-6) and same.likeness.agreement == 1
    assert small.likeness.divergence > 0 and small.likeness.agreement < 1
    assert first.replies == same.replies and first.repetition == same.repetition == repetition(first.replies)
    # The GPT-2 has 64 positions, so none writes more than fits there.
    longest = {name: max(len(each.prompt + each.tokens) for each in one.replies) for name, one in found.items()}
    assert set(longest.values()) == {64}
    assert dict.fromkeys(told) == dict.fromkeys(
        [*(f"{name}: replies" for name in models), "same: comparing", "small: comparing"]
    )


def test_tokenizers_that_read_a_text_alike() -> None:
    other = framed_tokenizer("cls and sep")
    assert reads_alike(TOKENIZER, other, ASKED)
    other.add_tokens(["joke"])
    assert not reads_alike(TOKENIZER, other, ASKED)


def test_what_cannot_reply() -> None:
    model = build("llama")
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, but is 0"):
        write_replies(model, TOKENIZER, max_new_tokens=0)
    with pytest.raises(InputError, match="A prompt to reply to was expected, but there is none"):
        write_replies(model, TOKENIZER, [])
    with pytest.raises(InputError, match="The prompt has token"):
        write_replies(tiny_model(), TOKENIZER)
    with pytest.raises(InputError, match="a tokenizer for each"):
        compare_replies({"a": model}, {})


def test_the_prompts_are_fifty_and_differ() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 50
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in PROMPTS)
