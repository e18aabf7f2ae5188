"""Publishing to the loopback Hub: what arrives, what is refused, and where the token goes."""

import json
import shutil
import socket
import threading
from pathlib import Path
from textwrap import dedent

import pytest
from huggingface_hub import constants
from loopback_hub import Reply, StoredFile, run_client
from publishing import FILES, FINE_TOKEN, READ_TOKEN, REPO_ID, TOKEN, refusal, write_output

from bake.hub import access, check_access, publish, verify_arrival

# huggingface_hub's own upload of LFS files uses an argument that its HTTP library is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def output(tmp_path):
    return write_output(tmp_path / "output")


def test_publish_end_to_end_in_fresh_processes(hub, output, tmp_path):
    """As a user does it: settings from the environment, twice; then as anybody downloads it."""
    (output / ".cache").mkdir()
    (output / ".cache" / "notes").write_text("not for the Hub")
    process = run_client(
        hub,
        dedent(f"""
            import json, sys
            from pathlib import Path
            from bake.hub import check_access, publish, verify_arrival
            assert "huggingface_hub" not in sys.modules
            before = check_access("{REPO_ID}")
            first = publish(Path("output"), "{REPO_ID}")
            second = publish(Path("output"), "steered")
            verify_arrival(Path("output"), "{REPO_ID}", first.commit)
            assert "torch" not in sys.modules
            print(json.dumps([value.to_dict() for value in (before, first, second)]))
        """),
        tmp_path,
        token=TOKEN,
        PYTHONPATH=str(ROOT),
    )
    assert process.returncode == 0, process.stderr
    before, first, second = json.loads(process.stdout)
    assert before == {"repo_id": REPO_ID, "exists": False, "private": True, "user": "ada"}

    assert hub.repos[REPO_ID].private is True
    assert [commit.title for commit in hub.commits(REPO_ID)] == [
        "Publish the baked model",
        "initial commit",
    ]
    expected = {**FILES, "bake.json": (output / "bake.json").read_bytes()}
    stored = {name: body for name, body in hub.files(REPO_ID).items() if name != ".gitattributes"}
    assert stored == expected
    assert first == {
        "repo_id": REPO_ID,
        "url": f"{hub.url}/{REPO_ID}",
        "commit": hub.commits(REPO_ID)[0].oid,
        "files": sorted(expected),
        "private": True,
        "bytes": sum(map(len, expected.values())),
        "already_there": False,
        "copied": [],
        "uploaded": sum(map(len, expected.values())),
        "pull_request": None,
        "proven": True,
    }
    assert second == {**first, "already_there": True, "uploaded": 0}

    # The token goes to the Hub in one header, and nowhere else.
    assert any(r.headers.get("authorization") == f"Bearer {TOKEN}" for r in hub.requests)
    assert any(request.host == "storage" for request in hub.requests)
    for request in hub.requests:
        authorization = request.headers.pop("authorization", "")
        assert not (request.host == "storage" and authorization)
        sent = repr((request.path, request.query, request.headers)).encode() + request.body
        assert TOKEN.encode() not in sent
    assert TOKEN not in process.stdout + process.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(TOKEN.encode() not in path.read_bytes() for path in written)
    assert TOKEN.encode() not in b"".join(hub.files(REPO_ID).values())


def test_the_next_bake_replaces_the_last_one_in_one_commit(hub, output, tmp_path):
    first = publish(output, REPO_ID)
    hub.add_files(REPO_ID, {".gitignore": b"*.log\n"})
    sent = hub.received_lfs_bytes
    files = {**FILES, "model-00002-of-00002.safetensors": b"PUSH" * 100}
    del files["figures/dose.png"]
    again = write_output(tmp_path / "again", files)
    second = publish(again, REPO_ID, commit_message="Push harder")
    titles = [commit.title for commit in hub.commits(REPO_ID)]
    assert titles == ["Push harder", "Add files", "Publish the baked model", "initial commit"]
    assert set(hub.files(REPO_ID)) == {*files, "bake.json", ".gitattributes", ".gitignore"}
    assert hub.received_lfs_bytes - sent == 400  # only the shard that changed
    verify_arrival(output, REPO_ID, first.commit)
    assert "is not what was sent" in refusal(verify_arrival, output, REPO_ID, second.commit)


