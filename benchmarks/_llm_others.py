"""Pruning methods that others ship for language models, reimplemented on top of deadhead's plans and cut.

Each function prunes a model in place to a share of its blocks' parameters, and returns it. Nothing is trained. deadhead
chooses and compensates nothing: it counts what is left, cuts, and checks the cut. All methods share these rules:

- The calibration text is the one that is given. Authors take rows of C4 or WikiText-2 of their own.
- A share is of the blocks' parameters. The result is the nearest share at or below it that the method can reach.
- Query heads that share keys and values stay or go together, unless the method says otherwise.

Dimensions: B rows, T tokens, R tokens of a batch or of all, D model width, n inputs of an output projection, H units of
a site (KV groups, or hidden units).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

import deadhead
from deadhead.attaching import choices_of
from deadhead.compensation.calibration import Calibration, run_stack
from deadhead.compensation.streams import Stream, first, stream_of
from deadhead.layouts import Site, find_layout, head_columns
from deadhead.measure.cost import cost_of_kind, counted_costs, model_cost
from deadhead.modes import evaluating
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.scores import HeadScores

Batches = Sequence[Mapping[str, Tensor]]  # `input_ids` (B, T) each


def flap(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """FLAP (An, Zhao, Yu, Tang, Wang 2024, arXiv 2312.11983) as its authors ship it: WIFV, AL-AM, bias.

    Kept: units are scored as `_flap_scores` says, all layers and both kinds in one ranking, and what the removed inputs
    of an output projection are in the mean, times their columns, becomes its bias.
    Adapted: query heads that share keys and values have the mean of their scores, as in its forks for such models.
    """
    sites = _sites(model)
    scores, moments = _flap_scores(model, sites, batches)
    plan = _ranked(model, sites, scores, share)
    biases_D = {path: _lost(site, plan, moments[site.key]) for path, site in _paths(model, sites).items()}
    deadhead.cut(model, plan)
    for path, bias_D in biases_D.items():
        output: Any = model.get_submodule(path)
        output.bias = nn.Parameter(bias_D.to(model.dtype))
    return model


def flap_grail(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """FLAP's choice with GRAIL's least squares (Tang, Wang, Thiele, Saukh 2026, arXiv 2602.23795) instead of a bias.

    Kept: from layer to layer, on what the pruned and mended layers before it give, the inputs X of each output
    projection with all its units there are rebuilt from those that stay, S, by ridge regression over all tokens alike:
    W ← W G_:S (G_SS + λ)⁻¹ with G = XᵀX. λ is next to 0: what rounding needs.
    Adapted: the same for attention, by single inputs of its output projection.
    """
    sites = _sites(model)
    plan = _ranked(model, sites, _flap_scores(model, sites, batches)[0], share)
    for here in _in_turn(model, sites, batches, _Gram):
        for site, gram in here:
            _rebuild(site, plan.units[site.key], gram.products_nn)
    return deadhead.cut(model, plan)


def wanda_sp(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """Wanda-sp, the structured Wanda (Sun, Liu, Bair, Kolter 2023, arXiv 2306.11695) of FLAP's authors.

    Kept: a hidden unit scores Σ_i |W_ij| ‖x_j‖ over the outputs i, and the same number with the lowest scores goes from
    every layer, one after the other, each on what the pruned ones before it give.
    Adapted: hidden units alone.
    """
    sites = [site for site in _sites(model) if site.is_hidden]
    gone = _fewest(model, share, lambda count: _plan(model, {site.key: site.units[count:] for site in sites}))
    kept: dict[UnitKey, tuple[int, ...]] = {}
    for here in _in_turn(model, sites, batches, _Moments):
        for site, moments in here:
            columns_Dn = head_columns(site.output).detach()
            kept[site.key] = _best(columns_Dn.abs().sum(0) * moments.squares_n.sqrt(), gone)
            # Until the cut: what goes is without effect.
            head_columns(site.output).data[:, _others(kept[site.key], len(site.units))] = 0
    return deadhead.cut(model, _plan(model, kept))


def llm_pruner(
    model: PreTrainedModel, batches: Batches, share: float, *, spared: tuple[int, int] = (3, 1)
) -> PreTrainedModel:
    """LLM-Pruner (Ma, Fang, Wang 2023, arXiv 2305.11627) with its first-order element-wise Taylor score.

    Kept: a unit scores Σ |w ∂L/∂w| over all weights that go with it, L the mean loss of the calibration text; the first
    and the last layers are spared, and every other one loses the same share of its groups of heads and of its hidden
    units, each rounded down, those with the lowest scores. A share that is no whole group takes hidden units alone.
    Adapted: which layers are spared (three and one, as in its own settings for models of 32 layers and more).
    """
    sites = _sites(model)
    layers = sorted({site.layer for site in sites})
    open_to = [site for site in sites if site.layer in layers[spared[0] : len(layers) - spared[1]]]
    most = max(len(site.units) for site in open_to)

    def count(site: Site, gone: int) -> int:
        return gone * len(site.units) // most

    gone = _fewest(model, share, lambda gone: _plan(model, {s.key: s.units[count(s, gone) :] for s in open_to}))
    with _gradients(model, batches):
        scores = {site.key: _coupled(site) for site in open_to}
    return deadhead.cut(model, _plan(model, {s.key: _best(scores[s.key], count(s, gone)) for s in open_to}))


def llm_pruner_everywhere(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """LLM-Pruner, as `llm_pruner` says, with no layer spared."""
    return llm_pruner(model, batches, share, spared=(0, 0))


def torch_pruning(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """Torch-Pruning 1.6.1 (Fang, Ma, Song, Mi, Wang 2023, arXiv 2301.12900), the package, by its GroupTaylorImportance.

    Kept: its dependency graph, score, ranking in each layer by itself and the same ratio in all, as in its recipe for
    language models.
    Adapted: it is shown the feed-forward parts alone, whose hidden units it prunes, and deadhead cuts what it names.
    """
    import torch_pruning as tp

    sites = [site for site in _sites(model) if site.is_hidden]
    gone = _fewest(model, share, lambda count: _plan(model, {site.key: site.units[count:] for site in sites}))
    outputs = {id(site.output): site for site in sites}
    kept: dict[UnitKey, tuple[int, ...]] = {}
    with _gradients(model, batches):
        pruner = tp.pruner.BasePruner(
            nn.ModuleList(site.module for site in sites),
            example_inputs=torch.zeros(1, model.config.hidden_size),
            forward_fn=lambda shown, hidden: [module(hidden) for module in shown],
            importance=tp.importance.GroupTaylorImportance(),
            # It keeps the integer part of what is left.
            pruning_ratio=(gone - 0.5) / len(sites[0].units),
            ignored_layers=[site.output for site in sites],
            # The defaults of these are shared by all pruners.
            in_channel_groups={},
            out_channel_groups={},
        )
        for group in pruner.step(interactive=True):
            for dependency, units in group:
                if (site := outputs.get(id(dependency.target.module))) is not None:
                    kept[site.key] = tuple(sorted(set(site.units) - set(units)))
    return deadhead.cut(model, _plan(model, kept))


def whole_layers(model: PreTrainedModel, batches: Batches, share: float) -> PreTrainedModel:
    """ShortGPT (Men et al. 2024, arXiv 2403.03853): whole layers with the least block influence go.

    Kept: a layer's influence is the mean over tokens of 1 − cos(h before it, h after it), in the dense model.
    Adapted: as many layers as are nearest to the share; what is left of one is its norms, which nothing reads.
    """
    influence = _influence(model, batches)
    left = set(_best(influence, round((1 - share) * len(influence))))
    kept = {site.key: site.units if site.layer in left else () for site in _sites(model)}
    return deadhead.cut(model, _plan(model, kept))


SHIPPED: dict[str, Callable[[PreTrainedModel, Batches, float], PreTrainedModel]] = {
    "flap-as-shipped": flap,
    "flap+grail": flap_grail,
    "wanda-sp": wanda_sp,
    "llm-pruner": llm_pruner,
    "llm-pruner-everywhere": llm_pruner_everywhere,
    "torch-pruning": torch_pruning,
    "whole-layers": whole_layers,
}


class _Sums(Protocol):
    """Sums over the inputs of an output projection."""

    def add(self, rows_Rn: Tensor) -> None:
        """Add some tokens' inputs."""


