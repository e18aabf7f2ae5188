"""Tensors read one at a time, from disk or by ranges from the Hub, and the bytes counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING

from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.remote import read_remote_range
from bake.io.safetensors import DTYPES, TensorEntry, decode_tensor, read_range

if TYPE_CHECKING:
    import torch

CONNECTIONS = 16
GAP = 4096  # bytes between two ranges that one request brings
_COUNTING = Lock()


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
    """The tensors of a checkpoint, of which no more is read than is asked for. read_bytes: so far.

    What is known to be needed is fetched ahead, all at once: a request to the Hub takes longer than what it
    brings, and neighbours in a file share one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.read_bytes = 0
        self._ahead: dict[tuple[str, int, int], bytes] = {}

    def is_here(self, name: str) -> bool:
        """Tell whether the file that a tensor lies in is on disk."""
        return (self.checkpoint.directory / self.checkpoint.entry(name).file).is_file()

    def prefetch(self, names: Iterable[str], rows: int | None = None) -> None:
        """Fetch tensors from the Hub, or so many rows of each, for `read` and `rows`, and keep them.

        What lies on disk is left to be read when it is asked for.
        """
        by_file: dict[str, list[tuple[int, int]]] = {}
        for name in dict.fromkeys(names):
            if self.is_here(name):
                continue
            entry = self.checkpoint.entry(name)
            start, stop = self._span(entry, rows)[:2]
            if (
                stop > start
                and (entry.file, entry.start + start, entry.start + stop) not in self._ahead
            ):
                by_file.setdefault(entry.file, []).append((entry.start + start, entry.start + stop))
        runs = [
            (file, run) for file, spans in by_file.items() for run in _joined(sorted(set(spans)))
        ]
        if not runs:
            return
        with ThreadPoolExecutor(max_workers=CONNECTIONS) as pool:
            for found in pool.map(self._fetch, runs):
                self._ahead |= found

    def _fetch(
        self, run: tuple[str, Sequence[tuple[int, int]]]
    ) -> dict[tuple[str, int, int], bytes]:
        """Read neighbours of a file by one request."""
        file, spans = run
        first, last = spans[0][0], max(stop for _, stop in spans)
        checkpoint = self.checkpoint
        data = read_remote_range(checkpoint.model_id, checkpoint.revision, file, first, last)
        with _COUNTING:
            self.read_bytes += last - first
        return {(file, start, stop): data[start - first : stop - first] for start, stop in spans}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in its stored dtype; raise CheckpointError for one that is not there."""
        return self._decode(self.checkpoint.entry(name), None)

    def rows(self, name: str, count: int) -> torch.Tensor:
        """Return at most `count` rows from the middle of a tensor; a vector whole."""
        return self._decode(self.checkpoint.entry(name), count)

    @staticmethod
    def _span(entry: TensorEntry, count: int | None) -> tuple[int, int, tuple[int, ...]]:
        """Return [start, stop) in bytes of a tensor's middle rows, or of all of it, and their shape."""
        if count is None or len(entry.shape) < 2 or entry.shape[0] <= count:
            return 0, entry.size, tuple(entry.shape)
        first = (entry.shape[0] - count) // 2
        bits = (entry.elements // entry.shape[0]) * DTYPES[entry.dtype][0]
        return first * bits // 8, (first + count) * bits // 8, (count, *entry.shape[1:])

    def _decode(self, entry: TensorEntry, count: int | None) -> torch.Tensor:
        start, stop, shape = self._span(entry, count)
        held = self._ahead.get((entry.file, entry.start + start, entry.start + stop))
        if held is None:
            self.read_bytes += stop - start
            held = read_part(self.checkpoint, entry, start, stop)
        return decode_tensor(bytearray(held), entry.dtype, shape)


def _joined(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield runs of ascending byte ranges with gaps that are sooner read than asked for again."""
    run: list[tuple[int, int]] = []
    for span in spans:
        if run and span[0] - max(stop for _, stop in run) > GAP:
            yield run
            run = []
        run.append(span)
    if run:
        yield run
