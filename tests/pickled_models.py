"""Checkpoints as an older transformers left them: weights in pickles."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def pickle_weights(source: Path, target: Path, shards: int = 1, legacy: bool = False) -> Path:
    """The checkpoint `source` with its weights as an older transformers left them, ties included."""
    target.mkdir()
    for path in source.iterdir():
        if not path.name.startswith("model"):
            (target / path.name).write_bytes(path.read_bytes())
    tensors = {
        n: t for path in sorted(source.glob("*.safetensors")) for n, t in load_file(path).items()
    }
    config = json.loads((source / "config.json").read_text())
    if config["tie_word_embeddings"]:
        name = next(
            name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))
        )
        tensors["lm_head.weight"] = tensors[name]
    options = {"_use_new_zipfile_serialization": not legacy}
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin", **options)
        return target
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        held = names[number::shards]
        torch.save({name: tensors[name] for name in held}, target / file, **options)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target
