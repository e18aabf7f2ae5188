"""What of a base a bake does not have, and why: its code, adapters, weights that nobody listed.

Also the weights of multi-token prediction, which engines draft with and transformers does not load: a file
of them beside the index is carried byte for byte where the layers keep their names, and else is left out.
The base's card, pictures, archives and training leftovers are no part of a model and are not mentioned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bake.checkpoint.own_code import is_code
from bake.io.output_files import is_data
from bake.support.text import one_line

MTP_FILES = ("*mtp*.safetensors", "*nextn*.safetensors")
_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.ggml"),
    *("*.onnx", "*.onnx_data*", "*.npz", "*.npy", "*.tflite", "*.mlmodel", "*.nemo", "*.pkl"),
    *("*.distcp", "*.ot", "*.imatrix"),
)
_NO_MODEL = ("training_args.bin", "optimizer*", "scheduler*", "rng_state*", "trainer_state*")
_ADAPTER = "adapter_"
_LAYER = re.compile(r"(.*\.\d+)\..*")
_SHOWN = 4
_MAX_FILES, _MAX_FOLDERS = 5000, 3

_REASONS = {
    "code": "bake runs and hands on no code of a base: what was proven is transformers' own class",
    "adapter": "an adapter is no part of the weights that were baked: merge it into the base first "
    "(merge_and_unload) if it should be",
    "weights": "transformers does not load them with this model, and they are not steered",
    "draft": "multi-token prediction was trained on layers that have other names or numbers here: "
    "do not ask an engine for it",
    "thin": "a thin bake has no weights of its base: put them beside it for multi-token prediction",
}


@dataclass(frozen=True)
class LeftOut:
    """Things of a base that its bake has not. kind: a key of the reasons above."""

    kind: str
    names: tuple[str, ...]

    @property
    def reason(self) -> str:
        """Why they are not there."""
        return _REASONS[self.kind]

    def describe(self) -> str:
        """Return the line for the terminal."""
        return f"not in the output: {_shorten(self.names)} ({self.reason})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {"kind": self.kind, "names": list(self.names), "reason": self.reason}


def find_left_out(
    beside: Iterable[str],
    *,
    code_keys: Iterable[str] = (),
    dropped: Iterable[str] = (),
    drafts: Collection[str] = (),
    thin: bool = False,
) -> tuple[LeftOut, ...]:
    """Sort what a bake leaves out by why it does.

    beside: the base's files that are neither companions nor loaded. code_keys: what named code, such as
    "config.json: auto_map". dropped: tensors that are left out. drafts: files of multi-token prediction
    that could be carried and are not. thin: whether that is because the bake is a thin one.
    """
    found: dict[str, list[str]] = {kind: [] for kind in _REASONS}
    names = sorted(beside)
    folders = {name.rpartition("/")[0] for name in names if name.endswith("/adapter_config.json")}
    for name in names:
        folder, _, file = name.rpartition("/")
        if is_code(name):
            found["code"].append(name)
        elif file.startswith(_ADAPTER) or folder in folders:
            found["adapter"].append(name)
        elif name in drafts:
            found["thin" if thin else "draft"].append(name)
        elif _is_weights(file):
            found["weights"].append(name)
    found["code"] += code_keys
    layers = (_LAYER.fullmatch(name) for name in dropped)
    found["draft"] += sorted({f"{match[1]}.*" for match in layers if match})
    return tuple(LeftOut(kind, tuple(names)) for kind, names in found.items() if names)


def card_lines(recorded: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the card's lines on what `bake.json` says was left out; the template escapes them."""
    return [f"{_shorten(entry['names'])}: {entry['reason']}." for entry in recorded]


def list_beside(directory: Path, known: Collection[str]) -> tuple[str, ...]:
    """Return the files of a checkpoint that are not in `known`, hidden ones and its card left out.

    Folders that are links are not entered, nor are more than a few levels of them.
    """
    return tuple(sorted(name for name in _walk(directory) if name not in known))


def is_draft(name: str) -> bool:
    """Tell whether a file holds the weights of multi-token prediction, by its name."""
    return "/" not in name and any(fnmatchcase(name.lower(), pattern) for pattern in MTP_FILES)


def _walk(directory: Path) -> Iterator[str]:
    count = 0
    for folder, folders, files in os.walk(directory):
        inside = Path(folder).relative_to(directory).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        if prefix.count("/") >= _MAX_FOLDERS:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            count += 1
            if count > _MAX_FILES:
                return
            if not name.startswith("."):
                yield prefix + name


def _is_weights(file: str) -> bool:
    def matches(patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(file.lower(), pattern) for pattern in patterns)

    return matches(_WEIGHTS) and not matches(_NO_MODEL) and not is_data(file)


def _shorten(names: Collection[str]) -> str:
    shown = ", ".join(one_line(name, 80) for name in list(names)[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
