"""Propose slots for a site by experiment on the twin: move a bias, see what the site's activation does.

A proposal is cheap and may be wrong (the bias may feed something else too); `Twin.prove` decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bake.errors import UnsupportedError
from bake.sites import INPUT_SITES, LayerStructure, Slot, addition_location, capture_location
from bake.steering import captured, steered, submodule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bake.anatomy.twin import Twin

# write: a bias of the projection that writes to the residual stream, or whatever acts as one.
# norm: the bias of the norm before the block. projection: W·v into the block's input projections.
SlotKind = Literal["write", "norm", "projection"]
PROBED_LAYER = 1
_LAYER = "{layer}"


@dataclass(frozen=True)
class Proposal:
    """Slots that may absorb a constant at a site; names hold "{layer}" for the layer's index.

    `missing` names the parameters that would have to exist and do not; then there is no route.
    """

    kind: SlotKind
    slots: tuple[Slot, ...]
    missing: tuple[str, ...] = ()

    def slots_of(self, layer: int) -> tuple[Slot, ...]:
        """Return the slots of decoder layer `layer`, with its index in their names."""
        return tuple(
            replace(
                slot,
                bias=slot.bias.format(layer=layer),
                weight=slot.weight.format(layer=layer) if slot.weight else None,
            )
            for slot in self.slots
        )


def measure_attention_scale(twin: Twin, structure: LayerStructure) -> float | None:
    """Return how far the residual stream after attention moves per unit of attention's output.

    None where it does not simply move: a post-norm in between, a parallel block, no attention.
    """
    if structure.attention is None or structure.before_mlp is None:
        return None
    push = _probe_vector(twin)
    before = _activation(twin, twin.model, structure, "attn_out")
    location, _ = addition_location("attn_out", structure)
    assert location.side == "output"
    with steered(twin.model, structure, "attn_out", {PROBED_LAYER: push}):
        after = _activation(twin, twin.model, structure, "attn_out")
    return _uniform_ratio(after - before, push)


def find_input_norms(twin: Twin, structure: LayerStructure) -> dict[str, str]:
    """Return {input site: name of the layer's norm whose output is the site's activation}."""
    import torch

    found: dict[str, str] = {}
    layer = submodule(twin.model, structure, PROBED_LAYER, "")
    for site in INPUT_SITES:
        try:
            activation = _activation(twin, twin.model, structure, site)
        except UnsupportedError:
            continue
        for name, child in layer.named_children():
            output = _output_of(twin, child)
            if isinstance(output, torch.Tensor) and torch.equal(output, activation):
                found[site] = name
    return found


def _output_of(twin: Twin, module: nn.Module) -> Any:
    """Return what a module returned in the last of the twin's forwards; None if it was not called."""
    seen: list[Any] = [None]
    handle = module.register_forward_hook(lambda _module, _arguments, output: seen.append(output))
    twin.run(twin.model)
    handle.remove()
    return seen[-1]


def propose_slots(
    twin: Twin, flagged: nn.Module, structure: LayerStructure, site: str
) -> list[Proposal]:
    """Return proposals for `site`, the most natural first. `flagged` has every usable flag set."""
    proposals = [
        Proposal("norm" if site in INPUT_SITES else "write", (slot,))
        for slot in _constant_slots(twin, flagged, structure, site)
    ]
    if site in INPUT_SITES:
        proposals += _projection_slots(twin, flagged, structure, site)
    return proposals


def _constant_slots(
    twin: Twin, flagged: nn.Module, structure: LayerStructure, site: str
) -> Iterator[Slot]:
    """Yield biases of the layer that move the site's activation by a constant multiple of themselves."""
    import torch

    push = _probe_vector(twin)
    prefix = f"{structure.layer(PROBED_LAYER)}."
    home = structure.attention if site == "attn_out" else structure.mlp
    names = [
        name
        for name, parameter in flagged.named_parameters()
        if name.startswith(prefix)
        and "bias" in name.rpartition(".")[2]
        and parameter.shape == push.shape
        and not (site in INPUT_SITES and _inside_block(name[len(prefix) :], structure))
    ]
    # The projection of the block that the site belongs to comes first.
    names.sort(key=lambda name: not name.startswith(f"{prefix}{home}."))
    before = _activation(twin, flagged, structure, site)
    for name in names:
        parameter = flagged.get_parameter(name)
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(push)
            after = _activation(twin, flagged, structure, site)
            parameter.copy_(original)
        scale = _uniform_ratio(after - before, push)
        if scale is not None:
            yield Slot(_template(name, structure), scale=scale)


def _inside_block(name: str, structure: LayerStructure) -> bool:
    return name.split(".")[0] in (structure.attention, structure.mlp)


