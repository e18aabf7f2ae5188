"""Which files of a checkpoint travel with it byte for byte: tokenizer, licence and so on.

The rule is a list of what does *not* travel, because nobody can list every tokenizer's files:
weights in any form (an engine could prefer another copy over the steered one), its code, its card
and its pictures, training leftovers, bake's own files, hidden files. `config.json` and the index
are rewritten, so they are not companions either. The same patterns filter a download and a
directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from bake.checkpoint.own_code import CODE_FILES

CHAT_TEMPLATES = "additional_chat_templates"  # the one subdirectory that transformers reads

NOT_CARRIED = (
    # weights, and copies of them that an engine could prefer
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *(
        "*.ckpt",
        "*.ckpt.*",
        "*.h5",
        "*.h5.index.json",
        "*.msgpack",
        "*.msgpack.index.json",
        "*.gguf",
    ),
    *(
        "*.ggml",
        "*.onnx",
        "*.onnx_data*",
        "*.ot",
        "*.npz",
        "*.npy",
        "*.tflite",
        "*.mlmodel",
        "*.nemo",
    ),
    *("*.pkl", "*.pickle", "*.distcp", "*.imatrix", "*.dduf", "*.keras", "adapter_*"),
    # what describes such copies, and training leftovers
    *("params.json", "checklist.chk", "trainer_state*", "optimizer*", "scheduler*", "rng_state*"),
    "events.out.*",
    # code: what was proven is transformers' own class
    *CODE_FILES,
    # the base's card, its pictures, archives
    *(
        "README*",
        "readme*",
        "*.png",
        "*.jpg",
        "*.jpeg",
        "*.gif",
        "*.svg",
        "*.webp",
        "*.mp4",
        "*.pdf",
    ),
    *("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z"),
    # rewritten by bake, or bake's own where the base is a baked model
    *("config.json", "bake.json"),
    # hidden files, caches, half-finished downloads
    *(".*", "*.incomplete", "*.lock", "*.tmp", "*~"),
)


def is_companion(name: str) -> bool:
    """Whether file `name`, relative to the checkpoint with forward slashes, is carried over."""
    *folders, file = name.split("/")
    if folders and folders != [CHAT_TEMPLATES]:
        return False
    return not any(fnmatchcase(file, pattern) for pattern in NOT_CARRIED)


def find_companions(directory: Path) -> tuple[str, ...]:
    """The names of the files in `directory` that are carried over, sorted."""
    return tuple(sorted(name for name in _files(directory) if is_companion(name)))


def _files(directory: Path) -> Iterable[str]:
    for folder in (directory, directory / CHAT_TEMPLATES):
        if folder.is_dir():
            paths = (path for path in folder.iterdir() if path.is_file())
            yield from (path.relative_to(directory).as_posix() for path in paths)
