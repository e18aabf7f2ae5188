"""Tensors read one at a time, from disk or by ranges from the Hub, and the bytes counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.remote import read_remote_range
from bake.io.safetensors import DTYPES, TensorEntry, decode_tensor, read_range

if TYPE_CHECKING:
    import torch


def read_part(checkpoint: Checkpoint, entry: TensorEntry, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a tensor, from disk or by a ranged read from the Hub."""
    path = checkpoint.directory / entry.file
    if path.is_file():
        return bytes(read_range(path, entry.start + start, entry.start + stop))
    return read_remote_range(
        checkpoint.model_id,
        checkpoint.revision,
        entry.file,
        entry.start + start,
        entry.start + stop,
    )


def equal_files(base: Checkpoint, baked: Checkpoint) -> set[tuple[str, str]]:
    """Return pairs (base's file, baked file) whose SHA-256 is known and the same."""
    known = {baked.known_sha256(file): file for file in baked.shards}
    pairs = ((file, known.get(base.known_sha256(file))) for file in base.shards)
    return {(file, other) for file, other in pairs if other and base.known_sha256(file)}


class RangedTensors:
    """The tensors of a checkpoint, of which no more is read than is asked for. read_bytes: so far."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.read_bytes = 0

    def is_here(self, name: str) -> bool:
        """Tell whether the file that a tensor lies in is on disk."""
        return (self.checkpoint.directory / self.checkpoint.entry(name).file).is_file()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype; raise CheckpointError for one that is not there."""
        entry = self.checkpoint.entry(name)
        return self._decode(entry, 0, entry.size, tuple(entry.shape))

    def rows(self, name: str, count: int) -> torch.Tensor:
        """Return at most `count` rows from the middle of a tensor; a vector whole."""
        entry = self.checkpoint.entry(name)
        if len(entry.shape) < 2 or entry.shape[0] <= count:
            return self.read(name)
        start = (entry.shape[0] - count) // 2
        bits = (entry.elements // entry.shape[0]) * DTYPES[entry.dtype][0]
        return self._decode(
            entry, start * bits // 8, (start + count) * bits // 8, (count, *entry.shape[1:])
        )

    def _decode(
        self, entry: TensorEntry, start: int, stop: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        self.read_bytes += stop - start
        data = bytearray(read_part(self.checkpoint, entry, start, stop))
        return decode_tensor(data, entry.dtype, shape)