def _projection_slots(
    twin: Twin, flagged: nn.Module, structure: LayerStructure, site: str
) -> Iterator[Proposal]:
    """Yield the biases of all the matrices that read the site's activation, as one proposal."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    block_name = capture_location(site, structure).module
    block = submodule(flagged, structure, PROBED_LAYER, block_name)
    activation = _activation(twin, flagged, structure, site)
    readers: list[tuple[str, nn.Module]] = []

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: nn.Module, arguments: tuple) -> None:
            seen = arguments[0] if arguments else None
            if (
                isinstance(seen, torch.Tensor)
                and seen.numel() == activation.numel()
                and torch.equal(seen.reshape(-1), activation.reshape(-1))
            ):
                readers.append((name, module))

        return module.register_forward_pre_hook(look)

    handles = [
        watch(name, module)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    twin.run(flagged)
    for handle in handles:
        handle.remove()
    if not readers:
        return
    prefix = f"{structure.layer(PROBED_LAYER)}.{block_name}."
    inert = _inert_shares(twin, flagged, [module for _, module in readers])
    slots = tuple(
        Slot(
            _template(f"{prefix}{name}.bias", structure),
            _template(f"{prefix}{name}.weight", structure),
            transposed=isinstance(module, Conv1D),
            inert=share,
        )
        for (name, module), share in zip(readers, inert, strict=True)
    )
    missing = tuple(
        f"{block_name}.{name}.bias"
        for name, module in readers
        if getattr(module, "bias", None) is None
    )
    yield Proposal("projection", slots, missing)


def _inert_shares(
    twin: Twin, model: nn.Module, modules: list[nn.Module]
) -> list[tuple[float, float] | None]:
    """Return, for each module's bias, the contiguous part that no logit depends on.

    Parts are fractions of the bias's length, so that what the twin shows holds for the real model.
    """
    import torch

    biases = [getattr(module, "bias", None) for module in modules]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return [None] * len(modules)
    logits = model(input_ids=twin.input_ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(11))
    gradients = iter(torch.autograd.grad((logits * weights).sum(), present))
    found = [None if bias is None else next(gradients).abs() for bias in biases]
    loudest = max(gradient.max() for gradient in found if gradient is not None)
    return [None if g is None else _inert_share(g <= 1e-5 * loudest) for g in found]


def _inert_share(silent: torch.Tensor) -> tuple[float, float] | None:
    """Return which part of a bias is silent, where the real model's bias is divided alike.

    All of it (a key bias on its own) or the middle third (fused query, key, value of one size). Other
    divisions depend on how many heads there are, which the twin changes, and a few small gradients
    are chance.
    """
    length = len(silent)
    if bool(silent.all()):
        return 0.0, 1.0
    third = length // 3
    fused = _middle_third(length, third)
    if length == 3 * third and bool((silent == fused).all()):
        return 1 / 3, 2 / 3
    return None


def _middle_third(length: int, third: int) -> torch.Tensor:
    """Return a mask of `length` that is true in the middle third."""
    import torch

    mask = torch.zeros(length, dtype=torch.bool)
    mask[third : 2 * third] = True
    return mask


def _probe_vector(twin: Twin) -> torch.Tensor:
    import torch

    return torch.randn(twin.hidden_size, generator=torch.Generator().manual_seed(5)) * 0.5


def _activation(twin: Twin, model: nn.Module, structure: LayerStructure, site: str) -> torch.Tensor:
    """Return the site's activation in the probed layer, (batch, positions, hidden_size)."""
    seen: list[torch.Tensor] = []
    with captured(
        model, structure, site, [PROBED_LAYER], lambda _layer, x: seen.append(x.detach().clone())
    ):
        twin.run(model)
    return seen[0]


def _uniform_ratio(moved: torch.Tensor, push: torch.Tensor) -> float | None:
    """Return s where every row of `moved` is s · push to rounding; None where it is not."""
    rows = moved.reshape(-1, push.shape[0]).double()
    direction = push.double()
    ratio = (rows @ direction / direction.dot(direction)).mean()
    error = (rows - ratio * direction).abs().max()
    if ratio.abs() < 1e-6 or error > 1e-4 * (ratio * direction).abs().max():
        return None
    rounded = round(float(ratio), 4)
    # A scale that rounds to a short decimal is that decimal: multipliers come from a config.
    return rounded if abs(rounded - float(ratio)) < 1e-5 * abs(float(ratio)) else float(ratio)


def _template(name: str, structure: LayerStructure) -> str:
    prefix = f"{structure.layer(PROBED_LAYER)}."
    return f"{structure.layers}.{_LAYER}.{name.removeprefix(prefix)}"