def test_visibility_is_asked_for_and_never_widened(hub, output):
    assert publish(output, "lab/open", private=False).private is False
    assert hub.repos["lab/open"].private is False
    assert "--public" in refusal(check_access, "lab/open")
    assert "--public" in refusal(publish, output, "lab/open")
    hub.create_repo("lab/hidden", private=True)
    assert publish(output, "lab/hidden", private=False).private is True


def test_a_branch_is_made_when_there_is_none(hub, output):
    published = publish(output, REPO_ID, revision="strong")
    assert published.url == f"{hub.url}/{REPO_ID}/tree/strong"
    assert hub.commits(REPO_ID, "strong")[0].oid == published.commit
    assert set(hub.files(REPO_ID)) == {".gitattributes"}
    assert publish(output, REPO_ID, revision="strong").already_there


def test_somebody_elses_files_are_not_mixed_in(hub, output):
    hub.create_repo(REPO_ID, private=True)
    hub.add_files(REPO_ID, {"README.md": b"# soon\n"})
    assert check_access(REPO_ID).exists is True
    hub.add_files(REPO_ID, {"pytorch_model.bin": b"other"})
    assert "pytorch_model.bin" in refusal(check_access, REPO_ID)
    assert "pytorch_model.bin" in refusal(publish, output, REPO_ID)
    assert len(hub.commits(REPO_ID)) == 3
    assert hub.received_lfs_bytes == 0


def test_a_repository_that_is_not_as_asked_gets_nothing(hub, output):
    """Between the check and the commit anything may happen; what is then there decides."""

    def somebody_is_faster(request, private, files):
        if request.path != "/api/repos/create":
            return None
        hub.create_repo(REPO_ID, private=private)
        hub.add_files(REPO_ID, files)
        return Reply.json({"url": f"{hub.url}/{REPO_ID}"})

    hub.before_request = lambda request: somebody_is_faster(request, False, {})
    assert "is public" in refusal(publish, output, REPO_ID)
    del hub.repos[REPO_ID]
    hub.before_request = lambda request: somebody_is_faster(request, True, {"theirs.txt": b"1"})
    assert "theirs.txt" in refusal(publish, output, REPO_ID)
    assert hub.received_lfs_bytes + hub.received_regular_bytes == 0


def test_only_what_was_verified_is_sent(hub, output, tmp_path):
    def spoiled(name):
        shutil.copytree(output, tmp_path / name)
        return tmp_path / name

    tampered = spoiled("tampered")
    shard = tampered / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    message = refusal(publish, tampered, REPO_ID)
    assert "model-00001-of-00002.safetensors was changed" in message
    assert f"bake verify {tampered}" in message

    added = spoiled("added")
    (added / "extra.bin").write_bytes(b"extra")
    assert "extra.bin was added" in refusal(publish, added, REPO_ID)

    lacking = spoiled("lacking")
    (lacking / "direction.safetensors").unlink()
    assert "direction.safetensors is missing" in refusal(publish, lacking, REPO_ID)

    for name in ("config.json", "bake.json", "README.md"):
        unfinished = spoiled(f"without_{name}")
        (unfinished / name).unlink()
        assert f"has no {name}" in refusal(publish, unfinished, REPO_ID)

    failed = write_output(tmp_path / "failed", equivalence={"passed": False})
    assert "no passed equivalence" in refusal(publish, failed, REPO_ID)
    unchecked = write_output(tmp_path / "unchecked", equivalence=None)
    assert "bake verify" in refusal(publish, unchecked, REPO_ID)
    assert "not a directory" in refusal(publish, tmp_path / "none", REPO_ID)
    assert hub.requests == []


