"""The reference: a context manager that hooks a model with a push, and one that captures activations.

What a hook adds is the definition that every baked checkpoint is measured against, so it is kept as
plain as it can be: no editing in place, no caching, one vector per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from bake.errors import UnsupportedError
from bake.sites import LayerStructure, Location, addition_location, capture_location
from bake.writes import Ablation, Part, Removal, Silence, WriteMap, remove, share_left

if TYPE_CHECKING:
    import torch
    from torch import nn

# What decoder layers of transformers call the tensor that flows through them.
INPUT_NAMES = ("hidden_states", "x", "inputs", "hidden", "layer_input")


def submodule(model: nn.Module, structure: LayerStructure, layer: int, path: str) -> nn.Module:
    """Return the module at `path` inside decoder layer `layer` (0-based; "" is the layer itself)."""
    name = structure.layer(layer)
    return model.get_submodule(f"{name}.{path}" if path else name)


@contextmanager
def steered(
    model: nn.Module,
    structure: LayerStructure,
    site: str,
    push: Mapping[int, torch.Tensor],
    *,
    factor: float = 1.0,
    mask: torch.Tensor | None = None,
) -> Iterator[None]:
    """Add factor · push[l] at `site` of every layer l in `push` while the context is open.

    push: {0-based layer: (hidden_size,) float tensor}. Applies at every position of every forward, or
    with a mask, (texts, positions), where that is 1.
    """
    with ExitStack() as hooks:
        for layer, vector in push.items():
            location, scale = addition_location(site, structure.at(layer))
            module = submodule(model, structure, layer, location.module)
            handle = register(module, location, _adder(vector * (factor * scale), mask))
            hooks.callback(handle.remove)
        yield


@contextmanager
def ablated(
    model: nn.Module, writes: WriteMap, ablation: Removal, *, before_push: bool = False
) -> Iterator[None]:
    """Take an ablation's subspace out while the context is open, or let heads and neurons write nothing.

    Of the stream: wherever something reads it, which is each layer's input, what reads it inside the layer,
    and the last layer's output. Of writes: of the outputs of its layers' blocks. Computed in float32. Heads
    and neurons are zero, or their mean, where the projection that they go through reads them.

    before_push: a push is added after it, which a reader must find: then of the stream after the embedding
    and of every block's output, which comes to the same where nothing else is added.
    """
    if isinstance(ablation, Silence):
        with ExitStack() as hooks:
            for part in ablation.parts:
                module = model.get_submodule(part.write.parameter.removesuffix(".weight"))
                place = Location("", "input")
                mean = None if ablation.means is None else ablation.means[part.name]
                hooks.callback(register(module, place, _silencer(part, mean)).remove)
            yield
        return

    def eraser(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def erase(activation: torch.Tensor) -> torch.Tensor:
            left = remove(activation.float(), ablation.basis[layer], ablation.strength)
            return left.to(activation.dtype)

        return erase

    with ExitStack() as hooks:
        for place, layer in _places(writes, ablation, before_push=before_push):
            module = model.get_submodule(place.module)
            hooks.callback(register(module, place, eraser(layer)).remove)
        yield


@contextmanager
def ablated_rows(
    model: nn.Module, writes: WriteMap, ablations: Mapping[int, Ablation]
) -> Iterator[None]:
    """Take another subspace out of each row of a batch while the context is open, as `ablated` does.

    ablations: {row: what is taken out of it}; the other rows are left alone. Where it is taken out, an
    activation is (rows, positions, hidden_size). One hook does it for all rows.
    """
    import torch

    held: dict[Location, dict[int, tuple[torch.Tensor, float]]] = {}
    for row, ablation in ablations.items():
        for place, layer in _places(writes, ablation):
            held.setdefault(place, {})[row] = (ablation.basis[layer].float(), ablation.strength)

    def eraser(
        parts: Mapping[int, tuple[torch.Tensor, float]],
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        rank = max(len(basis) for basis, _ in parts.values())
        width = next(iter(parts.values()))[0].shape[-1]
        read = torch.zeros(max(parts) + 1, rank, width)
        for row, (basis, _) in parts.items():
            read[row, : len(basis)] = basis
        strengths = torch.tensor(
            [parts[row][1] if row in parts else 0.0 for row in range(len(read))]
        )
        written = strengths[:, None, None] * read

        def erase(activation: torch.Tensor) -> torch.Tensor:
            first, second = (
                torch.cat([each, each.new_zeros(len(activation) - len(each), rank, width)]).to(
                    activation.device
                )
                for each in (read, written)
            )
            values = activation.float()
            along = values @ first.transpose(1, 2)  # (rows, positions, rank)
            return torch.baddbmm(values, along, second, alpha=-1).to(activation.dtype)

        return erase

    with ExitStack() as hooks:
        for place, parts in held.items():
            module = model.get_submodule(place.module)
            hooks.callback(register(module, place, eraser(parts)).remove)
        yield


def _places(
    writes: WriteMap, ablation: Ablation, *, before_push: bool = False
) -> Iterator[tuple[Location, int]]:
    """Yield where an ablation's hooks are, modules by their whole names, with the layer of each."""
    for layer in ablation.layers:
        parts = writes.by_layer[layer]
        name = f"{writes.layers}.{layer}"
        if before_push and ablation.scope == "stream" and layer == ablation.layers[0]:
            yield Location(name, "input"), layer
        if before_push or ablation.scope != "stream":
            for block in parts.blocks:
                yield Location(f"{name}.{block}" if block else name, "output"), layer
            continue
        yield Location(name, "input"), layer
        for reader in parts.readers:
            yield Location(f"{name}.{reader}" if reader else name, "input"), layer
        if layer == ablation.layers[-1]:
            yield Location(name, "output"), layer


