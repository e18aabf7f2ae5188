"""What the base's repository has already is copied on the Hub; pull requests; breaks."""

import hashlib
import json

import pytest
from loopback_hub import Reply, StoredFile
from publishing import FILES as SMALL_FILES
from publishing import REPO_ID, TOKEN, refusal, write_output

from bake.hub import check_access, publish

# huggingface_hub's own upload of LFS files uses an argument that its HTTP library is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

BASE = "acme/base"
BIG = bytes(range(256)) * 4000
CARD = SMALL_FILES["README.md"].replace(
    b"library_name", b"base_model: acme/base\nbase_model_relation: finetune\nlibrary_name"
)
FILES = {**SMALL_FILES, "README.md": CARD, "model-00001-of-00002.safetensors": BIG}
SHA256 = hashlib.sha256(BIG).hexdigest()
UPLOADED = sum(len(FILES[name]) for name in FILES if name.endswith((".safetensors", ".png"))) - len(
    BIG
)


@pytest.fixture
def base(hub):
    """The base on the Hub: its one shard is the bake's first, under another name."""
    hub.create_repo(BASE)
    return hub.add_files(BASE, {"model.safetensors": BIG, "config.json": b"{}"}).oid


@pytest.fixture
def output(tmp_path, base):
    return write_output(tmp_path / "output", FILES, **record(base))


def record(sha):
    return {
        "base": {"id": BASE, "revision": sha},
        "undo": {"files": {"model-00001-of-00002.safetensors": "model.safetensors"}},
    }


def thin_record(sha, sha256=SHA256):
    shard = {
        "name": "model-00001-of-00002.safetensors",
        "base_file": "model.safetensors",
        "size": len(BIG),
        "sha256": sha256,
    }
    unproven = {"passed": False, "verified": False, "reason": "thin"}
    return {**record(sha), "thin": {"shards": [shard]}, "equivalence": unproven}


@pytest.fixture
def thin(tmp_path, base):
    files = {name: body for name, body in FILES.items() if body != BIG}
    return write_output(tmp_path / "thin", files, **thin_record(base))


def test_an_untouched_shard_is_copied_and_not_sent(hub, output, capsys):
    published = publish(output, REPO_ID)
    assert hub.files(REPO_ID)["model-00001-of-00002.safetensors"] == BIG
    assert published.copied == ("model-00001-of-00002.safetensors",)
    assert hub.received_lfs_bytes == UPLOADED
    assert hub.received_lfs_bytes < 0.01 * len(BIG)
    assert f"the Hub copies 1 (1.0 MB) from {BASE}" in capsys.readouterr().err
    assert publish(output, REPO_ID).already_there


def test_the_copy_is_of_the_pinned_commit(hub, output, base):
    hub.add_files(BASE, {"model.safetensors": b"retrained" * 99})
    publish(output, REPO_ID)
    assert hub.files(REPO_ID)["model-00001-of-00002.safetensors"] == BIG
    assert hub.received_lfs_bytes == UPLOADED


def test_a_shard_that_is_not_the_bases_is_sent(hub, tmp_path, base):
    patched = {**FILES, "model-00001-of-00002.safetensors": BIG[:-1] + b"!"}
    publish(write_output(tmp_path / "patched", patched, **record(base)), REPO_ID)
    assert hub.files(REPO_ID)["model-00001-of-00002.safetensors"][-1:] == b"!"
    assert hub.received_lfs_bytes == UPLOADED + len(BIG)


def without_xet(hub):
    """The base lies in the older storage, from which the Hub does not copy."""

    def hide(request):
        if request.path.startswith(f"/api/models/{BASE}/paths-info/"):
            entry = StoredFile(BIG, is_lfs=True).entry("model.safetensors")
            return Reply.json([{key: entry[key] for key in entry if key != "xetHash"}])
        return None

    return hide


def refusing(status):
    def refuse(request):
        if request.path.endswith("/lfs-files/duplicate"):
            return Reply.json({"error": "another storage region"}, status)
        return None

    return refuse


def failing(request):
    """The Hub answers the request to copy, and says that it could not."""
    if request.path.endswith("/lfs-files/duplicate"):
        return Reply.json({"failed": [{"sha256": "0", "error": "no room"}]})
    return None


