"""What is fitted: the output projections that a cut model shares with the dense model; running dense parts instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deadhead.errors import InputError
from deadhead.layouts import Site, find_layout, head_columns
from deadhead.models.pruned.structure import OutputBias, weight_of


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """The attention, or the feed-forward part, of a layer.

    Args:
        path: path of the output projection in both models.
        parts: paths of the modules to replace by the dense model's, which makes the sublayer dense.
        columns: the inputs of the dense projection that the cut projection reads; None if they are not known.
    """

    path: str
    parts: tuple[str, ...]
    columns: tuple[int, ...] | None = None

    def is_within(self, layer: str) -> bool:
        """Return whether the sublayer is part of the module with this path."""
        return not layer or self.path.startswith(f"{layer}.")


def find_sublayers(model: PreTrainedModel, dense: PreTrainedModel) -> list[Sublayer]:
    """Return the sublayers that have an output projection, or its bias, in both models.

    Raises:
        InputError: a projection of one model does not fit the other's.
    """
    layout = find_layout(dense)
    # By the unit that the model was cut by, if the dense model knows it.
    units = layout.units(dense)
    unit = next(unit for unit in [*find_layout(model).units(model), *units] if unit in units)
    sites = [site for site in layout.all_sites(dense, unit, hidden=True) if site.output_path is not None and site.units]
    left = {site.key: site.units for site in find_layout(model).all_sites(model, unit, hidden=True)}
    names = {id(module): name for name, module in dense.named_modules()}
    owners = [names[id(site.module)] for site in sites]
    found = []
    for site, owner in zip(sites, owners, strict=True):
        path = f"{owner}.{site.output_path}"
        _require_alike(model, dense, path)
        # A module may contain other sublayers too; then only the projections belong to this one.
        shared = any(other.startswith(f"{owner}.") for other in owners) or owners.count(owner) > 1
        inner = dict.fromkeys(part.path.rpartition(".")[0] for part in site.selections(site.units))
        parts = [f"{owner}.{name}" for name in inner] if shared else [owner]
        found.append(Sublayer(path=path, parts=tuple(parts), columns=_columns(site, left.get(site.key))))
    return found


def _columns(site: Site, units: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if units is None or not set(units) <= set(site.units):
        return None
    return tuple(site.rows(units).tolist())


def _require_alike(model: PreTrainedModel, dense: PreTrainedModel, path: str) -> None:
    try:
        output = model.get_submodule(path)
    except AttributeError:
        output = None
    wanted = len(head_columns(dense.get_submodule(path)))
    width = None if output is None else output.out_features if isinstance(output, OutputBias) else _outputs(output)
    if width != wanted:
        found = "has none there" if width is None else f"has one with {width} outputs"
        raise InputError(
            f"The dense model must be the one that the model was cut from, but its projection {path} has {wanted} "
            f"outputs, and the model {found}; give the model as it was before the cut."
        )


def _outputs(output: nn.Module) -> int | None:
    return len(head_columns(output)) if isinstance(getattr(output, "weight", None), Tensor) else None


def layers_path(model: nn.Module, paths: Iterable[str]) -> str | None:
    """Return the path of the list of layers that contains all modules of these paths, or None if there is none."""
    found = {_first_list(model, path) for path in paths}
    return found.pop() if len(found) == 1 else None


def _first_list(model: nn.Module, path: str) -> str | None:
    parts = path.split(".")
    prefixes = [".".join(parts[:count]) for count in range(1, len(parts))]
    return next((prefix for prefix in prefixes if isinstance(model.get_submodule(prefix), nn.ModuleList)), None)


@contextmanager
def dense_in_place(model: nn.Module, dense: nn.Module, sublayer: Sublayer) -> Iterator[nn.Module]:
    """Make a sublayer compute what the dense one does while the block runs; yield its present output projection."""
    before = {path: model.get_submodule(path) for path in sublayer.parts}
    try:
        for path in sublayer.parts:
            model.set_submodule(path, dense.get_submodule(path))
        yield model.get_submodule(sublayer.path)
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def projection(output: nn.Module) -> Tensor:
    """Return an output projection's weight, (D, N), with its bias, if it has one, as the last column."""
    bias = getattr(output, "bias", None)
    columns = [] if isinstance(output, OutputBias) else [head_columns(output).detach()]
    columns += [] if bias is None else [bias.detach()[:, None]]
    if len(columns) == 1:
        return columns[0]
    return torch.cat(columns, dim=1) if columns else torch.empty(0, 0)


def install(output: nn.Module, weight_DN: Tensor) -> bool:
    """Give a projection new weights; return False if its dtype cannot hold them.

    They are in new parameters, because others may hold the old. The bias is the last column, as in `projection`.
    """
    parts: dict[str, Tensor] = {}
    if getattr(output, "bias", None) is not None:
        parts["bias"], weight_DN = weight_DN[:, -1], weight_DN[:, :-1]
    if not isinstance(output, OutputBias):
        is_view = head_columns(output) is not weight_of(output)
        parts["weight"] = weight_DN.T if is_view else weight_DN
    old = {name: output.get_parameter(name) for name in parts}
    new = {name: value.to(old[name].device, old[name].dtype).contiguous() for name, value in parts.items()}
    if not all(bool(value.isfinite().all()) for value in new.values()):
        return False
    for name, value in new.items():
        setattr(output, name, nn.Parameter(value, requires_grad=old[name].requires_grad))
    return True
