"""Run a language model up to its output layer: the logits of a whole batch, (tokens × vocabulary), are never made.

What a model does between its last hidden states and its logits (scales, caps, transforms, biases) is not reimplemented:
for each chunk of tokens the model's own forward runs again, with given states in place of its layers. This is first
tried on a few tokens. Models for which it does not work compute all logits at once, as usual.

Dimensions: B rows, T tokens, N tokens of all rows, D width, V vocabulary, K sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from deadhead.gates.sharding import is_sharded
from deadhead.layouts.inputs import made_tokens
from deadhead.measure.chunks import Sums, fits_at_once, sum_in_chunks
from deadhead.measure.divergence import widened
from deadhead.models.all_attention.adaptive import AdaptiveSoftmax
from deadhead.models.pruned.structure import text_stack
from deadhead.modes import evaluating, seeded

# The module that calls a model's layers, and what it calls them.
_Place: TypeAlias = tuple[nn.Module, str]


@dataclass(frozen=True, kw_only=True)
class LastStates:
    """What a model computed on a batch before its output layer, or with it if the logits are small.

    Args:
        outputs: what the model returned. Its logits are those of each row's first token, if `output_layer` is there.
        states_BTD: the last hidden states; without `output_layer` the logits.
        words: V, or how many of them are scored at least.
        output_layer: the model's own forward from states (1, N, D) on; it may be given `shift_labels`.
        weights: what learns in the output layer.
    """

    outputs: Any
    states_BTD: Tensor
    words: int
    output_layer: Callable[..., Any] | None = None
    is_adaptive: bool = False
    weights: tuple[Tensor, ...] = ()

    def logits(self, states_ND: Tensor) -> Tensor:
        """Return the logits of some states, (N, V)."""
        return states_ND if self.output_layer is None else self.output_layer(states_ND[None]).logits[0]

    def sums(self, sums: Sums, chosen_BT: Tensor | None = None, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return K sums over states, as `sum_in_chunks` does, of all tokens or those chosen.

        `sums` takes states (n, D) and n rows of each of `others`, which begin with B and T or with N.
        """
        rows_ND, *rest = (
            tensor.flatten(0, 1) if chosen_BT is None else tensor[chosen_BT] for tensor in (self.states_BTD, *others)
        )
        return sum_in_chunks(sums, rows_ND, rest, width=self.words, weights=self.weights)

    def nll(self, wanted_BT: Tensor) -> Tensor:
        """Return the sum of the negative log-likelihoods of tokens, 0-dimensional, but for those that are -100."""
        wanted_BT = wanted_BT.to(self.states_BTD.device)
        if self.output_layer is None:
            return nll(self.states_BTD.flatten(0, 1), wanted_BT.flatten())
        return self.sums(self._nll, wanted_BT != -100, wanted_BT)[0]

    def _nll(self, states_ND: Tensor, wanted_N: Tensor) -> Tensor:
        if self.is_adaptive:
            # It needs only the bands that its targets are in.
            layer = cast(Callable[..., Any], self.output_layer)
            loss: Tensor = layer(states_ND[None], shift_labels=wanted_N[None], num_items_in_batch=1).loss
            return loss[None]
        return nll(self.logits(states_ND), wanted_N)[None]