def test_tokens(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_nobodysSecret")
    assert "does not accept" in refusal(check_access, REPO_ID)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "can only read" in refusal(check_access, REPO_ID)
    monkeypatch.setenv("HF_TOKEN", FINE_TOKEN)
    assert check_access(REPO_ID).user == "ada"
    assert check_access("club/steered").exists is False
    for cut_short in ("hf_Secret…", "hf_Secret\x01", "hf_ Secret"):
        monkeypatch.setenv("HF_TOKEN", cut_short)
        assert "characters that no token has" in refusal(check_access, REPO_ID)
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(check_access, REPO_ID)
    assert "no Hugging Face token" in message
    assert "HF_TOKEN" in message


def test_names_and_namespaces(hub, monkeypatch):
    assert check_access("steered").repo_id == REPO_ID
    assert check_access("lab/steered").repo_id == "lab/steered"
    for namespace in ("museum", "bob"):
        message = refusal(check_access, f"{namespace}/steered")
        assert "ada, lab" in message
    asked = len(hub.requests)
    for malformed in ("", "a/b/c", "ada/has space", "ada/..", "ada/", "https://huggingface.co/a/b"):
        assert "not a repository id" in refusal(check_access, malformed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(check_access, REPO_ID)
    assert len(hub.requests) == asked


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    given_up = threading.Event()

    def wait(request):
        given_up.wait(60)

    hub.before_request = wait
    monkeypatch.setattr(access, "REACH_TIMEOUT", 0.1)
    assert "cannot be reached (ReadTimeout)" in refusal(check_access, REPO_ID)
    given_up.set()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    message = refusal(check_access, REPO_ID)
    assert f"{endpoint} cannot be reached (ConnectError)" in message


@pytest.mark.parametrize(
    ("name", "stored", "difference"),
    [
        ("config.json", StoredFile(b'{"model_type": "lLama"}\n'), "has the hash"),
        ("direction.safetensors", StoredFile(bytes(64), is_lfs=True), "has the hash"),
        ("direction.safetensors", StoredFile(bytes(63), is_lfs=True), "has 63 bytes there"),
        ("direction.safetensors", None, "is missing"),
        ("stray.json", StoredFile(b"{}"), "is there too"),
    ],
)
def test_a_corrupted_arrival_is_noticed(hub, output, name, stored, difference):
    def corrupt_after_the_commit(request):
        if "/tree/" in request.path and len(hub.commits(REPO_ID)) > 1:
            files = hub.commits(REPO_ID)[0].files
            if stored is None:
                files.pop(name, None)
            else:
                files[name] = stored

    hub.before_request = corrupt_after_the_commit
    message = refusal(publish, output, REPO_ID)
    assert f"{name} {difference}" in message
    assert hub.commits(REPO_ID)[0].oid[:12] in message


def test_what_the_hub_refuses_becomes_one_line(hub, output, tmp_path):
    def somebody_commits_first(request):
        if "/commit/" in request.path:
            hub.add_files(REPO_ID, {"late.txt": b"late"})

    hub.before_request = somebody_commits_first
    message = refusal(publish, output, REPO_ID)
    assert "run the same command again" in message
    assert "commit has happened since" in message
    assert "config.json" not in hub.files(REPO_ID)

    def answering(part, status, host="hub"):
        def before_request(request):
            if part in request.path and request.host == host:
                return Reply.json({"error": "no room"}, status)
            return None

        hub.before_request = before_request
        return refusal(publish, output, "ada/other")

    assert "may not write to ada/other (no room)" in answering("/repos/create", 403)
    message = answering("/ada/other/", 400, host="storage")
    assert "Error while uploading" in message
    assert "status 400: no room" in message
    assert "failed with status 500 (no room)" in answering("/commit/", 500)

    hub.before_request = None
    unreadable = {**FILES, "README.md": b"---\na list, not a mapping\n---\n"}
    message = refusal(publish, write_output(tmp_path / "unreadable", unreadable), "ada/other")
    assert "the metadata of README.md is not a mapping" in message
