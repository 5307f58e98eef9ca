"""Parameters that FSDP2 shares out among processes, each of which holds a slice: a DTensor, read and written whole."""

from __future__ import annotations

from torch import Tensor, nn

from deadhead.errors import InputError

_REMEDY = (
    "attach gates before a Trainer shards the model, load it without tp_plan, and cut in one process, from a saved "
    "copy of the weights"
)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a process holds a slice of `tensor` only."""
    # By what it can do: the class's module takes a while to load, and is not there in every build of torch.
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor. One that is sharded is gathered, detached, so all processes must call this together."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_out(values: Tensor, like: Tensor) -> Tensor:
    """Return `values`, which every process has whole, sharded as `like` is; nothing is sent."""
    if not is_sharded(like):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def require_whole(model: nn.Module, what: str, remedy: str = _REMEDY) -> None:
    """Check that no parameter is sharded; if one is, the InputError begins with `what`, which is to be done."""
    # FSDP1 has flattened the parameters, or shows slices of them under their names.
    is_managed = any(hasattr(module, "_is_fsdp_managed_module") for module in model.modules())
    if is_managed or any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            f"{what} needs whole tensors, but those of this model are shared out among processes (by FSDP or tensor "
            f"parallelism): {remedy}."
        )