def nll(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods of tokens, 0-dimensional, but for those that are -100."""
    return cross_entropy(widened(logits_NV), wanted_N, ignore_index=-100, reduction="sum")


def whole_logits(outputs: Any) -> LastStates:
    """Return what a model returned that was run with its output layer; without logits, it has an adaptive softmax."""
    logits = outputs.logits
    return LastStates(
        outputs=outputs,
        states_BTD=logits,
        words=0 if logits is None else logits.shape[-1],
        is_adaptive=logits is None,
    )


def few_tokens(model: PreTrainedModel) -> Tensor:
    """Return the tokens for a trial of a model, (B, T)."""
    return made_tokens(model, 2, 4)


class StateReader:
    """Runs a language model, in a wrapper or not, up to its output layer if its logits would be large.

    Compiled models, models with sharded weights, models in wrappers other than PEFT's and DDP's, and models for which
    the result would differ are run as usual.
    """

    def __init__(self, model: PreTrainedModel | nn.Module) -> None:
        self.given = model
        wrapper: Any = model
        self.model = wrapper.get_base_model() if hasattr(model, "get_base_model") else wrapper
        # Where the layers are, None if the model does not fit; and before that is known, nothing.
        self._tried: tuple[_Place | None] | None = None

    def __call__(self, wrapper: nn.Module, **inputs: Any) -> LastStates:
        """Run the model, or DDP around it, on `input_ids` (B, T) and whatever else it takes, but for labels."""
        if self.is_apart(wrapper, inputs["input_ids"]):
            return self._run(wrapper, cast(tuple[_Place], self._tried)[0], inputs)
        return whole_logits(wrapper(**inputs))

    def is_apart(self, wrapper: nn.Module, ids_BT: Tensor) -> bool:
        """Return whether the model will be run on these tokens without its output layer."""
        inner = wrapper.module if isinstance(wrapper, DistributedDataParallel) else wrapper
        if inner is not self.given or not isinstance(self.model, PreTrainedModel):
            return False
        words = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        if fits_at_once(ids_BT.numel(), words) or not self._is_plain:
            return False
        self.try_out()
        return self.fits

    @property
    def fits(self) -> bool:
        """Whether the model, having been tried, can be run without its output layer."""
        return self._tried is not None and self._tried[0] is not None

    def try_out(self) -> None:
        """Try once whether the model fits. Hooks on it see a few tokens, so whoever counts hooks on afterwards."""
        if self._tried is None:
            fitting = (place for place in self._places() if self._is_same(place))
            self._tried = (next(fitting, None),)

    @property
    def _is_plain(self) -> bool:
        """Whether the model runs as it is written, on weights that are all here."""
        is_compiled = any(
            getattr(module, "_compiled_call_impl", None) for module in (self.given, *self.model.modules())
        )
        return not is_compiled and not any(map(is_sharded, self.model.parameters()))

    def _places(self) -> Iterator[_Place]:
        """Yield where the layers may be that the model's own forward calls: its base model, or the decoder in it."""
        paths = {module: path for path, module in self.model.named_modules()}
        for stack in (self.model.base_model, text_stack(self.model)):
            owner, _, name = paths.get(stack, "").rpartition(".")
            if name:
                yield self.model.get_submodule(owner), name

    def _run(self, wrapper: nn.Module, place: _Place, inputs: dict[str, Any]) -> LastStates:
        """Run all of the model, but its output layer on the first token of each row alone."""
        model, (owner, name) = self.model, place
        stack: Any = owner._modules[name]
        forward: Callable[..., Any] = stack.forward
        found: dict[str, Any] = {}

        @functools.wraps(forward)
        def read(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            found.update(kind=type(output), states=output.last_hidden_state)
            # Of a slice, in half precision on a CPU, a linear layer would copy its weight for each row.
            found["first"] = output.last_hidden_state = output.last_hidden_state[:, :1].contiguous()
            return output

        with _replaced(vars(stack), "forward", read):
            outputs = wrapper(**inputs)

        def output_layer(states_1ND: Tensor, **given: Any) -> Any:
            answer = _Answering(stack, lambda *_, **__: found["kind"](last_hidden_state=states_1ND))
            with _replaced(owner._modules, name, answer):
                ids = torch.zeros(states_1ND.shape[:2], dtype=torch.long, device=states_1ND.device)
                return model.forward(input_ids=ids, use_cache=False, **given)

        logits = outputs.logits
        is_adaptive = isinstance(model.get_output_embeddings(), AdaptiveSoftmax)
        return LastStates(
            outputs=outputs,
            states_BTD=found["states"],
            words=model.config.adaptive_cutoffs[0] if is_adaptive else logits.shape[-1],
            output_layer=output_layer,
            is_adaptive=is_adaptive,
            weights=_leaves(logits, found["first"]),
        )

    @torch.no_grad()
    def _is_same(self, place: _Place) -> bool:
        """Try on a few tokens whether logits from states, one by one and in another order, are those of the model."""
        inputs = {"input_ids": few_tokens(self.model), "use_cache": False}
        try:
            with evaluating(self.model), seeded():
                logits_NV = self.model(**inputs).logits.flatten(0, 1)
                read = self._run(self.model, place, inputs)
                states_ND = read.states_BTD.flatten(0, 1).flip(0)
                found = torch.cat([read.logits(chunk) for chunk in (states_ND[:1], states_ND[1:])]).flip(0)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception:  # a model's own code fails in many ways, and may then still be run as it is
            return False
        return found.shape == logits_NV.shape and bool(
            (found - logits_NV).abs().max() <= self._tolerance(logits_NV, states_ND) * logits_NV.abs().max()
        )

    def _tolerance(self, *tensors: Tensor) -> float:
        """Return by how much sums may differ that are computed in another order, relative to the largest number."""
        is_rounded = hasattr(self.model, "_original_forward") or torch.get_float32_matmul_precision() != "highest"
        dtypes = [*(tensor.dtype for tensor in tensors), self.model.dtype, *[torch.bfloat16] * is_rounded]
        return max(1e-5, *(4 * torch.finfo(dtype).eps for dtype in dtypes))


@contextmanager
def _replaced(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Let a table of attributes have another value while the block runs."""
    was_there, before = name in table, table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if was_there:
            table[name] = before
        else:
            del table[name]


class _Answering(nn.Module):
    """Knows all that a module does, but answers itself. The module's hooks are not called."""

    def __init__(self, module: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self.training = module.training
        # Not as a submodule of its own.
        self.__dict__["module"] = module
        self.answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def _leaves(found: Tensor, begin: Tensor) -> tuple[Tensor, ...]:
    """Return the leaves that learn of the graph between `begin`, which is none, and `found`."""
    nodes: list[Any] = [found.grad_fn]
    seen = {None, begin.grad_fn}
    leaves = []
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return tuple(leaves)
