"""Where the residual stream passes in a decoder layer, measured on the twin.

Names suggest where attention's output joins the stream; only an experiment tells a post-norm (the
output is normalised first) and a parallel block (it joins together with the MLP's) from a plain add.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from bake.anatomy.probing import probe_vector, read_children, uniform_ratio, zeroed
from bake.anatomy.structure import is_norm
from bake.errors import UnsupportedError
from bake.hooks import steered, submodule
from bake.sites import INPUT_SITES, LayerStructure, capture_location

if TYPE_CHECKING:
    import torch

    from bake.anatomy.twin import Twin

    Seen = Mapping[str, tuple[torch.Tensor | None, torch.Tensor | None]]


def trace_residual(
    twin: Twin, proposed: LayerStructure, layer: int
) -> tuple[LayerStructure, str | None]:
    """Complete a proposed structure with what the twin's layer `layer` shows.

    Returns it with `before_mlp`, `attention_scale` and `input_norms` as measured, and why the layer
    has no `attn_out` site (None where it has).
    """
    before = read_children(twin, proposed, layer)
    proposed = replace(
        proposed, before_mlp=None, input_norms=_input_norms(twin, proposed, before, layer)
    )
    if proposed.attention is None:
        return proposed, "the layer has no attention beside its MLP"
    written = _tensor(before, proposed.attention, output=True)
    if written is None or written.shape[-1] != twin.hidden_size:
        return proposed, "attention's output is no residual write"
    push = probe_vector(twin)
    # With before_mlp set to anything, the hook adds at attention's output.
    hook = replace(proposed, before_mlp=proposed.attention)
    with steered(twin.model, hook, "attn_out", {layer: push}):
        after = read_children(twin, proposed, layer)
    with zeroed(submodule(twin.model, proposed, layer, proposed.attention)):
        without = read_children(twin, proposed, layer)
    for name in _children_after(twin, proposed, layer, before):
        was, now = _tensor(before, name), _tensor(after, name)
        if was is None or now is None or was.shape[-1] != twin.hidden_size:
            continue
        scale = uniform_ratio(now - was, push)
        if scale is None:
            continue
        alone = _tensor(without, name)
        if _is_silent(alone, was) and name != proposed.mlp:
            # Without attention nothing arrives here: the residual stream does not pass.
            return proposed, (
                "attention's output is not simply added to the residual stream: "
                f"{name} normalises it first"
            )
        return replace(proposed, before_mlp=name, attention_scale=scale), None
    return proposed, (
        "attention's output is not simply added to the residual stream: "
        f"{_how_else(before, after, push, alone=proposed.mlp is None)}"
    )


def _how_else(before: Seen, after: Seen, push: torch.Tensor, *, alone: bool) -> str:
    if alone:
        return "the layer has one block only, whose write is at mlp_out"
    was, now = _tensor(before, "", output=True), _tensor(after, "", output=True)
    if was is not None and now is not None and uniform_ratio(now - was, push) is not None:
        return "it is added together with the MLP's (a parallel block), where mlp_out is the site"
    return "nothing in the layer reads their sum"


def _children_after(twin: Twin, structure: LayerStructure, layer: int, seen: Seen) -> list[str]:
    """Return the layer's norms and its MLP, in the order of their calls."""
    children = dict(submodule(twin.model, structure, layer, "").named_children())
    return [
        name
        for name in seen
        if name in children
        and name != structure.attention
        # A norm may hold an MLP of its own, as AXK2's do.
        and (is_norm(name, children[name]) or "layernorm" in name or name == structure.mlp)
    ]


def _tensor(seen: Seen, name: str, *, output: bool = False) -> torch.Tensor | None:
    return seen.get(name, (None, None))[output]


def _is_silent(alone: torch.Tensor | None, was: torch.Tensor) -> bool:
    return alone is not None and bool(alone.abs().max() <= 1e-6 * was.abs().max())


def _input_norms(twin: Twin, structure: LayerStructure, seen: Seen, layer: int) -> dict[str, str]:
    """Return {input site: name of the layer's norm whose output is the site's activation}."""
    import torch

    found: dict[str, str] = {}
    block = submodule(twin.model, structure, layer, "")
    for site in INPUT_SITES:
        try:
            activation = _tensor(seen, capture_location(site, structure).module)
        except UnsupportedError:
            continue
        if activation is None:
            continue
        for name, (_, output) in seen.items():
            if (
                name
                and output is not None
                and is_norm(name.rpartition(".")[2], block.get_submodule(name))
                and output.numel() == activation.numel()
                and torch.equal(output.reshape(-1), activation.reshape(-1))
            ):
                found[site] = name
                break
    return found
