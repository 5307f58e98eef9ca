"""Parameters that FSDP2 shards, so that each process holds a slice (a DTensor): reading and writing them whole."""

from __future__ import annotations

from torch import Tensor, nn

from deadhead.errors import InputError

_REMEDY = (
    "attach gates before a Trainer shards the model, load it without tp_plan, and cut in one process, from a saved "
    "copy of the weights"
)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a slice of `tensor`."""
    # Recognised by its methods: the class's module is slow to load, and some builds of torch lack it.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. If it is sharded, it is gathered and detached: all processes must call this."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_out(values: Tensor, like: Tensor) -> Tensor:
    """Return `values`, which every process has whole, sharded as `like` is; nothing is communicated."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def require_whole(model: nn.Module, what: str, remedy: str = _REMEDY) -> None:
    """Raise an InputError if a parameter is sharded; its message begins with `what`, the task that needs it whole."""
    # FSDP1 has flattened the parameters, or shows slices of them under their names.
    is_managed = any(hasattr(module, "_is_fsdp_managed_module") for module in model.modules())
    if is_managed or any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            f"{what} needs whole tensors, but those of this model are sharded across processes (by FSDP or tensor "
            f"parallelism): {remedy}."
        )
