"""Servers that drip, never end or send wrong kinds: `bake verify --endpoint` ends soon, with one line."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from contextlib import suppress

import pytest
from test_endpoint import BAKED, directory  # noqa: F401  a fixture

from bake.cli.main import main
from bake.errors import EndpointError
from bake.io import bounded_http
from bake.io.bounded_http import exchange

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
GOOD = json.dumps({"choices": [{"text": BAKED}]}).encode()


def read_request(client):
    """Read a request to its end: a socket that is closed with something unread resets the connection."""
    stream = client.makefile("rb")
    length = 0
    while line := stream.readline().strip().lower():
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    stream.read(length)


@pytest.fixture
def raw():
    """Return a function: pieces of bytes, or pauses in seconds → the URL that sends them."""
    listeners = []

    def start(*pieces, forever=None):
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve():
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    threading.Thread(target=send, args=(client,), daemon=True).start()

        def send(client):
            with suppress(OSError), client:
                read_request(client)
                for piece in pieces:
                    if isinstance(piece, bytes):
                        client.sendall(piece)
                    else:
                        time.sleep(piece)
                while forever:
                    client.sendall(forever)
                    time.sleep(0.02 if len(forever) == 1 else 0)
                client.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.fixture
def refusal(directory, capsys, monkeypatch):  # noqa: F811
    """Return a function: URL → the one line that `bake verify --endpoint` ends with."""
    monkeypatch.setattr(bounded_http, "FINISH", 0.4)

    def call(url):
        code = main(["verify", str(directory), "--endpoint", url, "--model", "m"])
        out, err = capsys.readouterr()
        assert (code, out) == (1, "")
        (line,) = err.splitlines()
        return line

    return call


@pytest.mark.parametrize(
    ("sent", "forever"),
    [
        ((), b"H"),
        ((b"HTTP/1.1 200 OK\r\n",), b"X"),
        ((HEAD,), b" "),
        ((b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n",), b" "),
        ((b"HTTP/1.1 500 No\r\nContent-Length: 900000\r\n\r\n",), b"x"),
        ((b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 9\r\n\r\n",), b"x"),
    ],
    ids=["status", "headers", "body", "chunk", "refusal", "redirect"],
)
def test_a_server_that_drips_is_left(raw, refusal, sent, forever):
    url = raw(*sent, forever=forever)
    if b"302" in b"".join(sent):
        assert "sends the request on to" in refusal(url)  # Nine bytes come soon.
    else:
        assert "no whole answer within the time allowed" in refusal(url)


def test_a_body_without_end_is_left(raw, refusal, monkeypatch):
    monkeypatch.setattr(bounded_http, "FINISH", 30)
    assert "more than 1000000 bytes" in refusal(raw(HEAD, forever=b" " * 65536))


def test_a_server_may_think_before_its_first_byte(raw, monkeypatch):
    monkeypatch.setattr(bounded_http, "FINISH", 0.4)
    url = raw(0.8, HEAD, GOOD)
    assert exchange(url, until=time.monotonic() + 20, max_bytes=1000).body == GOOD
    with pytest.raises(EndpointError, match="within the time allowed"):
        exchange(url, until=time.monotonic() + 0.2, max_bytes=1000)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (gzip.compress(GOOD, mtime=0), "is not UTF-8"),
        (b'{"choices": [{"text": "\\ud83d"}]}', "surrogate"),
        (b'{"choices": [], "choices": 1}', "twice"),
        (b"[" * 100_000, "nested"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"choices": NaN}', "NaN"),
        (b'"text"', "a JSON string"),
        (b"null", "null"),
        (b'{"choices": {"0": 1}}', "OpenAI-compatible"),
        (b'{"choices": [7]}', "OpenAI-compatible"),
        (b'{"choices": [{"text": ["a"]}]}', "OpenAI-compatible"),
        (b"", "is not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_kind_of_answer_is_one_line(raw, refusal, body, says):
    assert says in refusal(raw(HEAD, body))


@pytest.mark.parametrize(
    "sent",
    [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 999999 \r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500],
    ids=["nothing", "ssh", "status", "headers"],
)  # fmt: skip
def test_what_is_no_http_is_one_line(raw, refusal, sent):
    assert "no server answers at" in refusal(raw(sent))


def test_a_redirect_is_not_followed(raw, refusal):
    aim = raw(HEAD, GOOD)
    line = refusal(raw(f"HTTP/1.1 307 Elsewhere\r\nLocation: {aim}\r\n\r\n".encode()))
    assert f"sends the request on to {aim}" in line
    assert "follows nobody elsewhere" in line


def test_a_servers_names_steer_no_terminal(raw, refusal):
    answer = {"error": {"message": "no \x1b[2Jmodel\n# m‮"}}
    line = refusal(raw(b"HTTP/1.1 404 Not Found\r\n\r\n" + json.dumps(answer).encode()))
    assert "\x1b" not in line
    assert "‮" not in line
    assert "refuses model 'm' (HTTP 404: no ?[2Jmodel # m?)" in line
