"""What training gates on a model will need of memory, without its weights: one step is taken on paper, and counted.

Nothing is estimated by a formula. The model is set up as `deadhead.train` sets it up, on the meta device. Then its
tensors become such as have a shape and no contents (torch's fake tensors; unlike those on the meta device, they count
as being on a CPU, so that the same kernels are chosen as in training, which keep the same for the backward pass), and
it takes a step, forward and backward, while a meter adds up what each call makes and takes off what is freed.
"""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from deadhead.attaching import detach, gates_of, is_gate, unwrapped
from deadhead.errors import InputError, UnsupportedModel
from deadhead.measure.losses import SegmentLoss
from deadhead.plans.plan import Unit
from deadhead.training.phases.choosing import attach_gates
from deadhead.training.phases.learning import checkpoint_activations, learner
from deadhead.training.phases.segments import segment_length
from deadhead.training.recipes.recipe import PruneRecipe, changed

Mode = Literal["full", "lora", "frozen"]

# What no tensor without contents takes part in is computed for real up to this size, in bytes: positions, masks and
# gates' noise, whose values code asks for.
_REAL = 2**24


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory that training with gates takes, in bytes.

    Args:
        weights: parameters and buffers as they are held while training, gates and adapters among them.
        gradients: of all that learns, at the end of the backward pass.
        optimizer: two moments of all that learns, for AdamW, and one of each gate, for its own optimizer.
        activations: the most that a step holds at any time besides the three above: what the backward pass needs,
            logits and loss, and what the call at that time works with.
        total: the most that is held at any time. It is less than the sum: gradients come while activations go.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    total: int


def training_memory(
    config_or_model: PreTrainedConfig | PreTrainedModel,
    *,
    mode: Mode,
    batch_size: int,
    length: int | None = None,
    lora_rank: int = 16,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    unit: Unit | None = None,
    blocks: bool | int = False,
) -> TrainingMemory:
    """Count what `deadhead.train` will need of memory to train gates on a model, without making its weights.

    Counted is what tensors hold. A process takes more: libraries, a GPU's context, and what its allocator wastes. With
    glibc's on a CPU it was 1.1 to 3 times as much in all, most with checkpointing. It was about what is counted where
    MALLOC_MMAP_THRESHOLD_=65536 was set before the process started (`benchmarks/memory.py`).

    A teacher is not counted, nor are batches that are accumulated, which keep the gradients from one to the next (then
    the sum of the four parts is an upper bound).

    Kernels are those of a CPU. On a GPU attention with dropout keeps less, and deadhead's own models more, as their
    blocked attention is for CPUs.

    Args:
        config_or_model: a configuration, whose precision counts; or a model on any device, meta included, which is not
            changed.
        mode: what learns besides the gates. "full": all weights, in float32; "lora": adapters, beside weights that stay
            in their precision; "frozen": nothing.
        batch_size: B, rows of a batch.
        length: T, tokens of a row; None as in training: 256, or all positions there are, or a segment.
        lora_rank: of the adapters.
        gradient_checkpointing: whether layers keep their inputs only, and run again in the backward pass.
        bf16: mixed precision.
        unit: what a gate opens and closes; see `deadhead.attach`.
        blocks: whether blocks have gates too, or their size; see `deadhead.attach`.

    Raises:
        UnsupportedModel: it has no head that could be pruned, or it asks for the values of its tensors.
        InputError: an argument is out of range, or the model cannot be trained like that.
    """
    if mode not in ("full", "lora", "frozen"):
        raise InputError(f"A mode of training must be 'full', 'lora' or 'frozen', but is {mode!r}.")
    if mode == "lora" and lora_rank < 1:
        raise InputError(f"Adapters need a lora_rank of 1 or more, but it is {lora_rank}.")
    recipe: PruneRecipe = changed(
        PruneRecipe(),
        batch_size=batch_size,
        sequence_length=length,
        lora_rank=lora_rank if mode == "lora" else 0,
        freeze_weights=mode == "frozen",
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        unit=unit,
        blocks=bool(blocks),
        block_size=None if isinstance(blocks, bool) else blocks,
    )
    if isinstance(config_or_model, PreTrainedConfig):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_or_model)
    else:
        model = detach(_moved(config_or_model, torch.device("meta")))
    if gradient_checkpointing:
        checkpoint_activations(model, True)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        # On the meta device adapters are made without contents too.
        with torch.device("meta"), learner(model, recipe) as prepared:
            trainee = _moved(prepared, torch.device("cpu"), fake)
        # Real ones: they are small, and which heads are computed depends on what they draw.
        attach_gates(unwrapped(trainee), recipe)
        with warnings.catch_warnings():
            # Torch looks for gradients of real tensors that meet fake ones; it hides its warning, but not an error.
            warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
            return step_memory(trainee, recipe, fake)
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")
        raise UnsupportedModel(
            f"The memory to train a model of type {model.config.model_type!r} cannot be counted, as it takes no step "
            f"on tensors without contents ({reason}); train it for a few steps and measure."
        ) from error


