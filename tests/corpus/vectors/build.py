"""Vectors as others write them, and as an attacker would: 128 wide, 9 layers, as bake-demo is."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

WIDTH, LAYERS = 128, 9
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("code-was-run",))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def each(name: str, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> dict:
    vectors = {layer: noise(LAYERS, WIDTH)[layer] for layer in range(LAYERS)}
    return {name.format(at): change(at, v) if change else v for at, v in vectors.items()}


def first(factor: float) -> Callable[[int, torch.Tensor], torch.Tensor]:
    return lambda layer, vector: vector * factor if layer == 0 else vector


TENSORS: dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None]] = {
    "zero-layer": (each("direction.{}", first(0.0)), None),
    "noise-layer": (each("direction.{}", first(1e-17)), None),
    "all-zero": (each("direction.{}", lambda _, vector: vector * 0), None),
    "nan": (each("direction.{}", first(float("nan"))), None),
    "infinite": ({"direction": torch.full((WIDTH,), float("inf"))}, None),
    "whole-numbers": ({"direction": torch.arange(WIDTH)}, None),
    "complex": ({"direction": torch.complex(noise(WIDTH), noise(WIDTH))}, None),
    "empty-tensor": ({"direction": torch.zeros(0)}, None),
    "layer-keys": (each("layer_{}"), None),
    "lone": ({"refusal": noise(WIDTH)}, None),
    "matrix": ({"vectors": noise(LAYERS, WIDTH)}, None),
    "positions": ({"vectors": noise(3, LAYERS, WIDTH)}, None),
    "lens": (each("blocks.{}.hook_resid_post"), None),
    "lens-before": (
        {f"blocks.{layer}.hook_resid_pre": noise(WIDTH) for layer in range(1, 9)},
        None,
    ),
    "lens-inside": (each("blocks.{}.attn.hook_z"), None),
    "escapes": ({"direction": noise(WIDTH)}, {"site": "\x1b[2Jmlp_out"}),
    "projecting": ({"direction": noise(WIDTH)}, {"mode": "project"}),
    "ablating": ({"vector": noise(WIDTH)}, {"operation": "ablate"}),
    "elsewhere": ({"vector": noise(WIDTH)}, {"hook_point": "blocks.3.attn.hook_z"}),
    "adapter": ({"layers.0.q_proj.lora_A.weight": noise(4, WIDTH)}, None),
    "model": ({"model.layers.0.mlp.down_proj.weight": noise(WIDTH, WIDTH)}, None),
}


def tensors(folder: Path) -> None:
    for name, (values, metadata) in TENSORS.items():
        save_file(
            {k: v.contiguous() for k, v in values.items()}, folder / f"{name}.safetensors", metadata
        )


def headers(folder: Path) -> None:
    vector = {"dtype": "F32", "shape": [WIDTH], "data_offsets": [0, 4 * WIDTH]}
    entry = json.dumps(vector)
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    data = b"\1" * 4 * WIDTH
    many = {f"tensor {number}": nothing for number in range(60_000)}
    notes = {f"key {number}": "" for number in range(60_000)}
    put(folder / "many-names.safetensors", json.dumps(many))
    put(
        folder / "many-notes.safetensors",
        json.dumps({"__metadata__": notes, "direction": vector}),
        data,
    )
    put(
        folder / "twice.safetensors",
        f'{{"direction": {entry}, "direction": {entry}}}',
        data,
    )
    put(folder / "nested.safetensors", "[" * 100_000)
    put(
        folder / "half-a-character.safetensors",
        f'{{"__metadata__": {{"a": "\\ud800"}}, "direction": {json.dumps(vector)}}}',
        data,
    )
    (folder / "huge.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (folder / "short.safetensors").write_bytes(b"abc")
    (folder / "empty.safetensors").write_bytes(b"")


def put(path: Path, header: str, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data)


def arrays(folder: Path) -> None:
    layers = {f"layer_{layer}": noise(WIDTH).numpy() for layer in range(LAYERS)}
    np.savez(folder / "side.npz", **layers, accuracies=np.zeros(7))
    np.savez(folder / "objects.npz", a=np.array([{}], dtype=object))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(folder / "texts.npy", np.array(["a", "b"]))
    np.save(folder / "positions.npy", noise(2, LAYERS, WIDTH).numpy())
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        head = str({"descr": "<f4", "fortran_order": False, "shape": (2_000_000_000,)})
        start = b"\x93NUMPY\1\0" + struct.pack("<H", len(head) + 1) + head.encode() + b"\n"
        archive.writestr("a.npy", start + bytes(50_000_000))


def pickles(folder: Path) -> None:
    (folder / "code.pt").write_bytes(pickle.dumps(Code()))
    torch.save({0: Code()}, folder / "code-in-an-archive.pt")
    torch.save({"directions": {0: noise(WIDTH)}, "mode": "projection"}, folder / "projecting.pt")
    torch.save([1, "a"], folder / "list.pt")


def pointers(folder: Path) -> None:
    for ending in ("safetensors", "gguf", "npz", "pt"):
        (folder / f"pointer.{ending}").write_text(POINTER)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")


def control_vectors(folder: Path) -> None:
    for name, fields in {
        "plain": {},
        "adding": {"glp.mode": "add"},
        "projecting": {"glp.mode": "project"},
        "clamping": {"glp.mode": "clamp"},
        "ablating": {"controlvector.mode": "ablate"},
        "elsewhere": {"glp.hook_point": "attn_out"},
    }.items():
        control_vector(folder / f"{name}.gguf", fields)
    control_vector(folder / "model.gguf", {}, "llama")
    (folder / "cut.gguf").write_bytes((folder / "plain.gguf").read_bytes()[:100])
    (folder / "noise.gguf").write_bytes(b"GGUF" + b"\xff" * 100)


def control_vector(
    path: Path, fields: Mapping[str, str], architecture: str = "controlvector"
) -> None:
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in fields.items():
        writer.add_string(key, value)
    for layer in range(1, LAYERS):
        writer.add_tensor(f"direction.{layer}", noise(WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
