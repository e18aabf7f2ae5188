"""What writes to the residual stream: found by experiment on the twin, and proven there through the disk.

A parameter writes where moving it along a random direction moves what is added to the stream along that
direction and no other. Whether all of them together make up the stream is shown by an ablation: the
edited and reloaded twin has to equal the twin whose every reading of the stream is hooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.anatomy.erasure import erase
from bake.anatomy.flags import with_flags
from bake.anatomy.layers import LayerKind, LayerMap
from bake.anatomy.probing import probe_vector, read_children, uniform_ratio
from bake.anatomy.structure import is_norm
from bake.anatomy.twin import TWIN_ERRORS, Twin, TwinVerdict, one_line
from bake.checkpoint.loading import build_on_meta
from bake.errors import BakeError, UnsupportedError
from bake.hooks import ablated, register
from bake.sites import LayerStructure, Location
from bake.writes import (
    SCOPES,
    Ablation,
    LayerWrites,
    Untying,
    Write,
    WriteMap,
    orthonormalize,
    remove,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

_ALONG = 1e-4  # of what moved: how much of it may lie across the direction
_FACTORS = {"stream": 1.0, "writes": 0.5}  # the strength that each scope is proven with


@dataclass(frozen=True)
class Ablatable:
    """What of a model can be ablated exactly. writes: None where nothing can.

    verdicts: {scope: what the twin showed}. refusals: {scope: why it is refused}.
    """

    writes: WriteMap | None
    verdicts: Mapping[str, TwinVerdict]
    refusals: Mapping[str, str]

    def choose(self, scope: str | None, model_type: str) -> WriteMap:
        """Return what writes; raise UnsupportedError with the reason where the scope is not exact.

        scope: None for heads and neurons, which need to be found and nothing else.
        """
        if self.writes is None and scope is None:
            raise UnsupportedError(
                f"heads and neurons of {model_type} cannot be told: {self.refusals[SCOPES[0]]}"
            )
        if self.writes is None or scope in self.refusals:
            scope = scope or SCOPES[0]
            others = [other for other in SCOPES if other not in self.refusals]
            instead = f"; exact here: --scope {others[0]}" if others else ""
            raise UnsupportedError(
                f"{model_type} cannot be ablated exactly ({scope}): {self.refusals[scope]}{instead}"
            )
        return self.writes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`: {scope: "exact" or why not}."""
        return {scope: self.refusals.get(scope, "exact") for scope in SCOPES}


