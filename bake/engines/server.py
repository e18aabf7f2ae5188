"""One OpenAI-compatible server: JSON in, JSON out, and one line for whatever it does instead.

Nothing that it sends is trusted: answers are bounded in size and time, nobody is followed elsewhere, and
what it says goes through one line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bake.errors import EndpointError
from bake.io.bounded_http import UnreachableError, exchange
from bake.io.foreign_json import parse_json
from bake.redaction import without_secrets
from bake.support.text import one_line

MAX_ANSWER = 1_000_000  # bytes
SHOWN = 5  # model names
_NO_SUCH_PATH = ("not found", "method not allowed", "no reason given")


class RefusedError(EndpointError):
    """The server is there and said no."""


@dataclass(frozen=True)
class Server:
    """A server and what it calls the model.

    url: with or without `/v1`. option: what the user gave the address with. key: sent as a bearer token.
    """

    url: str
    model: str
    option: str
    key: str | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(
                f"{self.url} is no http address; give one such as http://localhost:8000/v1"
            )

    @property
    def name(self) -> str:
        """The address, fit to be printed."""
        return without_secrets(self.url)

    def address(self, path: str) -> str:
        """Return the whole address of a path such as "completions"."""
        root = self.url.rstrip("/")
        return f"{root}/{path}" if root.endswith("/v1") else f"{root}/v1/{path}"

    def ask(self, path: str, body: Mapping[str, Any], until: float) -> dict[str, Any]:
        """POST JSON, the model's name with it, and return the answer's.

        until: the deadline, in seconds of `time.monotonic`. Raises RefusedError with what the server said,
        EndpointError where it says nothing sound.
        """
        url = self.address(path)
        try:
            answer = exchange(
                url,
                until=until,
                max_bytes=MAX_ANSWER,
                body=json.dumps({"model": self.model, **body}).encode(),
                headers=self._headers,
            )
        except UnreachableError as error:
            raise EndpointError(
                f"no server answers at {url} ({one_line(error)}); start it, or correct {self.option}"
            ) from None
        if answer.location is not None and 300 <= answer.status < 400:
            raise EndpointError(
                f"the server at {url} sends the request on to {one_line(answer.location)}; bake follows "
                f"nobody elsewhere: give that address as {self.option} if you trust it"
            )
        if answer.status >= 300:
            raise RefusedError(self._explain(answer.status, _detail(answer.body), url, until))
        return _parse(answer.body, url)

    @property
    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"Content-Type": "application/json", **key}

    def _explain(self, status: int, detail: str, url: str, until: float) -> str:
        known = self._models(until)
        # Servers of one model take any name, and refuse for another reason.
        about_it = status in (404, 422) or "model" in detail.lower()
        if known and self.model not in known and about_it:
            shown = [one_line(name) for name in known[:SHOWN]]
            names = ", ".join(shown) + (", …" if len(known) > SHOWN else "")
            return (
                f"the server at {url} has no model {self.model!r} (HTTP {status}); it has {names}"
            )
        if status in (404, 405) and detail.lower() in _NO_SUCH_PATH:
            kind = "completions endpoint, not only chat"
            if url.endswith("chat/completions"):
                kind = "chat completions endpoint"
            return f"{url} does not exist on this server (HTTP {status}: {detail}); bake needs its {kind}"
        return f"the server at {url} refuses model {self.model!r} (HTTP {status}: {detail})"

    def _models(self, until: float) -> list[str]:
        """Return the names that the server lists; none where it lists nothing."""
        url = self.address("models")
        try:
            answer = exchange(url, until=until, max_bytes=MAX_ANSWER, headers=self._headers)
            entries = _parse(answer.body, url).get("data")
        except EndpointError:
            return []
        listed = entries if isinstance(entries, list) else []
        names = [entry.get("id") for entry in listed if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str)]


def first_choice(answer: Mapping[str, Any], url: str) -> dict[str, Any]:
    """Return the first of an answer's choices; raise EndpointError where there is none."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise EndpointError(
            f"{url} answers with something else than a completion; is it OpenAI-compatible?"
        )
    return choice


def _parse(body: bytes, url: str) -> dict[str, Any]:
    values: dict[str, Any] = parse_json(
        body, f"the answer of {url}", error=EndpointError, remedy="is it OpenAI-compatible?"
    )
    return values


def _detail(body: bytes) -> str:
    """Return the one line that an error's body holds."""
    try:
        values = _parse(body, "")
        found = values.get("error", values.get("detail", values))
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except EndpointError:
        text = body.decode(errors="replace")
    return one_line(text) or "no reason given"
