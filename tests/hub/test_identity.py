"""A local base that the user names: proven by its files' hashes, refused, or kept as the user's word."""

from __future__ import annotations

import shutil

import pytest

from bake.errors import HubError
from bake.hub.identity import check_id, identify_base

ID = "ada/base"


@pytest.fixture
def local(llama, hub):
    """A directory, the same files on the Hub."""
    hub.create_repo(ID)
    hub.add_files(ID, {path.name: path.read_bytes() for path in llama.iterdir()})
    return llama


def test_equal_files_give_the_id_and_the_commit(local, hub):
    found = identify_base(local, ("model.safetensors",), ID)
    assert found == {"id": ID, "revision": hub.commits(ID)[0].oid}
    assert identify_base(local, ("model.safetensors",), f"{ID}@main") == found


def test_another_file_is_refused(local, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(local, copy)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(HubError, match=r"is not ada/base: model\.safetensors has the hash"):
        identify_base(copy, ("model.safetensors",), ID)


def test_a_model_that_is_not_there_is_refused(local):
    with pytest.raises(HubError, match="ada/nothing"):
        identify_base(local, ("model.safetensors",), "ada/nothing")


def test_without_a_hub_it_is_the_users_word(local, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = identify_base(local, ("model.safetensors",), ID)
    assert found == {"id": ID, "revision": None, "claimed": True}
    assert "is not checked" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["base", "a/b/c", "a b/c", "../x/y", "ada/base@"])
def test_what_is_no_id_is_refused(given):
    with pytest.raises(HubError, match="is not org/name"):
        check_id(given)
