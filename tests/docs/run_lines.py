"""Runs lines of the documentation one after the other in one process; prints a JSON line for each.

python run_lines.py LINES.json: [{"kind": "command" | "python", "text": …}]. A server that answers with the
canary of the bake in ./SmolLM2-135M-Instruct-formal stands for whatever serves on port 8000.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from bake.cli.main import main

BAKE = Path("SmolLM2-135M-Instruct-formal")


class Steered(BaseHTTPRequestHandler):
    """Answers every completion as the bake does."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        canary = json.loads((BAKE / "bake.json").read_text())["equivalence"]["canary"]
        body = json.dumps({"choices": [{"text": canary["baked"]}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


def run_command(line: str) -> int:
    """Return the exit code of a line such as "bake export …"."""
    try:
        return main(shlex.split(line, comments=True)[1:])
    except SystemExit as done:
        return int(done.code or 0)


def run_python(code: str, names: dict) -> int:
    """Run a block; return 1 where it raises."""
    try:
        exec(compile(code, "documentation", "exec"), names)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def run() -> None:
    """Run all lines of the file."""
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Steered)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    names: dict = {}
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        text = entry["text"].replace("http://localhost:8000", address)
        said = io.StringIO()
        start = time.monotonic()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run_command(text) if entry["kind"] == "command" else run_python(text, names)
        seconds = time.monotonic() - start
        result = {**entry, "code": code, "said": said.getvalue()[-3000:], "seconds": seconds}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run()
