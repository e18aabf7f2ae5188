"""Small things about loading with transformers that several stages need in the same way."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

REPORT_SETS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_report(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return transformers' `output_loading_info` as four sorted lists of plain strings."""
    return {name: sorted(str(entry) for entry in info.get(name, ())) for name in REPORT_SETS}


def build_on_meta(config: PreTrainedConfig) -> nn.Module:
    """Build the causal language model of a config without allocating a weight."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    return model


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
