"""A Hugging Face Hub on 127.0.0.1, for tests that run the real huggingface_hub and transformers.

It keeps model repositories in memory and answers the Hub's HTTP API as far as those clients use it:
accounts, creation, preupload, LFS, atomic commits, branches, tags, pull requests, listings,
downloads, private and gated repositories, and the error codes that the client turns into its own
exceptions. Large files live on a second port, as the real Hub's do on a storage host, so that a
test can see that no token goes there. It leaves out Xet (`HF_HUB_DISABLE_XET=1`), datasets, spaces
and pagination.

    with LoopbackHub() as hub:
        hub.add_user("ada", token="hf_ada")
        run_client(hub, "import huggingface_hub as h; h.create_repo('ada/m')", tmp_path, "hf_ada")
        assert hub.repos["ada/m"].private is False

`run_client` starts a fresh Python: huggingface_hub reads HF_ENDPOINT and its siblings at import.
In the test's own process `HfApi(endpoint=hub.url, token=...)` works too.
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".npz", ".zip", ".model")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes; the Hub keeps no larger file in git itself
GIT_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
).encode()


# ---------------------------------------------------------------- what the Hub holds


@dataclass(frozen=True)
class StoredFile:
    """One file at one commit. `blob_id` is git's: of the content, or of the LFS pointer."""

    content: bytes
    is_lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def blob_id(self) -> str:
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                f"size {len(self.content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """The JSON of one file, as `tree` and `paths-info` give it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.blob_id}
        entry["size"] = len(self.content)
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
            # Not a real Xet hash: the client only insists that a file copied between repos has one.
            entry["xetHash"] = hashlib.sha256(self.sha256.encode()).hexdigest()
        return entry


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A model repository: branches, tags and pull requests name commits by their oid."""

    repo_id: str
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or (abbreviated) oid names."""
        refs = {**self.tags, **self.branches, **self.pull_requests}
        oids = [refs[revision]] if revision in refs else []
        if not oids and re.fullmatch(r"[0-9a-f]{5,40}", revision):
            oids = [oid for oid in self.commits if oid.startswith(revision)]
        if len(oids) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oids[0]]

    def history(self, revision: str) -> list[Commit]:
        """The commits that lead to a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def add_commit(
        self, parent: Commit | None, files: Mapping[str, StoredFile], title: str, author: str
    ) -> Commit:
        """Store a commit; the caller moves the ref."""
        blobs = {path: file.blob_id for path, file in sorted(files.items())}
        identity = json.dumps([self.repo_id, len(self.commits), title, blobs])
        oid = hashlib.sha1(identity.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        parent_oid = parent.oid if parent else None
        self.commits[oid] = Commit(oid, parent_oid, title, author, date, dict(files))
        return self.commits[oid]


@dataclass(frozen=True)
class User:
    """An account with one token, whose role is "read", "write" or "fineGrained".

    A fine-grained token may write to the namespaces in `scopes` only.
    """

    name: str
    token: str = field(repr=False)
    role: str = "write"
    organisations: Mapping[str, str] = field(default_factory=dict)  # name → role in it
    scopes: tuple[str, ...] = ()

    def is_member(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organisations

    def can_write(self, namespace: str) -> bool:
        if self.role == "fineGrained":
            return namespace in self.scopes
        role = "admin" if namespace == self.name else self.organisations.get(namespace, "read")
        return self.role == "write" and role != "read"


# ---------------------------------------------------------------- requests and replies


@dataclass
class Request:
    """One request as it was received; `host` is "hub" or "storage".

    `status` is what was answered, `sent` the bytes of the answer's body.
    """

    host: str
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes = field(repr=False)
    status: int = 0
    sent: int = 0

    def json(self) -> Any:
        return json.loads(self.body or b"{}")


@dataclass
class Reply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content: Any, status: int = 200) -> "Reply":
        return cls(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


class Refusal(Exception):  # noqa: N818 -- it is an answer of the Hub, not a fault of this file
    """An error answer, with the header that huggingface_hub turns into an exception class."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.reply = Reply.json({"error": message}, status)
        self.reply.headers["X-Error-Message"] = message
        if code:
            self.reply.headers["X-Error-Code"] = code
        self.reply.headers.update({name.replace("_", "-"): text for name, text in headers.items()})


