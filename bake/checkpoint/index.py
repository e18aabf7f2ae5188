"""Which files hold a checkpoint's weights: what the config names, one file, or an index of shards.

The order is transformers': a name in the config, `model.safetensors`, its index, and only where there
is none of these, the older `pytorch_model.bin` and its index. What is in the files is
`safetensors_file`'s and `conversion`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bake.errors import CheckpointError
from bake.io.foreign_json import read_json
from bake.io.foreign_paths import check_name, check_names

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_FILE = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class WeightFiles:
    """The weight files in the order in which transformers reads them.

    index: the index that lists them, or None. names: {file: the tensors that the index puts there}.
    metadata: the index's, None for a single file.
    """

    index: str | None
    names: Mapping[str, frozenset[str]]
    metadata: Mapping[str, Any] | None

    @property
    def pickled(self) -> bool:
        """Whether these are PyTorch's pickled files, which are converted before anything else."""
        first = next(iter(self.names))
        return not first.endswith(".safetensors")

    def check_complete(self, directory: Path, present: Mapping[str, frozenset[str]]) -> None:
        """Raise CheckpointError where the index puts a tensor into a file that does not hold it.

        present: {file: the tensors in it}.
        """
        for file, names in self.names.items():
            missing = sorted(names - present[file])
            if missing:
                raise CheckpointError(
                    f"{directory / str(self.index)} says that tensor {missing[0]} is in {file}, which "
                    "does not hold it: download or save the checkpoint again."
                )


def find_weight_files(
    directory: Path, config: Mapping[str, Any], is_there: Callable[[str], bool] | None = None
) -> WeightFiles:
    """Find the weight files that transformers would load from `directory`.

    is_there: tells whether the checkpoint has a file; the default looks into the directory, where
    in any case an index must be. Raises CheckpointError where there are no weights, or the config or
    the index names a file that is missing or outside the checkpoint.
    """
    is_there = is_there or (lambda name: (directory / name).is_file())
    weights = _choose(directory, config, is_there)
    if not weights.endswith(".index.json"):
        return WeightFiles(None, {weights: frozenset()}, None)
    return _read_index(directory, weights, is_there)


def named_weights(config: Any) -> str | None:
    """The weight file or index that the config names itself, which transformers loads first."""
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return named if isinstance(named, str) else None


def _choose(directory: Path, config: Mapping[str, Any], is_there: Callable[[str], bool]) -> str:
    named = named_weights(config)
    if named is not None:
        endings = (".safetensors", ".safetensors.index.json")
        check_name(named, directory / "config.json", suffixes=endings)
        if not is_there(named):
            raise CheckpointError(
                f"{directory / 'config.json'} names the weights {named}, which are not there: "
                "download or save the checkpoint again."
            )
        return named
    for name in (SINGLE_FILE, INDEX_FILE, PICKLED_FILE, PICKLED_INDEX):
        if is_there(name):
            return name
    other = sorted(
        path.name
        for pattern in ("*.bin", "*.bin.index.json", "*.safetensors", "*.gguf", "*.pth")
        for path in directory.glob(pattern)
    )
    found = f" (found {', '.join(other[:3])})" if other else ""
    raise CheckpointError(
        f"{directory} has neither {SINGLE_FILE} nor {PICKLED_FILE}, nor an index of either{found}: "
        "load the model with what made it, save_pretrained it elsewhere, and give that."
    )


def _read_index(directory: Path, index: str, is_there: Callable[[str], bool]) -> WeightFiles:
    """The listed shards, sorted by name as in transformers."""
    path = directory / index
    fields = read_json(path)
    weight_map, metadata = fields.get("weight_map"), fields.get("metadata")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to files: download or save it again."
        )
    folder = PurePosixPath(index).parent  # an index in a folder lists its shards relative to it
    suffix = ".safetensors" if index.endswith(".safetensors.index.json") else ".bin"
    names: dict[str, frozenset[str]] = {}
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, set()).add(name)
    for file in check_names(sorted(shards), path, suffixes=suffix):
        shard = str(folder / file)
        if not is_there(shard):
            raise CheckpointError(
                f"{path} lists {file}, which is not there: download the checkpoint again."
            )
        names[shard] = frozenset(shards[file])
    return WeightFiles(index, names, metadata if isinstance(metadata, dict) else {})
