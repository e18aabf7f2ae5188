"""The proof after arrival: a published repository, loaded by its id, does what the hooked base does.

A bake that was published unproven (a thin one) gets a second commit then: the card and `bake.json` that
say so.
"""

from __future__ import annotations

from dataclasses import replace

from bake.card.render import card_words_of_record
from bake.checkpoint.checkpoint import find_bake
from bake.hub.manifest import file_names
from bake.hub.publication import Publication, publish
from bake.io.work_directory import temporary_directory
from bake.lifecycle.verify import verify
from bake.models.streaming import Placement
from bake.pipeline.completion import record_proof
from bake.pipeline.record import read_result
from bake.support.progress import announce

MESSAGE = "Record that the published model was verified"


def verify_published(
    publication: Publication,
    *,
    base: str | None = None,
    revision: str | None = None,
    accept_licence: bool = False,
    placement: Placement | None = None,
) -> Publication:
    """Download what was published, prove it, and record the proof where the card says there is none.

    base, placement: as `verify` takes them; the other options as they were for `publish`. Raises
    EquivalenceError where the published model does not do what the hooked base does.
    """
    repo_id, commit = publication.repo_id, publication.commit
    directory = find_bake(repo_id, commit)
    found = verify(directory, base, placement, record=False, published=(repo_id, commit))
    found.equivalence.raise_if_failed()
    announce(
        f"{repo_id} at {commit[:12]} is proven: loaded by its id, it does what the hooked base does"
    )
    if publication.proven:
        return publication
    recorded = read_result(directory)
    with temporary_directory("bake-published-") as whole:
        for name in file_names(directory):
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).symlink_to((directory / name).resolve())
        record_proof(whole, recorded, found.equivalence, card_words_of_record(recorded))
        second = publish(
            whole,
            repo_id,
            private=publication.private,
            revision=revision,
            commit_message=MESSAGE,
            accept_licence=accept_licence,
        )
    return replace(
        second, copied=publication.copied, uploaded=publication.uploaded + second.uploaded
    )
