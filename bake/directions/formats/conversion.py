"""A direction into another tool's file: vectors as long as they were given, by the layers they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.direction import DEFAULT_SITE, Direction, normalise_all
from bake.directions.direction_file import direction_bytes
from bake.directions.formats import NATIVE, read_given
from bake.directions.formats.arrays import write_npy, write_npz
from bake.directions.formats.gguf_writer import write_gguf
from bake.directions.formats.given import name_layers
from bake.errors import DirectionError
from bake.sites import check_direction_site, check_site

if TYPE_CHECKING:
    import torch

OTHER_TOOLS = (".gguf", ".npy", ".npz")
WRITABLE = (*OTHER_TOOLS, ".safetensors")
UNKNOWN_HINT = "unknown"


@dataclass(frozen=True)
class ConvertedDirection:
    """A direction as another tool's file. `notes` are sentences on what the file could not keep."""

    output: Path
    content: bytes
    understood: str
    layers: str
    hidden_size: int
    site: str
    notes: tuple[str, ...]

    def describe(self) -> str:
        """Return what a person reads when it is done."""
        return f"{self.output}: {self.layers}, width {self.hidden_size}, at {self.site}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            "understood": self.understood,
            "layers": self.layers,
            "hidden_size": self.hidden_size,
            "site": self.site,
            "notes": list(self.notes),
        }


def convert(
    reference: Any,
    output: Path,
    *,
    layer_offset: int | None = None,
    site: str | None = None,
    model_hint: str | None = None,
    model_type: str | None = None,
    layer_count: int | None = None,
    hidden_size: int | None = None,
) -> ConvertedDirection:
    """Return the bytes of `output`, whose suffix names the format; nothing is written.

    model_type, layer_count, hidden_size: the model's, where they are known: one vector for all layers
    needs the count to become a control vector. model_hint goes before what the file or the model say.
    Raises DirectionError for what cannot be read, does not fit the
    model, or has no place in the format.
    """
    suffix = output.suffix.lower()
    if suffix not in WRITABLE:
        raise DirectionError(
            f"{output.name} is of no format that bake writes; name it {', '.join(WRITABLE)}"
        )
    if layer_count is not None and layer_count < 1:
        raise DirectionError(f"--layers {layer_count} is no number of layers; give one from 1 on")
    given, origin = read_given(reference, layer_offset=layer_offset, hidden_size=hidden_size)
    direction = given.to_direction(origin, site and check_site(site))
    stored = {layer: given.vectors[layer].float() for layer in direction.vectors}
    normalise_all(stored, direction.site, {}, origin)  # Values that float32 holds.
    if hidden_size is not None:
        direction.select([], hidden_size)
    if layer_count is not None:
        direction.check_layers(layer_count)
    site = direction.site
    notes: list[str] = []
    if suffix == ".gguf":
        hint = model_hint or given.metadata.get("model_hint") or model_type or UNKNOWN_HINT
        stored, notes = _for_llama_cpp(stored, site, layer_count)
        content = write_gguf({layer: v for layer, v in stored.items() if layer is not None}, hint)
    elif suffix == ".safetensors":
        metadata = given.metadata if given.format == NATIVE else direction.metadata
        content = direction_bytes(Direction(stored, site, metadata))
    else:
        if layer_count is not None:
            stored = _spread(stored, range(layer_count))
        content = write_npy(stored) if suffix == ".npy" else write_npz(stored)
        if site != DEFAULT_SITE:
            notes.append(f"{suffix} holds no site; read it with --direction-site {site}")
    understood = direction.metadata["understood"]
    covered = name_layers(stored)
    width = direction.hidden_size
    return ConvertedDirection(output, content, understood, covered, width, site, tuple(notes))


def _for_llama_cpp(
    vectors: Mapping[int | None, torch.Tensor], site: str, layer_count: int | None
) -> tuple[dict[int | None, torch.Tensor], list[str]]:
    """Return the vectors of layers from 1 on, for the site where llama.cpp adds them."""
    note = check_direction_site(site, DEFAULT_SITE, convert=False)
    notes = [f"{note}, where llama.cpp adds it"] if note else []
    if None in vectors and layer_count is None:
        raise DirectionError(
            "one vector for all layers needs the number of layers to become a control vector; pass "
            "--layers N or --model MODEL"
        )
    spread = _spread(vectors, range(1, layer_count or 1))
    if None in vectors:
        notes.append(
            f"the one vector is for layers 1 to {(layer_count or 1) - 1}, not for the band that a bake "
            "pushes: take the bake itself with --push for that"
        )
    if 0 in spread:
        del spread[0]
        notes.append("layer 0 is left out: llama.cpp takes no control vector there")
    if not spread:
        raise DirectionError("no layer from 1 on is left, and llama.cpp takes none for layer 0")
    return spread, notes


def _spread(
    vectors: Mapping[int | None, torch.Tensor], layers: range
) -> dict[int | None, torch.Tensor]:
    """Return a vector for each of `layers` where there is one for all; else the vectors as they are."""
    return dict.fromkeys(layers, vectors[None]) if None in vectors else dict(vectors)
