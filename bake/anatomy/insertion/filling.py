"""Filling: what an inserted layer holds so that all it does is add a vector to the residual stream.

Every parameter is zero but a few. They are found by experiment: a layer of the twin is set to zero,
candidates are tried, and what moves the residual stream by a constant multiple of a vector, whatever
the text, is a slot. Four sources of a constant, from the simplest:

- `bias`: a bias of the projection that writes to the residual stream;
- `value`: the value bias at one; attention averages values with weights that sum to one, so the first
  column of the output projection is added as it is;
- `norm`: the same, where instead of the value the norm before attention has a bias;
- `squares`: a gated MLP without any bias. Its two inputs hold the identity and its negative, so that
  act(n)·n + act(−n)·(−n) = n² (SiLU, GELU and ReLU alike), and n² sums to the width after a norm.

A norm behind the block (Gemma, OLMo 2) turns any constant into one of fixed length. Then either that
norm's weight is the slot, or, where the norm computes 1 + weight and a small vector would drown in
the rounding of the one, the constant is made so small that the norm's epsilon decides its length and
the norm becomes a plain factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bake.anatomy.flags import FlagEffect, with_flags
from bake.checkpoint.loading import build_model
from bake.hooks import captured
from bake.sites import LayerStructure, Slot

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bake.anatomy.twin import Twin

Source = Literal["bias", "value", "norm", "squares"]
# The weight of a norm that is to be a plain factor: exact in bfloat16 and float16. The factor's error is
# mean(v²) / (2 · 2^28): below 1e-4 for vectors of rms 230, far above any residual stream.
GAIN = float(2**14)
_EPSILONS = ("eps", "variance_epsilon", "norm_eps")


@dataclass(frozen=True)
class Constant:
    """A parameter of the inserted layer that is not zero: all of it, or the first of its columns."""

    parameter: str
    value: float
    first_column: bool = False


@dataclass(frozen=True)
class Filling:
    """What the inserted layer holds. Names are inside the layer.

    slot: takes the push; for `squares` without a norm behind it is the pattern of all output
    projections of the MLP, and its scale is still to be multiplied with the hidden size. kinds: the
    parameter names of the layers that can be filled so.
    """

    source: Source
    slot: Slot | None
    constants: tuple[Constant, ...]
    flags: tuple[tuple[str, Any], ...]
    kinds: frozenset[frozenset[str]]
    scale: float = 1.0

    def describe(self) -> str:
        """Say in a few words how the constant comes to be."""
        flags = "".join(f", {key}: {str(value).lower()}" for key, value in self.flags)
        if self.slot is None:
            return f"gated MLP that sums squares{flags}"
        if self.source == "bias":
            return f"{self.slot.bias}{flags}"
        made = {"value": "a constant value", "norm": "a norm's bias", "squares": "summed squares"}
        return f"{self.slot.bias} on {made[self.source]}{flags}"


def layer_kind(layer: nn.Module) -> frozenset[str]:
    """Return the names of a layer's parameters: what makes a layer fit for a filling."""
    return frozenset(name for name, _ in layer.named_parameters(remove_duplicate=False))


def propose_fillings(
    twin: Twin, structure: LayerStructure, effects: Sequence[FlagEffect]
) -> Iterator[Filling]:
    """Yield what may work, the simplest and most exact first; a proof on the twin decides."""
    flags = {effect.path: effect.value for effect in effects}
    bench = _Bench(twin, structure, flags)
    for source in ("bias", "value", "norm"):
        for behind in (False, True):
            found = bench.search(source, behind=behind)
            if found is not None:
                yield bench.with_needed_flags(found, effects)
    yield from bench.squares()


