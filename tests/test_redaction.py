"""No token and no password is said, whoever quotes it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN
from loopback_hub import LoopbackHub, Reply, run_client
from publishing import REPO_ID, TOKEN, refusal, write_output
from safetensors.torch import save_file

from bake import export
from bake.errors import BakeError
from bake.hub import publish
from bake.redaction import without_local_paths, without_secrets
from bake.support.progress import announce

ROOT = Path(__file__).parents[1]


def test_addresses_lose_their_passwords_and_texts_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for text, wanted in (
        ("'https://ada:hf_x@hub.example/ada/m'", "'https://hub.example/ada/m'"),
        ("http://hf_x@127.0.0.1:9", "http://127.0.0.1:9"),
        ("see https://hub.example/@ada and a@b", "see https://hub.example/@ada and a@b"),
        (f"Bearer {TOKEN}!", "Bearer (the token)!"),
    ):
        assert without_secrets(text) == wanted


def test_errors_and_announcements_hold_none(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert TOKEN not in str(BakeError(f"the proxy says {TOKEN}"))
    announce(f"asking http://ada:{TOKEN}@hub")
    assert TOKEN not in capsys.readouterr().err


@pytest.mark.parametrize("padding", [0, 280])
def test_a_hub_that_quotes_the_token_is_not_repeated(hub, tmp_path, padding):
    """Not its beginning either, where the quotation is cut."""

    def quoting(request):
        if request.path.startswith("/api/repos"):
            return Reply.json({"error": "x" * padding + TOKEN}, 400)
        return None

    hub.before_request = quoting
    message = refusal(publish, write_output(tmp_path / "out"), REPO_ID)
    assert TOKEN[:12] not in message


@pytest.mark.parametrize(
    "words",
    [
        ["publish", "out", REPO_ID],
        ["verify", REPO_ID],
        ["inspect", REPO_ID],
        ["undo", REPO_ID, "-o", "x"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_password_in_the_hubs_address_is_not_said(tmp_path, words, there):
    write_output(tmp_path / "out")
    with LoopbackHub() as hub:
        hub.add_user("ada", TOKEN)
        host = hub.url.removeprefix("http://") if there else "127.0.0.1:9"
        address = f"http://ada:hf_urlSecret@{host}"
        done = run_client(
            hub,
            ["-m", "bake.cli.main", *words, "--json"],
            tmp_path,
            TOKEN,
            PYTHONPATH=str(ROOT),
            HF_ENDPOINT=address,
        )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Secret" not in done.stdout + done.stderr


def test_an_error_needs_no_client_of_the_hub():
    code = "import sys, bake.errors as e; e.BakeError('x'); print('huggingface_hub' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"


def test_local_paths_go_and_addresses_stay():
    for text, wanted in (
        ("/home/ada/data.json", "(local path)"),
        ('{"model": "/home/ada/x", "b": 1}', '{"model": "(local path)", "b": 1}'),
        ("C:\\Users\\ada\\x and file:///home/ada", "(local path) and (local path)"),
        ("https://hub.example/ada/m, meta-llama/Llama-3.2-1B", None),
        ("α = m·μ_l/√d, and/or 1/2", None),
    ):
        assert without_local_paths(text) == (wanted or text)


def test_a_bake_does_not_say_where_anything_lay(make_model, prompts_file, tmp_path):
    """Another tool's direction file may name the machine that it was found on."""
    place = tmp_path / "planted-place"
    place.mkdir()
    metadata = {"site": "mlp_out", "model": str(place / "base"), "note": "from ada/base"}
    save_file({"direction": torch.ones(HIDDEN)}, place / "vector.safetensors", metadata)
    assert b"planted-place" in (place / "vector.safetensors").read_bytes()
    base, given = make_model(sharded=True), str(place / "vector.safetensors")
    export(str(base), output=place / "out", direction=given, prompts=prompts_file)
    for path in (place / "out").rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert b"planted-place" not in content, path.name
        assert str(base.parent).encode() not in content, path.name
    assert b"from ada/base" in (place / "out" / "direction.safetensors").read_bytes()
