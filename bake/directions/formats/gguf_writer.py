"""Writes a control vector for llama.cpp's `--control-vector`, with the `gguf` package (`[gguf]`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bake.directions.formats.gguf_reader import ARCHITECTURE
from bake.errors import DirectionError
from bake.io.work_directory import temporary_directory

if TYPE_CHECKING:
    import torch


def write_gguf(vectors: Mapping[int, torch.Tensor], model_hint: str) -> bytes:
    """Return a file with `direction.{l}`, F32, by layer, and the three keys that readers expect.

    vectors: {0-based layer ≥ 1: (hidden_size,)}; llama.cpp takes none for layer 0, which is refused.
    model_hint: llama.cpp's name of the architecture; it and repeng only show it. The same vectors give
    the same bytes. Raises DirectionError where the `gguf` package is missing.
    """
    try:
        import gguf
    except ImportError:
        raise DirectionError(
            "writing GGUF needs the gguf package; pip install 'bake-steering[gguf]'"
        ) from None
    if not vectors or min(vectors) < 1:
        raise DirectionError("a control vector has layers from 1 on; llama.cpp takes none for 0")
    with temporary_directory("bake-gguf-") as folder:
        path = folder / "vectors.gguf"  # The package writes to paths only.
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        # uint32, as repeng has it: cvector-generator's int32 is how its other numbering is recognised.
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(vectors))
        for layer in sorted(vectors):
            writer.add_tensor(f"direction.{layer}", vectors[layer].float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()