S = TypeVar("S", bound=_Sums)


class _Moments:
    """First and second moments of each input; all (n,), float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sums_n = torch.zeros(width, dtype=torch.float64)
        self.squares_n = torch.zeros(width, dtype=torch.float64)

    def add(self, rows_Rn: Tensor) -> None:
        """Add some tokens' inputs."""
        self.count += len(rows_Rn)
        self.sums_n += rows_Rn.double().sum(0)
        self.squares_n += rows_Rn.double().square().sum(0)

    @property
    def mean_n(self) -> Tensor:
        return self.sums_n / self.count

    @property
    def variance_n(self) -> Tensor:
        return self.squares_n / self.count - self.mean_n.square()


class _Gram:
    """Products of all pairs of inputs, summed over tokens: (n, n), float64."""

    def __init__(self, width: int) -> None:
        self.products_nn = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows_Rn: Tensor) -> None:
        """Add some tokens' inputs."""
        rows_Rn = rows_Rn.double()
        self.products_nn.addmm_(rows_Rn.T, rows_Rn)


def _flap_scores(
    model: PreTrainedModel, sites: Sequence[Site], batches: Batches
) -> tuple[dict[UnitKey, Tensor], dict[UnitKey, _Moments]]:
    """Return FLAP's scores by key, (H,), and the moments of the inputs that were looked at.

    An input scores m_j = Var(x_j) ‖W_:j‖² of an output projection W; of attention it is m_j², as in the authors' code,
    not the paper. Scores are standardised over each projection's inputs, (m − mean) / deviation, and a group of heads
    has the mean of its own.
    """
    moments = {site.key: _Moments(_width(site)) for site in sites}
    with _watching(sites, moments), torch.no_grad(), evaluating(model):
        for batch in batches:
            run_stack(model, batch)
    scores = {}
    for site in sites:
        scores_n = moments[site.key].variance_n * head_columns(site.output).detach().double().square().sum(0)
        scores_n = scores_n if site.is_hidden else scores_n.square()
        scores_n = (scores_n - scores_n.mean()) / scores_n.std()
        scores[site.key] = scores_n.unflatten(0, (len(site.units), -1)).mean(1)
    return scores, moments


