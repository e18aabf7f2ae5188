"""Quantised bases: which of them bake understands, and how their weights are read.

bake computes with dequantised weights everywhere, by transformers' own dequantisation, and writes none
of them: what is quantised keeps its bytes, and a push is stored beside it in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import UnsupportedError
from bake.support.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The methods whose tensors transformers dequantises without their kernels, so also on a CPU.
UNDERSTOOD = ("fp8", "mxfp4")
# Files in which a tool says that it quantised the weights beside them, where config.json does not.
MARKS = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
_KEYS = ("quantization_config", "compression_config", "quantization")


def quantization_method(config: Mapping[str, Any], directory: Path | None = None) -> str | None:
    """Return the method by which a checkpoint is quantised ("fp8"); None where it is not.

    config: its config.json's values. directory: where other tools' own files may say it too.
    """
    for owner in _owners(config):
        for key in _KEYS:
            values = owner.get(key)
            if isinstance(values, Mapping) and values:
                return _name_method(key, values)
    if directory is None:
        return None
    return next((name for file, name in MARKS.items() if (directory / file).is_file()), None)


def _owners(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a config and the ones inside it: a wrapper's decoder may be quantised by itself."""
    yield config
    yield from (value for value in config.values() if isinstance(value, Mapping))


def _name_method(key: str, values: Mapping[str, Any]) -> str:
    if values.get("quant_method"):
        return one_line(values["quant_method"], 40)
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    if key == "compression_config":
        return "compressed-tensors"
    if {"group_size", "bits"} <= values.keys():
        return "MLX"  # Which writes them as `quantization`, and often a second time.
    return "unnamed"


def check_quantization(config: Mapping[str, Any], name: str, directory: Path | None = None) -> None:
    """Raise UnsupportedError for a base whose quantisation bake cannot read, with what works instead.

    directory: as in `quantization_method`.
    """
    method = quantization_method(config, directory)
    if method is not None and method not in UNDERSTOOD:
        raise UnsupportedError(
            f"{name} is quantised by {method}, whose weights cannot be compared with a hooked model "
            f"here (understood: {', '.join(UNDERSTOOD)}); bake the unquantised base, then quantise that"
        )


def dequantizing_options(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what `from_pretrained` needs to load a base dequantised; nothing for an unquantised one."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    values = _quantization_config(config)
    if values is None:
        return {}
    with _errors_named():
        found = AutoQuantizationConfig.from_dict({**values, "dequantize": True})
    return {"quantization_config": found}


def dequantizer(config: PreTrainedConfig) -> Any:
    """Return transformers' quantizer of a config, set to dequantise on loading; None without one."""
    from transformers.quantizers.auto import AutoHfQuantizer

    values = _quantization_config(config)
    if values is None:
        return None
    with _errors_named():
        return AutoHfQuantizer.from_config({**values, "dequantize": True}, pre_quantized=True)


def without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the same architecture with ordinary weights; a copy if it is changed."""
    import copy

    if _quantization_config(config) is None:
        return config
    plain = copy.deepcopy(config)
    for owner in (plain, plain.get_text_config()):
        if hasattr(owner, "quantization_config"):
            del owner.quantization_config
    return plain


@contextmanager
def _errors_named() -> Iterator[None]:
    """Turn whatever transformers raises over a stranger's quantization_config into one line."""
    try:
        yield
    except Exception as error:
        raise UnsupportedError(
            f"the quantization_config in config.json is none that transformers can use "
            f"({one_line(error)}); download it again, or bake the unquantised base"
        ) from None


def _quantization_config(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return the config's quantisation as transformers finds it, as plain values."""
    values = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(decoder=True), "quantization_config", None
    )
    if values is None:
        return None
    return dict(values) if isinstance(values, Mapping) else dict(values.to_dict())
