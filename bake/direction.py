"""A direction: unit vectors with the site they were found at, and the file they live in.

A direction file is safetensors: one tensor `direction` of shape (hidden_size,) for all layers, or
`direction.{l}` for 0-based decoder layer l; metadata strings `site`, `model`, `method`, `token` and
what else is known. How directions are found is `bake.contrast`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import DirectionError
from bake.safetensors_file import encode_header, encode_tensor, spec_of
from bake.sites import SITES, LayerStructure
from bake.steering import submodule

if TYPE_CHECKING:
    import torch
    from torch import nn

_LAYER_KEY = re.compile(r"direction\.(\d+)")
DEFAULT_SITE = "mlp_out"


@dataclass(frozen=True)
class Direction:
    """Unit vectors û_l, float32, (hidden_size,) each; key None holds one vector for all layers."""

    vectors: Mapping[int | None, torch.Tensor]
    site: str
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def hidden_size(self) -> int:
        """The width of the vectors."""
        return int(next(iter(self.vectors.values())).shape[0])

    def layer(self, layer: int) -> torch.Tensor:
        """Return û_l; raise DirectionError where the file has none for this layer."""
        if None in self.vectors:
            return self.vectors[None]
        if layer not in self.vectors:
            known = ", ".join(
                str(index) for index in sorted(k for k in self.vectors if k is not None)
            )
            raise DirectionError(
                f"the direction has no vector for layer {layer}; it has layers {known}"
            )
        return self.vectors[layer]

    def select(self, layers: Iterable[int], hidden_size: int) -> dict[int, torch.Tensor]:
        """Return {layer: û_l}; raise DirectionError where the width is not the model's."""
        if self.hidden_size != hidden_size:
            raise DirectionError(
                f"the direction is {self.hidden_size} wide and the model's hidden size is "
                f"{hidden_size}; it was found on {self.metadata.get('model', 'another model')}"
            )
        return {layer: self.layer(layer) for layer in layers}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the vectors."""
        return {
            "site": self.site,
            "hidden_size": self.hidden_size,
            "layers": "all"
            if None in self.vectors
            else sorted(k for k in self.vectors if k is not None),
            "metadata": dict(self.metadata),
        }


def normalise(vector: torch.Tensor, name: str) -> torch.Tensor:
    """Return the float32 unit vector; raise DirectionError for a wrong shape, zeros or NaN."""
    if vector.ndim != 1:
        raise DirectionError(
            f"{name} has shape {tuple(vector.shape)}; a direction is one vector of shape (hidden_size,)"
        )
    wide = vector.double()
    if not bool(wide.isfinite().all()):
        raise DirectionError(f"{name} holds NaN or infinite values; find it again in float32")
    length = float(wide.norm())
    if length == 0:
        raise DirectionError(f"{name} is all zeros, which points nowhere")
    return (wide / length).float()


def convert_to_input(
    direction: Direction,
    model: nn.Module,
    structure: LayerStructure,
    site: str,
    layers: Sequence[int],
) -> Direction:
    """Carry a residual direction to a normalised input: û ← normalise(norm weight ⊙ û), per layer.

    The norm's weight is read off its behaviour, so that a norm that multiplies by 1 + w (Gemma) is
    converted like one that multiplies by w. Raises DirectionError where no norm feeds the site.
    """
    if any(site not in structure.at(layer).input_norms for layer in layers):
        raise DirectionError(
            f"no norm's output is {site} in this architecture, so a residual direction cannot be "
            f"converted; find one there (bake direction --site {site})"
        )
    vectors: dict[int | None, torch.Tensor] = {
        layer: normalise(
            direction.layer(layer)
            * effective_weight(
                submodule(model, structure, layer, structure.at(layer).input_norms[site]),
                direction.hidden_size,
            ),
            f"the direction converted to {site} at layer {layer}",
        )
        for layer in layers
    }
    return Direction(vectors, site, {**direction.metadata, "converted_from": direction.site})


def effective_weight(norm: nn.Module, hidden_size: int) -> torch.Tensor:
    """Return what a norm multiplies its normalised input by, (hidden_size,), on the CPU.

    x = (1, −1, 1, …) has mean 0 and mean square 1, so RMSNorm and LayerNorm leave it as it is:
    (norm(x) − norm(−x)) / 2 = weight ⊙ x.
    """
    import torch

    parameter = next(norm.parameters())
    x = torch.ones(1, 1, hidden_size, device=parameter.device, dtype=parameter.dtype)
    x[..., 1::2] = -1
    with torch.no_grad():
        weight: torch.Tensor = (norm(x) - norm(-x)) / 2 * x
    return weight[0, 0].float().cpu()


def load_direction(path: Path) -> Direction:
    """Read a direction file. Raises DirectionError naming the file and what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DirectionError(f"no direction file {path}; make one with bake direction")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DirectionError(f"{path} is not a safetensors file: {error}") from None
    vectors: dict[int | None, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER_KEY.fullmatch(name)
        if name == "direction":
            vectors[None] = normalise(tensor, f"{path.name}: {name}")
        elif match:
            vectors[int(match[1])] = normalise(tensor, f"{path.name}: {name}")
    return _checked(vectors, metadata, path)


def _checked(
    vectors: dict[int | None, torch.Tensor], metadata: dict[str, str], path: Path
) -> Direction:
    if not vectors:
        raise DirectionError(
            f"{path} holds no tensor named direction or direction.<layer>; is it a direction file?"
        )
    if None in vectors and len(vectors) > 1:
        raise DirectionError(f"{path} holds both one direction for all layers and some per layer")
    widths = {int(vector.shape[0]) for vector in vectors.values()}
    if len(widths) > 1:
        raise DirectionError(f"{path} holds vectors of different widths: {sorted(widths)}")
    site = metadata.pop("site", DEFAULT_SITE)
    if site not in SITES:
        raise DirectionError(f"{path} names an unknown site {site!r}; one of {', '.join(SITES)}")
    return Direction(vectors, site, metadata)


def direction_bytes(direction: Direction) -> bytes:
    """Return the direction file's bytes; the same direction always gives the same bytes."""
    tensors = {
        "direction" if layer is None else f"direction.{layer}": direction.vectors[layer].float()
        for layer in sorted(direction.vectors, key=lambda layer: -1 if layer is None else layer)
    }
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    header = encode_header(specs, {**direction.metadata, "site": direction.site})
    return header + b"".join(encode_tensor(tensor) for tensor in tensors.values())
