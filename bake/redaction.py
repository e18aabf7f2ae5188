"""What must not be said: the Hugging Face token, passwords in addresses; and, in published files, where
something lies on this machine.
"""

from __future__ import annotations

import os
import re
import sys

_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_LOCAL_PATH = re.compile(
    r"(?:file://|(?<![\w/:.~\\]))(?:~?/[^\s/\"',;]+/|[A-Za-z]:[\\/])[^\s\"',;]*"
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def without_secrets(text: str) -> str:
    """Return `text` without the token, and with `https://host` for `https://user:password@host`."""
    for token in sorted(_tokens(), key=len, reverse=True):
        text = text.replace(token, "(the token)")
    return _CREDENTIALS.sub("", text)


def _tokens() -> set[str]:
    """The tokens that this process can have sent: a stored one only where the Hub's client is loaded."""
    found = {os.environ.get(name, "").strip() for name in _VARIABLES}
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import get_token

        found.add(get_token() or "")
    return found - {""}


def without_local_paths(text: str) -> str:
    """Return `text` without absolute paths, which name a person's machine; addresses stay."""
    return _LOCAL_PATH.sub("(local path)", text)
