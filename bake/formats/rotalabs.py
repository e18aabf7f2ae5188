"""rotalabs-steer's vectors: `layer_{l}.json` beside `layer_{l}.pt`, and a folder of these.

A folder is what its `SteeringVectorSet.save` writes (with a `metadata.json` that lists the layers), one
pair of files what `SteeringVector.save` writes. The vectors are of the residual stream after layer l,
counted from 0: `mlp_out` here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import DirectionError
from bake.formats.given import GivenVectors, from_tensor, layer_number, printable
from bake.formats.pickles import load_tensors

if TYPE_CHECKING:
    import torch

FORMAT = "rotalabs-steer vectors"
MAX_DESCRIPTION = 1_000_000  # bytes of one .json
SET_FILE = "metadata.json"


def is_rotalabs(path: Path) -> bool:
    """Tell whether a `.pt` or `.json` file is one of a pair of rotalabs-steer's."""
    beside = path.with_suffix(".json")
    if not (beside.is_file() and path.with_suffix(".pt").is_file()):
        return False
    return "layer_index" in _read_json(beside)


def read_pair(path: Path) -> GivenVectors:
    """Read one vector from its `.json` and `.pt`, whichever of the two is named."""
    layer, vector, metadata = _read_vector(path.with_suffix(".json"))
    return GivenVectors(FORMAT, {layer: vector}, site="mlp_out", metadata=metadata)


def read_folder(folder: Path) -> GivenVectors:
    """Read every vector of a folder. Raises DirectionError where two are of one layer, or none is."""
    described = sorted(folder.glob("layer_*.json"))
    if not described:
        raise DirectionError(
            f"{folder} holds no layer_N.json; a folder is read as rotalabs-steer's vectors"
        )
    vectors: dict[int | None, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for path in described:
        layer, vector, metadata = _read_vector(path)
        if layer in vectors:
            raise DirectionError(f"{folder.name} holds two vectors of layer {layer}; keep one")
        vectors[layer] = vector
    missing = [layer for layer in _listed_layers(folder) if layer not in vectors]
    if missing:
        raise DirectionError(
            f"{folder.name} lists layer {missing[0]} and has no layer_{missing[0]}.json; copy the "
            f"folder again"
        )
    ordered = dict(sorted(vectors.items(), key=lambda item: item[0] or 0))
    return GivenVectors(FORMAT, ordered, site="mlp_out", metadata=metadata)


def _listed_layers(folder: Path) -> list[int]:
    """Return the layers that the set's own file lists; none where it is missing."""
    if not (folder / SET_FILE).is_file():
        return []
    listed = _read_json(folder / SET_FILE).get("layers")
    numbers = [layer_number(entry) for entry in listed] if isinstance(listed, list) else []
    return [layer for layer in numbers if layer is not None]


def _read_vector(described: Path) -> tuple[int, torch.Tensor, dict[str, str]]:
    import torch

    values = _read_json(described)
    layer = layer_number(values.get("layer_index"))
    if layer is None:
        raise DirectionError(f"{described.name} has no layer_index; it is not rotalabs-steer's")
    file = described.with_suffix(".pt")
    if not file.is_file():
        raise DirectionError(f"{described.name} has no {file.name} beside it; copy both")
    tensor = load_tensors(file)
    if not isinstance(tensor, torch.Tensor):
        raise DirectionError(f"{file.name} holds a {type(tensor).__name__} and no tensor")
    vector = from_tensor(tensor.detach(), file.name).get(None)
    if vector is None or vector.numel() * vector.element_size() > file.stat().st_size:
        raise DirectionError(
            f"{file.name} has shape {tuple(tensor.shape)}; rotalabs-steer saves one vector a file"
        )
    known = {
        "model": values.get("model_name"),
        "method": values.get("extraction_method"),
        "behavior": values.get("behavior"),
    }
    return layer, vector, {k: printable(v) for k, v in known.items() if isinstance(v, str) and v}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_DESCRIPTION:
            raise ValueError(f"{path.stat().st_size} bytes long")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DirectionError(f"{path.name} cannot be read ({reason}); save it again") from None
    if not isinstance(values, dict):
        raise DirectionError(f"{path.name} is no JSON object; it is not rotalabs-steer's")
    return values
