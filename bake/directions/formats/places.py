"""Names of places in a model, as other tools write them: which layer, and which of bake's sites.

TransformerLens has `blocks.3.hook_resid_post`, transformers and nnsight `model.layers.3.mlp` and
`layers.3.output`, numpy archives `layer_3` or `3`. The output of a module that is added straight to the
residual stream is one site with the stream after it, because a constant added to either is the same
push: `hook_mlp_out` and `.mlp` are `mlp_out`, `hook_attn_out` and `.self_attn` are `attn_out`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bake.sites import SITES

MAX_LAYERS = 10_000
MAX_NAME = 200
EMBEDDING = -1  # the layer number of what stands before layer 0

_BEFORE = "the stream before layer l is layer l − 1's output"
_MLP = "the MLP's output, which is added to the stream, taken as mlp_out"
_ATTENTION = "attention's output, which is added to the stream, taken as attn_out"
_NORMALISED = "a norm's output, taken as the normalised input behind it"

# The place inside a layer, without `hook_` → (layers to add, site, what is said of it).
_WORDS: dict[str, tuple[int, str, str]] = {
    **dict.fromkeys(
        (
            *("", "layer", "block", "decoder_block", "decoder_layer", "post_layer", "post_block"),
            *("layer_out", "block_out", "l_out", "resid", "resid_post", "residual"),
            *("residual_post", "residual_stream", "resid_stream", "residual_stream_post"),
            "residual_stream_post_layer",
        ),
        (0, "mlp_out", ""),
    ),
    **dict.fromkeys(
        ("input", "layer_input", "block_input", "resid_pre", "residual_pre", "pre_layer"),
        (-1, "mlp_out", _BEFORE),
    ),
    **dict.fromkeys(("resid_mid", "residual_mid"), (0, "attn_out", "")),
    **dict.fromkeys(("mlp", "mlp_out", "feed_forward", "ffn", "ffn_out"), (0, "mlp_out", _MLP)),
    **dict.fromkeys(
        ("self_attn", "attn", "attention", "self_attention", "attn_out"),
        (0, "attn_out", _ATTENTION),
    ),
    **dict.fromkeys(("self_attn_input", "attn_input", "attn_in"), (0, "attn_in", "")),
    **dict.fromkeys(("mlp_input", "mlp_in"), (0, "mlp_in", "")),
    "input_layernorm": (0, "attn_in", _NORMALISED),
    "post_attention_layernorm": (0, "mlp_in", _NORMALISED),
}
_EMBEDDINGS = frozenset(
    ("embed", "pos_embed", "embedding", "embeddings", "embed_tokens", "wte", "embed_in")
)
_WRAPPERS = (
    r"(?:(?:model|transformer|language_model|gpt_neox|backbone|decoder|module|base_model)\.)*"
)
# 12, layer_12, layers.12, direction.12, blocks.12, model.layers.12
_NUMBERED = re.compile(
    rf"{_WRAPPERS}(?:(?:layers?|directions?|vectors?|blocks?|h)?[._-]?)?([0-9]{{1,6}})"
)
# blocks.3.hook_resid_post, model.layers.3.mlp, layer_3_resid_post
_INSIDE = re.compile(rf"{_WRAPPERS}(?:layers?|blocks?|h)[._-]?([0-9]{{1,6}})[._](.+)")
_BEHIND = re.compile(r"(.+?)[._-]([0-9]{1,6})")  # resid_post.3
_AHEAD = re.compile(r"([0-9]{1,6})[._-](.+)")  # 3.resid_post


@dataclass(frozen=True)
class Place:
    """What a name means. layer: 0-based, None where it has none, EMBEDDING before layer 0.

    site: one of bake's, None where the name has a layer only. unknown: the part of a name that is none
    of bake's sites. meaning: how another site's name was taken.
    """

    layer: int | None
    site: str | None = None
    unknown: str = ""
    meaning: str = ""

    @property
    def is_layer_output(self) -> bool:
        """Tell whether the name means the layer's output itself, and no module's in it."""
        return self.site in (None, "mlp_out") and self.meaning in ("", _BEFORE)


def parse_place(name: Any) -> Place | None:
    """Return the layer that a name is of, and its site where it says one; None for other names."""
    if isinstance(name, int) and not isinstance(name, bool):
        return Place(name) if 0 <= name < MAX_LAYERS else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME:
        return None
    text = re.sub(r"\[(\w{1,12})\]", r".\1", name.strip())
    match = _NUMBERED.fullmatch(text)
    if match:
        return _make(match[1], None)
    match = _INSIDE.fullmatch(text)
    if match:
        return _make(match[1], match[2])
    for pattern, number, word in ((_BEHIND, 2, 1), (_AHEAD, 1, 2)):
        match = pattern.fullmatch(text)
        if match and _normalise(match[word]) in _WORDS:
            return _make(match[number], match[word])
    if _normalise(text.rpartition(".")[2]) in _EMBEDDINGS:
        return Place(EMBEDDING, "mlp_out", meaning="the embedding")
    return None


def layer_number(name: Any) -> int | None:
    """Return the layer that a key names, 12 for 12, "12", "layer_12" or "direction.12"; else None."""
    place = parse_place(name)
    return place.layer if place and place.site is None and not place.unknown else None


def parse_site(value: str) -> Place:
    """Return what a field such as `hook_point` says: a site, and a layer where it names one as well."""
    place = parse_place(value)
    if place is not None:
        return place
    if value in SITES:
        return Place(None, value)
    found = _WORDS.get(_normalise(value)) if value.strip() else None
    if found is None or found[0]:  # The input of which layer?
        return Place(None, unknown=value)
    return Place(None, found[1], meaning=found[2])


def _make(number: str, word: str | None) -> Place | None:
    layer = int(number)
    if layer >= MAX_LAYERS:
        return None
    if word is None:
        return Place(layer)
    found = _WORDS.get(_normalise(word))
    if found is None:
        return Place(layer, unknown=word)
    shift, site, meaning = found
    return Place(layer + shift, site, meaning=meaning)


def _normalise(word: str) -> str:
    """Return a place's name as `_WORDS` has it: `hook_resid_post`, `mlp.output.0` → `mlp`."""
    text = re.sub(r"[.\-\s/]+", "_", word.strip().lower())
    return re.sub(r"_?outputs?(_0)?$", "", text.removeprefix("hook_"))
