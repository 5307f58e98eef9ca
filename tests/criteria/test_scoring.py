"""One-shot criteria against brute force, on our own model, a GPT-2 and a Llama with grouped queries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import deadhead
from deadhead.criteria.scoring import score_heads
from deadhead.errors import InputError
from deadhead.layouts import find_layout, head_columns
from deadhead.measure import chunks
from deadhead.plans.kinds import ONE_SHOT, READS_TEXT
from deadhead.plans.plan import Unit, UnitKey
from tests.criteria.models import IDS, MODELS, batches, llama
from tests.random_models import assert_unchanged, snapshot, tiny_model


@pytest.fixture(params=MODELS)
def case(request: Any) -> tuple[Any, Unit]:
    make, unit = MODELS[request.param]
    return make().double(), unit


def row_losses(model: Any) -> Tensor:
    """Return the mean loss of each row's tokens, as the model computes it."""
    logits = model(input_ids=IDS[:, :-1], use_cache=False).logits
    if hasattr(model.config, "memory_length"):
        wanted = IDS[:, 1:]
    else:
        logits, wanted = logits[:, :-1], IDS[:, 1:-1]
    return cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


@torch.no_grad()
def scaled(model: Any, site: Any, head: int, factor: float) -> Any:
    """Return a copy whose head of this site gives `factor` times as much to the layer's output."""
    other = copy.deepcopy(model)
    found = next(s for s in find_layout(other).sites(other, "head") if s.layer == site.layer)
    place = slice(head * site.unit_dim, (head + 1) * site.unit_dim)
    head_columns(found.output)[:, place] *= factor
    return other


def test_taylor_is_the_derivative_by_the_heads_scale(case: tuple[Any, Unit]) -> None:
    model, unit = case
    found = score_heads(model, "taylor", batches(), unit=unit)
    # Not smaller: a Llama's norms compute in float32 whatever the model's precision.
    step = 2e-3
    for site in find_layout(model).sites(model, unit):
        for head in range(site.total):
            with torch.no_grad():
                more, less = (row_losses(scaled(model, site, head, 1 + sign * step)) for sign in (1, -1))
            expected = float(((more - less) / (2 * step)).abs().mean())
            assert float(found.scores[site.key][head]) == pytest.approx(expected, rel=3e-3, abs=1e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (3,)], ids=str)
def test_taylor_weighs_rows_by_the_tokens_that_count(sizes: tuple[int, ...]) -> None:
    """However rows lie in batches: a row of one answer token says as much as that token, one without says nothing."""
    model = llama().double()
    scored = torch.zeros(3, 8, dtype=torch.bool)
    scored[0, 3:], scored[1, 7], scored[2, 0] = True, True, True
    batches = [{"input_ids": IDS[part, :-1], "scored": scored[part]} for part in torch.arange(3).split(sizes)]
    found = score_heads(model, "taylor", batches, unit="head")
    site, step = find_layout(model).sites(model, "head")[0], 2e-3

    def sums(factor: float) -> Tensor:
        logits = scaled(model, site, 1, factor)(input_ids=IDS[:, :-1], use_cache=False).logits[:, :-1]
        nats = cross_entropy(logits.transpose(1, 2), IDS[:, 1:-1], reduction="none")
        return (nats * scored[:, 1:]).sum(1)

    with torch.no_grad():
        expected = float(((sums(1 + step) - sums(1 - step)) / (2 * step)).abs().sum() / 6)
    assert float(found.scores[site.key][1]) == pytest.approx(expected, rel=3e-3)


def test_output_difference_is_what_the_layers_output_loses(case: tuple[Any, Unit]) -> None:
    model, unit = case
    found = score_heads(model, "output-difference", batches(), unit=unit)
    for site in find_layout(model).sites(model, unit):
        inputs: list[Tensor] = []
        hook = site.output.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0].detach()))
        row_losses(model)
        hook.remove()
        weight = head_columns(site.output).detach()
        whole = inputs[0] @ weight.T
        for head in range(site.total):
            place = slice(head * site.unit_dim, (head + 1) * site.unit_dim)
            alone = inputs[0][..., place] @ weight[:, place].T
            expected = float(alone.square().sum() / whole.square().sum())
            assert float(found.scores[site.key][head]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["all-attention", "gpt2", "llama, groups"])
