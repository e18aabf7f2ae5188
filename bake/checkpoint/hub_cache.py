"""What a directory is called: by its Hub id where it is a snapshot in the Hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

COMMIT_SHA = re.compile(r"[0-9a-f]{40}")


def identify(directory: Path) -> tuple[str, str | None]:
    """Return (id, commit sha) of a directory: the Hub's of a snapshot, else its name and None."""
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        sha = directory.name if COMMIT_SHA.fullmatch(directory.name) else None
        return "/".join(repository.split("--")[1:]), sha
    return directory.name, None
