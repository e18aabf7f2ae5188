"""A base that has been opened and examined: what every command starts from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bake.anatomy import Anatomy, examine
from bake.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoint.licences import read_licence
from bake.checkpoint.quantization import check_quantization
from bake.errors import CheckpointError
from bake.io.shipped import DEMO_MODEL, DEMO_NAME, find_model
from bake.models.forward import LanguageModel, load_model, read_config
from bake.models.streaming import Placement
from bake.support.timing import Stopwatch
from bake.texts.prompts import load_tokenizer
from bake.texts.protocols import Tokenizer


@dataclass(frozen=True)
class Base:
    """A base that has been opened and examined: what every command starts from."""

    checkpoint: Checkpoint
    anatomy: Anatomy

    def to_dict(self) -> dict[str, Any]:
        """Return what names the base in `bake.json`: never a local path.

        A local base is named by its directory and by a hash of what its headers and config say.
        """
        if self.checkpoint.source.resolve() == DEMO_MODEL.resolve():
            return {"id": DEMO_NAME, "revision": None}
        identity = {"id": self.checkpoint.model_id, "revision": self.checkpoint.revision}
        if self.checkpoint.revision:
            return identity
        return {**identity, "headers_sha256": self.checkpoint.headers_sha256}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer. Raises CheckpointError where it has none that loads and runs no code."""
        return load_tokenizer(self.checkpoint.directory)

    @cached_property
    def licence(self) -> dict[str, Any]:
        """What the base's card says of its licence, see `licences`; unreadable, it is announced."""
        return read_licence(self.checkpoint.source, self.checkpoint.companions)

    def stat_files(self) -> list[tuple[str, int, int]]:
        """Return name, bytes and time (ns) of every file of the checkpoint: what tells that one changed."""
        files = sorted(path for path in self.checkpoint.source.iterdir() if path.is_file())
        stats = [(path.name, path.stat()) for path in files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def open_base(
    model: str,
    revision: str | None = None,
    clock: Stopwatch | None = None,
    *,
    headers_only: bool = False,
) -> Base:
    """Open a checkpoint and examine its architecture, on headers and the twin alone.

    headers_only: weights that are on the Hub stay there.
    """
    clock = clock or Stopwatch()
    with clock.stage("checkpoint"):
        checkpoint = open_checkpoint(
            find_model(model), revision=revision, headers_only=headers_only
        )
        check_quantization(checkpoint.config, checkpoint.model_id, checkpoint.directory)
    with clock.stage("anatomy"):
        anatomy = examine(read_config(checkpoint.directory))
    return Base(checkpoint, anatomy)


def load_base(base: Base, placement: Placement | None = None) -> LanguageModel:
    """Load the base; refuse one whose weights are incomplete, which transformers fills at random."""
    checkpoint, tokenizer = base.checkpoint, base.tokenizer  # the cheap part first
    loaded = load_model(checkpoint.directory, placement=placement)
    missing = loaded.report["missing_keys"] + loaded.report["mismatched_keys"]
    if missing:
        raise CheckpointError(
            f"{checkpoint.model_id} lacks weights that its architecture needs ({missing[0]}); "
            f"transformers would fill them at random, so it cannot be measured"
        )
    return LanguageModel(
        loaded.model,
        loaded.report,
        loaded.device,
        loaded.weights,
        structure=base.anatomy.structure,
        tokenizer=tokenizer,
    )
