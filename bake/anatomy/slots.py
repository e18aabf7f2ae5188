"""Propose slots for a site by experiment on the twin: move a bias, see what the site's activation does.

A proposal is cheap and may be wrong (the bias may feed something else too); `Twin.prove` decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bake.anatomy.probing import probe_vector, read_activation, uniform_ratio
from bake.errors import UnsupportedError
from bake.hooks import submodule
from bake.sites import INPUT_SITES, LayerStructure, Slot, capture_location

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bake.anatomy.twin import Twin

# write: a bias of the projection that writes to the residual stream, or whatever acts as one.
# norm: the bias of the norm before the block. projection: W·v into the block's input projections.
# value: a bias before the projection that writes, so that what it writes is the push.
SlotKind = Literal["write", "norm", "projection", "value"]
PROBED_LAYER = 1
_LAYER = "{layer}"
_WAY_BACK = re.compile(r"down|out|w2")
_RAW_MATRICES = re.compile(r"expert|router|gate|moe", re.IGNORECASE)


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


def propose_slots(
    twin: Twin,
    flagged: nn.Module,
    structure: LayerStructure,
    site: str,
    layer: int = PROBED_LAYER,
) -> list[Proposal]:
    """Return proposals for `site` of a twin's layer, the most natural first.

    flagged: the twin with every usable flag set.
    """
    search = _Search(twin, flagged, structure, site, layer)
    kind: SlotKind = "norm" if site in INPUT_SITES else "write"
    proposals = [
        Proposal(
            kind,
            (
                replace(
                    slot,
                    bias=search.template(slot.bias),
                    weight=slot.weight and search.template(slot.weight),
                ),
            ),
        )
        for slot in search.constant_slots()
    ]
    if site in INPUT_SITES:
        proposals += search.projection_slots()
    elif site == "attn_out" and not proposals:
        proposals += search.value_slots()
    return proposals


@dataclass(frozen=True)
class _Reader:
    """A matrix that reads the site's activation: where it is, and the bias that goes with it."""

    module: nn.Module
    weight: str
    bias: str
    transposed: bool

    @property
    def bias_parameter(self) -> torch.Tensor | None:
        import torch

        found = getattr(self.module, self.bias.rpartition(".")[2], None)
        return found if isinstance(found, torch.Tensor) else None