def _ranked(model: PreTrainedModel, sites: Sequence[Site], scores: Mapping[UnitKey, Tensor], share: float) -> HeadPlan:
    """Return the plan that drops the lowest scores of all sites, each unit counting as many parameters as it has."""
    unit = _unit(model)
    costs = counted_costs(model, "params", unit=unit, hidden=True, of="blocks")
    return HeadScores(scores=scores, choices=choices_of(sites, unit, 1)).within(costs, share * costs.total)


def _lost(site: Site, plan: HeadPlan, moments: _Moments) -> Tensor:
    """Return what the inputs that a plan removes add to an output in the mean, (D,)."""
    gone = _others(site.rows(plan.units[site.key]).tolist(), _width(site))
    return head_columns(site.output).detach().double()[:, gone] @ moments.mean_n[gone]


@torch.no_grad()
def _rebuild(site: Site, kept: tuple[int, ...], products_nn: Tensor) -> None:
    """Fit a projection that reads only some units (0 for the others) to its former outputs."""
    columns_Dn = head_columns(site.output)
    rows = site.rows(kept)
    within = products_nn[rows][:, rows]
    within.diagonal().add_(1e-9 * within.diagonal().mean() if len(rows) else 0)
    fitted_Dn = torch.linalg.solve(within, products_nn[rows] @ columns_Dn.double().T).T
    columns_Dn.zero_()
    columns_Dn[:, rows] = fitted_Dn.to(columns_Dn.dtype)


def _coupled(site: Site) -> Tensor:
    """Return for each unit Σ |w ∂L/∂w| over all weights that go with it, (H,)."""
    total_H = torch.zeros(len(site.units), dtype=torch.float64)
    for part in site.selections(site.units):
        weight = site.module.get_parameter(part.path)
        assert weight.grad is not None
        lengths = (weight * weight.grad).detach().abs().double().movedim(part.dim, 0).flatten(1).sum(1)
        total_H += lengths[part.index].unflatten(0, (len(site.units), -1)).sum(1)
    return total_H