def _silencer(part: Part, mean: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    def silence(activation: torch.Tensor) -> torch.Tensor:
        kept = activation.clone()
        kept[..., slice(*part.columns)] = 0 if mean is None else mean.to(kept.device, kept.dtype)
        return kept

    return silence


@contextmanager
def captured(
    model: nn.Module,
    structure: LayerStructure,
    site: str,
    layers: list[int],
    receive: Callable[[int, torch.Tensor], None],
) -> Iterator[None]:
    """Call receive(l, activation (batch, positions, hidden_size)) at `site` of each layer, per forward."""

    def reader(layer: int) -> Callable[[torch.Tensor], None]:
        return lambda activation: receive(layer, activation)

    with ExitStack() as hooks:
        for layer in layers:
            location = capture_location(site, structure.at(layer))
            module = submodule(model, structure, layer, location.module)
            hooks.callback(register(module, location, reader(layer)).remove)
        yield


@contextmanager
def parts_read(
    model: nn.Module, silence: Silence, receive: Callable[[Part, torch.Tensor], None]
) -> Iterator[None]:
    """Call receive(part, what goes through it (…, columns)), per forward, for heads and neurons."""

    def reader(part: Part) -> Callable[[torch.Tensor], None]:
        return lambda activation: receive(part, activation[..., slice(*part.columns)])

    with ExitStack() as hooks:
        for part in silence.parts:
            module = model.get_submodule(part.write.parameter.removesuffix(".weight"))
            hooks.callback(register(module, Location("", "input"), reader(part)).remove)
        yield


@contextmanager
def share_watched(model: nn.Module, watched: Mapping[str, torch.Tensor]) -> Iterator[list[float]]:
    """Yield a list to which every output of the watched modules adds its `share_left`.

    watched: {module: (directions, hidden_size)}, orthonormal.
    """
    shares: list[float] = []

    def look(basis: torch.Tensor) -> Callable[[torch.Tensor], None]:
        return lambda activation: shares.append(share_left(activation, basis))

    with ExitStack() as hooks:
        for name, basis in watched.items():
            module = model.get_submodule(name)
            hooks.callback(register(module, Location("", "output"), look(basis)).remove)
        yield shares


def check_activation(activation: torch.Tensor, input_ids: torch.Tensor, hidden_size: int) -> None:
    """Raise UnsupportedError for what is not (texts, positions, hidden_size).

    Some architectures carry several streams, or put positions first: read as if they did not, their
    activations would be those of other tokens.
    """
    expected = (*input_ids.shape, hidden_size)
    if tuple(activation.shape) != expected:
        raise UnsupportedError(
            f"this architecture's activations are of shape {tuple(activation.shape)} where one stream's "
            f"would be {expected} (texts, positions, hidden size), which bake cannot read"
        )


def _adder(
    vector: torch.Tensor, mask: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor]:
    def add(activation: torch.Tensor) -> torch.Tensor:
        added = vector.to(activation.device, activation.dtype)
        if mask is not None:
            added = _place(mask.to(activation.device, activation.dtype), activation) * added
        return activation + added

    return add


def _place(mask: torch.Tensor, activation: torch.Tensor) -> torch.Tensor:
    """Shape a mask (texts, positions) so that it multiplies an activation (…, hidden_size).

    Some blocks are given several streams a token, some positions first, some all tokens in one row.
    """
    for laid_out in (mask, mask.T, mask.reshape(-1), mask.reshape(1, -1)):
        if activation.shape[: laid_out.ndim] == laid_out.shape:
            return laid_out.reshape(*laid_out.shape, *[1] * (activation.ndim - laid_out.ndim))
    raise UnsupportedError(
        f"an activation of shape {tuple(activation.shape)} does not show which of its places are the "
        f"texts' tokens {tuple(mask.shape)}"
    )


def register(
    module: nn.Module, location: Location, function: Callable[[torch.Tensor], torch.Tensor | None]
) -> Any:
    """Hook one side of a module; what `function` returns, unless None, replaces the activation."""
    if location.side == "output":

        def on_output(_module: nn.Module, _arguments: Any, output: Any) -> Any:
            if isinstance(output, tuple | list):
                replaced = function(output[0])
                return output if replaced is None else type(output)((replaced, *output[1:]))
            replaced = function(output)
            return output if replaced is None else replaced

        return module.register_forward_hook(on_output)

    def on_input(_module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> Any:
        if arguments:
            replaced = function(arguments[0])
            return None if replaced is None else ((replaced, *arguments[1:]), keywords)
        name = next((name for name in INPUT_NAMES if name in keywords), None)
        if name is None:
            raise UnsupportedError(
                f"{type(module).__name__} takes its input as none of {', '.join(INPUT_NAMES)}"
            )
        replaced = function(keywords[name])
        return None if replaced is None else (arguments, {**keywords, name: replaced})

    return module.register_forward_pre_hook(on_input, with_kwargs=True)
