"""Find the decoder layers of a model, and what the parts of a layer are called.

Works on module structure alone, so a model on the meta device will do. What the names suggest is
only a proposal: the twin (`bake.anatomy.twin`) proves it or the route is refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from bake.errors import UnsupportedError
from bake.sites import LayerStructure

if TYPE_CHECKING:
    from torch import nn

# Towers that are not the text decoder, and multi-token-prediction heads.
_NOT_THE_DECODER = re.compile(r"vision|visual|audio|image|speech|patch|mtp|draft|encoder\.")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|ff$", re.IGNORECASE)
_NORM = re.compile(r"norm|ln|layernorm", re.IGNORECASE)


def find_decoder_layers(model: nn.Module) -> tuple[str, int]:
    """Return the module path of the list of decoder layers and how many it holds.

    Raises UnsupportedError when the model keeps no list of layers.
    """
    from torch import nn

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and not _NOT_THE_DECODER.search(name)
        and any(True for _ in module[0].children())
    }
    # An expert list inside a layer is smaller than the list of layers that contains it.
    outermost = {
        name: module
        for name, module in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    if not outermost:
        raise UnsupportedError(
            f"{type(model).__name__} keeps no list of decoder layers; bake needs one to push layer by layer"
        )
    name = max(outermost, key=lambda key: sum(p.numel() for p in outermost[key].parameters()))
    return name, len(outermost[name])


def find_structure(model: nn.Module, layers: str, layer: int = 0) -> LayerStructure:
    """Propose the names of attention, MLP and the norm before the MLP in decoder layer `layer`."""
    children = dict(model.get_submodule(f"{layers}.{layer}").named_children())
    norms = [name for name, child in children.items() if _is_norm(name, child)]
    blocks = [name for name in children if name not in norms]

    def named(pattern: re.Pattern[str]) -> str | None:
        matches = [
            name
            for name in blocks
            if pattern.search(name) and any(True for _ in children[name].parameters())
        ]
        return matches[0] if matches else None

    attention, mlp = named(_ATTENTION), named(_MLP)
    return LayerStructure(layers, attention, mlp, _second_norm(norms))


def _is_norm(name: str, module: nn.Module) -> bool:
    return bool(_NORM.search(name) or _NORM.search(type(module).__name__)) and not any(
        True for _ in module.children()
    )


def _second_norm(norms: list[str]) -> str | None:
    """Return the norm that reads the residual stream between attention and MLP, if the names say so.

    With two norms the second is it (Llama's post_attention_layernorm, GPT-2's ln_2). With more, the
    architectures that have post-norms call it pre_feedforward_layernorm.
    """
    for name in norms:
        if re.search(r"pre_(ff|feedforward|mlp)", name):
            return name
    return norms[1] if len(norms) == 2 else None
