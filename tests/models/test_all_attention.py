"""The All-attention Transformer: the maths written out, and every way of reading a text comes to the same."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM, AllAttentionModel
from deadhead.models.all_attention.attention import band
from deadhead.models.all_attention.positions import rotate, sinusoidal_table
from tests.random_models import (
    cached_logits,
    chunks,
    difference,
    gradients,
    random_model,
    segment_logits,
    tiny_config,
    tiny_model,
)

POSITIONS = ["learned", "sinusoidal", "rotary"]
positions = pytest.mark.parametrize("position", POSITIONS)
initial_memory = pytest.mark.parametrize("attend_initial_memory", [False, True])


def text(batch: int, length: int, seed: int = 0, vocabulary: int = 29) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def written_out(model: AllAttentionForCausalLM, ids_T: Tensor) -> Tensor:
    """Return the logits (T, V) of one text by the formulas of the paper, query by query, head by head."""
    config = model.config
    inner, memory, head_dim = model.model, config.memory_length, config.head_dim

    def turned(vector_E: Tensor, position: int) -> Tensor:
        if config.position != "rotary":
            return vector_E
        pairs = torch.complex(*vector_E.double().chunk(2))
        angle = position * 10000.0 ** (-torch.arange(head_dim // 2).double() * 2 / head_dim)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag]).to(vector_E.dtype)

    hidden = [inner.embed_tokens.weight[token] * math.sqrt(config.hidden_size) for token in ids_T]
    for layer in inner.layers:
        attention, added = layer.attention, []
        for i in range(len(hidden)):
            outputs = []
            for head in range(config.num_attention_heads):
                rows = slice(head * head_dim, (head + 1) * head_dim)

                def project(name: str, state: Tensor, rows: slice = rows, attention: Any = attention) -> Tensor:
                    linear = getattr(attention, f"{name}_proj")
                    value = linear.weight[rows] @ state
                    return value if linear.bias is None else value + linear.bias[rows]

                query = project("q", layer.norm(hidden[i]))
                scores, values = [], []
                for j in range(i - memory, i + 1):
                    if j < 0 and not config.attend_initial_memory:
                        continue
                    state = layer.norm(hidden[j] if j >= 0 else torch.zeros_like(hidden[0]))
                    key = project("k", state)
                    if config.position == "rotary":
                        score = turned(query, i) @ turned(key, j)
                    else:
                        if config.position == "learned":
                            relative = inner.position_table[memory - (i - j)]
                        else:
                            angle = (i - j) * 10000.0 ** (
                                -torch.arange(0, config.hidden_size, 2).double() / config.hidden_size
                            )
                            relative = torch.cat([angle.sin(), angle.cos()]).to(query.dtype)
                        owner = inner if config.share_position_bias else attention
                        score = (query + owner.content_bias[head]) @ key
                        score = score + (query + owner.position_bias[head]) @ project("r", relative)
                    scores.append(score / math.sqrt(head_dim))
                    values.append(project("v", state))
                for n in range(config.num_persistent):
                    persistent_k = math.sqrt(head_dim) * attention.persistent_k[head, n]
                    scores.append(query @ persistent_k / math.sqrt(head_dim))
                    values.append(math.sqrt(config.num_persistent) * attention.persistent_v[head, n])
                outputs.append(torch.stack(scores).softmax(0) @ torch.stack(values))
            added.append(attention.o_proj.weight @ torch.cat(outputs) + attention.o_proj.bias)
        hidden = [state + more for state, more in zip(hidden, added, strict=True)]
        if config.feed_forward_size:
            ff = layer.feed_forward
            inner_states = [torch.relu(ff.up_proj.weight @ ff.norm(state) + ff.up_proj.bias) for state in hidden]
            added = [ff.down_proj.weight @ state + ff.down_proj.bias for state in inner_states]
            hidden = [state + more for state, more in zip(hidden, added, strict=True)]
    return model.lm_head(inner.norm(torch.stack(hidden)))


@initial_memory
@positions
@pytest.mark.parametrize("switches", [False, True])
def test_logits_and_gradients_are_those_of_the_formulas(
    position: str, attend_initial_memory: bool, switches: bool
) -> None:
    model = tiny_model(
        seed=1,
        dtype=torch.float64,
        num_hidden_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        num_persistent=3,
        memory_length=3,
        position=position,
        attend_initial_memory=attend_initial_memory,
        share_position_bias=switches,
        projection_bias=switches,
        final_layer_norm=not switches,
        lm_head_bias=switches,
        tie_word_embeddings=not switches,
    )
    ids = text(1, 7)
    expected = written_out(model, ids[0])
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = torch.autograd.grad((expected * weights).sum(), list(model.parameters()))
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            # Angles are computed in float32, whatever the model's precision.
            assert difference(model(input_ids=ids, use_cache=False).logits[0], expected) <= 1e-6
        logits = model(input_ids=ids, use_cache=False).logits[0]
        found = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        for (name, _), value, right in zip(model.named_parameters(), found, reference, strict=True):
            assert difference(value, right) <= 1e-5, name


@initial_memory
@positions
def test_whole_cached_and_segmented_reading_agree_over_many_windows(position: str, attend_initial_memory: bool) -> None:
    model = tiny_model(position=position, attend_initial_memory=attend_initial_memory)
    ids = text(2, 61)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        # What stands more than a window of every layer back has no influence at all.
        reach = 3 * 5 + 1
        tail = model(input_ids=ids[:, -reach - 4 :], use_cache=False).logits
    if position != "rotary":
        assert difference(tail[:, -4:], whole[:, -4:]) <= 1e-5
    for seed in range(6):
        sizes = [1] * 61 if seed == 0 else chunks(random.Random(seed), 61)
        assert difference(cached_logits(model, ids, sizes), whole) <= 1e-5, sizes
        assert difference(segment_logits(model, ids, sizes), whole) <= 1e-5, sizes
        # In turn with either implementation.
        model.set_attn_implementation("eager" if seed % 2 else "sdpa")


@positions
def test_only_the_window_is_seen(position: str) -> None:
    model = tiny_model(num_hidden_layers=1, position=position)
    ids = text(1, 12)
    changed = ids.clone()
    changed[0, 3] = (ids[0, 3] + 1) % 29
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0] > 1e-6
    # Position 3 is seen by itself and the 5 after it, and the future by nobody.
    assert moved.tolist() == [3 <= i <= 8 for i in range(12)]


def test_rotary_attention_depends_on_distances_only() -> None:
    model = tiny_model(position="rotary", num_hidden_layers=1)
    # Far into a text of one repeated window everything is as it was a period before, persistent vectors included.
    ids = text(1, 7).repeat(1, 8)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert difference(logits[:, 14:21], logits[:, 42:49]) <= 1e-5
    q, k = torch.randn(2, 1, 1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = [rotate(q, start) @ rotate(k, start).transpose(-1, -2) for start in (0, 100)]
    assert difference(*scores) <= 1e-5
    assert difference(rotate(q, 3).norm(dim=-1), q.norm(dim=-1)) <= 1e-6
    assert torch.equal(rotate(q[:, :, :1], 0), q[:, :, :1])


@initial_memory
@positions
def test_left_padding_changes_no_row(position: str, attend_initial_memory: bool) -> None:
    model = tiny_model(position=position, attend_initial_memory=attend_initial_memory)
    lengths = [1, 4, 9, 17]
    rows = [text(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(4, 17, dtype=torch.long), torch.zeros(4, 17, dtype=torch.long)
    for row, alone in enumerate(rows):
        ids[row, -alone.shape[1] :], mask[row, -alone.shape[1] :] = alone[0], 1
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            other = model(input_ids=ids.where(mask == 1, torch.tensor(5)), attention_mask=mask, use_cache=False).logits
        cached = cached_logits(model, ids, [3, 1, 10, 2, 1], mask)
        assert whole.isfinite().all() and cached.isfinite().all()
        for row, alone in enumerate(rows):
            with torch.no_grad():
                expected = model(input_ids=alone, use_cache=False).logits[0]
            for found in (whole, other, cached):
                assert difference(found[row, -alone.shape[1] :], expected) <= 1e-5, (implementation, row)


@initial_memory
@positions
def test_eager_and_sdpa_agree(position: str, attend_initial_memory: bool) -> None:
    ids, found = text(3, 23), []
    for implementation in ("eager", "sdpa"):
        model = tiny_model(
            position=position, attend_initial_memory=attend_initial_memory, attn_implementation=implementation
        )
        assert model.config._attn_implementation == implementation
        with torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert difference(*found) <= 1e-5
    assert not torch.equal(*found), "the two implementations must not be the same code"


def test_an_emptied_layer_0_counts_positions_in_the_cache() -> None:
    plan = {"version": 1, "unit": "head", "total": {str(i): 4 for i in range(3)}, "kept": {"0": [], "1": [1], "2": []}}
    for position in POSITIONS:
        model = tiny_model(head_plan=plan, position=position)
        ids = text(2, 31)
        with torch.no_grad():
            whole = model(input_ids=ids, use_cache=False).logits
            output = model(input_ids=ids, use_cache=True)
        assert output.past_key_values.get_seq_length() == 31
        assert difference(cached_logits(model, ids, [4, 1, 1, 9, 16]), whole) <= 1e-5


def test_the_cache_keeps_no_more_than_the_memory() -> None:
    model = tiny_model()
    with torch.no_grad():
        cache = model(input_ids=text(2, 40)).past_key_values
    assert all(layer.keys.shape == (2, 4, 5, 4) for layer in cache.layers)
    with torch.no_grad():
        memory = model(input_ids=text(2, 40), use_cache=False).memory
    assert len(memory) == 3 and all(states.shape == (2, 5, 16) and not states.requires_grad for states in memory)


def test_the_band_moves_each_row_to_its_columns() -> None:
    scores = torch.arange(1.0, 13.0).view(1, 1, 4, 3)
    inf = float("-inf")
    full = torch.tensor(
        [[1, 2, 3, inf, inf, inf], [inf, 4, 5, 6, inf, inf], [inf, inf, 7, 8, 9, inf], [inf, inf, inf, 10, 11, 12]]
    )
    assert torch.equal(band(scores, 6)[0, 0], full)
    assert torch.equal(band(scores, 4)[0, 0], full[:, 2:])


def test_sinusoids_are_those_of_transformer_xl() -> None:
    table = sinusoidal_table(4, 6)
    for row, distance in enumerate([3, 2, 1, 0]):
        for i in range(3):
            angle = distance / 10000 ** (2 * i / 6)
            assert float(table[row, i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[row, 3 + i]) == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cutoffs", [[7], [5, 11], [3, 9, 20]])
def test_adaptive_softmax(cutoffs: list[int], bias: bool, tied: bool) -> None:
    model = tiny_model(seed=2, adaptive_cutoffs=cutoffs, adaptive_factor=2, lm_head_bias=bias, tie_word_embeddings=tied)
    ids, targets = text(3, 14), text(3, 14, seed=5)
    targets[0, :3] = torch.tensor([0, cutoffs[0], 28])
    output = model(input_ids=ids)
    log_probability = output.logits.detach()
    assert log_probability.shape == (3, 14, 29)
    assert difference(log_probability.exp().sum(-1), torch.ones(3, 14)) <= 1e-5
    nll = -log_probability.gather(-1, targets[..., None]).squeeze(-1)
    loss = model(input_ids=ids, shift_labels=targets).loss
    assert difference(loss, nll.mean()) <= 1e-6
    partly = targets.clone()
    partly[:, ::3] = -100
    assert difference(model(input_ids=ids, shift_labels=partly).loss, nll[partly != -100].mean()) <= 1e-6
    summed = model(input_ids=ids, shift_labels=partly, num_items_in_batch=7).loss
    assert difference(summed, nll[partly != -100].sum() / 7) <= 1e-6
    # The fast loss and the full distribution have the same gradients, ties included.
    fast = torch.autograd.grad(loss, list(model.parameters()))
    slow = torch.autograd.grad(
        -output.logits.gather(-1, targets[..., None]).mean(), list(model.parameters()), allow_unused=True
    )
    for (name, _), one, other in zip(model.named_parameters(), fast, slow, strict=True):
        assert difference(one, other) <= 1e-4, name


def test_adaptive_tails_are_narrower_and_words_keep_their_order() -> None:
    model = tiny_model(adaptive_cutoffs=[5, 11], adaptive_factor=2)
    tables = model.get_input_embeddings().tables
    assert [tuple(table.weight.shape) for table in tables] == [(5, 16), (6, 8), (18, 4)]
    embedded = model.get_input_embeddings()(torch.tensor([[0, 4, 5, 10, 11, 28]]))[0]
    projections = model.get_input_embeddings().projections
    for row, (rank, word) in enumerate([(0, 0), (0, 4), (1, 0), (1, 5), (2, 0), (2, 17)]):
        assert difference(embedded[row], projections[rank](tables[rank].weight[word])) <= 1e-6


@pytest.mark.parametrize("cutoffs", [None, [5, 11]])
def test_ties(cutoffs: list[int] | None) -> None:
    tied = tiny_model(tie_word_embeddings=True, adaptive_cutoffs=cutoffs, adaptive_factor=2)
    untied = tiny_model(tie_word_embeddings=False, adaptive_cutoffs=cutoffs, adaptive_factor=2)
    if cutoffs is None:
        pairs = [("lm_head.weight", "model.embed_tokens.weight")]
    else:
        names = [*(f"tables.{i}.weight" for i in range(3)), "projections.1.weight", "projections.2.weight"]
        pairs = [(f"lm_head.{name}", f"model.embed_tokens.{name}") for name in names]
        assert tied.lm_head.projections[0].weight is not tied.model.embed_tokens.projections[0].weight
    for one, other in pairs:
        assert tied.get_parameter(one) is tied.get_parameter(other), one
        assert untied.get_parameter(one) is not untied.get_parameter(other), one
    spared = sum(untied.get_parameter(one).numel() for one, _ in pairs)
    assert untied.num_parameters() - tied.num_parameters() == spared


@initial_memory
@positions
def test_attention_weights(position: str, attend_initial_memory: bool) -> None:
    model = tiny_model(position=position, attend_initial_memory=attend_initial_memory)
    ids = text(2, 9)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False)
        output = model(input_ids=ids, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert plain.attentions is None and plain.hidden_states is None
    assert difference(output.logits, plain.logits) <= 1e-5
    columns = 9 + 5 * attend_initial_memory + 5
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
    for weights in output.attentions:
        assert weights.shape == (2, 4, 9, columns)
        assert difference(weights.sum(-1), torch.ones(2, 4, 9)) <= 1e-5
        assert bool((weights >= 0).all()) and bool((weights[..., -5:] > 0).all())
        seen = (weights[0, 0, :, :-5] > 0).sum(-1)
        assert seen.tolist() == [6] * 9 if attend_initial_memory else [min(i + 1, 6) for i in range(9)]


def test_logits_to_keep() -> None:
    model, ids = tiny_model(), text(2, 9)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        assert difference(model(input_ids=ids, logits_to_keep=1).logits, whole[:, -1:]) <= 1e-6
        assert difference(model(input_ids=ids, logits_to_keep=4).logits, whole[:, -4:]) <= 1e-6
        assert difference(model(input_ids=ids, logits_to_keep=torch.tensor([0, 5])).logits, whole[:, [0, 5]]) <= 1e-6


def test_labels_are_shifted_and_shift_labels_are_not() -> None:
    model, ids = tiny_model(), text(2, 9)
    with torch.no_grad():
        log_probability = model(input_ids=ids).logits.log_softmax(-1)
        nll = -log_probability[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        assert difference(model(input_ids=ids, labels=ids).loss, nll.mean()) <= 1e-6
        shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        assert difference(model(input_ids=ids, shift_labels=shifted).loss, nll.mean()) <= 1e-6
        partly = ids.clone()
        partly[:, :4] = -100
        assert difference(model(input_ids=ids, labels=partly).loss, nll[:, 3:].mean()) <= 1e-6
        assert difference(model(input_ids=ids, labels=ids, num_items_in_batch=5).loss, nll.sum() / 5) <= 1e-6
        # With both given, the next tokens that go on in the next segment win.
        targets = text(2, 9, seed=3)
        expected = -log_probability.gather(-1, targets[..., None]).mean()
        assert difference(model(input_ids=ids, labels=ids, shift_labels=targets).loss, expected) <= 1e-6


def test_embeddings_may_be_given_instead_of_ids() -> None:
    model, ids = tiny_model(), text(2, 9)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(input_ids=ids, inputs_embeds=embeds)


def test_memory_and_cache_exclude_each_other() -> None:
    model, ids = tiny_model(), text(2, 9)
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        memory = model(input_ids=ids, use_cache=False).memory
        with pytest.raises(ValueError, match="either memory"):
            model(input_ids=ids, past_key_values=cache, memory=memory)


def test_training_mode_keeps_memory_and_no_cache() -> None:
    output = tiny_model().train()(input_ids=text(2, 9))
    assert output.past_key_values is None and len(output.memory) == 3
    assert tiny_model()(input_ids=text(2, 9)).past_key_values is not None


@positions
def test_generation(position: str) -> None:
    model, ids = tiny_model(position=position), text(2, 8)
    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 17}
    greedy = model.generate(**options, do_sample=False)
    assert greedy.shape == (2, 25) and torch.equal(greedy[:, :8], ids)
    assert torch.equal(model.generate(**options, do_sample=False, use_cache=False), greedy)
    # Step by step without any cache, over several windows.
    expected = ids
    with torch.no_grad():
        for _ in range(17):
            following = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
    assert torch.equal(greedy, expected)
    torch.manual_seed(0)
    sampled = model.generate(**options, do_sample=True, top_k=5)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**options, do_sample=True, top_k=5), sampled)
    assert sampled.shape == (2, 25) and not torch.equal(sampled, greedy)
    beams = model.generate(**options, do_sample=False, num_beams=3)
    assert torch.equal(model.generate(**options, do_sample=False, num_beams=3, use_cache=False), beams)
    scores = [_log_probability(model, tokens) for tokens in (beams, greedy)]
    assert bool((scores[0] >= scores[1] - 1e-4).any()), "a beam should find likelier texts than greedy search"


def _log_probability(model: AllAttentionForCausalLM, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return logits[:, 7:-1].gather(-1, tokens[:, 8:, None]).sum((1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads must divide hidden_size, but 3 does not divide 16"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"num_persistent": -1}, "num_persistent must be at least 0"),
        ({"memory_length": 0}, "memory_length must be at least 1"),
        ({"segment_length": -1}, "segment_length must be at least 1"),
        ({"num_attention_heads": 16, "position": "rotary"}, "'rotary' needs an even width, but it is 1"),
        ({"hidden_size": 15, "num_attention_heads": 3, "position": "sinusoidal"}, "'sinusoidal' needs an even width"),
        ({"position": "alibi"}, "position must be one of learned, sinusoidal, rotary, but it is 'alibi'"),
        ({"hidden_dropout": 1.0}, "hidden_dropout must be at least 0 and below 1"),
        ({"attention_dropout": -0.1}, "attention_dropout must be at least 0"),
        ({"adaptive_cutoffs": []}, "adaptive_cutoffs must rise"),
        ({"adaptive_cutoffs": [0, 5]}, "adaptive_cutoffs must rise"),
        ({"adaptive_cutoffs": [9, 5]}, "adaptive_cutoffs must rise"),
        ({"adaptive_cutoffs": [5, 29]}, "adaptive_cutoffs must rise and lie between 1 and vocab_size 29"),
        ({"adaptive_cutoffs": [5, 9, 20]}, "too small for 3 tails at adaptive_factor 4"),
        ({"head_plan": {"total": {"0": 4}, "kept": {"0": [0]}}}, "must name each of the 3 layers"),
        ({"head_plan": {"kept": {}}}, "must name each of the 3 layers"),
        (
            {"head_plan": {"total": dict.fromkeys("012", 4), "kept": {"0": [4], "1": [], "2": []}}},
            "names a head of layer 0",
        ),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_configuration_round_trip(tmp_path: Any) -> None:
    config = tiny_config(position="sinusoidal", adaptive_cutoffs=(5, 11), adaptive_factor=2, attention_dropout=0.2)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is AllAttentionConfig and again.to_diff_dict() == config.to_diff_dict()
    assert again.adaptive_cutoffs == [5, 11] and again.attention_dropout == 0.2


@pytest.mark.parametrize("adaptive", [False, True])
@initial_memory
@positions
def test_the_gradient_reaches_every_parameter(position: str, attend_initial_memory: bool, adaptive: bool) -> None:
    model = tiny_model(
        position=position,
        attend_initial_memory=attend_initial_memory,
        projection_bias=True,
        lm_head_bias=True,
        adaptive_cutoffs=[9] if adaptive else None,
    ).train()
    for name, gradient in gradients(model, torch.arange(58).remainder(29).view(2, 29)).items():
        assert gradient.isfinite().all() and gradient.abs().max() > 0, name


def test_memory_brings_no_gradient_into_the_segment_before() -> None:
    # The last token of a row predicts nothing, since its next one is not among the labels.
    used = set(text(2, 6, seed=1)[:, :-1].flatten().tolist())
    model = tiny_model(tie_word_embeddings=False).train()
    memory = model(input_ids=text(2, 6)).memory
    model(input_ids=text(2, 6, seed=1), memory=memory, labels=text(2, 6, seed=1)).loss.backward()
    moved = set(model.model.embed_tokens.weight.grad.abs().sum(-1).nonzero().flatten().tolist())
    assert moved == used


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@positions
def test_bfloat16(position: str, implementation: str) -> None:
    model = tiny_model(position=position, attn_implementation=implementation)
    ids = text(2, 15)
    with torch.no_grad():
        reference = model(input_ids=ids).logits
        model.to(torch.bfloat16)
        output = model(input_ids=ids, use_cache=False).logits
    assert output.dtype == torch.bfloat16 and difference(output, reference) < 0.1
    assert difference(cached_logits(model, ids, [5, 1, 9]), output) < 0.1
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_dropout_acts_in_training_only() -> None:
    for name in ("attention_dropout", "hidden_dropout", "embedding_dropout", "output_dropout"):
        options: dict[str, Any] = {name: 0.4}
        model, ids = tiny_model(**options), text(2, 9)
        with torch.no_grad():
            expected = tiny_model()(input_ids=ids, use_cache=False).logits
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
            draws = [model.train()(input_ids=ids).logits for _ in range(2)]
        assert not torch.equal(*draws), name


@pytest.mark.slow
def test_attention_dropout_keeps_the_mean() -> None:
    model = tiny_model(attention_dropout=0.3, num_hidden_layers=1, final_layer_norm=False).train()
    ids = text(1, 6)
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([model(input_ids=ids).logits for _ in range(3000)]).mean(0)
        expected = model.eval()(input_ids=ids, use_cache=False).logits
    assert difference(mean, expected) < 0.03


def test_auto_classes() -> None:
    config = tiny_config()
    assert type(AutoModelForCausalLM.from_config(config)) is AllAttentionForCausalLM
    base = AutoModel.from_config(config)
    assert type(base) is AllAttentionModel
    assert base(input_ids=text(2, 9)).last_hidden_state.shape == (2, 9, 16)
    assert base.get_input_embeddings() is base.embed_tokens


def test_first_values_give_a_uniform_start() -> None:
    torch.manual_seed(0)
    config = tiny_config(vocab_size=97, hidden_size=64, num_persistent=32, tie_word_embeddings=False)
    model = AllAttentionForCausalLM(config).eval()
    with torch.no_grad():
        loss = float(model(input_ids=text(4, 40, vocabulary=97), labels=text(4, 40, vocabulary=97)).loss)
    # Logits of unit variance cost half a nat more than the uniform distribution.
    assert loss == pytest.approx(math.log(97) + 0.5, abs=0.3)
    attention = model.model.layers[0].attention
    assert float(attention.persistent_k.detach().std() * 4) == pytest.approx(1.0, abs=0.1)
    assert float(attention.persistent_v.detach().std() * 32**0.5) == pytest.approx(1.0, abs=0.1)
    assert not attention.content_bias.any() and not attention.o_proj.bias.any()


def test_every_parameter_gets_a_first_value() -> None:
    for position, adaptive in itertools.product(POSITIONS, (None, [5, 11])):
        torch.manual_seed(0)
        config = tiny_config(position=position, adaptive_cutoffs=adaptive, adaptive_factor=2, share_position_bias=True)
        first = AllAttentionForCausalLM(config)
        # Memory that was never written to would differ, or not be finite.
        torch.manual_seed(0)
        second = AllAttentionForCausalLM(config)
        for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other) and one.isfinite().all() and one.abs().max() < 10, name


def test_models_of_equal_seed_are_equal() -> None:
    models = [random_model(tiny_config(), 3) for _ in range(2)]
    logits = [model(input_ids=text(1, 5)).logits for model in models]
    assert torch.equal(*logits)