def step_memory(trainee: nn.Module, recipe: PruneRecipe, fake: FakeTensorMode | None = None) -> TrainingMemory:
    """Take a training step without the optimizer's part, and return its memory.

    Args:
        trainee: what learns, with gates, as `deadhead.train` has prepared it.
        recipe: the phase.
        fake: the mode of its tensors if they have no contents; None for real ones.
    """
    model = unwrapped(trainee)
    gates = gates_of(model)
    assert gates is not None
    # Training measures once in a while, if it does. A step that measures is counted.
    gates.track_difference(recipe.track_difference or recipe.weighting == "output_difference")
    trainee.train()
    tensors = {id(tensor): tensor for tensor in (*trainee.parameters(), *trainee.buffers())}
    loss = SegmentLoss(model)
    meter = _Meter(tensors.values(), fake)
    # A model with segment memory has none in its first step.
    for _ in range(2 if loss.has_memory else 1):
        gates.begin_step(0)
        trainee.zero_grad()
        with meter:
            _forward(trainee, loss, _batch(model, recipe), recipe.bf16).backward()
    learning = {name: p for name, p in trainee.named_parameters() if p.grad is not None}
    weights = sum(tensor.nbytes for tensor in tensors.values())
    optimizer = sum(p.nbytes * (1 if is_gate(name) else 2) for name, p in learning.items())
    return TrainingMemory(
        weights=weights,
        gradients=sum(p.nbytes for p in learning.values()),
        optimizer=optimizer,
        activations=meter.most_activations,
        total=weights + optimizer + meter.most,
    )


def _forward(trainee: nn.Module, segment_loss: SegmentLoss, inputs: dict[str, Tensor], bf16: bool) -> Tensor:
    """Return the loss, with all that goes free when training has it gone."""

    def mixed(**arguments: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = trainee(**arguments)
        # As accelerate does to what a model returns.
        return convert_to_fp32(outputs)

    loss: Tensor = segment_loss(cast(nn.Module, mixed) if bf16 else trainee, inputs).loss
    return loss


def _batch(model: PreTrainedModel, recipe: PruneRecipe) -> dict[str, Tensor]:
    """Return a batch of tokens (B, T) as frequent as by Zipf's law, which an adaptive embedding is made for."""
    shape = (recipe.batch_size, segment_length(model, recipe))
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    ids = (vocab_size ** torch.rand(shape, generator=generator, dtype=torch.float64)).long() - 1
    return {"input_ids": ids, "labels": ids, "is_first": torch.zeros(len(ids), dtype=torch.bool)}


def _moved(module: Any, device: torch.device, fake: FakeTensorMode | None = None) -> Any:
    """Return a copy of a module whose tensors have no contents.

    Args:
        module: with tensors on any device.
        device: the meta device, or with a mode the one that they are to count as being on.
        fake: the mode of fake tensors.
    """

    def empty(tensor: Tensor) -> Tensor:
        if fake is None:
            return torch.empty_like(tensor, device=device)
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    memo: dict[int, Any] = {id(p): nn.Parameter(empty(p), p.requires_grad) for p in module.parameters()}
    memo |= {id(buffer): empty(buffer) for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Meter(TorchDispatchMode):
    """Adds up the sizes of storages while it is on: each from the call that makes it until nobody holds it.

    Args:
        held: tensors that are there already, and stay; not counted. Gradients of those that learn are told apart.
        fake: the mode of tensors without contents, None if all are real.
    """

    def __init__(self, held: Iterable[Tensor], fake: FakeTensorMode | None) -> None:
        super().__init__()
        self.fake = fake
        # Kept, so that no other storage can get the address of one of them.
        self.held = [tensor.untyped_storage() for tensor in held]
        self.sizes = {storage._cdata: 0 for storage in self.held}
        self.finders: dict[int, Any] = {}
        self.gradients: set[int] = set()
        self.now = self.activations = self.most = self.most_activations = 0
        for tensor in held:
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(self._take_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call, and take note of what it made."""
        if func is torch.ops.prim.device.default:
            # Two calls of three.
            return func(*args)
        result = self._call(func, args, kwargs or {})
        for made in _tensors((result,)):
            self._see(made.untyped_storage())
        return result

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fake is None:
            return func(*args, **kwargs)
        given = [*_tensors(args), *_tensors(kwargs.values())]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func.name() == "aten::_grouped_mm":
                # Of experts. Without contents torch knows it in bfloat16 only, on a CPU in any precision.
                halves = (value.bfloat16() if value.is_floating_point() else value for value in args)
                return func(*halves, **kwargs).to(args[0].dtype)
            return func(*args, **kwargs)
        # What two tensors make is at most as large as every pair of their numbers, unless sizes are said.
        says_size = not given or any(isinstance(value, (list, tuple)) for value in args)
        if says_size or math.prod(tensor.numel() for tensor in given) > _REAL // 8:
            try:
                with self.fake:
                    result = func(*args, **kwargs)
            except RuntimeError:
                # Its size depends on values, which are there.
                return func(*args, **kwargs)
            if sum(made.nbytes for made in _tensors((result,))) > _REAL:
                return result
        return func(*args, **kwargs)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = size = storage.nbytes()
        self.finders[key] = weakref.ref(storage, lambda _: self._lose(key))
        self.now += size
        self.activations += size
        self.most = max(self.most, self.now)
        self.most_activations = max(self.most_activations, self.activations)

    def _lose(self, key: int) -> None:
        del self.finders[key]
        size = self.sizes.pop(key)
        self.now -= size
        if key in self.gradients:
            self.gradients.remove(key)
        else:
            self.activations -= size

    def _take_gradient(self, parameter: Tensor) -> None:
        key = -1 if parameter.grad is None else parameter.grad.untyped_storage()._cdata
        if key in self.finders and key not in self.gradients:
            self.gradients.add(key)
            self.activations -= self.sizes[key]
