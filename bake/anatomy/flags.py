"""Which parameters a configuration's flags create: flip each flag, see what appears.

Everything is built on the meta device, so a 405B model costs a fraction of a second and no memory.
No flag is known by name or by model type; any boolean with "bias" in its name is tried.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.checkpoint.loading import build_on_meta

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlagEffect:
    """What setting one flag does: `path` is the key in config.json, dotted where it is nested."""

    path: str
    value: bool
    adds: frozenset[str]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return {parameter name: shape}, tied parameters under each of their names."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def with_flags(config: PreTrainedConfig, flags: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of `config` with the flags set; keys are dotted paths."""
    changed = copy.deepcopy(config)
    for path, value in flags.items():
        *parents, name = path.split(".")
        owner: Any = changed
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)
    return changed


def find_bias_flags(config: PreTrainedConfig) -> list[FlagEffect]:
    """Try every bias flag that is off and return those that create bias vectors and nothing else."""
    before = parameter_shapes(build_on_meta(config))
    effects = []
    for path in _switched_off(config):
        try:
            after = parameter_shapes(build_on_meta(with_flags(config, {path: True})))
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            continue  # The architecture refuses the combination, so the flag is no route.
        adds = after.keys() - before.keys()
        kept = all(after.get(name) == shape for name, shape in before.items())
        if adds and kept and all("bias" in name.rpartition(".")[2] for name in adds):
            effects.append(FlagEffect(path, True, frozenset(adds)))
    return effects


def find_idle_flags(config: PreTrainedConfig) -> list[str]:
    """Return the bias flags that are off and whose setting creates no parameter at all."""
    before = parameter_shapes(build_on_meta(config))
    idle = []
    for path in _switched_off(config):
        try:
            after = parameter_shapes(build_on_meta(with_flags(config, {path: True})))
        except (TypeError, ValueError, AttributeError, NotImplementedError):
            continue
        if after == before:
            idle.append(path)
    return idle


def added_parameters(
    config: PreTrainedConfig, flags: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every parameter that the flags create on the whole model."""
    before = parameter_shapes(build_on_meta(config))
    after = parameter_shapes(build_on_meta(with_flags(config, flags)))
    return {name: shape for name, shape in after.items() if name not in before}


def _switched_off(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _switched_off(value, f"{prefix}{name}.")
        elif "bias" in name.lower() and (value is False or value is None):
            yield f"{prefix}{name}"


def unusual_flags(config: PreTrainedConfig) -> dict[str, bool]:
    """Return the config keys that ask for biases that their class does not have, and its own values."""
    text = config.get_text_config()
    usual = type(text)()
    return {
        name: False
        for name, value in text.to_dict().items()
        if value is True and "bias" in name and getattr(usual, name, None) is False
    }


def unusual_biases(config: PreTrainedConfig) -> frozenset[str]:
    """Return the parameters that are there because the config asks for biases that its class does not have.

    A model of such a family that was trained without them has none, so they held nothing before a push.
    """
    flags = unusual_flags(config)
    if not flags:
        return frozenset()
    own, plain = (
        set(parameter_shapes(build_on_meta(each))) for each in (config, with_flags(config, flags))
    )
    return frozenset(own - plain)