class LoopbackHub:
    """The Hub: a context manager that serves while it is open. `url` is what HF_ENDPOINT should be.

    To look inside: `repos`, `commits(repo_id)`, `files(repo_id, revision)`, `requests`,
    `received_lfs_bytes` and `received_regular_bytes`. To make it fail or dawdle, set
    `before_request`: it is called with every request, and may sleep, return a `Reply` to be sent
    instead of the Hub's own, or raise `ConnectionError` to hang up without an answer.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, User] = {}  # by token
        self.requests: list[Request] = []
        self.received_lfs_bytes = 0
        self.received_regular_bytes = 0
        self.before_request: Callable[[Request], Reply | None] | None = None
        self.lock = threading.RLock()
        self._servers: list[_Server] = []

    def __enter__(self) -> "LoopbackHub":
        self._servers = [_Server(self, "hub"), _Server(self, "storage")]
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in self._servers:
            server.stop()

    @property
    def url(self) -> str:
        return self._servers[0].url

    @property
    def storage_url(self) -> str:
        return self._servers[1].url

    # -- what tests set up and look at

    def add_user(
        self,
        name: str,
        token: str,
        role: str = "write",
        organisations: Mapping[str, str] | None = None,
        scopes: tuple[str, ...] = (),
    ) -> User:
        """Make an account; call again with another token for a second token of the same user."""
        self.users[token] = User(name, token, role, organisations or {}, scopes)
        return self.users[token]

    def create_repo(self, repo_id: str, *, private: bool = False, gated: bool = False) -> Repo:
        """Make a repository as the Hub does: with a first commit that holds `.gitattributes`."""
        with self.lock:
            repo = Repo(repo_id, private, gated)
            attributes = {".gitattributes": StoredFile(GIT_ATTRIBUTES)}
            commit = repo.add_commit(None, attributes, "initial commit", repo.namespace)
            repo.branches["main"] = commit.oid
            self.repos[repo_id] = repo
            return repo

    def add_files(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        title: str = "Add files",
        branch: str = "main",
    ) -> Commit:
        """Commit files without going through HTTP; safetensors and their like become LFS files."""
        with self.lock:
            repo = self.repos[repo_id]
            parent = repo.at(branch)
            stored = {
                name: StoredFile(body, _belongs_in_lfs(name, body)) for name, body in files.items()
            }
            repo.lfs_objects.update({f.sha256: f.content for f in stored.values() if f.is_lfs})
            commit = repo.add_commit(parent, {**parent.files, **stored}, title, repo.namespace)
            repo.branches[branch] = commit.oid
            return commit

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The history of a revision, newest first."""
        return self.repos[repo_id].history(revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file at a revision and its content."""
        return {path: file.content for path, file in self.repos[repo_id].at(revision).files.items()}

    # -- who may do what

    def caller(self, request: Request) -> User | None:
        """Who sent a request: None without a token, a refusal with a wrong one."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def readable(self, request: Request, repo_id: str) -> Repo:
        user, repo = self.caller(request), self.repos.get(repo_id)
        hidden = repo is None or (repo.private and not (user and user.is_member(repo.namespace)))
        if repo is None or hidden:
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, request: Request, repo_id: str) -> Repo:
        repo = self.readable(request, repo_id)
        self.require_writer(request, repo.namespace)
        return repo

    def require_writer(self, request: Request, namespace: str) -> User:
        user = self.caller(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.can_write(namespace):
            raise Refusal(
                403, f"You don't have the rights to write under the namespace {namespace}"
            )
        return user

    def require_admitted(self, request: Request, repo: Repo) -> None:
        """Refuse the content of a gated repository, whose metadata anybody sees."""
        user = self.caller(request)
        admitted = user and (user.name in repo.admitted or user.is_member(repo.namespace))
        if repo.gated and not admitted:
            message = f"Access to model {repo.repo_id} is restricted and you are not in the"
            raise Refusal(403 if user else 401, f"{message} authorized list.", "GatedRepo")

    def storage_href(self, repo_id: str, oid: str) -> str:
        """A signed address on the storage host: whoever has it needs no token."""
        return f"{self.storage_url}/{repo_id}/{oid}?signature={_signature(repo_id, oid)}"

    def answer(self, request: Request) -> Reply:
        """Log a request and find its reply."""
        self.requests.append(request)
        reply = self.before_request(request) if self.before_request else None
        if reply is None:
            try:
                reply = self._route(request)
            except Refusal as refusal:
                reply = refusal.reply
        request.status = reply.status
        request.sent = 0 if request.method == "HEAD" else len(reply.body)
        return reply

    def answer_quietly(self, request: Request) -> Reply:
        """Do what a request asks, for a `before_request` that then withholds the answer."""
        try:
            return self._route(request)
        except Refusal as refusal:
            return refusal.reply

    def _route(self, request: Request) -> Reply:
        # Spaces are repositories among the models.
        path = re.sub(r"^/api/spaces/", "/api/models/", request.path)
        path = re.sub(r"^/spaces/", "/", path)
        for host, method, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(path)
            if match and host == request.host and request.method in method.split("|"):
                groups = {name: unquote(text or "") for name, text in match.groupdict().items()}
                return endpoint(self, request, **groups)
        raise Refusal(404, f"The loopback Hub has no {request.method} {request.path}")


# ---------------------------------------------------------------- the endpoints

Endpoint = Callable[..., Reply]
ROUTES: list[tuple[str, str, re.Pattern[str], Endpoint]] = []
REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


def route(method: str, pattern: str, host: str = "hub") -> Callable[[Endpoint], Endpoint]:
    def register(endpoint: Endpoint) -> Endpoint:
        ROUTES.append((host, method, re.compile(pattern), endpoint))
        return endpoint

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub: LoopbackHub, request: Request) -> Reply:
    user = hub.caller(request)
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    token: dict[str, Any] = {"displayName": "a token", "role": user.role}
    if user.role == "fineGrained":
        scoped = [
            {"entity": {"type": "user", "name": name}, "permissions": ["repo.write"]}
            for name in user.scopes
        ]
        token["fineGrained"] = {"scoped": scoped}
    organisations = [
        {"type": "org", "name": name, "roleInOrg": role}
        for name, role in user.organisations.items()
    ]
    auth = {"type": "access_token", "accessToken": token}
    return Reply.json({"type": "user", "name": user.name, "orgs": organisations, "auth": auth})


