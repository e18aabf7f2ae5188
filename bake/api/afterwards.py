"""What is done with a bake: verify, publish, diff, reproduce, rescale, undo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import find_bake, is_path
from bake.errors import BakeError, UsageError
from bake.lifecycle.verify import Verification
from bake.lifecycle.verify import verify as verify_directory
from bake.models.streaming import choose_placement
from bake.options.documentation import documented
from bake.options.others import DETECT, DIFF, GGUF, PUBLISH, REPRODUCE, RESCALE, UNDO, VERIFY

if TYPE_CHECKING:
    from bake.detection.findings import Detection
    from bake.engines.endpoint import EndpointCheck
    from bake.hub import Publication
    from bake.lifecycle.branches import PublishedStrengths
    from bake.lifecycle.diff import Difference
    from bake.lifecycle.reproduce import Reproduction
    from bake.lifecycle.rescale import Rescaled, Undone
    from bake.llama_cpp.make import Gguf


@documented(VERIFY)
def verify(
    directory: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Verification:
    """Prove a baked directory or Hub id again, from its bake.json and its base.

    A thin or rescaled bake that is here is recorded as proven; a published one is only read.
    """
    placement = choose_placement(device_map, max_memory)
    path = Path(directory)
    if path.is_dir() or is_path(str(directory)):
        return verify_directory(path, base, placement)
    found = find_bake(str(directory), revision)
    published = (str(directory), found.name)
    return verify_directory(found, base, placement, record=False, published=published)


def verify_endpoint(
    url: str, model: str | None, *, directory: str | Path = ".", revision: str | None = None
) -> EndpointCheck:
    """Ask an OpenAI-compatible server for the canary of a bake: baked, base or neither.

    directory: a baked directory, or a Hub id, of which only bake.json is fetched.
    """
    from bake.checkpoint.download import download_record
    from bake.engines.endpoint import check_endpoint
    from bake.pipeline.record import read_canary, read_forks

    if not model:
        raise UsageError("--endpoint needs --model NAME, what the server calls the model")
    path = Path(directory)
    if not path.is_dir() and not is_path(str(directory)):
        path = download_record(str(directory), revision)
    return check_endpoint(url, model, read_canary(path), read_forks(path))


@documented(PUBLISH)
def publish(
    directory: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
    verify_remote: bool = False,
    strengths: Sequence[float] = (),
    base: str | None = None,
) -> Publication | PublishedStrengths:
    """Publish a baked directory to the Hub in one commit, and compare what arrived.

    What the base's repository has already is copied there.
    """
    from bake.pipeline.publishing import publish_directory

    if strengths and (revision or create_pr or verify_remote):
        raise BakeError(
            "--strengths makes branches of its own, each proven before it is sent: leave --revision, "
            "--create-pr and --verify-remote out"
        )
    if verify_remote and create_pr:
        raise BakeError(
            "--verify-remote is of what was published, not of a pull request: leave one out"
        )
    if base and not (strengths or verify_remote):
        raise BakeError("--base is for the proofs of --strengths and --verify-remote: leave it out")
    options: dict[str, Any] = {
        "private": not public,
        "commit_message": commit_message,
        "accept_licence": accept_licence,
    }
    if strengths:
        from bake.lifecycle.branches import publish_strengths

        return publish_strengths(Path(directory), repo_id, strengths, base=base, **options)
    found = publish_directory(
        Path(directory), repo_id, revision=revision, create_pr=create_pr, **options
    )
    if not verify_remote:
        return found
    from bake.lifecycle.published import verify_published

    return verify_published(found, base=base, revision=revision, accept_licence=accept_licence)


@documented(DIFF)
def diff(
    base: str | Path,
    baked: str | Path,
    *,
    base_revision: str | None = None,
    revision: str | None = None,
) -> Difference:
    """Say which tensors, config keys and files of two checkpoints differ, and by how much."""
    from bake.lifecycle import diff as compare

    return compare.diff(str(base), str(baked), base_revision=base_revision, revision=revision)


@documented(DETECT)
def detect(
    suspect: str | Path,
    *,
    base: str | Path | None = None,
    against: Sequence[str | Path] = (),
    measure: str | Path | None = None,
    output: str | Path | None = None,
    undo: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Detection:
    """Read pushes and ablations out of a checkpoint's weights, whatever it says of itself."""
    from bake.detection.detect import detect as look

    return look(
        str(suspect),
        base=None if base is None else str(base),
        revision=revision,
        base_revision=base_revision,
        against=[str(path) for path in against],
        output=None if output is None else str(output),
        undo=None if undo is None else str(undo),
        measures=None if measure is None else str(measure),
    )


@documented(GGUF)
def gguf(
    model: str | Path,
    *,
    output: str | Path,
    quantize: str | None = None,
    llama_cpp: str | Path | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    base_revision: str | None = None,
) -> Gguf:
    """Write a bake as a GGUF file that was run in llama.cpp, and what Ollama and LM Studio want."""
    from bake.llama_cpp.make import make_gguf

    return make_gguf(
        str(model),
        Path(output),
        quantise=quantize,
        base=None if base is None else str(base),
        revision=revision,
        base_revision=base_revision,
        llama_cpp=None if llama_cpp is None else str(llama_cpp),
        overwrite=overwrite,
    )


@documented(REPRODUCE)
def reproduce(
    model: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    calibrate: str | bool = False,
) -> Reproduction:
    """Build a bake again from its bake.json and its base, and compare every file."""
    from bake.lifecycle import reproduce as reproduction

    return reproduction.reproduce(str(model), base=base, revision=revision, calibrate=calibrate)


@documented(RESCALE)
def rescale(directory: str | Path, *, multiplier: float) -> Rescaled:
    """Give a baked directory another strength, in place."""
    from bake.lifecycle import rescale as restoration

    return restoration.rescale(Path(directory), multiplier)


@documented(UNDO)
def undo(
    model: str | Path, *, output: str | Path, overwrite: bool = False, revision: str | None = None
) -> Undone:
    """Write the base of a bake, from the bake alone."""
    from bake.lifecycle import rescale as restoration

    return restoration.undo(str(model), Path(output), overwrite=overwrite, revision=revision)
