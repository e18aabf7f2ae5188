"""The loopback Hub answers the real huggingface_hub client and transformers as the Hub would."""

import json
from pathlib import Path
from textwrap import dedent

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from loopback_hub import LoopbackHub, Reply, run_client

# huggingface_hub's own upload of LFS files uses an argument that its HTTP library is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

TOKEN = "hf_ada_may_write"
READ_TOKEN = "hf_ada_may_read"
OTHER_TOKEN = "hf_bob"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub() as hub:
        hub.add_user("ada", TOKEN, organisations={"lab": "write", "museum": "read"})
        hub.add_user("ada", READ_TOKEN, role="read")
        hub.add_user("bob", OTHER_TOKEN)
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=TOKEN)


def client_of(hub, token):
    return HfApi(endpoint=hub.url, token=token)


def test_accounts_and_creation(hub, api):
    assert api.whoami()["name"] == "ada"
    assert api.whoami()["auth"]["accessToken"]["role"] == "write"
    assert str(api.create_repo("ada/hidden", private=True)) == f"{hub.url}/ada/hidden"
    assert hub.repos["ada/hidden"].private is True
    api.create_repo("lab/open")
    assert hub.repos["lab/open"].private is False
    api.create_repo("lab/open", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("lab/open")
    for token, repo_id in ((TOKEN, "museum/no"), (TOKEN, "bob/no"), (READ_TOKEN, "ada/no")):
        with pytest.raises(HfHubHTTPError, match="403"):
            client_of(hub, token).create_repo(repo_id)
    assert set(hub.repos) == {"ada/hidden", "lab/open"}


def test_errors_become_the_clients_exceptions(hub, api, tmp_path):
    hub.create_repo("ada/hidden", private=True)
    hub.create_repo("bob/gated", gated=True)
    hub.add_files("bob/gated", {"config.json": b"{}"})
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client_of(hub, "hf_unknown").whoami()
    for token in (OTHER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            client_of(hub, token).model_info("ada/hidden")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("ada/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("ada/hidden", revision="none")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("ada/hidden", "none.json", cache_dir=tmp_path)
    assert api.model_info("bob/gated").gated == "auto"
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("bob/gated", "config.json", cache_dir=tmp_path)
    hub.repos["bob/gated"].admitted.add("ada")
    api.hf_hub_download("bob/gated", "config.json", cache_dir=tmp_path)


def test_one_commit_of_small_and_large_files(hub, api, tmp_path):
    weights, config = bytes(range(256)) * 40, b'{"a": 1}'
    api.create_repo("ada/model")
    first = api.model_info("ada/model").sha
    additions = {"config.json": config, "model.safetensors": weights, "figures/a.txt": b"a"}
    operations = [CommitOperationAdd(name, body) for name, body in additions.items()]
    info = api.create_commit("ada/model", operations, commit_message="all", parent_commit=first)
    assert hub.files("ada/model") == {
        ".gitattributes": hub.files("ada/model", first)[".gitattributes"],
        **additions,
    }
    assert [commit.title for commit in hub.commits("ada/model")] == ["all", "initial commit"]
    assert hub.commits("ada/model")[0].oid == info.oid == api.model_info("ada/model").sha
    assert (hub.received_lfs_bytes, hub.received_regular_bytes) == (len(weights), len(config) + 1)
    assert [commit.commit_id for commit in api.list_repo_commits("ada/model")] == [info.oid, first]

    tree = {entry.path: entry for entry in api.list_repo_tree("ada/model", recursive=True)}
    assert (
        tree["model.safetensors"].lfs.sha256
        == hub.repos["ada/model"].at("main").files["model.safetensors"].sha256
    )
    assert tree["config.json"].lfs is None
    # `printf '{"a": 1}' | git hash-object --stdin`
    assert tree["config.json"].blob_id == "4a036f56bb619924ec4189bd84ed716c766971ae"
    assert "figures/a.txt" in tree
    assert not hasattr(tree["figures"], "blob_id")
    assert [entry.path for entry in api.list_repo_tree("ada/model", "figures")] == ["figures/a.txt"]
    top = {entry.path for entry in api.list_repo_tree("ada/model")}
    assert top == {".gitattributes", "config.json", "figures", "model.safetensors"}
    paths = api.get_paths_info("ada/model", ["config.json", "none", "figures"])
    assert [entry.path for entry in paths] == ["config.json", "figures"]
    siblings = api.model_info("ada/model", files_metadata=True).siblings
    assert {file.rfilename: file.size for file in siblings}["model.safetensors"] == len(weights)

    downloaded = api.hf_hub_download("ada/model", "model.safetensors", cache_dir=tmp_path)
    assert Path(downloaded).read_bytes() == weights
    assert all(
        "authorization" not in request.headers
        for request in hub.requests
        if request.host == "storage"
    )

    late = [CommitOperationAdd("config.json", b"{}")]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("ada/model", late, commit_message="late", parent_commit=first)
    # The same LFS object is not sent twice.
    assert (
        api.create_commit(
            "ada/model",
            [
                CommitOperationAdd("copy.safetensors", weights),
                CommitOperationDelete("figures/"),
                CommitOperationDelete("config.json"),
            ],
            commit_message="more",
        ).oid
        != info.oid
    )
    assert hub.received_lfs_bytes == len(weights)
    assert set(hub.files("ada/model")) == {
        ".gitattributes",
        "model.safetensors",
        "copy.safetensors",
    }
    with pytest.raises(RemoteEntryNotFoundError):
        api.create_commit("ada/model", [CommitOperationDelete("none")], commit_message="none")


def test_copies_between_repositories_move_no_bytes(hub, api):
    hub.create_repo("bob/base")
    source = hub.add_files("bob/base", {"model.safetensors": b"weights", "config.json": b"{}"})
    api.create_repo("ada/copy")
    api.create_commit(
        "ada/copy",
        [
            CommitOperationCopy(
                name,
                new_name,
                src_repo_id="bob/base",
                src_repo_type="model",
                src_revision=source.oid,
            )
            for name, new_name in (
                ("model.safetensors", "a.safetensors"),
                ("config.json", "b.json"),
            )
        ],
        commit_message="copy",
    )
    files = hub.files("ada/copy")
    assert (files["a.safetensors"], files["b.json"]) == (b"weights", b"{}")
    assert hub.received_lfs_bytes == 0


def test_branches_tags_and_pull_requests(hub, api):
    api.create_repo("ada/model")
    api.create_branch("ada/model", branch="next/one")
    addition = CommitOperationAdd("a.txt", b"a")
    api.create_commit("ada/model", [addition], commit_message="a", revision="next/one")
    assert "a.txt" not in hub.files("ada/model")
    assert "a.txt" in hub.files("ada/model", "next/one")
    api.create_tag("ada/model", tag="v1", revision="next/one")
    api.delete_branch("ada/model", branch="next/one")
    refs = api.list_repo_refs("ada/model")
    assert [branch.name for branch in refs.branches] == ["main"]
    assert [tag.ref for tag in refs.tags] == ["refs/tags/v1"]
    assert "a.txt" in hub.files("ada/model", "v1")

    request = client_of(hub, OTHER_TOKEN).create_commit(
        "ada/model", [CommitOperationAdd("b.txt", b"b")], commit_message="b", create_pr=True
    )
    assert (request.pr_num, request.pr_revision) == (1, "refs/pr/1")
    assert "b.txt" in hub.files("ada/model", "refs/pr/1")
    assert "b.txt" not in hub.files("ada/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        client_of(hub, OTHER_TOKEN).upload_file(
            path_or_fileobj=b"c", path_in_repo="c.txt", repo_id="ada/model"
        )


def test_ranges(hub):
    hub.create_repo("ada/model")
    hub.add_files("ada/model", {"a.txt": b"0123456789", "b.safetensors": b"abcdefghij"})

    def get(name, span):
        url = f"{hub.url}/ada/model/resolve/main/{name}"
        return get_session().get(url, headers={"Range": f"bytes={span}"}, follow_redirects=True)

    part = get("a.txt", "2-4")
    assert (part.status_code, part.content) == (206, b"234")
    assert part.headers["Content-Range"] == "bytes 2-4/10"
    assert get("a.txt", "-3").content == b"789"
    assert get("b.safetensors", "7-").content == b"hij"
    assert get("b.safetensors", "10-").status_code == 416


def test_a_hook_can_fail_any_request(hub, api):
    def before_request(request):
        if request.path == "/api/models/ada/refused":
            return Reply.json({"error": "teapot"}, status=418)
        if request.path == "/api/models/ada/dropped":
            raise ConnectionResetError
        return None

    hub.before_request = before_request
    with pytest.raises(HfHubHTTPError, match="418"):
        api.model_info("ada/refused")
    with pytest.raises(Exception, match="disconnected"):
        api.model_info("ada/dropped")
    assert api.whoami()["name"] == "ada"
    assert hub.requests[0].status == 418


def test_transformers_loads_by_id_in_a_fresh_process(hub, tmp_path):
    """One process publishes a tiny random Llama, and then another knows only its id."""
    create = run_client(
        hub,
        dedent("""
            import json, sys, torch, transformers
            from huggingface_hub import HfApi
            config = transformers.LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2,
            )
            torch.manual_seed(0)
            model = transformers.LlamaForCausalLM(config)
            model.save_pretrained("saved")
            HfApi().create_repo("ada/tiny", private=True)
            HfApi().upload_folder(repo_id="ada/tiny", folder_path="saved")
            print(json.dumps(float(model(torch.arange(8)[None]).logits.sum())))
        """),
        tmp_path,
        token=TOKEN,
    )
    assert create.returncode == 0, create.stderr
    load = run_client(
        hub,
        dedent("""
            import json, torch, transformers
            model = transformers.AutoModelForCausalLM.from_pretrained("ada/tiny")
            print(json.dumps(float(model(torch.arange(8)[None]).logits.sum())))
        """),
        tmp_path / "saved",  # another HF_HOME: nothing comes from a cache
        token=TOKEN,
    )
    assert load.returncode == 0, load.stderr
    assert json.loads(load.stdout) == pytest.approx(json.loads(create.stdout))
    assert hub.received_lfs_bytes == (tmp_path / "saved" / "model.safetensors").stat().st_size
