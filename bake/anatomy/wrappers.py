"""What a multimodal wrapper's config needs before it is shrunk: small towers, positions that fit.

The towers (vision, audio) see nothing of a text, so their sizes say nothing about the decoder's slots;
they are made small where their names for a size are not the decoder's.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from bake.anatomy.tables import HEAD_SIZE

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_TOWER_SIZES = {
    "depth": 2,
    **dict.fromkeys(("embed_dim", "out_hidden_size", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim"), 32),
}
_SECTIONS = "mrope_section"  # how many rotary frequencies go to time, height and width


def text_key(config: PreTrainedConfig) -> str | None:
    """Return the key of the nested config that describes the text decoder; None where none does."""
    text = config.get_text_config(decoder=True)
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def prepare_wrapper(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config that can be shrunk; the one given, where it is no multimodal wrapper's."""
    text: Any = config.get_text_config()
    if text is config:
        return config
    prepared = copy.deepcopy(config)
    text = prepared.get_text_config()
    for name in prepared.sub_configs:
        tower = getattr(prepared, name, None)
        if tower is None or tower is text:
            continue
        for key, size in _TOWER_SIZES.items():
            if isinstance(getattr(tower, key, None), int):
                setattr(tower, key, size)
    rotary = getattr(text, "rope_parameters", None)
    if isinstance(rotary, dict) and rotary.get(_SECTIONS):
        rotary[_SECTIONS] = fit_sections(rotary[_SECTIONS], HEAD_SIZE // 2)
    return prepared


def fit_sections(sections: list[int], total: int) -> list[int]:
    """Return sections in about the same proportion that sum to `total`, none of them empty."""
    fitted = [max(1, size * total // sum(sections)) for size in sections]
    fitted[fitted.index(max(fitted))] += total - sum(fitted)
    return fitted