@dataclass(frozen=True)
class WriteSearch:
    """What the search needs: the real model on the meta device, its twin, and how their layers match."""

    config: PreTrainedConfig
    real: nn.Module
    twin: Twin
    layers: LayerMap
    structures: Mapping[LayerKind, LayerStructure]
    path: str

    def find(self) -> Ablatable:
        """Return what can be ablated exactly, each scope proven on the twin."""
        try:
            twin_map, real_map = self._maps()
        except (BakeError, *TWIN_ERRORS) as error:
            return Ablatable(None, {}, dict.fromkeys(SCOPES, _explain(error)))
        verdicts, refusals = {}, {}
        for scope in SCOPES:
            try:
                verdicts[scope] = self._prove(twin_map, scope)
                refusals[scope] = verdicts[scope].reason or ""
            except (BakeError, *TWIN_ERRORS) as error:
                refusals[scope] = _explain(error)
        refusals = {scope: reason for scope, reason in refusals.items() if reason}
        return Ablatable(real_map, verdicts, refusals)

    def _maps(self) -> tuple[WriteMap, WriteMap]:
        """Return what writes to the twin's stream and to the real model's."""
        if self.layers.strangers:
            raise UnsupportedError(
                f"no layer of a small twin is like layer {self.layers.strangers[0]}"
            )
        embeddings = self._embeddings()
        kinds = {kind: self._layer(kind) for kind in self.layers.kinds}

        def named(layers: Sequence[LayerKind]) -> dict[int, LayerWrites]:
            return {
                index: _at(kinds[kind], f"{self.path}.{index}.")
                for index, kind in enumerate(layers)
                if kind in kinds
            }

        twin = WriteMap(
            self.path,
            embeddings,
            named(self.layers.twin),
            find_untying(self.twin.config, self.twin.model, embeddings),
        )
        real = WriteMap(
            self.path,
            embeddings,
            named(self.layers.real),
            find_untying(self.config, self.real, embeddings),
        )
        present = {name for name, _ in self.real.named_parameters(remove_duplicate=False)}
        for write in real.every:
            if write.parameter not in present:
                raise UnsupportedError(f"not every layer has {write.parameter}")
        return twin, real

    def _embeddings(self) -> tuple[Write, ...]:
        """Return what the first layer's input is made of."""
        first = self.twin.model.get_submodule(f"{self.path}.0")

        def read() -> torch.Tensor:
            return _seen(self.twin, first, Location("", "input"))

        names = [
            name
            for name, _ in self.twin.model.named_parameters()
            if not name.startswith(f"{self.path}.")
        ]
        found = _find_writes(self.twin, names, read)
        before = read()
        with _erased(self.twin, found):
            after = read()
        if not found or not _equals_removal(self.twin, before, after):
            raise UnsupportedError(
                "what the first layer is given is not made by embeddings alone: a norm, or values that "
                "are no parameters, come before it"
            )
        return tuple(found)

    def _layer(self, kind: LayerKind) -> LayerWrites:
        """Return what writes in layers of a kind; parameters' names are those inside the layer."""
        structure, layer = self.structures[kind], self.layers.probed_layer(kind)
        prefix = f"{self.path}.{layer}."
        seen = read_children(self.twin, structure, layer)
        children = dict(self.twin.model.get_submodule(f"{self.path}.{layer}").named_children())
        outputs = {
            name: output
            for name, (_, output) in seen.items()
            if name in children
            and not is_norm(name, children[name])
            and output is not None
            and output.shape[-1] == self.twin.hidden_size
            and any(True for _ in children[name].parameters())
        }
        push = probe_vector(self.twin)
        blocks, writes = [], []
        for name in outputs:
            block = children[name]
            moved = self._moved_by(layer, name, outputs, push)
            if not moved.any():
                continue  # Something else of the layer reads it, and the stream does not.
            if uniform_ratio(moved, push) is None:
                raise UnsupportedError(
                    f"what {name} writes is not simply added to the residual stream: a norm or a gate "
                    "stands between, and a matrix before it cannot take a direction out after it"
                )

            def read(block: nn.Module = block) -> torch.Tensor:
                return _seen(self.twin, block, Location("", "output"))

            own = [
                f"{prefix}{name}.{parameter}".replace("..", ".")
                for parameter, _ in block.named_parameters()
            ]
            found = _find_writes(self.twin, own, read)
            before = read()
            with _erased(self.twin, found):
                after = read()
            if not _equals_removal(self.twin, before, after):
                raise UnsupportedError(
                    f"what {name} writes is not made by its last matrices and biases alone"
                )
            blocks.append(name)
            writes += [Write(write.parameter.removeprefix(prefix), write.axis) for write in found]
        if not blocks:
            raise UnsupportedError("no module of a layer writes to the residual stream by itself")
        carried = self._moved_by(layer, "", outputs, push)
        if uniform_ratio(carried, push) is None:
            raise UnsupportedError("a layer does not carry the residual stream on as it is")
        readers = self._readers(layer, structure, outputs, push)
        return LayerWrites(readers, tuple(blocks), tuple(writes))

    def _readers(
        self,
        layer: int,
        structure: LayerStructure,
        outputs: Mapping[str, torch.Tensor],
        push: torch.Tensor,
    ) -> tuple[str, ...]:
        """Return the modules of a layer whose input moves as the layer's input does."""
        before = read_children(self.twin, structure, layer)
        with self._held(layer, "", outputs, push):
            after = read_children(self.twin, structure, layer)
        found = []
        for name, (given, _) in before.items():
            now = after[name][0] if name in after else None
            if not name or "." in name or given is None or now is None or given.shape != now.shape:
                continue
            if given.shape[-1] == len(push) and uniform_ratio(now - given, push) is not None:
                found.append(name)
        return tuple(found)

    def _moved_by(
        self, layer: int, name: str, outputs: Mapping[str, torch.Tensor], push: torch.Tensor
    ) -> torch.Tensor:
        """Return how a layer's output moves with one block's output (or its input), the others held."""
        module = self.twin.model.get_submodule(f"{self.path}.{layer}")
        before = _seen(self.twin, module, Location("", "output"))
        with self._held(layer, name, outputs, push):
            after = _seen(self.twin, module, Location("", "output"))
        return after - before

    @contextmanager
    def _held(
        self, layer: int, moved: str, outputs: Mapping[str, torch.Tensor], push: torch.Tensor
    ) -> Iterator[None]:
        """Move one block's output by the push, "" the layer's input, and hold all other blocks'."""
        path = f"{self.path}.{layer}"

        def replay(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda _activation: value.clone()  # Some models add to it in place.

        with ExitStack() as hooks:
            for name, output in outputs.items():
                value = output + push if name == moved else output
                module = self.twin.model.get_submodule(f"{path}.{name}")
                hooks.callback(register(module, Location("", "output"), replay(value)).remove)
            if not moved:
                module = self.twin.model.get_submodule(path)
                place = Location("", "input")
                hooks.callback(register(module, place, lambda activation: activation + push).remove)
            yield

    def _prove(self, writes: WriteMap, scope: str) -> TwinVerdict:
        """Ablate the twin through the disk and compare it with the hooked one."""
        import torch

        generator = torch.Generator().manual_seed(7)
        basis = orthonormalize(
            [torch.randn(self.twin.hidden_size, generator=generator) for _ in range(2)]
        )
        layers = sorted(writes.by_layer)
        chosen = layers if scope == "stream" else layers[len(layers) // 2 :]
        ablation = Ablation(dict.fromkeys(chosen, basis), scope, _FACTORS[scope])
        return self.twin.prove_edits(
            lambda checkpoint: erase(checkpoint, self.twin.config, writes, ablation),
            lambda _mask: ablated(self.twin.model, writes, ablation),
        )


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, BakeError) else one_line(error)


def find_untying(
    config: PreTrainedConfig, model: nn.Module, embeddings: Sequence[Write]
) -> Untying | None:
    """Return how a head that shares an embedding's matrix gets its own; None where it has its own.

    model: the config's, on the meta device or not. Raises UnsupportedError where no config key unties it.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    every = dict(model.named_parameters(remove_duplicate=False))
    shared = [name for name, parameter in every.items() if parameter is weight]
    embedding = next((w.parameter for w in embeddings if w.parameter in shared), None)
    if embedding is None or len(shared) < 2:
        return None
    name = next(name for name in shared if name != embedding)
    top, nested = {"tie_word_embeddings": False}, {"text_config.tie_word_embeddings": False}
    tries = [top, nested, {**top, **nested}] if hasattr(config, "text_config") else [top]
    for flags in tries:
        untied = build_on_meta(with_flags(config, flags))
        found = dict(untied.named_parameters(remove_duplicate=False))
        if name in found and found[name] is not found[embedding]:
            return Untying(name, embedding, flags)
    raise UnsupportedError(
        f"{name} and {embedding} are one matrix, and no config key gives the output head its own"
    )


def _at(found: LayerWrites, prefix: str) -> LayerWrites:
    """Return a kind's writes with the names that they have in one layer."""
    writes = tuple(Write(f"{prefix}{write.parameter}", write.axis) for write in found.writes)
    return LayerWrites(found.readers, found.blocks, writes)


def _find_writes(twin: Twin, names: Sequence[str], read: Callable[[], torch.Tensor]) -> list[Write]:
    """Return the parameters that move what is read along a direction when they are moved along it."""
    import torch

    unit = probe_vector(twin)
    unit = unit / unit.norm()
    generator = torch.Generator().manual_seed(13)
    before = read()
    found = []
    for name in names:
        parameter = twin.model.get_parameter(name)
        for axis in range(-parameter.ndim, 0):
            if parameter.shape[axis] != len(unit) or not parameter.is_floating_point():
                continue
            shape = list(parameter.shape)
            shape[axis] = 1
            spread = torch.randn(shape, generator=generator)
            along = unit.reshape([-1 if i == axis else 1 for i in range(-parameter.ndim, 0)])
            with _changed(parameter, parameter + spread * along):
                moved = (read() - before).reshape(-1, len(unit)).double()
            across = moved - (moved @ unit.double())[:, None] * unit.double()
            largest = moved.abs().max()
            if largest > 1e-4 * before.abs().max() and across.abs().max() <= _ALONG * largest:
                found.append(Write(name, axis))
                break
    return found


@contextmanager
def _changed(parameter: torch.Tensor, value: torch.Tensor) -> Iterator[None]:
    """Give a parameter another value while the context is open."""
    import torch

    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(value)
        try:
            yield
        finally:
            parameter.copy_(original)


@contextmanager
def _erased(twin: Twin, writes: Sequence[Write]) -> Iterator[None]:
    """Take the probe's direction out of parameters of the twin while the context is open."""
    unit = probe_vector(twin)[None] / probe_vector(twin).norm()
    with ExitStack() as changes:
        for write in writes:
            parameter = twin.model.get_parameter(write.parameter)
            value = remove(parameter.detach(), unit, axis=write.axis)
            changes.enter_context(_changed(parameter, value))
        yield


def _equals_removal(twin: Twin, before: torch.Tensor, after: torch.Tensor) -> bool:
    unit = probe_vector(twin)[None] / probe_vector(twin).norm()
    error = (after - remove(before, unit)).abs().max()
    return bool(error <= _ALONG * before.abs().max())


def _seen(twin: Twin, module: nn.Module, place: Location) -> torch.Tensor:
    """Return the first activation on one side of a module in a run of the twin."""
    found: list[torch.Tensor] = []
    handle = register(module, place, lambda activation: found.append(activation.detach().clone()))
    try:
        twin.run(twin.model)
    finally:
        handle.remove()
    return found[0]
