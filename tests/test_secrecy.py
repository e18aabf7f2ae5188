"""No token and no password is said, whoever quotes it."""

import subprocess
import sys

import pytest
from loopback_hub import LoopbackHub, Reply, run_client
from publishing import REPO_ID, TOKEN, refusal, write_output
from test_road_to_the_hub import ROOT

from bake.errors import BakeError
from bake.hub import publish
from bake.progress import announce
from bake.secrecy import without_secrets


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
            ["-m", "bake.cli", *words, "--json"],
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
