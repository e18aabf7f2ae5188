"""A ladder of strengths: a branch for each, and of the weights only the slots' shard is sent."""

import json
import shutil

import pytest
import torch
from conftest import HIDDEN
from publishing import REPO_ID, TOKEN, refusal, sent_weights
from safetensors.torch import load, save_file

from bake import export, rescale
from bake.api import publish
from bake.errors import BakeError, EquivalenceError
from bake.hub import publish as send
from bake.io.hashing import hash_files
from bake.lifecycle import branches as ladder
from bake.lifecycle.branches import parse_strengths, publish_strengths

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture(scope="module")
def baked(make_model, tmp_path_factory):
    """A bake of a local base in several shards, at m = 1."""
    folder = tmp_path_factory.mktemp("ladder")
    direction = folder / "direction.safetensors"
    save_file({"direction": torch.ones(HIDDEN)}, direction, {"site": "mlp_out"})
    export(str(make_model(sharded=True)), output=folder / "bake", direction=str(direction))
    return folder / "bake"


def slots(hub, revision, extra):
    return load(hub.files(REPO_ID, revision)[extra])


def test_three_strengths_cost_three_extra_shards(hub, baked, capsys):
    recorded = json.loads((baked / "bake.json").read_text())
    weights = sorted(path.name for path in baked.glob("model-*.safetensors"))
    *kept, extra = weights
    assert len(kept) >= 2
    before = hash_files(baked)

    found = publish(baked, REPO_ID, strengths=[0.5, 1, 1.5])
    sent = sent_weights(hub, REPO_ID)
    assert len(sent) == len(kept) + 3
    size = (baked / extra).stat().st_size
    everything = sum((baked / name).stat().st_size for name in weights)
    assert sum(map(len, sent.values())) == everything + 2 * size  # and the third is main's own
    assert set(hub.repos[REPO_ID].branches) == {"main", "m0.5", "m1", "m1.5"}
    one, main = hub.files(REPO_ID, "m1"), hub.files(REPO_ID)
    assert {name for name in main if one[name] != main[name]} == {"README.md", "bake.json"}
    assert f'("{REPO_ID}")'.encode() in main["README.md"]
    for name in kept:
        assert hub.files(REPO_ID, "m1.5")[name] == (baked / name).read_bytes()
    (name,) = {slot["name"] for slot in recorded["plan"]["slots"][:1]}
    one = slots(hub, "m1", extra)[name]
    assert one.abs().max() > 0
    torch.testing.assert_close(slots(hub, "m0.5", extra)[name], 0.5 * one)
    torch.testing.assert_close(slots(hub, "m1.5", extra)[name], 1.5 * one)
    for branch in ("m0.5", "m1.5"):
        files = hub.files(REPO_ID, branch)
        assert b"Not verified here" in files["README.md"]
        assert json.loads(files["bake.json"])["multiplier"] == float(branch[1:])
        assert f'("{REPO_ID}", revision="{branch}")'.encode() in files["README.md"]
        assert len(hub.commits(REPO_ID, branch)) == 3
    assert "not verified" in found.describe()
    assert "name it with --base" in capsys.readouterr().err
    assert hash_files(baked) == before
    assert not list(baked.parent.glob(".bake-strengths*"))

    total = hub.received_lfs_bytes
    again = publish(baked, REPO_ID, strengths=[0.5, 1, 1.5])
    assert all(branch.already_there for branch in again.branches.values())
    assert hub.received_lfs_bytes == total
    assert TOKEN not in json.dumps(again.to_dict())


def test_with_the_base_at_hand_a_strength_is_proven_and_its_card_says_so(hub, baked, make_model):
    found = publish(baked, REPO_ID, strengths=[-0.5], base=str(make_model(sharded=True)))
    assert found.branches[-0.5].proven
    files = hub.files(REPO_ID, "m-0.5")
    proof = json.loads(files["bake.json"])["equivalence"]
    main = json.loads(hub.files(REPO_ID)["bake.json"])["equivalence"]
    assert proof["passed"]
    assert 0 < proof["max_effect"] != main["max_effect"]
    card = files["README.md"].decode()
    assert "Not verified here" not in card
    assert "multiplier m = -0.5" in card
    assert 'revision="m-0.5"' in card
    assert b"revision=" not in hub.files(REPO_ID)["README.md"]


def test_with_the_base_at_hand_each_is_proven_before_anything_is_sent(
    hub, baked, monkeypatch, make_model
):
    """The proof itself is tested elsewhere; here, that a failed one stops the publish."""
    proven = []

    class Failed:
        def raise_if_failed(self):
            if len(proven) == 2:
                raise EquivalenceError("not equivalent: the second")

    def prove(directory, base):
        proven.append((json.loads((directory / "bake.json").read_text())["multiplier"], base))
        return type("Found", (), {"equivalence": Failed()})

    monkeypatch.setattr(ladder, "verify", prove)
    base = str(make_model(sharded=True))
    with pytest.raises(EquivalenceError, match="the second"):
        publish_strengths(baked, REPO_ID, [0.5, 1, -1.5], base=base)
    assert proven == [(0.5, base), (-1.5, base)]
    assert hub.requests == []


def test_strengths_that_are_none_are_one_line(baked):
    assert parse_strengths("0.5,1,-1.5") == [0.5, 1.0, -1.5]
    for text, says in (("1,x", "no list of multipliers"), ("1,1.0", "twice"), ("", "no list")):
        with pytest.raises(BakeError, match=says):
            parse_strengths(text)
    with pytest.raises(BakeError, match="must be finite and not zero"):
        publish(baked, REPO_ID, strengths=[0])
    for options in ({"revision": "x"}, {"create_pr": True}, {"verify_remote": True}):
        with pytest.raises(BakeError, match="--strengths makes branches of its own"):
            publish(baked, REPO_ID, strengths=[1], **options)
    with pytest.raises(BakeError, match="--base is for the proofs"):
        publish(baked, REPO_ID, base="somewhere")
    with pytest.raises(BakeError, match="not of a pull request"):
        publish(baked, REPO_ID, verify_remote=True, create_pr=True)


def test_a_thin_bake_has_one_strength(hub, baked, tmp_path):
    shutil.copytree(baked, tmp_path / "thin")
    values = json.loads((baked / "bake.json").read_text()) | {"thin": {"shards": []}}
    (tmp_path / "thin" / "bake.json").write_text(json.dumps(values))
    with pytest.raises(BakeError, match="is a thin bake"):
        publish(tmp_path / "thin", REPO_ID, strengths=[2])
    assert hub.requests == []


def test_an_unproven_bake_is_not_published_by_hand(hub, baked, tmp_path):
    shutil.copytree(baked, tmp_path / "again")
    rescale(tmp_path / "again", multiplier=2.0)
    assert "no passed equivalence" in refusal(send, tmp_path / "again", REPO_ID)
    assert hub.requests == []
