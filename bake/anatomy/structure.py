"""Find the decoder layers of a model, and what the parts of a layer are called.

Where the decoder is and which child is attention or MLP is read off names, so a model on the meta
device will do; where the residual stream passes is measured on the twin. All of it is a proposal: the
twin (`bake.anatomy.twin`) proves it or the route is refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.errors import UnsupportedError
from bake.sites import LayerStructure

if TYPE_CHECKING:
    from torch import nn

# Towers that are not the text decoder, and multi-token-prediction heads.
_NOT_THE_DECODER = re.compile(r"vision|visual|audio|image|speech|patch|mtp|draft")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MIXER = re.compile(r"mamba|mixer|conv|temporal|recurrent|operator", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|ff$|^intermediate$|^fc1$|channel_mixer", re.IGNORECASE
)
_NORM = re.compile(r"norm|ln|layernorm", re.IGNORECASE)
# Inside a block that holds its own norm and residual add: the part that takes the normalised input.
_INNER_ATTENTION = ("self", "attention")


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
    decoders = {name: module for name, module in outermost.items() if "encoder" not in name}
    # Bert's decoder is called an encoder; where a model has both, the decoder is the other one.
    outermost = decoders or outermost
    if not outermost:
        raise UnsupportedError(
            f"{type(model).__name__} keeps no list of decoder layers; bake needs one to push layer by layer"
        )
    sizes = {key: sum(p.numel() for p in found.parameters()) for key, found in outermost.items()}
    name = max(sizes, key=lambda key: sizes[key])
    for other, found in outermost.items():
        beside = other != name and other.rpartition(".")[0] == name.rpartition(".")[0]
        if beside and len(found) == len(outermost[name]) and sizes[other] > sizes[name] / 10:
            raise UnsupportedError(
                f"{type(model).__name__} keeps the parts of its layers in separate lists ({name}, "
                f"{other}); no module's output is the residual stream after a layer"
            )
    return name, len(outermost[name])


def find_structure(model: nn.Module, layers: str, layer: int = 0) -> LayerStructure:
    """Propose the names of attention, MLP and the norm before the MLP in decoder layer `layer`."""
    children = dict(model.get_submodule(f"{layers}.{layer}").named_children())
    norms = [name for name, child in children.items() if is_norm(name, child)]
    blocks = [name for name in children if name not in norms and "layernorm" not in name]

    def named(pattern: re.Pattern[str]) -> str | None:
        matches = [
            name
            for name in blocks
            if pattern.search(name) and any(True for _ in children[name].parameters())
        ]
        return matches[0] if matches else None

    attention = named(_ATTENTION) or named(_MIXER)
    inner = None
    if attention is not None:
        inside = dict(children[attention].named_children())
        inner = next((f"{attention}.{name}" for name in _INNER_ATTENTION if name in inside), None)
    return LayerStructure(
        layers, attention, named(_MLP), _second_norm(norms), attention_input=inner
    )


def is_norm(name: str, module: nn.Module) -> bool:
    """Tell whether a module is a norm, by its name or its class's."""
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


def combine(structures: dict[int, LayerStructure]) -> LayerStructure:
    """Return one structure for all layers: the most frequent one, with the others beside it."""
    found = list(structures.values())
    main = max(found, key=found.count)
    others = {layer: other for layer, other in structures.items() if other != main}
    return replace(main, others=others)
