"""The edits of an ablation: every parameter that writes, as it lies on disk, without the subspace.

The twin is edited by this as the real checkpoint is. Matrices are read, computed and written one at a
time, when the writer comes to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from bake.anatomy.flags import with_flags
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.edits import Transform
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.errors import CheckpointError, UnsupportedError
from bake.io.safetensors import torch_dtype
from bake.writes import Removal, Write, WriteMap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_FLOATS = ("F32", "F16", "BF16")


def erase(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    writes: WriteMap,
    ablation: Removal,
    code: str | None = None,
) -> tuple[tuple[Transform, ...], Mapping[str, Any]]:
    """Return the edits of an ablation and the config keys that it changes.

    code: the safetensors dtype in which the edited tensors are stored; None keeps each one's.
    Raises CheckpointError where the checkpoint lacks a tensor, UnsupportedError where one is not stored as
    floats or holds something else too.
    """
    untying = writes.untying if ablation.scope == "stream" else None
    flags = untying.flags if untying else {}
    names = DiskNames(checkpoint, build_on_meta(with_flags(config, flags)))
    width = int(config.get_text_config().hidden_size)
    edits: dict[str, Transform] = {}
    for write, layer in writes.of(ablation):
        for source in _sources(checkpoint, names, write):
            _check_axis(checkpoint, source, write, width)
            copies: tuple[str, ...] = ()
            if untying and write.parameter == untying.embedding and not names.find(untying.head):
                copies = (names.new_name(untying.head),)
            edit = partial(ablation.edit, write=write, layer=layer)
            edits[source] = _edit(checkpoint, source, edit, copies=copies, code=code)
    if untying:
        _check_head(checkpoint, names, untying.head, untying.embedding)
    return tuple(edits.values()), flags


def _sources(checkpoint: Checkpoint, names: DiskNames, write: Write) -> tuple[str, ...]:
    """Return the tensors on disk that a parameter is made of, each of which is its own alone."""
    found = names.sources(write.parameter) or (names.existing(write.parameter),)
    fusion = names.fusions.get(write.parameter)
    if fusion is not None and any(
        other is fusion for name, other in names.fusions.items() if name != write.parameter
    ):
        raise UnsupportedError(
            f"{write.parameter} is stored together with other parameters ({found[0]}), so it cannot be "
            "edited by itself"
        )
    for name in found:
        if checkpoint.entry(name).dtype not in _FLOATS:
            raise UnsupportedError(
                f"{name} is stored as {checkpoint.entry(name).dtype}; ablate a base in "
                "float32, float16 or bfloat16"
            )
    return found


def _check_axis(checkpoint: Checkpoint, source: str, write: Write, width: int) -> None:
    """Raise CheckpointError for a stored tensor whose axis of the residual stream is not as wide."""
    shape = checkpoint.entry(source).shape
    if len(shape) < -write.axis or shape[write.axis] != width:
        raise CheckpointError(
            f"{source} has shape {tuple(shape)}, and its axis {write.axis} should be the residual "
            f"stream's {width}; is this checkpoint the architecture that its config names?"
        )


def _edit(
    checkpoint: Checkpoint,
    name: str,
    edit: Callable[..., torch.Tensor],
    *,
    copies: tuple[str, ...],
    code: str | None,
) -> Transform:
    shape = tuple(checkpoint.entry(name).shape)
    dtype = torch_dtype(code or checkpoint.entry(name).dtype)

    def function(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        kept = {copy: tensor.to(dtype) for copy in copies}
        return {name: edit(tensor, dtype=dtype), **kept}

    return Transform(name, dict.fromkeys((name, *copies), shape), function, dtype=code)


def _check_head(checkpoint: Checkpoint, names: DiskNames, head: str, embedding: str) -> None:
    """Raise CheckpointError for a stored head that the base does not use and the output would."""
    import torch

    stored = names.find(head)
    if stored is None:
        return
    original = checkpoint.read(names.existing(embedding))
    if not torch.equal(checkpoint.read(stored), original):
        raise CheckpointError(
            f"{stored} is stored beside the embedding that the base uses in its place, with other values; "
            "save the base once with transformers, which leaves it out"
        )


Edits = Callable[[Checkpoint], tuple[tuple[Transform, ...], Mapping[str, Any]]]