def test_magnitude_is_the_square_of_what_the_cut_takes_away(name: str) -> None:
    make, unit = MODELS[name]
    model = make()
    found = score_heads(model, "magnitude", unit=unit)
    total = {key.layer: len(scores) for key, scores in found.scores.items()}

    def square(module: Any) -> float:
        return sum(float(parameter.detach().double().square().sum()) for parameter in module.parameters())

    for layer in total:
        kept = {layer: range(1, total[layer])}
        smaller = deadhead.cut(make(), deadhead.HeadPlan(kept=kept, total=total, unit=unit))
        expected = square(model) - square(smaller)
        assert float(found.scores[UnitKey("head", layer)][0]) == pytest.approx(expected, rel=1e-3)


def test_random_scores_follow_the_seed() -> None:
    first, same, other = (score_heads(tiny_model(), "random", seed=seed).plan(0.5) for seed in (0, 0, 1))
    assert first == same != other


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "output-difference"])
def test_dead_heads_go_first(criterion: Any) -> None:
    model = tiny_model()
    dead = {0: [1], 2: [0, 3]}
    with torch.no_grad():
        for site in find_layout(model).sites(model, "head"):
            for head in dead.get(site.layer, ()):  # type: ignore[call-overload]
                for part in site.selections((head,)):
                    site.module.get_parameter(part.path).index_fill_(part.dim, part.index, 0.0)
    plan = score_heads(model, criterion, batches(2)).plan(3 / 12)
    assert {layer: list(plan.cut(layer)) for layer in plan.kept} == {0: [1], 1: [], 2: [0, 3]}


@pytest.mark.parametrize("name", ["gpt2", "llama, groups"])
@pytest.mark.parametrize("criterion", ONE_SHOT)
def test_a_block_scores_what_its_units_score_together(name: str, criterion: Any) -> None:
    make, unit = MODELS[name]
    model = make().double()
    single = score_heads(model, criterion, batches(2), unit=unit, blocks=1)
    sites = find_layout(model).hidden_sites(model)
    blocks = {site.layer: [site.units[::2], site.units[1:7:2], site.units[7::2]] for site in sites}
    found = score_heads(model, criterion, batches(2), unit=unit, blocks=blocks)
    for site in sites:
        place = {next(iter(block)): index for index, block in enumerate(single.choices.members[site.key])}
        for score, block in zip(found.scores[site.key], blocks[site.layer], strict=True):
            alone = single.scores[site.key][[place[member] for member in block]]
            if criterion == "taylor":
                # One factor on all of them: what one gains another may lose.
                assert 0 < float(score) < float(alone.sum())
            else:
                together = alone.mean() if criterion in ("wanda", "flap", "random") else alone.sum()
                assert float(score) == pytest.approx(float(together), rel=1e-4)


def test_taylor_of_a_block_is_the_derivative_by_one_factor_on_all_its_units() -> None:
    model = llama().double()
    site = find_layout(model).hidden_sites(model)[0]
    block = site.units[3:20:3]
    rest = [member for member in site.units if member not in block]
    found = score_heads(model, "taylor", batches(), blocks={site.layer: [block, rest]}).scores[site.key]
    step, weight = 2e-3, head_columns(site.output)
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            before = weight.clone()
            weight[:, list(block)] *= 1 + sign * step
            losses.append(row_losses(model))
            weight.copy_(before)
    expected = float(((losses[0] - losses[1]) / (2 * step)).abs().mean())
    assert float(found[0]) == pytest.approx(expected, rel=3e-3, abs=1e-5)


def test_the_memory_of_the_segment_before_is_seen() -> None:
    key = UnitKey("head", 0)
    first = score_heads(tiny_model(), "taylor", batches(2)).scores[key]
    going_on = [*batches(), {**batches()[0], "is_first": torch.tensor([False] * 3)}]
    assert not torch.allclose(score_heads(tiny_model(), "taylor", going_on).scores[key], first, rtol=1e-3)


