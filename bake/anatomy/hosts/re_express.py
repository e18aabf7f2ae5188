"""What every host has in common: names, shapes and config keys checked against the host's own class.

A conversion says what is particular to one pair of architectures; here it is turned into edits. Nothing
about the host is believed from memory: its parameters are those of a model built from the new config
without a weight, and every config key that both classes know must have the value that it had.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from bake.anatomy.flags import parameter_shapes
from bake.anatomy.hosts.conversion import Computed, Conversion, Merged, Shape
from bake.anatomy.hosts.names import HEAD, NORM, STEM, DecoderNames, find_names
from bake.anatomy.rewriting import Rewritten
from bake.checkpoint.edits import REMOVED, Add, Drop, Edit, Merge, Rename, Transform
from bake.checkpoint.loading import build_on_meta, quiet_transformers
from bake.errors import CheckpointError, UnsupportedError
from bake.io.safetensors import TensorEntry, torch_dtype
from bake.sites import Slot

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from bake.checkpoint.checkpoint import Checkpoint

FLOATS = ("F32", "F16", "BF16")  # safetensors codes of dtypes that can hold a push
# What identifies a config and is not part of what it computes. A host is never remote code.
_ROTATIONS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
_IDENTITY = {"architectures", "model_type", "transformers_version", "auto_map", "_name_or_path"}


@dataclass(frozen=True)
class HostRewriter:
    """Re-expresses a base as a conversion says; see `bake.anatomy.rewriting.Rewriter`.

    layers: the path of the list of decoder layers. nested: the config key of a multimodal wrapper's
    text decoder, which alone is re-expressed; None where the base is the decoder. kinds: what the slots
    are called inside the layers. limit: where the host is no longer the base; "" where it always is.
    """

    conversion: Conversion
    kinds: tuple[str, ...]
    remark: str = ""
    limit: str = ""
    layers: str = f"{STEM}layers"
    nested: str | None = None

    @property
    def name(self) -> str:
        """The host's model type."""
        return self.conversion.host

    @property
    def lossless(self) -> bool:
        """Whether every stored value stays what it is."""
        return self.conversion.lossless

    def describe(self) -> str:
        """Say what becomes of the base and where the push goes."""
        values = "every weight keeps its value" if self.lossless else "some weights are rounded"
        said = "; ".join(filter(None, (values, self.remark, self.limit)))
        what = "text decoder re-expressed" if self.nested else "re-expressed"
        return f"{', '.join(self.kinds)} ({what} as {self.name}: {said})"

    def model_type(self, config: PreTrainedConfig) -> str:
        """Return the model type of the output: a wrapper keeps its own."""
        return str(config.model_type) if self.nested else self.name

    def slots_of(self, layer: int, config: PreTrainedConfig) -> tuple[Slot, ...]:
        """Return the slots of a decoder layer of a base, in the host's parameter names."""
        slot, factor = self.conversion.slot(self._decoder(config), layer), self.conversion.factor
        place = f"{self.layers}.{layer}."
        return (Slot(f"{place}{slot}", weight=f"{place}{factor}" if factor else None),)

    def flags(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the config keys that the host needs, for people to see."""
        settings = self.conversion.settings(self._decoder(config))
        return self._placed({"model_type": self.name, **settings})

    def settings(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return what an engine has to compute: what the host needs, and its rotary positions."""
        rotation = getattr(self._decoder(config), "rope_parameters", None)
        said = {"rope_parameters": rotation} if rotation else {}
        return {**said, **self.conversion.settings(self._decoder(config))}

    def new_parameters(self, config: PreTrainedConfig) -> dict[str, Shape]:
        """Return {name: shape} of what the host has and is made of nothing of the base's."""
        place = self.layers.removesuffix("layers")
        created = self._created(self._decoder(config))
        return {place + name.removeprefix(STEM): shape for name, shape in created.items()}

    def rewrite(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        layers: Sequence[int],
        dtype: str | None = None,
    ) -> Rewritten:
        """Return the base as the host; see `Rewriter.rewrite`."""
        decoder = self._decoder(config)
        changes, host = self._configs(self._decoder_values(checkpoint), decoder)
        names = find_names(checkpoint, config, self.layers, self.conversion.on_disk)
        entries: dict[str, TensorEntry] = {}
        edits: list[Edit] = []
        for entry in checkpoint.tensors.values():
            parameter = names.parameter(entry.name)
            if parameter is not None and _beyond(parameter, int(decoder.num_hidden_layers)):
                edits.append(Drop(entry.name))  # For predicting several tokens: no model reads it.
            elif parameter is not None:
                entries[parameter] = entry
            elif dtype and entry.dtype in FLOATS and entry.dtype != dtype:
                edits.append(_cast(entry, entry.name, dtype))
        provided: dict[str, tuple[Shape, str]] = {}
        merged: set[str] = set()
        for group in self.conversion.merge({n: e.shape for n, e in entries.items()}, decoder):
            first = entries[group.sources[0]]
            code = dtype if dtype and first.dtype in FLOATS else first.dtype
            provided |= {output: (shape, code) for output, shape in group.outputs.items()}
            merged.update(group.sources)
            edits.append(
                _merge(group, {name: entries[name] for name in group.sources}, code, names)
            )
        created = self._created(decoder)
        for name, entry in entries.items():
            if name in merged:
                continue
            converted = self.conversion.convert(name, entry.shape, decoder)
            code = dtype if dtype and entry.dtype in FLOATS else entry.dtype
            outputs = {converted: entry.shape} if isinstance(converted, str) else converted.outputs
            if not created.keys().isdisjoint(outputs):
                checkpoint.check_new(entry.name)
            provided |= {output: (shape, code) for output, shape in outputs.items()}
            edits += _edit(entry, converted, code, names)
        shapes = {name: shape for name, (shape, _) in provided.items()}
        for parameter, shape, source in self.conversion.fused(shapes, decoder):
            provided[parameter] = shape, provided[source][1]
        tied = bool(config.tie_word_embeddings)
        edits += self._new(checkpoint, host, provided, names, tied=tied)
        slots = {layer: self.slots_of(layer, config) for layer in layers}
        place = self.layers.removesuffix("layers")
        on_disk = {
            name: names.disk(STEM + name.removeprefix(place))
            for parts in slots.values()
            for slot in parts
            for name in (slot.bias, slot.weight)
            if name is not None
        }
        return Rewritten(tuple(edits), self._placed(changes), slots, on_disk)

    def _decoder(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Return the config of what is re-expressed."""
        return getattr(config, self.nested) if self.nested else config

    def _decoder_values(self, checkpoint: Checkpoint) -> Mapping[str, Any]:
        """Return what config.json says of what is re-expressed."""
        if self.nested is None:
            return checkpoint.config
        values = checkpoint.config.get(self.nested)
        if not isinstance(values, Mapping):
            raise UnsupportedError(
                f"{checkpoint.model_id}: config.json has no object {self.nested}, so its decoder "
                f"cannot be re-expressed"
            )
        return values

    def _placed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return changes to the decoder's keys as changes to the whole config.json's."""
        prefix = f"{self.nested}." if self.nested else ""
        return {prefix + key: value for key, value in changes.items()}

    def _created(self, decoder: PreTrainedConfig) -> dict[str, Shape]:
        """Return the parameters that the host has and the base has not, as in a model of its own."""
        present = parameter_shapes(build_on_meta(decoder))
        _, host = self._configs(decoder.to_dict(), decoder)
        absent = {n: s for n, s in _host_shapes(host).items() if n not in present}
        new = self.conversion.new
        return {n: s for n, s in absent.items() if new(n, s, decoder) is not None}

    def _new(
        self,
        checkpoint: Checkpoint,
        host: PreTrainedConfig,
        provided: dict[str, tuple[Shape, str]],
        names: DecoderNames,
        *,
        tied: bool,
    ) -> Iterator[Add]:
        """Yield what the base has not and the conversion makes; check that it has everything else.

        provided: {parameter: (shape, dtype)} of what the base gives; what is new joins it. tied: whether
        the head is the embedding.
        """
        import torch

        for name, shape in _host_shapes(host).items():
            if name in provided:
                if provided[name][0] != shape:
                    raise CheckpointError(
                        f"{checkpoint.model_id}: {name} would have shape {provided[name][0]}, and "
                        f"{self.name} needs {shape}; is this checkpoint the architecture that its "
                        f"config names?"
                    )
                continue
            if name == HEAD and tied:
                continue
            if (
                0 in shape
            ):  # A matrix without a row or a column holds nothing that could be lacking.
                code = provided[NORM][1]
                provided[name] = shape, code
                yield Add(names.disk(name), torch.zeros(shape, dtype=torch_dtype(code)))
                continue
            weight = name.removesuffix("bias") + "weight"
            made = self.conversion.new(name, shape, host)
            if made is None or (name.endswith(".bias") and weight not in provided):
                raise CheckpointError(
                    f"{checkpoint.model_id} has no tensor that {name} of {self.name} could be made "
                    f"of; is the checkpoint complete?"
                )
            code = (provided.get(weight) or provided[NORM])[1]
            if code not in FLOATS:
                raise UnsupportedError(
                    f"{names.disk(name)} would be stored as {code}, which cannot hold a push; use a "
                    f"float base"
                )
            if not any(
                made.stride()
            ):  # One number for all, which takes no room until it is written.
                made = made[(0,) * made.ndim].to(torch_dtype(code)).expand(shape)
            yield Add(names.disk(name), made.to(torch_dtype(code)))

    def _configs(
        self, values: Mapping[str, Any], config: PreTrainedConfig
    ) -> tuple[dict[str, Any], PreTrainedConfig]:
        """Return the changes that turn the base's JSON into the host's, and the host's config.

        Keys that only the base's class knows go, because they mean nothing in the host. Where the
        JSON leaves a key to the class and the two classes disagree, the base's value is written.
        """
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        host_class = CONFIG_MAPPING[self.name]
        known, wanted = _keys(type(config)), _keys(host_class)
        changes: dict[str, Any] = {"model_type": self.name, **self.conversion.settings(config)}
        if "rope_parameters" in changes:  # The same said in another place would be read as well.
            changes |= dict.fromkeys(_ROTATIONS & values.keys(), REMOVED)
        if not self.nested or "architectures" in values:
            changes["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.name]]
        foreign = (known - wanted - self.conversion.read) | {"auto_map"}
        changes |= dict.fromkeys(sorted(foreign & values.keys() - changes.keys()), REMOVED)
        shared = sorted((known & wanted) - changes.keys() - _IDENTITY)
        host = _build(host_class, values, changes)
        for key in shared:
            if _value(host, key) != _value(config, key):
                changes |= _state(key, _value(config, key), values)
        host = _build(host_class, values, changes)
        for key in shared:
            if _value(host, key) != _value(config, key):
                raise UnsupportedError(
                    f"{self.name} cannot be given {key} = {_value(config, key)!r} of the base"
                )
        stated = _for_engines(host, values, changes)
        again = _build(host_class, values, {**changes, **stated})
        if all(_value(again, key) == _value(host, key) for key in wanted):
            changes |= stated  # Nothing that transformers would read otherwise.
        return changes, host


def _for_engines(
    host: PreTrainedConfig, values: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return keys that transformers does not need and other engines do.

    Every key that the host's own class declares, because their defaults are others (MLX's Granite has none
    for `logits_scaling`); rotary positions in the spelling before `rope_parameters`, which older versions
    and MLX alone read. Missing they cost RoPE without a word.
    """
    from transformers import PreTrainedConfig as Plain

    edited = {k: v for k, v in {**values, **changes}.items() if v is not REMOVED}
    own = _keys(type(host)) - _keys(Plain) - {"rope_parameters"}
    found: dict[str, Any] = {
        key: value
        for key in sorted(own - edited.keys())
        if isinstance(value := getattr(host, key, None), bool | int | float | str)
    }
    rope = getattr(host, "rope_parameters", None)
    if "rope_parameters" in edited and isinstance(rope, dict) and "rope_theta" in rope:
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default" and len(scaling) <= 1
        found["rope_theta"] = rope["rope_theta"]
        found["rope_scaling"] = None if plain else scaling
    return found


def _beyond(parameter: str, layers: int) -> bool:
    """Tell whether a parameter is of a decoder layer behind the model's last."""
    number = parameter.removeprefix(f"{STEM}layers.").partition(".")[0]
    return parameter.startswith(f"{STEM}layers.") and number.isdigit() and int(number) >= layers


def _edit(
    entry: TensorEntry, converted: str | Computed, code: str, names: DecoderNames
) -> Iterator[Edit]:
    """Yield the edit that makes the host's tensors of one of the base's; none where it is kept."""
    cast = torch_dtype(code) if code != entry.dtype else None
    if isinstance(converted, str):
        disk = names.disk(converted)
        if cast is not None:
            yield _cast(entry, disk, code)
        elif disk != entry.name:
            yield Rename(entry.name, disk)
        return

    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        # Cast first: what is computed is then as exact as the dtype that it is stored in.
        made = converted.function(tensor if cast is None else tensor.to(cast))
        return {names.disk(name): value for name, value in made.items()}

    outputs = {names.disk(name): shape for name, shape in converted.outputs.items()}
    splits = converted.splits and cast is None
    yield Transform(entry.name, outputs, function, code, splits)


def _cast(entry: TensorEntry, name: str, code: str) -> Transform:
    """Return the edit that stores a tensor in another dtype, under a name."""
    dtype = torch_dtype(code)
    return Transform(entry.name, {name: entry.shape}, lambda tensor: {name: tensor.to(dtype)}, code)


def _merge(
    group: Merged, entries: Mapping[str, TensorEntry], code: str, names: DecoderNames
) -> Merge:
    """Return the edit that makes the host's tensors of several of the base's."""
    cast = torch_dtype(code)
    sources = {entry.name: name for name, entry in entries.items()}

    def function(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = group.function({sources[disk]: value.to(cast) for disk, value in tensors.items()})
        return {names.disk(name): value for name, value in made.items()}

    outputs = {names.disk(name): shape for name, shape in group.outputs.items()}
    return Merge(tuple(sources), outputs, function, code)


def _keys(config_class: type[PreTrainedConfig]) -> set[str]:
    return {entry.name for entry in fields(config_class)}  # type: ignore[arg-type]


def _build(
    host_class: type[PreTrainedConfig], values: Mapping[str, Any], changes: Mapping[str, Any]
) -> PreTrainedConfig:
    """Read the edited JSON as transformers would."""
    edited = {k: v for k, v in {**values, **changes}.items() if v is not REMOVED}
    host: PreTrainedConfig = host_class.from_dict(copy.deepcopy(edited))
    return host


def _host_shapes(host: PreTrainedConfig) -> dict[str, Shape]:
    """Return {parameter: shape} of a host."""
    with quiet_transformers():
        return parameter_shapes(build_on_meta(host))


def _value(config: PreTrainedConfig, key: str) -> Any:
    """Return a config's value, in a spelling in which equal things are equal."""
    value = (
        vars(config)[key] if key in vars(config) else getattr(config, key)
    )  # of every layer alike
    if key == "rope_parameters" and isinstance(value, dict):
        neutral = {"partial_rotary_factor": 1.0, "type": value.get("rope_type")}
        return {k: v for k, v in value.items() if k not in neutral or v != neutral[k]}
    return value


def _state(key: str, value: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the changes that state a value, rotary positions in the spelling that the JSON has."""
    if key != "rope_parameters" or key in values or not isinstance(value, dict):
        return {key: value}
    scaling = {k: v for k, v in value.items() if k != "rope_theta"}
    return {"rope_theta": value["rope_theta"], "rope_scaling": scaling}
