"""What tests of publishing share: a small directory as bake leaves it, tokens, and refusals."""

import hashlib
import json

import pytest

from bake.errors import HubError

TOKEN = "hf_adaSecretThatMustNotAppear"
READ_TOKEN = "hf_adaReadOnlySecret"
FINE_TOKEN = "hf_adaFineGrainedSecret"
REPO_ID = "ada/steered"

FILES = {
    "README.md": b"---\n"
    b"library_name: transformers\npipeline_tag: text-generation\nlicense: mit\n"
    b"tags: [steering, activation-steering, bake]\n"
    b"---\n# A steered model\n",
    "config.json": b'{"model_type": "llama"}\n',
    "direction.safetensors": bytes(range(64)),
    "figures/dose.png": b"\x89PNG\r\n\x1a\n\0\0",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 64,
    "model-00002-of-00002.safetensors": b"push" * 100,
}


def write_output(directory, files=FILES, **changes):
    """A directory as `bake export` leaves it: the files, and a bake.json that vouches for them."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    record = {
        "files": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in files.items()
        },
        "equivalence": {"passed": True, "relative_error": 1e-6},
        "licence": {"license": "mit"},
    }
    (directory / "bake.json").write_text(json.dumps({**record, **changes}))
    return directory


def sent_weights(hub, repo_id):
    """The weight shards that were sent to a repository, not copied there: {sha256: bytes}."""
    puts = [request for request in hub.requests if request.method == "PUT"]
    bodies = {r.path.split("/")[-1]: r.body for r in puts if r.path.startswith(f"/{repo_id}/")}
    shards = {
        file.sha256
        for commit in hub.repos[repo_id].commits.values()
        for name, file in commit.files.items()
        if name.startswith("model-") and file.is_lfs
    }
    return {oid: body for oid, body in bodies.items() if oid in shards}


def refusal(call, *arguments, **options):
    """The message of the HubError that the call must raise: one line, without any token."""
    with pytest.raises(HubError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Secret" not in message
    return message