class _Bench:
    """A twin with every flag set, one layer of which is emptied and tried."""

    def __init__(self, twin: Twin, structure: LayerStructure, flags: Mapping[str, Any]) -> None:
        self.twin = twin
        self.structure = structure
        self.flags = flags
        self.model = twin.with_flags(flags)
        self.fresh = _fresh_layers(twin, structure, flags)
        layers: Any = self.model.get_submodule(structure.layers)
        kinds: dict[frozenset[str], int] = {}
        for index, layer in enumerate(layers):
            kinds.setdefault(layer_kind(layer), index)
        self.kinds = kinds

    def search(self, source: Source, *, behind: bool) -> Filling | None:
        """Return the first filling of a source that works on some kind of layer, for all it works on."""
        first: Filling | None = None
        for kind, index in self.kinds.items():
            with self._emptied(index) as layer:
                if first is None:
                    tried = self._candidates(source, index, layer, behind)
                    first = next((f for c in tried if (f := self._measured(c, index, kind))), None)
                    continue
                again = self._measured(first, index, kind) if _fits(first, kind) else None
                if again is not None and abs(again.scale / first.scale - 1) < 1e-5:
                    first = _joined(first, again)
        return first

    def squares(self) -> Iterator[Filling]:
        """Yield the fillings of a gated MLP: what its matrices hold is decided from their shapes."""
        plain: Any = self.twin.model.get_submodule(self.structure.layers)
        kinds = frozenset(layer_kind(layer) for layer in plain)
        units = tuple(
            dict.fromkeys(
                Constant(name, value)
                for index in self.kinds.values()
                for name, value in self._units(index)
            )
        )
        scale = self.structure.attention_scale
        yield Filling("squares", None, units, (), kinds, scale)
        wide = {
            name
            for layer in plain
            for name, parameter in layer.named_parameters()
            if parameter.shape == (self.twin.hidden_size,)
        }
        for name, unit in dict.fromkeys((c.parameter, c.value) for c in units):
            # Behind the MLP a norm can take the push, if its weight is what multiplies.
            if unit == 1.0 and name in wide:
                others = tuple(c for c in units if c.parameter != name)
                having = frozenset(kind for kind in kinds if name in kind)
                yield Filling("squares", Slot(name, scale=scale), others, (), having, scale)

    def with_needed_flags(self, found: Filling, effects: Sequence[FlagEffect]) -> Filling:
        """Return the filling with those flags only that create its parameters."""
        assert found.slot is not None
        used = {found.slot.bias, *(constant.parameter for constant in found.constants)}
        plain: Any = self.twin.model.get_submodule(self.structure.layers)
        lacking = {
            f"{self.structure.layer(index)}.{name}"
            for kind, index in self.kinds.items()
            if kind in found.kinds
            for name in used - layer_kind(plain[index])
        }
        needed: dict[str, Any] = {}
        for name in sorted(lacking):
            creating = next((effect for effect in effects if name in effect.adds), None)
            if creating is None:  # No flag does it alone, so it takes all of them.
                needed = dict(self.flags)
                break
            needed[creating.path] = creating.value
        model = self.twin.with_flags(needed)
        layers: Any = model.get_submodule(self.structure.layers)
        kinds = frozenset(layer_kind(layers[i]) for k, i in self.kinds.items() if k in found.kinds)
        return Filling(
            found.source, found.slot, found.constants, tuple(needed.items()), kinds, found.scale
        )

    def _candidates(
        self, source: Source, index: int, layer: nn.Module, behind: bool
    ) -> Iterator[Filling]:
        """Yield fillings to be measured; `behind` adds each norm of the layer as the one behind."""
        kind = layer_kind(layer)
        for slot, constants in self._sources(source, index, layer):
            if not behind:
                yield _filling(source, slot, constants, kind)
                continue
            for name, unit in self._units(index):
                taken = name in (slot.bias, *(c.parameter for c in constants))
                if taken or layer.get_parameter(name).shape != (self.twin.hidden_size,):
                    continue
                if unit == 1.0:
                    whole = Constant(slot.bias, 1.0, first_column=slot.axis is not None)
                    yield _filling(source, Slot(name), (*constants, whole), kind)
                elif (epsilon := _epsilon(layer, name)) is not None:
                    small = Slot(
                        slot.bias, scale=GAIN / epsilon**0.5, axis=slot.axis, span=slot.span
                    )
                    yield _filling(source, small, (*constants, Constant(name, GAIN)), kind)

    def _sources(
        self, source: Source, index: int, layer: nn.Module
    ) -> Iterator[tuple[Slot, tuple[Constant, ...]]]:
        width = self.twin.hidden_size
        parameters = dict(layer.named_parameters(remove_duplicate=False))
        biases = [n for n, p in parameters.items() if p.ndim == 1 and "bias" in n.split(".")[-1]]
        if source == "bias":
            for name in biases:
                if parameters[name].shape == (width,):
                    yield Slot(name), ()
            return
        inside = [n for n in parameters if _block_of(n) == self.structure.attention]
        outputs = [n for n in inside if parameters[n].ndim == 2 and parameters[n].shape[0] == width]
        # The projection that comes last writes to the residual stream.
        for output in reversed(outputs):
            slot = Slot(output, axis=0, span=(0, 1))
            if source == "value":
                for name in reversed([n for n in biases if n in inside]):
                    yield slot, (Constant(name, 1.0),)
                continue
            inputs = [
                n for n in inside if parameters[n].ndim == 2 and parameters[n].shape[1] == width
            ]
            for bias in (n for n in biases if n not in inside and parameters[n].shape == (width,)):
                for name in reversed([n for n in inputs if n != output]):
                    yield slot, (Constant(bias, 1.0), Constant(name, 1.0, first_column=True))

    def _units(self, index: int) -> Iterator[tuple[str, float]]:
        """Yield (weight of a norm, the value that makes it do nothing): one, or zero for 1 + weight."""
        for name, tensor in self.fresh[index].items():
            leaf = name.rpartition(".")[2]
            if tensor.ndim != 1 or "bias" in leaf or not _is_constant(tensor):
                continue
            if float(tensor[0]) in (0.0, 1.0):
                yield name, float(tensor[0])

    def _measured(self, tried: Filling, index: int, kind: frozenset[str]) -> Filling | None:
        """Return the filling with the scale that it has on the twin; None where it moves no constant."""
        import torch

        assert tried.slot is not None
        layer = self.model.get_submodule(self.structure.layer(index))
        push = torch.randn(self.twin.hidden_size, generator=torch.Generator().manual_seed(5)) * 0.5
        with torch.no_grad():
            for constant in tried.constants:
                set_constant(layer.get_parameter(constant.parameter), constant)
            slot = layer.get_parameter(tried.slot.bias)
            before = self._output(index)
            shape = tuple(slot.shape)
            slot.add_(tried.slot.delta(push, shape=shape).to(slot.dtype))
            after = self._output(index)
            slot.zero_()
            for constant in tried.constants:
                layer.get_parameter(constant.parameter).zero_()
        ratio = _constant_ratio(after - before, push)
        if ratio is None:
            return None
        scale = tried.slot.scale * ratio
        found = Slot(tried.slot.bias, scale=scale, axis=tried.slot.axis, span=tried.slot.span)
        return Filling(tried.source, found, tried.constants, (), frozenset({kind}), scale)

    def _output(self, index: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        with captured(
            self.model,
            self.structure,
            "mlp_out",
            [index],
            lambda _layer, activation: seen.append(activation.detach().double().clone()),
        ):
            self.twin.run(self.model)
        return seen[0]

    @contextmanager
    def _emptied(self, index: int) -> Iterator[nn.Module]:
        """Set everything in a layer to zero for a while, and factors on all of it to one."""
        import torch

        layer = self.model.get_submodule(self.structure.layer(index))
        kept = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with torch.no_grad():
            for tensor in layer.state_dict().values():
                if tensor.is_floating_point():
                    tensor.fill_(1.0 if tensor.numel() == 1 else 0.0)
            yield layer
            layer.load_state_dict(kept)


def set_constant(tensor: torch.Tensor, constant: Constant) -> None:
    """Write a constant into a parameter, in place."""
    if constant.first_column:
        tensor[:, 0] = constant.value
    else:
        tensor.fill_(constant.value)


def _fresh_layers(
    twin: Twin, structure: LayerStructure, flags: Mapping[str, Any]
) -> list[dict[str, torch.Tensor]]:
    """Return the parameters of layers as the architecture initialises them: norms do nothing then."""
    model = build_model(with_flags(twin.config, flags))
    layers: Any = model.get_submodule(structure.layers)
    return [
        {name: p.detach() for name, p in layer.named_parameters(remove_duplicate=False)}
        for layer in layers
    ]


def _filling(
    source: Source, slot: Slot, constants: tuple[Constant, ...], kind: frozenset[str]
) -> Filling:
    return Filling(source, slot, constants, (), frozenset({kind}), slot.scale)


def _joined(left: Filling, right: Filling) -> Filling:
    kinds = left.kinds | right.kinds
    return Filling(left.source, left.slot, left.constants, left.flags, kinds, left.scale)


def _fits(filling: Filling, kind: frozenset[str]) -> bool:
    assert filling.slot is not None
    return {filling.slot.bias, *(constant.parameter for constant in filling.constants)} <= kind


def _block_of(name: str) -> str:
    return name.partition(".")[0]


def _is_constant(tensor: torch.Tensor) -> bool:
    return bool((tensor == tensor[0]).all())


def _epsilon(layer: nn.Module, weight: str) -> float | None:
    """Return what a norm adds to the mean square, if it says so."""
    norm = layer.get_submodule(weight.rpartition(".")[0])
    found = [getattr(norm, name) for name in _EPSILONS if isinstance(getattr(norm, name, 0), float)]
    return found[0] if found and found[0] > 0 else None


def _constant_ratio(moved: torch.Tensor, push: torch.Tensor) -> float | None:
    """Return s where every row of `moved` is s · push to rounding; None where it is not."""
    rows = moved.reshape(-1, push.shape[0])
    direction = push.double()
    ratio = (rows @ direction / direction.dot(direction)).mean()
    error = (rows - ratio * direction).abs().max()
    # Written so that a NaN fails.
    if not (ratio.abs() > 1e-6 and error <= 1e-4 * (ratio * direction).abs().max()):
        return None
    rounded = round(float(ratio), 4)
    return rounded if abs(rounded - float(ratio)) < 1e-5 * abs(float(ratio)) else float(ratio)
