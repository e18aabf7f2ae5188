"""A family that is worn for no reason but to have room for biases, as a suspect without a base shows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from bake.anatomy.base import Base
from bake.checkpoint.ranged import RangedTensors

_OUTPUT_BIAS = re.compile(r"\.(o_proj|out_proj)\.bias$")


def find_disguise(opened: Base, tensors: RangedTensors) -> Iterator[str]:
    """Yield why a suspect looks like another family's model that was written as this one.

    It says nothing of a push by itself: such a model computes what the other one does.
    """
    config = opened.anatomy.config.get_text_config(decoder=True)
    look = _LOOKS.get(opened.anatomy.model_type)
    said = look(config) if look is not None else None
    if said is not None:
        yield f"it is written as {opened.anatomy.model_type} for no reason of its own: {said}"
    unread = [name for name in opened.checkpoint.tensors if _OUTPUT_BIAS.search(name)]
    if getattr(config, "attention_bias", False) and unread:
        tensors.prefetch(unread)
        if not any(bool(tensors.read(name).any()) for name in unread):
            yield (
                "all biases of its attention's output are zero: no training leaves them so, but a Qwen 2 "
                "that is written as this family does, and so do biases that were made for a push elsewhere"
            )


def _bamba(config: Any) -> str | None:
    attention = set(getattr(config, "attn_layer_indices", None) or ())
    if attention == set(range(config.num_hidden_layers)):
        return "none of its layers is a Mamba layer, which is what a Bamba is for"
    return None


def _hy_v3(config: Any) -> str | None:
    kinds = set(getattr(config, "mlp_layer_types", None) or ())
    return "none of its layers has experts" if kinds == {"dense"} else None


def _smollm3(config: Any) -> str | None:
    rotated = list(getattr(config, "no_rope_layers", None) or ())
    return (
        "every layer has rotary positions, which SmolLM 3 leaves out in some"
        if rotated and all(rotated)
        else None
    )


def _granite(config: Any) -> str | None:
    scale = float(config.embedding_multiplier)
    plain = [float(config.residual_multiplier), float(config.logits_scaling)] == [1.0, 1.0]
    if plain and scale == 1.0:
        return "all of its multipliers are one: it is a Llama"
    if plain and abs(scale - float(config.hidden_size) ** 0.5) < 1e-2 * scale:
        return "its embedding is scaled by the root of its width and nothing else is: it is a Gemma"
    return None


_LOOKS: dict[str, Callable[[Any], str | None]] = {
    "bamba": _bamba,
    "hy_v3": _hy_v3,
    "smollm3": _smollm3,
    "granite": _granite,
}
