"""Hosts: other stock architectures that compute the same and have the bias that the base lacks.

Which architecture can host which cannot be discovered, so there is a table: one module a host. What a
table claims is proven on the twin like everything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.anatomy.hosts import aria, bamba, deepseek_v2, gemma4, granite, hy_v3, llama, smollm3
from bake.anatomy.hosts.configs import remark_on_window
from bake.anatomy.hosts.conversion import Conversion
from bake.anatomy.hosts.names import STEM
from bake.anatomy.hosts.re_express import HostRewriter
from bake.anatomy.wrappers import text_key
from bake.checkpoint.quantization import without_quantization

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
    *deepseek_v2.CONVERSIONS,
    *gemma4.CONVERSIONS,
)


def find_hosts(
    config: PreTrainedConfig, layers: str = f"{STEM}layers"
) -> tuple[list[HostRewriter], list[str]]:
    """Return the rewriters whose host can express `config`, best first, and why others cannot.

    Of a multimodal wrapper only the text decoder is re-expressed: the wrapper builds whatever
    architecture its nested config names. layers: the path of the list of decoder layers.
    """
    found, reasons = [], []
    nested = text_key(config)
    decoder = getattr(config, nested) if nested else config
    for conversion in CONVERSIONS:
        if conversion.base != decoder.model_type:
            continue
        reason = conversion.refuse(decoder)
        if without_quantization(config) is not config:
            reason = "quantised weights are not re-expressed"
        if reason is None:
            remarks = filter(None, (conversion.remark(decoder), remark_on_window(decoder)))
            every = range(int(decoder.num_hidden_layers))
            kinds = tuple(dict.fromkeys(conversion.slot(decoder, layer) for layer in every))
            remark, limit = "; ".join(remarks), conversion.limit(decoder)
            found.append(HostRewriter(conversion, kinds, remark, limit, layers, nested))
        else:
            reasons.append(f"as {conversion.host}: {reason}")
    return found, reasons


__all__ = ["CONVERSIONS", "HostRewriter", "find_hosts"]