@pytest.mark.parametrize("criterion", ONE_SHOT)
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_before(criterion: Any, training: bool) -> None:
    model = tiny_model(hidden_dropout=0.5).train(training)
    before = snapshot(model)
    score_heads(model, criterion, batches())
    assert_unchanged(model, before)
    assert model.training == training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("criterion", ONE_SHOT)
def test_a_model_that_was_cut_is_scored_by_its_dense_indices(criterion: Any) -> None:
    model = deadhead.cut(tiny_model(), deadhead.HeadPlan(kept={0: [1, 3], 1: []}, total=dict.fromkeys(range(3), 4)))
    found = score_heads(model, criterion, batches())
    assert [*found.choices.units.values()] == [(1, 3), (), (0, 1, 2, 3)]
    assert {key.layer: len(scores) for key, scores in found.scores.items()} == {0: 2, 2: 4}
    deadhead.cut(model, found.plan(0.5))
    assert sum(deadhead.model_cost(model).heads) == 3


@pytest.mark.parametrize("criterion", READS_TEXT)
def test_text_is_needed(criterion: Any) -> None:
    with pytest.raises(InputError, match="got no batch"):
        score_heads(tiny_model(), criterion)


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="The criterion must be one of magnitude, taylor"):
        score_heads(tiny_model(), "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cut by head, but the unit 'kv_group'"):
        score_heads(tiny_model(), "random", unit="kv_group")
    gated = tiny_model()
    gates = deadhead.attach(gated)
    gates.gates[UnitKey("head", 1)].set_log_alpha(torch.tensor([2.0, -2.0, 2.0, 2.0]))
    with pytest.raises(InputError, match="some of its gates are closed"):
        score_heads(gated, "random")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (None, "takes blocks as"),
        ({0: [0, 1]}, "takes blocks as"),
        (17, "The block size must lie between 1 and the width of the layers, 16"),
        ({0: [range(15)]}, "15 is in none"),
    ],
)
def test_bad_blocks_are_told_of_before_text_is_read(blocks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_heads(tiny_model(num_persistent=16), "taylor", iter(()), blocks=blocks)


def test_layers_of_which_no_blocks_are_named_go_or_stay_as_a_whole() -> None:
    model = tiny_model(num_persistent=16)
    for blocks in ({}, {1: [range(16)]}):
        found = score_heads(model, "magnitude", blocks=blocks).choices.hidden
        assert [[*map(len, members)] for members in found.values()] == [[16]] * 3


def test_open_gates_change_no_score() -> None:
    gated = tiny_model()
    deadhead.attach(gated, config=deadhead.GateConfig(output_scale=True))
    for criterion in READS_TEXT:
        found, expected = (score_heads(model, criterion, batches()).scores for model in (gated, tiny_model()))
        for layer, values in expected.items():
            torch.testing.assert_close(found[layer], values, rtol=1e-4, atol=1e-6)


def test_gates_lean_as_scores_rank_heads() -> None:
    gates = deadhead.attach(tiny_model())
    scores = score_heads(tiny_model(), "magnitude")
    gates.lean(scores, spread=3.0)
    leaning = torch.cat(list(gates.log_alpha().values()))
    assert leaning.argsort().tolist() == torch.cat(list(scores.scores.values())).argsort().tolist()
    assert float(leaning.mean()) == pytest.approx(2.0, abs=1e-5)
    assert float(leaning.std(correction=0)) == pytest.approx(3.0, abs=1e-5)
    assert gates.plan(sparsity=0.5) == scores.plan(0.5)


@pytest.mark.parametrize("criterion", READS_TEXT)
def test_few_logits_at_once_give_the_same_scores(
    criterion: Any, case: tuple[Any, Unit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tried beforehand is counted nowhere."""
    model, unit = case
    whole = score_heads(model, criterion, batches(2), unit=unit)
    monkeypatch.setattr(chunks, "AT_ONCE", 29 * 5)
    found = score_heads(model, criterion, batches(2), unit=unit)
    for key, scores in whole.scores.items():
        assert torch.allclose(found.scores[key], scores, rtol=1e-5, atol=1e-9)
