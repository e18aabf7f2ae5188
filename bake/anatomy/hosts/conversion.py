"""A conversion: what is particular to one pair of architectures, of which one can host the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bake.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Computed:
    """Tensors of the host made from one of the base's: `outputs`, `splits` as in a Transform."""

    outputs: Mapping[str, tuple[int, ...]]
    function: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
    splits: bool = False


@dataclass(frozen=True)
class Merged:
    """Tensors of the host made from several of the base's, which `sources` names; see Merge."""

    sources: tuple[str, ...]
    outputs: Mapping[str, tuple[int, ...]]
    function: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


Shape = tuple[int, ...]


def keep(name: str, shape: Shape, config: PreTrainedConfig) -> str | Computed:
    """Return the name itself: the host has the same tensor under the same name."""
    return name


def merge_nothing(shapes: Mapping[str, Shape], config: PreTrainedConfig) -> Iterator[Merged]:
    """Yield nothing: the host keeps no tensors together that the base keeps apart."""
    yield from ()


def split_rows(parts: Mapping[str, int], shape: Shape) -> Computed:
    """Cut the rows of a tensor of `shape` into consecutive pieces {name: rows}; no bit changes."""
    if not shape or sum(parts.values()) != shape[0]:
        raise CheckpointError(
            f"a tensor with {shape[0] if shape else 0} rows should become {', '.join(parts)} with "
            f"{sum(parts.values())}; is this checkpoint the architecture that its config names?"
        )

    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        pieces = tensor.split(list(parts.values()))
        return {name: piece.contiguous() for name, piece in zip(parts, pieces, strict=True)}

    return Computed({name: (rows, *shape[1:]) for name, rows in parts.items()}, function, True)


def everywhere(slot: str) -> Callable[[PreTrainedConfig, int], str]:
    """Return what names the same slot in every layer."""
    return lambda config, layer: slot


def fuse_nothing(
    shapes: Mapping[str, Shape], config: PreTrainedConfig
) -> Iterator[tuple[str, Shape, str]]:
    """Yield nothing: transformers loads every tensor of the host as it is stored."""
    yield from ()


def zero_biases(name: str, shape: Shape, config: PreTrainedConfig) -> torch.Tensor | None:
    """Return zeros for a bias, None for anything else: that has to come from the base."""
    import torch

    return torch.zeros(shape) if name.endswith(".bias") else None


in_the_mlp = everywhere("mlp.down_proj.bias")


@dataclass(frozen=True)
class Conversion:
    """How a base architecture becomes a host; both are model types, names are the module's.

    refuse: why a config cannot be expressed, or None. settings: the config keys that the host needs.
    convert: (name, shape, config) → the tensor's name in the host, or how it is computed. merge: tensors
    that the host keeps together, {name: shape} → what is made of several. fused: parameters that
    transformers makes on loading of stored ones, {name: shape} → (parameter, shape, one of the stored).
    on_disk: {part of a parameter's name: what the host's files have there}. slot: (config, layer) → the
    bias inside the decoder layer that moves the residual stream by itself. read: keys that are the base's
    own and that the host reads all the same. new: (name, shape, config) → what a parameter holds that is
    made of nothing of the base's, None where it has to be. factor: the tensor of one number inside a layer
    that multiplies the slot; "" where none does. lossless: whether every stored value stays what it is.
    remark: what else a user should know of a config's conversion. limit: where the host is no longer the
    base; with one the route is taken on request only.
    """

    base: str
    host: str
    refuse: Callable[[PreTrainedConfig], str | None]
    settings: Callable[[PreTrainedConfig], Mapping[str, Any]]
    convert: Callable[[str, Shape, PreTrainedConfig], str | Computed] = keep
    slot: Callable[[PreTrainedConfig, int], str] = in_the_mlp
    read: frozenset[str] = field(default=frozenset())
    lossless: bool = True
    remark: Callable[[PreTrainedConfig], str] = lambda config: ""
    merge: Callable[[Mapping[str, Shape], PreTrainedConfig], Iterator[Merged]] = merge_nothing
    fused: Callable[[Mapping[str, Shape], PreTrainedConfig], Iterator[tuple[str, Shape, str]]] = (
        fuse_nothing
    )
    on_disk: Mapping[str, str] = field(default_factory=dict, hash=False)
    new: Callable[[str, Shape, PreTrainedConfig], torch.Tensor | None] = zero_biases
    factor: str = ""
    limit: Callable[[PreTrainedConfig], str] = lambda config: ""
