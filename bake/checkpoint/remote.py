"""Headers of weights that stay on the Hub: the first bytes of each file, by ranged reads.

A header says everything of a tensor but its values, so that a plan, an estimate and a thin bake of a
model need a few megabytes of it and not its weights.

huggingface_hub's `parse_safetensors_file_metadata` reads the same bytes and keeps less: no file's size,
against which offsets are checked, and no order of keys; it reads all that a server sends that ignores
ranges, looks at no overlap or gap, and does not try again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bake.checkpoint.download import hub_errors_named
from bake.errors import CheckpointError
from bake.io.safetensors import PREFIX_BYTES, Header, header_length, parse_header

# Most headers fit, so that one request is enough.
_FIRST_BYTES = 128 * 1024
_CONNECTIONS = 8
# Where the Hub sent us for a file, by an address that is signed for an hour: asked for once, not for each
# range. It goes without the user's token.
_STORAGE: dict[tuple[str, str | None], tuple[str, float]] = {}
_REMEMBERED = 300.0  # seconds
_TOTAL = re.compile(r"bytes \d+-\d+/(\d+)")


def read_remote_headers(
    model_id: str, revision: str | None, files: Sequence[str]
) -> dict[str, Header]:
    """The headers of safetensors files in a repository on the Hub, {file: header}.

    Raises CheckpointError where the Hub refuses or a file is not sound.
    """
    with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
        headers = pool.map(lambda file: _read_remote_header(model_id, revision, file), files)
        return dict(zip(files, headers, strict=True))


def read_remote_range(
    model_id: str, revision: str | None, file: str, start: int, stop: int
) -> bytes:
    """Bytes [start, stop) of a file in a repository on the Hub.

    Raises CheckpointError where the Hub refuses or sends something else than was asked for.
    """
    data = bytearray()
    if stop > start:
        with _opened(model_id, revision, file, start, stop) as response:
            if response.status_code != 206 and start:
                raise CheckpointError(
                    f"{model_id}/{file}: the Hub answers with the whole file instead of a range: "
                    "download the model and give its directory."
                )
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= stop - start:
                    break
    if len(data) < stop - start:
        raise CheckpointError(f"{model_id}/{file} ended early on the Hub: try again.")
    return bytes(data[: stop - start])


def _read_remote_header(model_id: str, revision: str | None, file: str) -> Header:
    origin = f"{model_id}/{file}"
    start, size = _read_start(model_id, revision, file, _FIRST_BYTES)
    length = header_length(origin, start)
    if PREFIX_BYTES + length > len(start):
        start, size = _read_start(model_id, revision, file, PREFIX_BYTES + length)
    return parse_header(origin, file, start[PREFIX_BYTES:][:length], length, size)


def _read_start(model_id: str, revision: str | None, file: str, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a file, or all of a shorter one, and its size."""
    data = bytearray()
    with _opened(model_id, revision, file, 0, count) as response:
        size = _file_size(response)
        if size is None:
            raise CheckpointError(
                f"{model_id}/{file}: the Hub does not say how large it is: download the model and "
                "give its directory."
            )
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= count:  # a server that ignores ranges would send everything
                break
    return bytes(data[:count]), size


@contextmanager
def _opened(model_id: str, revision: str | None, file: str, start: int, stop: int) -> Iterator[Any]:
    """The Hub's answer to a request for bytes [start, stop)."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    own = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(library_name="bake-steering"), **own}
    place = (hf_hub_url(model_id, file, revision=revision), headers.get("authorization"))
    told, at = _STORAGE.get(place, ("", 0.0))
    if told and time.monotonic() - at < _REMEMBERED:
        with (
            hub_errors_named(model_id, revision),
            http_stream_backoff("GET", told, headers=own, follow_redirects=True) as response,
        ):
            if response.status_code == 206:
                yield response
                return
    with (
        hub_errors_named(model_id, revision),
        http_stream_backoff("GET", place[0], headers=headers, follow_redirects=True) as response,
    ):
        hf_raise_for_status(response)
        if response.status_code == 206 and response.history:
            _STORAGE[place] = str(response.url), time.monotonic()
        yield response


def _file_size(response: Any) -> int | None:
    if response.status_code == 206:
        total = _TOTAL.fullmatch(response.headers.get("Content-Range", ""))
        return int(total[1]) if total else None
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None
