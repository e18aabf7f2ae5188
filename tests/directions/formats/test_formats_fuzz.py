"""Damaged files of every format: a Direction or one line, never a crash, never absurd memory.

Seeded: bytes flipped, files cut short, numbers overwritten with enormous ones, where headers lie.
"""

import io
import random
import resource
import zipfile

import numpy as np
import pytest
import torch

from bake.directions.direction import Direction
from bake.directions.direction_file import direction_bytes
from bake.directions.formats import read_direction
from bake.directions.formats.gguf_writer import write_gguf
from bake.errors import BakeError

ROUNDS = 240
MEMORY = 300_000  # kB of growth; nothing here has more than a few thousand bytes
LARGE = (0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**40, 2**62, 2**64 - 1)
ROWS = {layer: torch.arange(1.0, 9) + layer for layer in range(1, 4)}


def made(save, *arguments, **options):
    stream = io.BytesIO()
    save(*[stream if argument is ... else argument for argument in arguments], **options)
    return stream.getvalue()


ARRAYS = {f"layer_{layer}": vector.numpy() for layer, vector in ROWS.items()}
SOUND = {
    "v.gguf": write_gguf(ROWS, "llama"),
    "v.safetensors": direction_bytes(Direction(ROWS, "mlp_out", {"method": "mean"})),
    "v.npy": made(np.save, ..., np.stack(list(ARRAYS.values()))),
    "v.npz": made(np.savez, ..., **ARRAYS),
    "compressed.npz": made(np.savez_compressed, ..., **ARRAYS),
    "v.pt": made(torch.save, ROWS, ...),
    "old.pt": made(torch.save, ROWS, ..., _use_new_zipfile_serialization=False),
}


def damage(content, source):
    """Return the content damaged in one of four ways."""
    data = bytearray(content)
    kind = source.randrange(4)
    head = min(len(data), 400) if source.random() < 0.7 else len(data)
    if kind == 0:
        return bytes(data[: source.randrange(len(data))])
    if kind == 1:
        for _ in range(source.randint(1, 8)):
            data[source.randrange(head)] ^= 1 << source.randrange(8)
    elif kind == 2:
        number = source.choice(LARGE)
        width = 4 if number < 2**32 else 8
        at = source.randrange(head)
        data[at : at + width] = number.to_bytes(width, "little")
    else:
        at = source.randrange(head)
        data[at:at] = source.randbytes(source.randint(1, 16))
    return bytes(data)


def damage_file(name, source):
    """Return a sound file damaged; of an archive half the time a part, with sizes and sums made good."""
    content = SOUND[name]
    if content[:2] != b"PK" or source.random() < 0.5:
        return damage(content, source)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        kind = archive.infolist()[0].compress_type
    inner = [part for part in parts if part.endswith((".pkl", ".npy"))] + [source.choice([*parts])]
    chosen = source.choice(inner)
    parts[chosen] = damage(parts[chosen], source)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    return stream.getvalue()


@pytest.mark.parametrize("name", SOUND)
def test_damaged_files_never_do_harm(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(SOUND[name])
    if name == "old.pt":
        with pytest.raises(BakeError):
            read_direction(path)
    else:
        assert read_direction(path).hidden_size == 8
    source = random.Random(name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages = []
    for _ in range(ROUNDS):
        path.write_bytes(damage_file(name, source))
        try:
            found = read_direction(path)
        except BakeError as error:
            messages.append(str(error))
        else:
            assert isinstance(found, Direction)
            for vector in found.vectors.values():
                assert abs(float(vector.double().norm()) - 1) < 1e-5
    assert len(messages) > ROUNDS // 10  # So the damage is felt.
    assert all("\n" not in message and len(message) < 1000 for message in messages)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
