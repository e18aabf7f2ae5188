"""One request to a server that nobody vouches for: bounded in time and size, and never sent elsewhere.

A socket's timeout starts again with every byte, so that a server could keep a client for ever. Here the
whole exchange, from the name's lookup to the last byte, has one deadline.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from bake.errors import EndpointError


@dataclass(frozen=True)
class Answer:
    """What a server answered, whatever it was. location: where a redirect points."""

    status: int
    body: bytes
    location: str | None = None


class UnreachableError(EndpointError):
    """No whole answer came from a server."""


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an answer: it could lead to another host, to http or to a file."""

    def redirect_request(self, *_: Any) -> None:
        return None


def exchange(
    url: str,
    *,
    until: float,
    max_bytes: int,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """POST a body, or GET without one, and return the answer, a refusal or a redirect included.

    until: the deadline, in seconds of `time.monotonic`. Raises UnreachableError, with the reason alone,
    where there is no server, no sound answer, more than `max_bytes` of it, or the deadline passes.
    """
    answers: queue.Queue[Answer | Exception] = queue.Queue()
    remaining = until - time.monotonic()

    def run() -> None:
        try:
            answers.put(_exchange(url, body, headers or {}, max(remaining, 0.001), max_bytes))
        except Exception as error:  # It is raised again on the thread that waits.
            answers.put(error)

    # A thread of its own can be left behind, whatever it waits for.
    threading.Thread(target=run, daemon=True).start()
    try:
        found = answers.get(timeout=max(remaining, 0))
    except queue.Empty:
        raise UnreachableError("no whole answer within the time allowed") from None
    if isinstance(found, OSError | HTTPException | ValueError):
        reason = getattr(found, "reason", None) or found
        raise UnreachableError(str(reason) or type(found).__name__)
    if isinstance(found, Exception):
        raise found
    if len(found.body) > max_bytes:
        raise UnreachableError(f"it sends more than {max_bytes} bytes")
    return found


def _exchange(
    url: str, body: bytes | None, headers: Mapping[str, str], timeout: float, max_bytes: int
) -> Answer:
    request = Request(url, body, dict(headers))
    try:
        with build_opener(_NoRedirects).open(request, timeout=timeout) as answer:
            return Answer(answer.status, answer.read(max_bytes + 1))
    except HTTPError as error:
        with error:
            return Answer(error.code, error.read(max_bytes)[:max_bytes], error.headers["Location"])
