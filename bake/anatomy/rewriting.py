"""Rewriting: the same function as another stock checkpoint, so that slots exist where the base has none.

Two routes rewrite: `host` (the weights in another architecture) and `insert` (an extra stock layer).
Both speak of names on disk, because that is what an edit names; a rewriter is proven on the twin by
writing the twin to disk and rewriting that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from bake.checkpoint.edits import Edit
from bake.sites import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from bake.checkpoint.checkpoint import Checkpoint


@dataclass(frozen=True)
class Rewritten:
    """A base in another stock form, before any push: it computes what the base computes.

    edits: on names on disk; what none names is kept. config_changes: {dotted key: value or REMOVED}.
    slots: {decoder layer of the base: slots}, in parameter names of the new form; each is an `Add`
    among the edits, whose tensor is what the slot holds without a push. names: {a slot's key: name on
    disk} of slots that are called otherwise there, and of the factors behind slots that have one.
    """

    edits: tuple[Edit, ...]
    config_changes: Mapping[str, Any]
    slots: Mapping[int, tuple[Slot, ...]]
    names: Mapping[str, str] = field(default_factory=dict)


class Rewriter(Protocol):
    """Turns a base into another stock form. Frozen: it is part of a route and is compared and printed."""

    @property
    def name(self) -> str:
        """What it turns the base into, in a word or two: `llama`, `extra layers (A)`."""

    @property
    def lossless(self) -> bool:
        """Whether every weight keeps its stored value, so that no rounding comes in."""

    def describe(self) -> str:
        """Say in a phrase how the route works and what it costs, for `bake inspect`."""

    def rewrite(
        self,
        checkpoint: Checkpoint,
        config: PreTrainedConfig,
        layers: Sequence[int],
        dtype: str | None = None,
    ) -> Rewritten:
        """Return the rewritten base with slots for the decoder layers `layers`.

        config: the checkpoint's own. dtype: the safetensors code in which the whole checkpoint is
        stored; None keeps each tensor's. Reads headers only: weights are decoded when the writer
        executes a Transform. Raises CheckpointError where a tensor that must be there is not.
        """