@torch.no_grad()
def _influence(model: PreTrainedModel, batches: Batches) -> Tensor:
    """Return for each layer the mean over tokens of 1 − cos(h before it, h after it)."""
    stream = _stream(model, batches)
    found = []
    for index in range(len(stream.layers)):
        before = list(stream.states)
        stream.advance(index)
        turns = [1 - cosine_similarity(a, b, dim=-1).flatten() for a, b in zip(before, stream.states, strict=True)]
        found.append(torch.cat(turns).double().mean())
    return torch.stack(found)


@contextmanager
def _gradients(model: PreTrainedModel, batches: Batches) -> Iterator[None]:
    """Let all weights have the gradients of the text's mean loss while the block runs."""
    rows = sum(len(batch["input_ids"]) for batch in batches)
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            ids = batch["input_ids"]
            (model(input_ids=ids, labels=ids, use_cache=False).loss * (len(ids) / rows)).backward()
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def _in_turn(
    model: PreTrainedModel, sites: Sequence[Site], batches: Batches, sums: Callable[[int], S]
) -> Iterator[list[tuple[Site, S]]]:
    """Yield for each layer its sites with their sums, gathered on the outputs of the pruned layers before it."""
    stream = _stream(model, batches)
    for index, layer in enumerate(stream.layers):
        here = [site for site in sites if site.layer == index]
        found = {site.key: sums(_width(site)) for site in here}
        with _watching(here, found), torch.no_grad(), evaluating(model):
            for args, kwargs in stream.inputs(index):
                first(layer(*args, **kwargs))
        yield [(site, found[site.key]) for site in here]
        with torch.no_grad(), evaluating(model):
            stream.advance(index)


@torch.no_grad()
def _stream(model: PreTrainedModel, batches: Batches) -> Stream:
    """Return the hidden states before the first layer of a Llama."""
    given = [dict(batch) for batch in batches]
    stream = stream_of(
        model.eval(), Calibration(batches=given, is_held=[False] * len(given), has_memory=False), "model.layers"
    )
    assert not stream.is_whole, "the layers must run by themselves"
    return stream


@contextmanager
def _watching(sites: Sequence[Site], found: Mapping[UnitKey, S]) -> Iterator[None]:
    """While the block runs, add what output projections read to their sums."""

    def add(sums: S, module: nn.Module, args: tuple[Any, ...]) -> None:
        sums.add(args[0].flatten(0, -2))

    with ExitStack() as exits:
        for site in sites:
            exits.enter_context(site.output.register_forward_pre_hook(partial(add, found[site.key])))
        yield


def _unit(model: PreTrainedModel) -> Unit:
    return find_layout(model).units(model)[0]


def _sites(model: PreTrainedModel) -> list[Site]:
    return find_layout(model).all_sites(model, _unit(model), hidden=True)


def _width(site: Site) -> int:
    return len(site.units) * site.unit_dim


def _paths(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Site]:
    """Return the sites by the paths of their output projections."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(site.output)]: site for site in sites}


def _plan(model: PreTrainedModel, kept: Mapping[UnitKey, Sequence[int]]) -> HeadPlan:
    """Return the plan that keeps some units of some sites, and all of the others."""
    return choices_of(_sites(model), _unit(model), 1).plan_of(kept)


def _fewest(model: PreTrainedModel, share: float, plan: Callable[[int], HeadPlan]) -> int:
    """Return the smallest number whose plan leaves at most a share of the blocks' parameters."""
    limit = share * cost_of_kind(model_cost(model), "params", "blocks")
    most = max(len(site.units) for site in _sites(model))
    low, high = 0, most + 1
    while low < high:
        middle = (low + high) // 2
        if cost_of_kind(model_cost(model, plan(middle)), "params", "blocks") <= limit:
            high = middle
        else:
            low = middle + 1
    if low > most:
        raise ValueError(f"The method cannot leave as little as {share:.0%} of the blocks' parameters.")
    return low


def _best(scores_H: Tensor, gone: int) -> tuple[int, ...]:
    """Return the units that stay when the `gone` units with the lowest scores go."""
    return tuple(sorted(scores_H.argsort(stable=True)[gone:].tolist()))


def _others(kept: Sequence[int], total: int) -> list[int]:
    """Return the numbers below a total that are not kept."""
    return sorted(set(range(total)) - set(kept))