@route("POST", "/api/repos/create")
def create_repo(hub: LoopbackHub, request: Request) -> Reply:
    payload = request.json()
    user = hub.caller(request)
    namespace = payload.get("organization") or (user.name if user else "")
    hub.require_writer(request, namespace)
    repo_id = f"{namespace}/{payload['name']}"
    with hub.lock:
        if repo_id in hub.repos:
            refusal = Refusal(409, "You already created this model repo")
            refusal.reply.body = json.dumps({"url": f"{hub.url}/{repo_id}"}).encode()
            raise refusal
        hidden = payload.get("visibility") == "private" or payload.get("private") is True
        hub.create_repo(repo_id, private=hidden)
    return Reply.json({"url": f"{hub.url}/{repo_id}", "name": repo_id, "private": hidden})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: LoopbackHub, request: Request) -> Reply:
    front_matter = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
    try:
        metadata = yaml.safe_load(front_matter[1]) if front_matter else {}
    except yaml.YAMLError as error:
        metadata = str(error)
    if not isinstance(metadata, dict):
        errors = [{"message": f"the metadata is not a mapping: {metadata}"}]
        return Reply.json({"errors": errors, "warnings": []}, status=400)
    return Reply.json({"errors": [], "warnings": []})


@route("POST", f"/api/models/{REPO}/preupload/{REVISION}")
def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    create_pr = request.query.get("create_pr") == "1"
    repo = (hub.readable if create_pr else hub.writable)(request, repo_id)
    present = repo.at(revision).files
    answers = []
    for file in request.json()["files"]:
        sample = base64.b64decode(file["sample"])
        mode = "lfs" if _belongs_in_lfs(file["path"], sample, file["size"]) else "regular"
        answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
        stored = present.get(file["path"])
        if stored is not None:
            answer["oid"] = stored.sha256 if stored.is_lfs else stored.blob_id
        answers.append(answer)
    return Reply.json({"files": answers})


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    repo = hub.writable(request, repo_id)
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.lfs_objects:
            answer["actions"] = {"upload": {"href": hub.storage_href(repo_id, wanted["oid"])}}
        objects.append(answer)
    return Reply.json({"transfer": "basic", "objects": objects})


