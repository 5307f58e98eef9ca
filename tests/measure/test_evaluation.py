"""Perplexity and bits per byte against a plain loop, one token at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import deadhead
from benchmarks._tiny_models import tiny_model as plain_model
from deadhead import HeadPlan, InputError
from deadhead.data import TokenStream
from deadhead.measure import chunks
from deadhead.measure.evaluation import Evaluation, evaluate
from deadhead.measure.last_states import StateReader
from tests.random_models import tiny_model
from tests.small_runs import stream


def _one_by_one(model: torch.nn.Module, tokens: np.ndarray) -> list[float]:
    """Return each token's negative log-likelihood after all the true text before it, without a cache."""
    ids = torch.from_numpy(tokens.astype("int64"))
    with torch.no_grad():
        return [
            -float(model(input_ids=ids[None, :end], use_cache=False).logits[0, -1].log_softmax(-1)[ids[end]])
            for end in range(1, len(ids))
        ]


@pytest.mark.parametrize("num_tokens", [2, 3, 6, 7, 8, 61])
def test_equals_one_token_at_a_time(num_tokens: int) -> None:
    model = tiny_model(dtype=torch.float64)
    text = stream(num_tokens)
    losses = _one_by_one(model, text.tokens)
    result = evaluate(model, text)
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result.tokens == num_tokens - 1 == len(losses)
    assert result.perplexity == math.exp(result.loss)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / text.num_bytes, rel=1e-6)
    assert result.word_perplexity == pytest.approx(math.exp(sum(losses) / max(text.num_words, 1)), rel=1e-6)
    assert result.tokens_per_second > 0


