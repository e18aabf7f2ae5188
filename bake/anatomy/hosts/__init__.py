"""Hosts: other stock architectures that compute the same and have the bias that the base lacks.

Which architecture can host which cannot be discovered, so there is a table: one module a host. What a
table claims is proven on the twin like everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.anatomy.hosts import aria, bamba, granite, hy_v3, llama, smollm3
from bake.anatomy.hosts.conversion import Conversion, HostRewriter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# In the order of preference: Llama first, because most engines know its biases.
CONVERSIONS: tuple[Conversion, ...] = (
    *llama.CONVERSIONS,
    *smollm3.CONVERSIONS,
    *hy_v3.CONVERSIONS,
    *bamba.CONVERSIONS,
    *granite.CONVERSIONS,
    *aria.CONVERSIONS,
)


def find_hosts(config: PreTrainedConfig) -> tuple[list[HostRewriter], list[str]]:
    """Return the rewriters whose host can express `config`, best first, and why others cannot."""
    found, reasons = [], []
    for conversion in CONVERSIONS:
        if conversion.base != config.model_type:
            continue
        reason = conversion.refuse(config)
        if getattr(config, "quantization_config", None):
            reason = "quantised weights are not re-expressed"
        if reason is None:
            found.append(HostRewriter(conversion, conversion.remark(config)))
        else:
            reasons.append(f"as {conversion.host}: {reason}")
    return found, reasons


__all__ = ["CONVERSIONS", "HostRewriter", "find_hosts"]