@route("PUT|GET|HEAD", f"/{REPO}/(?P<oid>[0-9a-f]{{64}})", host="storage")
def storage(hub: LoopbackHub, request: Request, repo_id: str, oid: str) -> Reply:
    if request.query.get("signature") != _signature(repo_id, oid):
        raise Refusal(403, "SignatureDoesNotMatch")
    objects = hub.repos[repo_id].lfs_objects
    if request.method != "PUT":
        if oid not in objects:
            raise Refusal(404, "NoSuchKey")
        return _ranged(request, objects[oid], {"ETag": f'"{oid}"'})
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "BadDigest")
    with hub.lock:
        objects[oid] = request.body
        hub.received_lfs_bytes += len(request.body)
    return Reply()


@route("POST", f"/api/models/{REPO}/lfs-files/duplicate")
def duplicate_lfs_files(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    source, payload = hub.readable(request, repo_id), request.json()
    hub.require_admitted(request, source)
    target, failed = hub.writable(request, payload["target"]["name"]), []
    for file in payload["files"]:
        if file["sha256"] in source.lfs_objects:
            target.lfs_objects[file["sha256"]] = source.lfs_objects[file["sha256"]]
        else:
            failed.append({"sha256": file["sha256"], "error": "not found in the source repo"})
    return Reply.json({"failed": failed})


@route("POST", f"/api/models/{REPO}/commit/{REVISION}")
def create_commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    create_pr = request.query.get("create_pr") == "1"
    repo = (hub.readable if create_pr else hub.writable)(request, repo_id)
    lines = [json.loads(line) for line in request.body.split(b"\n") if line.strip()]
    header, user = lines[0]["value"], hub.caller(request)
    with hub.lock:
        parent = repo.at(revision)
        if not parent.oid.startswith(header.get("parentCommit") or ""):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        refs = repo.pull_requests if create_pr or revision.startswith("refs/pr/") else repo.branches
        if not create_pr and revision not in refs:
            raise Refusal(400, f"{revision} is not a branch")
        files = dict(parent.files)
        for line in lines[1:]:
            _apply(hub, repo, files, line["key"], line["value"])
        commit = repo.add_commit(parent, files, header["summary"], user.name if user else "")
        number = len(repo.pull_requests) + 1
        refs[f"refs/pr/{number}" if create_pr else revision] = commit.oid
    answer = {"success": True, "commitOid": commit.oid}
    answer["commitUrl"] = f"{hub.url}/{repo_id}/commit/{commit.oid}"
    if create_pr:
        answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{number}"
    return Reply.json(answer)


def _apply(
    hub: LoopbackHub,
    repo: Repo,
    files: dict[str, StoredFile],
    operation: str,
    value: dict[str, Any],
) -> None:
    """One line of a commit."""
    path = value["path"]
    if operation == "file":
        content = base64.b64decode(value["content"])
        hub.received_regular_bytes += len(content)
        files[path] = StoredFile(content)
    elif operation == "lfsFile":
        if value["oid"] not in repo.lfs_objects:
            raise Refusal(400, f"LFS object {value['oid']} of {path} was never uploaded")
        files[path] = StoredFile(repo.lfs_objects[value["oid"]], is_lfs=True)
    elif operation == "copyFile":
        source = repo.at(value["srcRevision"]).files if value.get("srcRevision") else files
        if value["srcPath"] not in source:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        files[path] = source[value["srcPath"]]
    elif operation in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        is_folder = operation == "deletedFolder"
        gone = [name for name in files if (name.startswith(folder) if is_folder else name == path)]
        if not gone:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise Refusal(400, f"the loopback Hub knows no commit operation {operation!r}")


@route("POST|DELETE", f"/api/models/{REPO}/(?P<kind>branch|tag)/{REVISION}")
def change_ref(hub: LoopbackHub, request: Request, repo_id: str, kind: str, revision: str) -> Reply:
    """Make or delete a branch or tag; a new tag's address names what it tags, not its name."""
    repo, payload = hub.writable(request, repo_id), request.json()
    refs = repo.branches if kind == "branch" else repo.tags
    if request.method == "DELETE":
        if refs.pop(revision, None) is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return Reply.json({})
    name = payload.get("tag", revision)
    if name in refs:
        raise Refusal(409, "Reference already exists")
    target = revision if kind == "tag" else payload.get("startingPoint", "main")
    refs[name] = repo.at(target).oid
    return Reply.json({})


@route("GET", f"/api/models/{REPO}/refs")
def list_refs(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    repo = hub.readable(request, repo_id)

    def references(refs: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
        items = refs.items()
        return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": oid} for n, oid in items]

    answer: dict[str, Any] = {"converts": [], "branches": references(repo.branches, "refs/heads/")}
    answer["tags"] = references(repo.tags, "refs/tags/")
    if request.query.get("include_prs"):
        answer["pullRequests"] = references(repo.pull_requests, "")
    return Reply.json(answer)


@route("GET", f"/api/models/{REPO}/discussions")
def list_discussions(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    """The pull requests, newest first; the loopback Hub has no other discussions and closes none."""
    repo = hub.readable(request, repo_id)
    found = [
        {
            "num": int(ref.rsplit("/", 1)[1]),
            "title": repo.commits[oid].title,
            "author": {"name": repo.commits[oid].author},
            "createdAt": repo.commits[oid].date,
            "status": "open",
            "isPullRequest": True,
            "repo": {"name": repo_id, "type": "model"},
        }
        for ref, oid in reversed(repo.pull_requests.items())
    ]
    return Reply.json({"discussions": found, "count": len(found), "start": 0})


@route("GET", f"/api/models/{REPO}/commits/{REVISION}")
def list_commits(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    history = hub.readable(request, repo_id).history(revision)
    return Reply.json(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": "",
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in history
        ]
    )


@route("GET", rf"/api/models/{REPO}(?:/revision/{REVISION})?")
def model_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    repo = hub.readable(request, repo_id)
    commit = repo.at(revision or "main")
    siblings = []
    for path, file in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.query.get("blobs"):
            sibling.update(size=len(file.content), blobId=file.blob_id)
            if file.is_lfs:
                sibling["lfs"] = {
                    "sha256": file.sha256,
                    "size": len(file.content),
                    "pointerSize": 130,
                }
        siblings.append(sibling)
    return Reply.json(
        {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo.namespace,
            "sha": commit.oid,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "lastModified": commit.date,
            "tags": [],
            "siblings": siblings,
        }
    )


@route("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?")
def list_tree(
    hub: LoopbackHub, request: Request, repo_id: str, revision: str, folder: str
) -> Reply:
    commit = hub.readable(request, repo_id).at(revision)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    entries = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            entries[name] = _folder_entry(name)
        if recursive or len(parts) == 1:
            entries[path] = file.entry(path)
    if folder and not entries:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return Reply.json(list(entries.values()))


@route("POST", f"/api/models/{REPO}/paths-info/{REVISION}")
def paths_info(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    files = hub.readable(request, repo_id).at(revision).files
    if "json" in request.headers.get("content-type", ""):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body.decode()).get("paths", [])
    entries = []
    for path in paths:
        if path in files:
            entries.append(files[path].entry(path))
        elif any(name.startswith(f"{path}/") for name in files):
            entries.append(_folder_entry(path))
    return Reply.json(entries)


@route("GET|HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Reply:
    repo = hub.readable(request, repo_id)
    hub.require_admitted(request, repo)
    commit = repo.at(revision)
    file = commit.files.get(path)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.blob_id}"'}
    if not file.is_lfs:
        return _ranged(request, file.content, headers)
    headers["X-Linked-Size"] = str(len(file.content))
    headers["X-Linked-ETag"] = f'"{file.sha256}"'
    return Reply(302, headers={**headers, "Location": hub.storage_href(repo_id, file.sha256)})


def _belongs_in_lfs(path: str, sample: bytes, size: int | None = None) -> bool:
    """The Hub's rule: by name, by size, and whatever looks binary in its first 512 bytes."""
    size = len(sample) if size is None else size
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD or b"\0" in sample[:512]


def _folder_entry(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode()).hexdigest()
    return {"type": "directory", "path": path, "oid": oid, "size": 0}


def _signature(repo_id: str, oid: str) -> str:
    return hashlib.sha256(f"{repo_id} {oid} signed".encode()).hexdigest()[:16]


def _ranged(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    """The content, or the part of it that a Range header asks for."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match.groups() == ("", ""):
        return Reply(200, content, headers)
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, len(content)) if match[2] else len(content)
    else:
        start, stop = max(len(content) - int(match[2]), 0), len(content)
    if start >= len(content) or start >= stop:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
    return Reply(206, content[start:stop], headers)


# ---------------------------------------------------------------- sockets


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One write per answer: headers and body in two packets cost 40 ms of delayed acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    server: "_Server"

    def _serve(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        headers = {name.lower(): text for name, text in self.headers.items()}
        body = b"".join(self._body_chunks())
        request = Request(self.server.host, self.command, address.path, query, headers, body)
        try:
            reply = self.server.hub.answer(request)
        except ConnectionError:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, text in reply.headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
        self.wfile.flush()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 -- http.server's names

    def _body_chunks(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 -- http.server's name
        """Say nothing: `LoopbackHub.requests` is the log."""


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them

    def __init__(self, hub: LoopbackHub, host: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.host = hub, host
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that goes away in the middle of an answer is no fault of the Hub.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        # Clients keep their connections alive; their threads end only when somebody hangs up.
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


# ---------------------------------------------------------------- clients


def client_environment(
    url: str, home: Path, token: str | None = None, **extra: str
) -> dict[str, str]:
    """The environment of a process that knows only this Hub and a Hugging Face home of its own."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTEST")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(foreign)}
    environment |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PYTHONDONTWRITEBYTECODE": "1",
        **extra,
    }
    if token is not None:
        environment["HF_TOKEN"] = token
    return environment


def run_client(
    hub: LoopbackHub,
    code_or_arguments: str | list[str],
    tmp_path: Path,
    token: str | None = None,
    timeout: float = 600,  # seconds; for a process that hangs, not for one on a busy machine
    **extra_environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run Python code (a string) or `python ARGUMENTS` (a list) in a fresh process on this Hub.

    Its Hugging Face home is `tmp_path/"hf_home"` and its working directory `tmp_path`. The exit
    code is not checked: read `returncode`, `stdout` and `stderr`.
    """
    code = isinstance(code_or_arguments, str)
    arguments = ["-c", code_or_arguments] if code else list(code_or_arguments)
    environment = client_environment(hub.url, tmp_path / "hf_home", token, **extra_environment)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
