"""Names on disk and names in the model: which stored tensors become which parameter on loading.

The two differ by a prefix (GPT-2), by a layout of long ago (`language_model.model.layers…`), or by a
conversion: experts that are stored one by one are merged into one parameter, and a quantised weight is
made of numbers and their scales. transformers knows all of it, and here its own rules are asked, so that
whatever `from_pretrained` accepts is understood. What is done with the names is the business of the plan
and of streaming.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.quantization import dequantizer
from bake.errors import CheckpointError, UnsupportedError
from bake.io.safetensors import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Fusion:
    """Stored tensors that transformers makes into one or more parameters while it loads.

    sources: {pattern of the converter: names on disk, in the order in which it takes them}. target:
    the first parameter that comes out, by which the converter is told where it is.
    """

    sources: Mapping[str, tuple[str, ...]]
    target: str
    converter: Any = field(repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name on disk that goes into it."""
        return tuple(name for names in self.sources.values() for name in names)


class DiskNames:
    """Maps the parameters of a model to tensors of a checkpoint, by transformers' own rules.

    model: the architecture with the parameters that are asked for, on the meta device; weights are
    read when `read` is called, nothing before.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        self._checkpoint = checkpoint
        self._model = model
        self._wanted = model.state_dict()
        quantizer = dequantizer(model.config)
        rules = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.renamed: dict[str, str] = {}
        self.unexpected: list[str] = []
        self._dequantizations = tuple(quantizer.get_load_operations().values()) if quantizer else ()
        collected: dict[str, dict[str, list[str]]] = {}
        # In transformers' order: a renaming may depend on names that came before.
        for name in sorted(checkpoint.tensors, key=dot_natural_key):
            parameter, pattern = self._convert(name)
            if parameter not in self._wanted:
                self.unexpected.append(parameter)
            elif pattern is None or self._is_float(name, pattern):
                self.renamed.setdefault(parameter, name)
            else:
                collected.setdefault(parameter, {}).setdefault(pattern, []).append(name)
        self._collected = {
            target: sources for target, sources in collected.items() if target not in self.renamed
        }

    def find(self, parameter: str) -> str | None:
        """Return the name on disk of a parameter that is stored as it is, else None."""
        return self.renamed.get(parameter)

    def existing(self, parameter: str) -> str:
        """Return the name on disk of a parameter that must be stored as it is.

        Raises UnsupportedError where it is made of other tensors on loading, CheckpointError where
        the checkpoint lacks it.
        """
        name = self.find(parameter)
        if name is not None:
            return name
        fusion = self.fusions.get(parameter)
        if fusion is not None:
            raise UnsupportedError(
                f"{parameter} is not stored as it is: transformers makes it of "
                f"{len(fusion.names)} tensors such as {fusion.names[0]}, so it cannot be patched"
            )
        raise CheckpointError(
            f"{self._checkpoint.model_id} has no tensor {parameter}, which this architecture should "
            f"have; is the checkpoint complete?"
        )

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Return the names of all tensors on disk that a parameter is made of; none if there are none."""
        if parameter in self.renamed:
            return (self.renamed[parameter],)
        fusion = self.fusions.get(parameter)
        return fusion.names if fusion else ()

    def read(self, parameter: str) -> torch.Tensor:
        """Return a parameter's value in its stored dtype, merged from its sources where it has several.

        Raises as `existing`, and UnsupportedError where its conversion fails.
        """
        if parameter in self.fusions:
            return self._merge(self.fusions[parameter], self._checkpoint.read)[parameter]
        return self._checkpoint.read(self.existing(parameter))

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return the shape that a parameter has when it is read; only headers are looked at."""
        if parameter in self.fusions:
            merged = self._merge(self.fusions[parameter], self._outline)[parameter]
            return tuple(merged.shape)
        return tuple(self._checkpoint.entry(self.existing(parameter)).shape)

    def new_bias(self, parameter: str) -> tuple[str, str]:
        """Return (name of a new bias, name on disk of the weight beside it or of a part of it).

        For a parameter that is not stored. The name is the weight's with `bias` for `weight`, or else
        the module's own; it is one that transformers reads as this very parameter. Raises
        UnsupportedError where there is none, CheckpointError where the weight is not there or the
        bias is, unread by the base.
        """
        if self.sources(parameter):
            # Where it is made of several, `existing` says so.
            self._checkpoint.check_new(self.existing(parameter))
        weight = parameter.removesuffix("bias") + "weight"
        sources = self.sources(weight) or self._tied(weight) or (self.existing(weight),)
        stored = next((name for name in sources if name.endswith("weight")), sources[0])
        beside = stored.removesuffix("weight") + "bias"
        for name in (beside, parameter) if parameter in self._wanted else ():
            if name not in self._checkpoint.tensors and self._convert(name) == (parameter, None):
                return name, stored
        raise UnsupportedError(
            f"no name on disk becomes {parameter} on loading (tried {beside} and {parameter}), so a "
            f"new bias would be dropped; another site may have a slot that is there already"
        )

    def new_name(self, parameter: str) -> str:
        """Return a name on disk that transformers reads as a parameter that is not stored yet.

        Raises UnsupportedError where there is none.
        """
        taken = parameter in self._checkpoint.tensors
        if (
            parameter in self._wanted
            and not taken
            and self._convert(parameter) == (parameter, None)
        ):
            return parameter
        raise UnsupportedError(f"no name on disk becomes {parameter} on loading")

    def _tied(self, parameter: str) -> tuple[str, ...]:
        """Return the names on disk of a tensor that the model has under another name as well."""
        every = dict(self._model.named_parameters(remove_duplicate=False))
        wanted = every.get(parameter)
        aliases = (name for name, value in every.items() if value is wanted and name != parameter)
        return next((found for name in aliases if (found := self.sources(name))), ())

    @cached_property
    def fusions(self) -> Mapping[str, Fusion]:
        """{parameter: what it is made of}, for those that are not stored as they are."""
        found = {}
        for target, sources in self._collected.items():
            converter = self._converter(next(iter(sources)))
            taken = {key: tuple(names) for key, names in sources.items()}
            fusion = Fusion(taken, target, converter)
            single = len(converter.target_patterns) == 1
            for parameter in (target,) if single else self._merge(fusion, self._outline):
                found[parameter] = fusion
        return found

    def _convert(self, name: str) -> tuple[str, str | None]:
        """Return the parameter that a name on disk becomes, and the converter's pattern if one does it.

        As `transformers.core_model_loading.convert_and_load_state_dict_in_model` does.
        """
        from transformers.core_model_loading import rename_source_key

        prefix = getattr(self._model, "base_model_prefix", "")
        parameter, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._wanted
        )
        if parameter not in self._wanted and name in self._wanted:
            parameter, pattern = rename_source_key(name, [], [], prefix, self._wanted)
        return parameter, pattern

    def _is_float(self, name: str, pattern: str) -> bool:
        """Tell whether a dequantisation would leave a tensor as it is: it is no quantised one.

        A quantised model's every `weight` goes through its dequantisation, norms and embedding too.
        """
        converter = self._converter(pattern)
        return (
            bool(self._dequantizations)
            and all(isinstance(step, self._dequantizations) for step in converter.operations)
            and len(converter.target_patterns) == 1
            and name.endswith(converter.target_patterns[0])
            and self._checkpoint.entry(name).dtype in ("F64", "F32", "F16", "BF16")
        )

    def _converter(self, pattern: str) -> Any:
        return next(c for c in self._converters if pattern in c.source_patterns)

    def _outline(self, name: str) -> torch.Tensor:
        import torch

        entry = self._checkpoint.entry(name)
        return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")

    def _merge(self, fusion: Fusion, read: Any) -> dict[str, torch.Tensor]:
        """Run transformers' converter on sources that `read` gives for their names."""
        converter = copy.deepcopy(fusion.converter)
        for pattern, names in fusion.sources.items():
            for name in names:
                converter.add_tensor(fusion.target, name, pattern, lambda name=name: read(name))
        try:
            merged = converter.convert(fusion.target, model=self._model, config=self._model.config)
        except Exception as error:  # A converter is code of every architecture's own.
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise UnsupportedError(
                f"{fusion.target} cannot be made of what is stored ({reason})"
            ) from error
        return {
            name: value[0] if isinstance(value, list) else value for name, value in merged.items()
        }
