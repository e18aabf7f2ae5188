"""What an export will cost, from headers alone: bytes, memory, forward passes, a rough time.

No weight is read and nothing is written. Bytes are exact, because they come from the same layout that
the writer executes; memory is what the weights need; time is arithmetic on the assumptions below,
which are told with it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bake.anatomy.base import Base, open_base
from bake.anatomy.insertion import Insertion
from bake.checkpoint.checkpoint import Checkpoint
from bake.checkpoint.layout import Layout, plan_layout
from bake.checkpoint.loading import build_on_meta
from bake.checkpoint.names import DiskNames
from bake.checkpoint.writer import check_links
from bake.errors import BakeError
from bake.io.safetensors import TensorEntry
from bake.pipeline.decision import read_pairs_and_trial
from bake.pipeline.given_directions import fit_directions, read_directions
from bake.pipeline.recipe import Recipe
from bake.pipeline.thin import check_base, check_route
from bake.plan.destination import choose_destination
from bake.plan.plan import outline_edits
from bake.proof.equivalence import MAX_PROMPTS, MAX_TOKENS
from bake.proof.observation import CANARIES, CANARY_TOKENS, LOGIT_BYTES, NEW_TOKENS
from bake.proof.observation import WRITTEN as SAMPLE_TOKENS
from bake.proof.prove import EQUIVALENCE_PROMPTS
from bake.proof.samples import SAMPLES
from bake.sweeps.auto import CONTINUED, WRITTEN
from bake.sweeps.measured_law import MEASURED_LAW, NEUTRAL_TOKENS
from bake.sweeps.measurements import Texts
from bake.texts.prompts import BATCH_TOKENS, read_prompts

CHARACTERS_PER_TOKEN = 4  # of English text, by the usual tokenizers
RUNTIME_BYTES = 600_000_000  # torch, transformers and the interpreter
FLOPS_PER_CORE = 2e10  # float32, of one CPU core
READ_BYTES_PER_SECOND = 1e9
COPY_BYTES_PER_SECOND = 2.2e9
HASH_BYTES_PER_SECOND = 0.34e9  # of one core
START_SECONDS = 15  # imports, the twin, the plain process

# Kinds of output files as the user knows them, by the writer's action.
_KINDS = {
    "kept": "kept",
    "patched": "patched",
    "rewritten": "rewritten",
    "added": "new",
    "originals": "originals",
}


@dataclass(frozen=True)
class FileCost:
    """Output files of one kind: kept whole, patched, rewritten, new, or originals of patched ones."""

    kind: str
    files: int
    bytes: int


@dataclass(frozen=True)
class PassCost:
    """A stage's forward passes: each uses every weight once. tokens: positions computed, in all."""

    stage: str
    forwards: int
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """What an export would cost. Sizes in bytes, times in seconds; `assumptions` are sentences.

    write_bytes: what the disk must take, where it cannot clone; cloned_bytes: the share of it that a
    file system with clones does not write. memory_whole, memory_streamed: peak with the model in
    memory in float32, and layer by layer.
    """

    base: Mapping[str, Any]
    architecture: str
    site: str
    route: str
    slots: str
    config_changes: Mapping[str, Any]
    layers: tuple[int, ...]
    parameters: int
    base_bytes: int
    files: tuple[FileCost, ...]
    shards: str
    write_bytes: int
    cloned_bytes: int
    upload_bytes: int
    memory_whole: int
    memory_streamed: int
    passes: tuple[PassCost, ...]
    seconds_whole: float
    seconds_streamed: float
    assumptions: tuple[str, ...]

    @property
    def forwards(self) -> int:
        """How often every weight is used."""
        return sum(entry.forwards for entry in self.passes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {**asdict(self), "forwards": self.forwards}


def estimate_cost(recipe: Recipe) -> Estimate:
    """Estimate an export; the recipe needs no output, and no direction where there is none yet.

    Raises a BakeError for what the export itself would refuse, as far as headers tell.
    """
    recipe.check_choices()
    if recipe.ablate:
        raise BakeError("--estimate does not count what --ablate rewrites: leave one of them out")
    directions = read_directions(recipe)
    base = open_base(recipe.model, recipe.revision, headers_only=True)
    given = fit_directions(base, directions, recipe)
    checkpoint = base.checkpoint
    check_links(checkpoint, recipe.shards)
    destination = choose_destination(base.anatomy, recipe.place, given)
    route, layers = destination.route, destination.layers
    if recipe.thin:
        check_base(base)
        check_route(base.anatomy, route)
    edits = outline_edits(checkpoint, base.anatomy, route, layers, dtype=recipe.dtype)
    layout = plan_layout(checkpoint, edits)
    files = _count_files(layout)
    sizes = {entry.kind: entry.bytes for entry in files}
    kept = sizes.get("kept", 0)
    upload = sum(sizes.values()) + _companion_bytes(checkpoint)
    elsewhere = kept if recipe.thin or recipe.shards != "copy" else 0
    written = sum(sizes.values()) - elsewhere
    passes = tuple(_count_passes(base, recipe, layers))
    beside = 0 if recipe.thin else LOGIT_BYTES + _activation_bytes(base)
    parameters = sum(entry.elements for entry in checkpoint.tensors.values())
    largest = parameters + (
        len(layers) * route.rewriter.layer_parameters
        if isinstance(route.rewriter, Insertion)
        else 0
    )
    shared = _disk_seconds(written, 0 if recipe.thin else sum(sizes.values()))
    tokens = sum(entry.tokens for entry in passes)
    computing = 2 * largest * tokens / (FLOPS_PER_CORE * _cores())
    reading = sum(entry.forwards for entry in passes) * checkpoint.size / READ_BYTES_PER_SECOND
    return Estimate(
        base=base.to_dict(),
        architecture=base.anatomy.architecture,
        site=route.site,
        route=route.route,
        slots=route.describe(),
        config_changes=dict(route.flags),
        layers=tuple(layers),
        parameters=parameters,
        base_bytes=checkpoint.size,
        files=files,
        shards="none" if recipe.thin else recipe.shards,
        write_bytes=written,
        cloned_bytes=0 if elsewhere else kept,
        upload_bytes=upload - (kept if recipe.thin else 0),
        memory_whole=RUNTIME_BYTES + (0 if recipe.thin else 4 * largest + beside),
        memory_streamed=RUNTIME_BYTES
        + (0 if recipe.thin else 4 * _streamed_parameters(base) + beside),
        passes=passes,
        seconds_whole=shared + computing,
        seconds_streamed=shared + max(computing, reading),
        assumptions=_explain(),
    )


def _count_files(layout: Layout) -> tuple[FileCost, ...]:
    found = {
        kind: [file.size for file in layout.files if file.action == action]
        for action, kind in _KINDS.items()
    }
    return tuple(FileCost(kind, len(sizes), sum(sizes)) for kind, sizes in found.items() if sizes)


def _count_passes(base: Base, recipe: Recipe, layers: Sequence[int]) -> list[PassCost]:
    """Count the forward passes of every stage that needs the model; none of a thin bake."""
    if recipe.thin:
        return []
    passes = []
    share = (max(layers) + 1) / base.anatomy.layer_count  # both stop after the last layer needed
    pairs, trial_texts = read_pairs_and_trial(recipe)
    if pairs:
        texts = [text for pair in pairs for text in pair.texts()]
        passes.append(_measuring("direction", texts, share))
    if recipe.calibration is None:
        passes.append(_measuring("calibrate", read_prompts(recipe.prompts), share))
    if trial_texts is not None and recipe.law == MEASURED_LAW:
        passes.append(_measuring_law(trial_texts, len(layers)))
    if trial_texts is not None and recipe.given_multiplier is None:
        passes.append(_choosing(trial_texts))
    return [*passes, _proving(base)]


def _measuring(stage: str, texts: Sequence[str], share: float) -> PassCost:
    tokens = sum(_tokens(text) for text in texts)
    return PassCost(stage, math.ceil(tokens / BATCH_TOKENS), round(tokens * share))


def _choosing(texts: Texts) -> PassCost:
    """The passes of `--multiplier auto`, as it mostly goes: base and push, neutral text twice."""
    read = [pair.prompt + text for pair in texts.pairs for text in (pair.positive, pair.negative)]
    read += 2 * texts.neutral
    openings = texts.openings[:CONTINUED]
    tokens = sum(_tokens(text) for text in read)
    # A continuation is read once while it is written, and once to score it.
    tokens += sum(2 * (_tokens(opening) + WRITTEN) for opening in openings)
    return PassCost("choose the multiplier", len(read) + 2 * (WRITTEN + 1), 2 * tokens)


def _measuring_law(texts: Texts, layers: int) -> PassCost:
    """The passes of `--law measured`: every text by the base and with every layer pushed by itself."""
    pairs = [pair.prompt + text for pair in texts.pairs for text in (pair.positive, pair.negative)]
    tokens = sum(map(_tokens, pairs))
    tokens += sum(min(_tokens(text), NEUTRAL_TOKENS) for text in texts.neutral)
    forwards = len(pairs) + len(texts.neutral)
    return PassCost("measure the law", forwards, (layers + 1) * tokens)


def _proving(base: Base) -> PassCost:
    """The proof's passes, as `bake.proof.observation` makes them.

    Samples are counted, though a model that is streamed writes none.
    """
    texts = [
        min(_tokens(text), MAX_TOKENS) for text in read_prompts(EQUIVALENCE_PROMPTS)[:MAX_PROMPTS]
    ]
    few = texts[:CANARIES]  # what runs in the stored dtype are given
    batches = math.ceil(sum(texts) / max(1, LOGIT_BYTES // (4 * _vocabulary(base.checkpoint))))
    batched = 4  # base, hooked, baked as stored, baked with exact slots: in float32
    single = 3  # plain process, base, hooked: in the stored dtype, one text at a time
    padded = 6  # hooked and baked: on the right, on the left, on the left without position ids
    continued = 3  # greedy continuations: reference, plain process, base in the stored dtype
    chosen = 2  # given continuations read in one forward a prompt
    forwards = (
        batched * batches
        + (single + 1) * len(few)  # once more in float32, to compare padded batches with
        + padded
        + continued * NEW_TOKENS
        + chosen * CANARIES
        + 2 * SAMPLE_TOKENS  # by base and bake
    )
    tokens = (
        batched * sum(texts)
        + (single + 1) * sum(few)
        + padded * len(few) * max(few)
        + (continued + chosen) * CANARIES * (CANARY_TOKENS + NEW_TOKENS)
        + 2 * SAMPLES * (CANARY_TOKENS + SAMPLE_TOKENS)
    )
    return PassCost("prove", forwards, tokens)


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN) + 1


def _vocabulary(checkpoint: Checkpoint) -> int:
    """The vocabulary's size as the config states it; a usual one where it does not."""
    config: Mapping[str, Any] = checkpoint.config
    nested = config.get("text_config")
    size = config.get("vocab_size") or (
        nested.get("vocab_size") if isinstance(nested, Mapping) else None
    )
    return int(size) if isinstance(size, int) else 100_000


def _streamed_parameters(base: Base) -> int:
    """The parameters of the largest decoder layer, and of everything outside the layers."""
    sizes = {
        layer: sum(entry.elements for entry in entries)
        for layer, entries in _by_layer(base).items()
    }
    outside = sizes.pop(None, 0)
    return outside + max(sizes.values(), default=0)


def _activation_bytes(base: Base) -> int:
    """What a layer computes for one batch: about four activations as wide as its widest matrix."""
    inside = [
        size
        for layer, entries in _by_layer(base).items()
        if layer is not None
        for entry in entries
        for size in entry.shape[-2:]
    ]
    return 4 * 4 * BATCH_TOKENS * max(inside, default=0)


def _by_layer(base: Base) -> dict[str | None, list[TensorEntry]]:
    """The tensors of each decoder layer, by its number on disk; None for those outside."""
    names = DiskNames(base.checkpoint, build_on_meta(base.anatomy.config))
    pattern = re.compile(rf"{re.escape(base.anatomy.structure.layers)}\.(\d+)\.")
    numbers: dict[str, str] = {}
    for parameter in (*names.renamed, *names.fusions):
        found = pattern.match(parameter)
        if found:
            numbers |= dict.fromkeys(names.sources(parameter), found[1])
    layers: dict[str | None, list[TensorEntry]] = {}
    for name, entry in base.checkpoint.tensors.items():
        layers.setdefault(numbers.get(name), []).append(entry)
    return layers


def _companion_bytes(checkpoint: Checkpoint) -> int:
    names = ("config.json", *checkpoint.companions)
    return sum((checkpoint.source / name).stat().st_size for name in names)


def _disk_seconds(written: int, hashed: int) -> float:
    return (
        START_SECONDS
        + written / COPY_BYTES_PER_SECOND
        + hashed / (HASH_BYTES_PER_SECOND * _cores())
    )


def _cores() -> int:
    return os.cpu_count() or 1


def _explain() -> tuple[str, ...]:
    return (
        f"{CHARACTERS_PER_TOKEN} characters a token",
        f"{_cores()} CPU cores at {FLOPS_PER_CORE / 1e9:.0f} GFLOP/s in float32, every parameter "
        "used for every token (a mixture of experts needs fewer)",
        f"layer by layer: all weights read from disk for every forward pass, at "
        f"{READ_BYTES_PER_SECOND / 1e9:.0f} GB/s",
        f"copies at {COPY_BYTES_PER_SECOND / 1e9:.1f} GB/s, hashes at "
        f"{HASH_BYTES_PER_SECOND / 1e9:.2f} GB/s a core, the Hub's cache knows none",
        "no GPU, no download, no upload",
    )