@dataclass(frozen=True)
class _Search:
    """The search for slots of one site in one layer of the twin."""

    twin: Twin
    flagged: nn.Module
    structure: LayerStructure
    site: str
    layer: int

    @property
    def prefix(self) -> str:
        return f"{self.structure.layer(self.layer)}."

    def template(self, name: str) -> str:
        """Return a parameter's name with "{layer}" for the layer's index."""
        return f"{self.structure.layers}.{_LAYER}.{name.removeprefix(self.prefix)}"

    def constant_slots(self) -> Iterator[Slot]:
        """Yield biases that move the site's activation by a constant multiple of themselves."""
        push = probe_vector(self.twin)
        before = self._activation()
        for name, axis in self._constant_candidates():
            with _moved(self.flagged.get_parameter(name), push):
                after = self._activation()
            scale = uniform_ratio(after - before, push)
            if scale is not None:
                yield Slot(name, scale=scale, axis=axis)
            elif axis is None and (weight := self._channel_scale(name, after - before, push)):
                yield Slot(name, weight)

    def _channel_scale(self, name: str, moved: torch.Tensor, push: torch.Tensor) -> str | None:
        """Return the vector beside a bias that multiplies each channel of it; None if none does."""
        import torch

        if not moved.any():
            return None
        expected = moved.reshape(-1, push.shape[0]) / push
        owner, _, _ = name.rpartition(".")
        for key, parameter in self.flagged.get_submodule(owner).named_parameters(recurse=False):
            if "bias" in key or parameter.shape != push.shape:
                continue
            if torch.allclose(expected, parameter.expand_as(expected), rtol=1e-3, atol=1e-4):
                return f"{owner}.{key}"
        return None

    def immovable_writes(self) -> list[str]:
        """Return biases of the site's own block that do not move its activation by a constant."""
        push = probe_vector(self.twin)
        before = self._activation()
        found = []
        for name, _axis in self._constant_candidates():
            with _moved(self.flagged.get_parameter(name), push):
                after = self._activation()
            moved = (after - before).abs().max() > 1e-5 * before.abs().max()
            if moved and name.startswith(f"{self.prefix}{self._home}."):
                found.append(name.removeprefix(self.prefix))
        return found

    @property
    def _home(self) -> str | None:
        """The block whose bias is the natural slot."""
        return self.structure.attention if self.site == "attn_out" else self.structure.mlp

    def _activation(self) -> torch.Tensor:
        return read_activation(self.twin, self.flagged, self.structure, self.site, self.layer)

    def _constant_candidates(self) -> list[tuple[str, int | None]]:
        """Return the biases of the width of the residual stream, each with the axis that v lies on."""
        width = self.twin.hidden_size
        inside = None
        if self.site in INPUT_SITES:
            # What lies behind the site cannot move its activation.
            inside = f"{self.prefix}{capture_location(self.site, self.structure).module}."
        found: list[tuple[str, int | None]] = [
            (name, None if parameter.ndim == 1 else 1)
            for name, parameter in self.flagged.named_parameters()
            if name.startswith(self.prefix)
            and "bias" in name.rpartition(".")[2]
            and parameter.ndim <= 2
            and parameter.shape[-1] == width
            and not (inside and name.startswith(inside))
        ]
        # What is there without a flag comes first, then the projection of the site's own block.
        native = {name for name, _ in self.twin.model.named_parameters()}
        home = f"{self.prefix}{self._home}."
        found.sort(key=lambda entry: (entry[0] not in native, not entry[0].startswith(home)))
        return found

    def value_slots(self) -> Iterator[Proposal]:
        """Yield biases that attention's output projection turns into the push, where it can be solved.

        As many values as the projection reads: with fewer, shared by several heads, most of the residual
        stream is out of reach.
        """
        home = f"{self.prefix}{self._home}."
        inside = {n: p for n, p in self.flagged.named_parameters() if n.startswith(home)}
        push = probe_vector(self.twin)
        before = self._activation()
        writers = [n for n, p in inside.items() if p.ndim == 2 and p.shape[0] == len(push)]
        for weight in reversed(writers):  # What comes last writes to the residual stream.
            width = inside[weight].shape[1]
            for bias in (
                n for n, p in inside.items() if n.endswith("bias") and p.shape == (width,)
            ):
                slot = Slot(bias, weight, solved=True)
                try:
                    delta = slot.delta(push, inside[weight].detach())
                except UnsupportedError:
                    break
                with _moved(inside[bias], delta.to(push.dtype)):
                    after = self._activation()
                scale = uniform_ratio(after - before, push)
                if scale is not None:
                    named = replace(slot, bias=self.template(bias), weight=self.template(weight))
                    yield Proposal("value", (replace(named, scale=scale),))
                    return

    def projection_slots(self) -> Iterator[Proposal]:
        """Yield the biases of all the matrices that read the site's activation, as one proposal."""
        readers = self._readers()
        if not readers:
            return
        inert = _inert_shares(
            self.twin, self.flagged, [reader.bias_parameter for reader in readers]
        )
        slots = tuple(
            Slot(
                self.template(reader.bias),
                self.template(reader.weight),
                transposed=reader.transposed,
                inert=share,
            )
            for reader, share in zip(readers, inert, strict=True)
        )
        missing = tuple(
            reader.bias.removeprefix(self.prefix)
            for reader in readers
            if reader.bias_parameter is None
        )
        yield Proposal("projection", slots, missing)

    def _readers(self) -> list[_Reader]:
        """Return the matrices that are given the site's activation, in the order of their calls."""

        block_name = capture_location(self.site, self.structure).module
        block = submodule(self.flagged, self.structure, self.layer, block_name)
        activation = self._activation()
        readers: dict[str, _Reader] = {}

        def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
            def look(_module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
                given = (*arguments[:1], *keywords.values())
                if any(_is_same(seen, activation) for seen in given):
                    for reader in _matrices(f"{self.prefix}{name}", module, activation.shape[-1]):
                        readers.setdefault(reader.weight, reader)

            return module.register_forward_pre_hook(look, with_kwargs=True)

        handles = [
            watch(".".join(filter(None, (block_name, name))), module)
            for name, module in block.named_modules()
        ]
        self.twin.run(self.flagged)
        for handle in handles:
            handle.remove()
        return list(readers.values())


def _is_same(seen: Any, activation: torch.Tensor) -> bool:
    import torch

    return (
        isinstance(seen, torch.Tensor)
        and seen.numel() == activation.numel()
        and torch.equal(seen.reshape(-1), activation.reshape(-1))
    )


def _matrices(name: str, module: nn.Module, width: int) -> Iterator[_Reader]:
    """Yield the matrices of a module that map its input, of `width`, to something else.

    A linear layer has one. Routers and fused experts keep theirs as plain parameters, of shape
    (…, out, in) or (…, in, out), with a bias `X_bias` beside `X` where there is one.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear | Conv1D):
        yield _Reader(module, f"{name}.weight", f"{name}.bias", isinstance(module, Conv1D))
        return
    if not _RAW_MATRICES.search(type(module).__name__):
        return  # A recurrent block's parameters are shaped like matrices too.
    for key, parameter in module.named_parameters(recurse=False):
        bias_key = "bias" if key == "weight" else f"{key}_bias"
        names = (f"{name}.{key}", f"{name}.{bias_key}")
        bias = getattr(module, bias_key, None)
        if parameter.ndim == 2 and key == "weight" and parameter.shape[1] == width:
            yield _Reader(module, *names, transposed=False)
        elif parameter.ndim != 3:
            continue
        elif bias is None:
            if width in parameter.shape[1:] and not _WAY_BACK.search(key):
                yield _Reader(module, *names, transposed=False)
        elif tuple(parameter.shape[1:]) == (width, bias.shape[-1]):
            yield _Reader(module, *names, transposed=True)
        elif tuple(parameter.shape[1:]) == (bias.shape[-1], width):
            yield _Reader(module, *names, transposed=False)


@contextmanager
def _moved(parameter: torch.Tensor, push: torch.Tensor) -> Iterator[None]:
    """Move a bias (every row of one that is a matrix) by `push` while the context is open."""
    import torch

    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(push)
        try:
            yield
        finally:
            parameter.copy_(original)


def explain_no_slot(
    twin: Twin, flagged: nn.Module, structure: LayerStructure, site: str, layer: int
) -> str | None:
    """Say of a bias that looks like the slot why it is none; None where there is no such bias.

    Only of the MLP's: there is one width in it that is not the residual stream's own.
    """
    if site != "mlp_out":
        return None
    names = _Search(twin, flagged, structure, site, layer).immovable_writes()
    if not names:
        return None
    return (
        f"{names[-1]} exists and does not move this activation by a constant: a norm or a gate "
        "stands between"
    )


def _inert_shares(
    twin: Twin, model: nn.Module, biases: list[torch.Tensor | None]
) -> list[tuple[float, float] | None]:
    """Return, for each bias, the contiguous part that no logit depends on.

    Parts are fractions of the bias's length, so that what the twin shows holds for the real model.
    """
    import torch

    present = [bias for bias in biases if bias is not None]
    if not present:
        return [None] * len(biases)
    logits = model(input_ids=twin.input_ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(11))
    gradients = iter(torch.autograd.grad((logits * weights).sum(), present, materialize_grads=True))
    found = [None if bias is None else next(gradients).abs() for bias in biases]
    loudest = max(gradient.max() for gradient in found if gradient is not None)
    return [None if g is None else _inert_share(g <= 1e-5 * loudest) for g in found]


def _inert_share(silent: torch.Tensor) -> tuple[float, float] | None:
    """Return which part of a bias is silent, where the real model's bias is divided alike.

    All of it (a key bias on its own) or the middle third (fused query, key, value of one size). Other
    divisions depend on how many heads there are, which the twin changes, and a few small gradients
    are chance.
    """
    if bool(silent.all()):
        return 0.0, 1.0
    if silent.ndim != 1:
        return None
    length = len(silent)
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
