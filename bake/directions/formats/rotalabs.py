"""rotalabs-steer's vectors: `layer_{l}.json` beside `layer_{l}.pt`, and a folder of these.

A folder is what its `SteeringVectorSet.save` writes (with a `metadata.json` that lists the layers), one
pair of files what `SteeringVector.save` writes. The vectors are of the residual stream after layer l,
counted from 0: `mlp_out` here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.directions.formats.declared import Declared, read_declared
from bake.directions.formats.given import GivenVectors, Pick, from_tensor, printable
from bake.directions.formats.pickles import load_tensors
from bake.directions.formats.places import layer_number
from bake.errors import DirectionError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import check_links
from bake.io.git_lfs import check_pointer

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


def read_pair(path: Path, pick: Pick | None = None) -> GivenVectors:
    """Read one vector from its `.json` and `.pt`, whichever of the two is named.

    The one that is named may be a link, as any file that a user names; the other not out of the folder.
    """
    if pick is not None:
        raise DirectionError(
            f"{path.name} has no positions; rotalabs-steer saves one vector a file"
        )
    _check_links(path.parent, [path.with_suffix(".json"), path.with_suffix(".pt")], named=path)
    layer, vector, declared, metadata = _read_vector(path.with_suffix(".json"))
    site = declared.site or "mlp_out"
    return GivenVectors(FORMAT, {layer: vector}, site, declared.notes, metadata)


def read_folder(folder: Path) -> GivenVectors:
    """Read every vector of a folder. Raises DirectionError where two are of one layer, or none is."""
    described = sorted(folder.glob("layer_*.json"))
    pairs = [name for path in described for name in (path, path.with_suffix(".pt"))]
    _check_links(folder, [*pairs, folder / SET_FILE])
    if not described:
        raise DirectionError(
            f"{folder} holds no layer_N.json; a folder is read as rotalabs-steer's vectors"
        )
    vectors: dict[int | None, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    notes: dict[str, None] = {}
    sites = set()
    for path in described:
        layer, vector, declared, metadata = _read_vector(path)
        sites.add(declared.site or "mlp_out")
        notes |= dict.fromkeys(declared.notes)
        if layer in vectors:
            raise DirectionError(f"{folder.name} holds two vectors of layer {layer}; keep one")
        vectors[layer] = vector
    missing = [layer for layer in _listed_layers(folder) if layer not in vectors]
    if missing:
        raise DirectionError(
            f"{folder.name} lists layer {missing[0]} and has no layer_{missing[0]}.json; copy the "
            f"folder again"
        )
    if len(sites) > 1:
        raise DirectionError(
            f"{folder.name} holds vectors of several sites ({', '.join(sorted(sites))}); keep those of one"
        )
    ordered = dict(sorted(vectors.items(), key=lambda item: item[0] or 0))
    return GivenVectors(FORMAT, ordered, sites.pop(), list(notes), metadata)


def _listed_layers(folder: Path) -> list[int]:
    """Return the layers that the set's own file lists; none where it is missing."""
    if not (folder / SET_FILE).is_file():
        return []
    listed = _read_json(folder / SET_FILE).get("layers")
    numbers = [layer_number(entry) for entry in listed] if isinstance(listed, list) else []
    return [layer for layer in numbers if layer is not None]


def _check_links(folder: Path, paths: list[Path], named: Path | None = None) -> None:
    names = [path.name for path in paths if path != named]
    check_links(folder, names, error=DirectionError)


def _read_vector(described: Path) -> tuple[int, torch.Tensor, Declared, dict[str, str]]:
    import torch

    values = _read_json(described)
    declared = read_declared(values, described.name)
    layer = layer_number(values.get("layer_index"))
    if layer is None:
        raise DirectionError(f"{described.name} has no layer_index; it is not rotalabs-steer's")
    file = described.with_suffix(".pt")
    if not file.is_file():
        raise DirectionError(f"{described.name} has no {file.name} beside it; copy both")
    check_pointer(file, DirectionError)
    tensor = load_tensors(file)
    if not isinstance(tensor, torch.Tensor):
        raise DirectionError(f"{file.name} holds a {type(tensor).__name__} and no tensor")
    vector = from_tensor(tensor.detach(), file.name)[0].get(None)
    if vector is None or vector.numel() * vector.element_size() > file.stat().st_size:
        raise DirectionError(
            f"{file.name} has shape {tuple(tensor.shape)}; rotalabs-steer saves one vector a file"
        )
    known = {
        "model": values.get("model_name"),
        "method": values.get("extraction_method"),
        "behavior": values.get("behavior"),
    }
    metadata = {k: printable(v) for k, v in known.items() if isinstance(v, str) and v}
    return layer, vector, declared, metadata


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(
        path, error=DirectionError, remedy="save it again", max_bytes=MAX_DESCRIPTION
    )
    return values