@pytest.mark.parametrize("why", ["xet", "region", "failed", "gone", "gated"])
def test_where_the_hub_cannot_copy_it_is_sent_and_said(hub, output, capsys, why):
    if why == "gone":
        del hub.repos[BASE]
    elif why == "gated":
        hub.repos[BASE].gated = True
    else:
        hub.before_request = {"xet": without_xet(hub), "region": refusing(400), "failed": failing}[
            why
        ]
    published = publish(output, REPO_ID)
    assert published.copied == ()
    assert hub.files(REPO_ID)["model-00001-of-00002.safetensors"] == BIG
    assert hub.received_lfs_bytes == UPLOADED + len(BIG)  # and what a first try sent, once
    said = {
        "xet": "outside Xet",
        "region": "another storage region",
        "failed": "no room",
        "gated": "is restricted",
    }
    (line,) = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "sent, " in line or "are sent" in line
    ]
    assert said.get(why, "is not on the Hub") in line
    assert len(hub.commits(REPO_ID)) == 2


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("asked", ["/paths-info/", "/lfs-files/duplicate"])
def test_a_hub_that_fails_for_a_moment_is_no_reason_to_send_a_base(hub, output, status, asked):
    def fail(request):
        return Reply.json({"error": "busy"}, status) if asked in request.path else None

    hub.before_request = fail
    assert "run the same command again" in refusal(publish, output, REPO_ID)
    assert hub.received_lfs_bytes < len(BIG)
    hub.before_request = None
    assert publish(output, REPO_ID).copied == ("model-00001-of-00002.safetensors",)
    assert hub.received_lfs_bytes == UPLOADED


def test_a_thin_bake_is_whole_on_the_hub_without_its_weights_here(hub, thin):
    published = publish(thin, REPO_ID)
    assert published.proven is False
    assert hub.files(REPO_ID)["model-00001-of-00002.safetensors"] == BIG
    assert hub.received_lfs_bytes == UPLOADED
    assert "bake verify" in published.describe()
    assert publish(thin, REPO_ID).already_there


@pytest.mark.parametrize("why", ["xet", "region", "gone", "changed"])
def test_a_thin_bake_that_cannot_be_completed_is_refused(hub, thin, base, why):
    if why == "gone":
        del hub.repos[BASE]
    elif why == "changed":
        record = thin_record(base, "0" * 64)
        values = json.loads((thin / "bake.json").read_text())
        (thin / "bake.json").write_text(json.dumps({**values, **record}))
    else:
        hub.before_request = {"xet": without_xet(hub), "region": refusing(400)}[why]
    assert "put the base's shards beside it" in refusal(publish, thin, REPO_ID)
    assert set(hub.files(REPO_ID)) == {".gitattributes"}


def test_a_pull_request_leaves_main_alone_and_is_opened_once(hub, output, tmp_path):
    assert "nothing to open a pull request against" in refusal(
        publish, output, REPO_ID, create_pr=True
    )
    first = publish(output, REPO_ID)
    changed = write_output(tmp_path / "changed", {**FILES, "config.json": b"{}\n"})
    request = publish(changed, REPO_ID, create_pr=True, commit_message="Other config")
    assert request.pull_request == f"{hub.url}/{REPO_ID}/discussions/1"
    assert hub.commits(REPO_ID)[0].oid == first.commit
    assert hub.commits(REPO_ID, "refs/pr/1")[0].title == "Other config"
    assert hub.files(REPO_ID, "refs/pr/1")["config.json"] == b"{}\n"
    again = publish(changed, REPO_ID, create_pr=True)
    assert again.already_there
    assert again.commit == request.commit
    assert list(hub.repos[REPO_ID].pull_requests) == ["refs/pr/1"]
    assert "no branch nowhere" in refusal(
        publish, changed, REPO_ID, create_pr=True, revision="nowhere"
    )


def test_a_pull_request_needs_no_right_to_write(hub, output, monkeypatch):
    publish(output, REPO_ID)
    hub.repos[REPO_ID].private = False
    hub.add_user("bob", "hf_bobSecret")
    monkeypatch.setenv("HF_TOKEN", "hf_bobSecret")
    assert "bob may not write to ada" in refusal(check_access, REPO_ID, private=False)
    found = check_access(REPO_ID, private=False, create_pr=True)
    assert found.user == "bob"
    assert TOKEN not in str(found)


def test_a_commit_whose_answer_is_lost_is_found(hub, output):
    def lose_the_answer(request):
        if "/commit/" in request.path:
            assert hub.answer_quietly(request).status == 200
            raise ConnectionError
        return

    hub.before_request = lose_the_answer
    published = publish(output, REPO_ID)
    assert hub.commits(REPO_ID)[0].oid == published.commit
    assert len(hub.commits(REPO_ID)) == 2
    hub.add_files(REPO_ID, {"config.json": b"{}"})
    request = publish(output, REPO_ID, create_pr=True)
    assert request.pull_request.endswith("/discussions/1")
    assert list(hub.repos[REPO_ID].pull_requests) == ["refs/pr/1"]


def test_after_a_break_nothing_is_sent_twice(hub, output):
    hub.before_request = lambda request: (
        Reply.json({"error": "down"}, 500) if "/commit/" in request.path else None
    )
    assert "run the same command again" in refusal(publish, output, REPO_ID)
    assert set(hub.files(REPO_ID)) == {".gitattributes"}
    sent = hub.received_lfs_bytes
    assert sent == UPLOADED
    hub.before_request = None
    publish(output, REPO_ID)
    assert hub.received_lfs_bytes == sent
