"""Names of a decoder's tensors on disk, and in a causal language model that is nothing but the decoder.

Conversions speak of the latter (`model.layers…`, `lm_head.weight`). A checkpoint of the base model alone
has no `model.`; in a multimodal wrapper the decoder has a place of its own, and on disk often another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bake.checkpoint.checkpoint import Checkpoint

STEM, HEAD, NORM = "model.", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class DecoderNames:
    """stem: what names on disk have for `model.`. head: the name of the language model head on disk.

    renamed: {part of a parameter's name: what the host's files have there}.
    """

    stem: str
    head: str
    renamed: Mapping[str, str]

    def parameter(self, name: str) -> str | None:
        """Return the parameter that a name on disk stands for; None for what is not the decoder's."""
        if name == self.head:
            return HEAD
        return STEM + name.removeprefix(self.stem) if name.startswith(self.stem) else None

    def disk(self, parameter: str) -> str:
        """Return the name on disk of a parameter."""
        if parameter == HEAD:
            return self.head
        for part, written in self.renamed.items():
            parameter = parameter.replace(part, written)
        return self.stem + parameter.removeprefix(STEM)


def find_names(
    checkpoint: Checkpoint, config: PreTrainedConfig, layers: str, renamed: Mapping[str, str]
) -> DecoderNames:
    """Find what a checkpoint calls its decoder. layers: the path of the list of decoder layers.

    Raises CheckpointError where the checkpoint lacks the decoder's last norm.
    """
    disk = DiskNames(checkpoint, build_on_meta(config))
    norm = NORM.removeprefix(STEM)
    stem = disk.existing(layers.removesuffix("layers") + norm).removesuffix(norm)
    return DecoderNames(stem, disk.find(HEAD) or HEAD, renamed)
