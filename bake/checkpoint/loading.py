"""Small things about loading with transformers that several stages need in the same way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.pretrained import load_config, load_model, make_model
from bake.checkpoint.quantization import dequantizing_options

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

REPORT_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_report(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return transformers' `output_loading_info` as four sorted lists of plain strings."""
    return {name: sorted(str(entry) for entry in info.get(name, ())) for name in REPORT_SETS}


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class that loads a config's model as the checkpoint means it.

    AutoModelForImageTextToText for a multimodal wrapper: its config names the wrapper's class (whose
    text decoder alone may be a causal language model too), or transformers has no other.
    `bake/proof/plain.py` decides alike, without bake.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    wrapper = str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type, ""))
    named = wrapper in (config.architectures or ())
    if named and wrapper.endswith("ForConditionalGeneration"):
        return AutoModelForImageTextToText
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM  # Which refuses it, and says which it knows.


def build_model(config: PreTrainedConfig, **options: Any) -> nn.Module:
    """Build the language model of a config with fresh weights; options as `from_config` takes them."""
    return make_model(auto_class(config), config, **options)


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """Build the language model of a config without allocating a weight.

    In float32, whatever the config says: a weight that is dequantised comes in its parameter's dtype,
    and no exact value should be rounded on the way.
    """
    import torch

    with torch.device("meta"):
        return build_model(config, dtype=torch.float32)


def load_pretrained(directory: Path, **options: Any) -> tuple[nn.Module, dict[str, list[str]]]:
    """Load a directory with the Auto class that suits it; return the model and its loading report.

    Quantised weights are dequantised: what bake compares is what the weights say, on any device.
    """
    import torch

    with quiet_transformers():
        config = load_config(directory)
        dequantizing = dequantizing_options(config)
        model, info = load_model(auto_class(config), directory, config, **options, **dequantizing)
    if dequantizing and options.get("dtype") == torch.float32:
        # What passes through a dequantisation without being quantised comes in its stored dtype.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
    return model, load_report(info)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' log and progress bars: bake reads the loading report itself.

    Also torch's remark on matrices without a row, of which a host may have some on purpose.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def single_thread() -> Iterator[None]:
    """Compute on one thread: on tensors this small, threads spend their time waiting for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
