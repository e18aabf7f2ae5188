"""One request to a server that nobody vouches for: bounded in time and size, and never sent elsewhere.

A socket's timeout starts again with every byte, so that a server could keep a client for ever. Here the
whole exchange, from the name's lookup to the last byte, has one deadline; and a server that has begun to
answer, for which it may have had to load a model first, has to finish soon.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from bake.errors import EndpointError

FINISH = 10.0  # seconds from an answer's first byte to its last, which are one megabyte at most


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


class _Begun:
    """Puts itself on the queue, in an answer's place, when the first byte of one has come."""


def exchange(
    url: str,
    *,
    until: float,
    max_bytes: int,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """POST a body, or GET without one, and return the answer, a refusal or a redirect included.

    until: the deadline, in seconds of `time.monotonic`; FINISH after the first byte if that is sooner.
    Raises UnreachableError, with the reason alone, where there is no server, no sound answer, more than
    `max_bytes` of it, or the deadline passes.
    """
    told: queue.Queue[Answer | Exception | _Begun] = queue.Queue()
    remaining = max(until - time.monotonic(), 0.001)

    def run() -> None:
        request = Request(url, body, dict(headers or {}))
        try:
            told.put(_exchange(request, remaining, max_bytes, lambda: told.put(_Begun())))
        except Exception as error:  # It is raised again on the thread that waits.
            told.put(error)

    # A thread of its own can be left behind, whatever it waits for.
    threading.Thread(target=run, daemon=True).start()
    found: Answer | Exception | _Begun = _Begun()
    while isinstance(found, _Begun):
        try:
            found = told.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            raise UnreachableError("no whole answer within the time allowed") from None
        until = min(until, time.monotonic() + FINISH)
    if isinstance(found, OSError | HTTPException | ValueError):
        reason = getattr(found, "reason", None) or found
        raise UnreachableError(str(reason) or type(found).__name__)
    if isinstance(found, Exception):
        raise found
    if len(found.body) > max_bytes:
        raise UnreachableError(f"it sends more than {max_bytes} bytes")
    return found


def _exchange(
    request: Request, timeout: float, max_bytes: int, begun: Callable[[], None]
) -> Answer:
    handlers = _NoRedirects, *_watching(begun)
    try:
        with build_opener(*handlers).open(request, timeout=timeout) as answer:
            return Answer(answer.status, answer.read(max_bytes + 1))
    except HTTPError as error:
        with error:
            return Answer(error.code, error.read(max_bytes)[:max_bytes], error.headers["Location"])


def _watching(begun: Callable[[], None]) -> tuple[HTTPHandler, HTTPSHandler]:
    """Return urllib's handlers that call `begun` at the first byte of an answer."""

    class Watched(HTTPResponse):
        def begin(self) -> None:
            self.fp.peek(1)
            begun()
            super().begin()

    class Plain(HTTPConnection):
        response_class = Watched

    class Secure(HTTPSConnection):
        response_class = Watched

    class PlainHandler(HTTPHandler):
        def http_open(self, req: Request) -> HTTPResponse:
            return self.do_open(Plain, req)

    class SecureHandler(HTTPSHandler):
        def https_open(self, req: Request) -> HTTPResponse:
            return self.do_open(Secure, req)

    return PlainHandler(), SecureHandler()
