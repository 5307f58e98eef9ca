"""Text that a model writes itself: whose tokens follow its own distribution, in whole rows, the same for a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks._tiny_models import scramble
from deadhead import InputError
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.errors import UnsupportedModel
from deadhead.measure.self_generated import write_text
from tests.random_models import tiny_model
from tests.small_runs import framed_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)


def chat_tokenizer() -> Any:
    """Return a tokenizer of bytes with a chat template in the manner of ChatML, whose turns end with `<end>`."""
    tokenizer = framed_tokenizer("none")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def gpt2(vocab_size: int = 257, positions: int = 64) -> GPT2LMHeadModel:
    """Return a random GPT-2 whose tokens are not all alike likely."""
    config = GPT2Config(vocab_size=vocab_size, n_positions=positions, n_embd=16, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    scramble(model, 0)
    return model.eval()


def llama(vocab_size: int) -> LlamaForCausalLM:
    """Return a random Llama."""
    config: Any = LlamaConfig
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(config(vocab_size=vocab_size, **shape))
    scramble(model, 0)
    return model.eval()


def _steps(model: Any, ids_RT: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each token after the first its log-likelihood, and the entropy of the distribution that it is of."""
    with torch.no_grad():
        logs_RTV = model(input_ids=ids_RT, use_cache=False).logits[:, :-1].log_softmax(-1)
    own_RT = logs_RTV.gather(2, ids_RT[:, 1:, None]).squeeze(2)
    return own_RT, -(logs_RTV.exp() * logs_RTV).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tokens_are_of_the_models_distribution(scale: float) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(scale)
    rows = write_text(model, byte_tokenizer(), rows=200, length=40)
    assert rows.shape == (200, 40) and rows.dtype == torch.int64
    own_RT, entropy_RT = _steps(model, rows)
    # The sum over all tokens of log p + H has mean 0, and a variance that is the sum of those of its terms.
    gap_RT = (own_RT + entropy_RT).double()
    error = float(gap_RT.square().sum().sqrt() / gap_RT.numel())
    assert abs(float(gap_RT.mean())) < 4 * error
    # So fine that drawing with another temperature would show.
    assert error < 0.1 * float(entropy_RT.mean())
    counts = torch.bincount(rows[:, 1], minlength=257) / 200
    with torch.no_grad():
        expected = model(input_ids=rows[:1, :1]).logits[0, 0].softmax(-1)
    assert float((counts - expected).abs().max()) < 4 * float((expected * (1 - expected) / 200).sqrt().max()) + 1e-3


def test_what_a_models_own_configuration_of_generation_says_is_no_matter() -> None:
    model = gpt2()
    expected = write_text(model, byte_tokenizer(), rows=3, length=30)
    ends = expected[0, 5].item()
    kept = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, eos_token_id=ends, max_new_tokens=3
    )
    model.generation_config = kept
    model.train()
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(write_text(model, byte_tokenizer(), rows=3, length=30), expected)
    # The model and the process's random state are as they were.
    assert torch.equal(torch.rand(1), first)
    assert model.generation_config is kept and model.training and model.config.use_cache


def test_the_seed_decides() -> None:
    model, told = gpt2(), list[tuple[int, int]]()
    first = write_text(
        model, byte_tokenizer(), rows=40, length=20, progress=lambda done, total: told.append((done, total))
    )
    assert torch.equal(first, write_text(model, byte_tokenizer(), rows=40, length=20, seed=0))
    assert not torch.equal(first, write_text(model, byte_tokenizer(), rows=40, length=20, seed=1))
    assert len({tuple(row) for row in first.tolist()}) == 40
    assert told == sorted(told) and told[-1] == (800, 800)


@pytest.mark.parametrize(
    ("frame", "eos", "begin"), [("bos", True, "<bos>"), ("cls and sep", True, "<cls>"), ("none", True, "<end>")]
)
def test_rows_begin_as_texts_do(frame: str, eos: bool, begin: str) -> None:
    tokenizer = framed_tokenizer(frame, eos=eos)
    rows = write_text(llama(len(tokenizer)), tokenizer, rows=3, length=8)
    assert set(rows[:, 0].tolist()) == {tokenizer.convert_tokens_to_ids(begin)}


def test_rows_begin_with_any_token_where_nothing_is_said() -> None:
    tokenizer = framed_tokenizer("none", eos=False)
    tokenizer.bos_token = None
    # The model has more tokens than the tokenizer, which are never written.
    rows = write_text(llama(len(tokenizer) + 500), tokenizer, rows=64, length=5)
    assert len(set(rows[:, 0].tolist())) > 20
    assert int(rows.max()) < len(tokenizer)


def test_conversations_go_on_as_the_template_does() -> None:
    tokenizer = chat_tokenizer()
    model = llama(len(tokenizer))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<start>", "<end>")}
    with torch.no_grad():
        # It ends turns often, and never begins one of itself.
        model.lm_head.weight[:, :] *= 0.01
        model.model.norm.weight.abs_()
        model.lm_head.weight[ids["<end>"]] = model.lm_head.weight[ids["<start>"]] = 0
    rows = write_text(model, tokenizer, rows=8, length=400)
    assert rows.shape == (8, 400)
    answered = 0
    for row in rows.tolist():
        text = tokenizer.decode(row)
        assert text.startswith("<start>user\n")
        roles = ["user", "assistant"] * 200
        # What follows an end is the template's, but for the row's own end.
        for turn, role in zip(text.split("<end>")[1:], roles[1:], strict=False):
            begun = f"\n<start>{role}\n"
            assert turn[: len(begun)] == begun[: len(turn)]
            answered += role == "assistant"
    assert answered > 4


def test_a_model_with_segment_memory_writes_one_long_text() -> None:
    model = tiny_model(vocab_size=257)
    rows = write_text(model, byte_tokenizer(), rows=4, length=60)
    assert rows.shape == (4, 60) and set(rows[:, 0].tolist()) == {256}
    with torch.no_grad():
        logits = model(input_ids=rows[:, :1], use_cache=False).logits
    assert bool((logits[:, 0].softmax(-1).gather(1, rows[:, 1:2]) > 0).all())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": 0}, "At least one row"),
        ({"length": 1}, "longer than the 1 tokens"),
        ({"length": 65}, "64 positions"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        write_text(gpt2(), byte_tokenizer(), **{"rows": 2, "length": 9, **changes})


def test_what_cannot_write() -> None:
    with pytest.raises(InputError, match="vocabulary ends at 99"):
        write_text(gpt2(vocab_size=100), byte_tokenizer(), rows=1, length=9)
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="not finite"):
        write_text(model, byte_tokenizer(), rows=1, length=9)
    with pytest.raises(UnsupportedModel):
        write_text(model.transformer, byte_tokenizer(), rows=1, length=9)