@pytest.mark.parametrize("kind", ["memory", "adaptive", "llama", "gemma2"])
def test_in_chunks_it_is_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has logits of a few of the tokens that are scored; of those that are only read there are none."""
    if kind in ("llama", "gemma2"):
        model = plain_model(kind, dtype=torch.float64)
    else:
        cutoffs = {"adaptive_cutoffs": [5, 9], "adaptive_factor": 2} if kind == "adaptive" else {}
        model = tiny_model(dtype=torch.float64, **cutoffs)
    text = stream(150)
    whole = evaluate(model, text)
    monkeypatch.setattr(chunks, "AT_ONCE", 7 * model.config.vocab_size)
    calls = []
    monkeypatch.setattr(StateReader, "_run", lambda *args, run=StateReader._run: calls.append(1) or run(*args))
    assert evaluate(model, text).loss == pytest.approx(whole.loss, rel=1e-7 if kind == "adaptive" else 1e-12)
    assert len(calls) >= 2, "one to try, and one that counts"


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("num_tokens", [301, 302, 307])
def test_does_not_depend_on_the_batch_size(batch_size: int, num_tokens: int, position: str) -> None:
    """Rows start with a full memory. What reaches beyond it, from layer to layer, is too far for this tolerance.

    With 3 layers a token feels 3 × 5 positions back, a row's first tokens only 5; a model of one layer is exact.
    """
    text = stream(num_tokens)
    model = tiny_model(position=position, num_hidden_layers=1)
    assert evaluate(model, text, batch_size=batch_size).loss == pytest.approx(evaluate(model, text).loss, rel=1e-6)
    deep = tiny_model(position=position)
    assert evaluate(deep, text, batch_size=batch_size).loss == pytest.approx(
        evaluate(deep, text, batch_size=1).loss, rel=3e-3
    )


def test_every_token_is_scored_once() -> None:
    """A model that gives every token its own fixed chance: the sum over the text tells what was scored how often."""
    model = tiny_model(lm_head_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        chances = model.lm_head.bias.log_softmax(0)
    for num_tokens in (50, 133, 134, 500):
        text = stream(num_tokens, seed=num_tokens)
        expected = -float(chances[torch.from_numpy(text.tokens[1:].astype("int64"))].double().sum())
        for batch_size in (1, 3, 8):
            result = evaluate(model, text, batch_size=batch_size)
            assert result.tokens == num_tokens - 1
            assert result.loss * result.tokens == pytest.approx(expected, rel=1e-6)


def test_limit_scores_the_beginning() -> None:
    model = tiny_model()
    text = stream(200)
    shorter = TokenStream(tokens=text.tokens[:41], num_bytes=0, num_words=0)
    limited = evaluate(model, text, limit=40)
    assert limited.tokens == 40
    assert limited.loss == evaluate(model, shorter).loss
    # Bytes and words are those of the whole text in proportion.
    assert limited.bits_per_byte == pytest.approx(limited.loss * 40 / math.log(2) / (text.num_bytes * 40 / 199))
    assert limited.word_perplexity == pytest.approx(math.exp(limited.loss * 40 / (text.num_words * 40 / 199)))
    assert evaluate(model, text, limit=10**9).loss == evaluate(model, text).loss


def test_the_model_keeps_its_mode() -> None:
    model = tiny_model(hidden_dropout=0.5).train()
    first = evaluate(model, stream(60)).loss
    assert evaluate(model, stream(60)).loss == first
    assert model.training


def test_gated_as_cut() -> None:
    model = tiny_model()
    plan = HeadPlan(kept={0: (0, 2), 1: ()}, total=dict.fromkeys(range(3), 4), output_scale=True)
    deadhead.attach(model).set_plan(plan)
    gated = evaluate(model, stream(150)).loss
    assert evaluate(deadhead.cut(model, plan), stream(150)).loss == pytest.approx(gated, rel=1e-5)


def test_large_tokens_are_not_wrapped() -> None:
    """Tokens are stored in 16 bits without a sign, where the mark of what is not scored would be a token."""
    tokens = np.random.default_rng(0).integers(65_000, 65_536, size=308).astype(np.uint16)
    model = tiny_model(vocab_size=65_536, num_hidden_layers=1)
    text = TokenStream(tokens=tokens, num_bytes=308, num_words=3)
    assert evaluate(model, text, batch_size=3).loss == pytest.approx(evaluate(model, text, batch_size=1).loss, rel=1e-6)


def test_progress_is_told_of_every_segment() -> None:
    told: list[tuple[int, int]] = []
    evaluate(tiny_model(), stream(25), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_text_too_short_is_refused(num_tokens: int) -> None:
    with pytest.raises(InputError, match=f"at least 2 tokens is needed to measure perplexity, but it has {num_tokens}"):
        evaluate(tiny_model(), stream(num_tokens))


def test_tokens_of_another_tokenizer_are_refused() -> None:
    text = TokenStream(tokens=np.array([1, 2, 29, 3], dtype=np.uint16), num_bytes=4, num_words=1)
    with pytest.raises(InputError, match="has token 29, but the model's vocabulary ends at 28; use the tokenizer"):
        evaluate(tiny_model(), text)
    # It may be the very last one, which is predicted but never read.
    last = TokenStream(tokens=np.array([1, 2, 29], dtype=np.uint16), num_bytes=3, num_words=1)
    with pytest.raises(InputError, match="has token 29"):
        evaluate(tiny_model(), last)


def test_hopeless_models_have_infinite_perplexity() -> None:
    model = tiny_model(lm_head_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.linspace(0, -1e5, 29))
    result = evaluate(model, stream(60))
    assert result.perplexity == result.word_perplexity == math.inf
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 40])
@pytest.mark.parametrize("window", [2, 7, 8])
def test_without_memory_a_window_scores_every_token_once_after_at_least_half_a_window(length: int, window: int) -> None:
    model = without_memory()
    tokens = stream(length).tokens
    result = evaluate(model, stream(length), window=window, batch_size=3)
    expected = 0.0
    done = 0
    with torch.no_grad():
        while done < length - 1:
            stop = min(window if done == 0 else done + window // 2, length - 1)
            start = max(0, stop - window)
            ids = torch.from_numpy(tokens[start : stop + 1].astype("int64"))
            log_p = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            nll = -log_p[torch.arange(len(ids) - 1), ids[1:]]
            expected += float(nll[done - start :].sum())
            done = stop
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(expected / (length - 1), rel=1e-5)


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 40])
@pytest.mark.parametrize("prefix", [(5,), (5, 6)])
def test_every_window_begins_as_the_tokenizer_begins_a_text(prefix: tuple[int, ...], length: int) -> None:
    """Each token of the text is scored once, the first one after the prefix alone; the prefix is not scored."""
    model = without_memory()
    tokens = stream(length).tokens
    text = TokenStream(tokens=tokens, num_bytes=2 * length, num_words=length, prefix=prefix)
    width = 7 - len(prefix)
    expected, windows, scored = 0.0, 0, -1
    with torch.no_grad():
        while scored < length - 1 or not windows:
            stop = min(width if not windows else scored + width // 2, length - 1)
            ids = torch.tensor([*prefix, *tokens[max(0, stop - width) : stop + 1].tolist()])
            log_p = model(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            nll = -log_p[torch.arange(len(ids) - 1), ids[1:]]
            expected += float(nll[len(nll) - (stop - scored) :].sum())
            scored, windows = stop, windows + 1
    result = evaluate(model, text, window=7, batch_size=3)
    assert (result.tokens, result.rows, result.prefix) == (length, windows, prefix)
    assert result.length == min(7, length - 1 + len(prefix))
    assert result.loss == pytest.approx(expected / length, rel=1e-5)
    assert result.word_perplexity == pytest.approx(result.perplexity)
    assert f"each with {len(prefix)} token" in result.cut


@pytest.mark.parametrize("prefix", [(), (5,), (5, 6)])
def test_of_answers_no_other_token_is_scored(prefix: tuple[int, ...]) -> None:
    model, plain = without_memory(), stream(40)
    draw = np.random.default_rng(1).random(40) < 0.4

    def measured(scored: np.ndarray | None, limit: int | None = None) -> Evaluation:
        text = replace(plain, prefix=prefix, scored=scored)
        return evaluate(model, text, window=7, batch_size=3, limit=limit)

    whole, marked, others = measured(None), measured(draw), measured(~draw)
    assert marked.tokens + others.tokens == whole.tokens
    assert marked.tokens == draw[0 if prefix else 1 :].sum()
    total = marked.loss * marked.tokens + others.loss * others.tokens
    assert total == pytest.approx(whole.loss * whole.tokens, rel=1e-5)
    assert marked.word_perplexity == pytest.approx(math.exp(marked.loss * marked.tokens / plain.num_words))
    assert measured(np.ones(40, dtype=np.bool_)).loss == whole.loss
    # So many answers, not so many tokens.
    late = np.arange(40) > 20
    assert (measured(late, 3).tokens, measured(late, 99).loss) == (3, measured(late).loss)
    with pytest.raises(InputError, match="leave answers_only out"):
        measured(np.zeros(40, dtype=np.bool_))
    with pytest.raises(InputError, match="leave answers_only out"):
        evaluate(tiny_model(), replace(plain, scored=draw))


def test_a_model_with_memory_reads_no_prefix() -> None:
    text = stream(60)
    framed = TokenStream(tokens=text.tokens, num_bytes=text.num_bytes, num_words=text.num_words, prefix=(5,))
    found, expected = (evaluate(tiny_model(), each) for each in (framed, text))
    assert (found.loss, found.prefix) == (expected.loss, ())
    assert (
        found.cut
        == expected.cut
        == ("1 row of at most 59 tokens; every token scored once, after at least 5 others where there are as many")
    )


def test_a_prefix_of_another_tokenizer_is_refused() -> None:
    text = TokenStream(tokens=stream(9).tokens, num_bytes=9, num_words=9, prefix=(29,))
    with pytest.raises(InputError, match="has token 29"):
        evaluate(without_memory(), text)
    with pytest.raises(InputError, match="must have 3 to 8 tokens, but got 2"):
        evaluate(without_memory(), TokenStream(tokens=text.tokens, num_bytes=9, num_words=9, prefix=(2,)), window=2)


def test_a_window_must_fit_the_model() -> None:
    for window in (1, 9):
        with pytest.raises(InputError, match=f"must have 2 to 8 tokens, but got {window}"):
            evaluate(without_memory(), stream(30), window=window)
    assert evaluate(without_memory(), stream(30)).tokens == 29


def without_memory() -> GPT2LMHeadModel:
    """Return a model of 8 positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=29, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config).eval()
