"""How base shards get into the output: copies and links, and what must never happen through a link."""

from __future__ import annotations

import errno
import gc
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from pickled_models import pickle_weights
from transformers import AutoModelForCausalLM

from bake.api import export, verify
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.edits import Add, Patch
from bake.checkpoint.writer import write_weights
from bake.errors import BakeError, OutputError
from bake.io.hashing import hash_files

LINKS = ("hardlink", "symlink")
SHA = "0123456789abcdef0123456789abcdef01234567"


def write(base: Path, output: Path, edits, shards: str = "copy"):
    output.mkdir()
    return write_weights(open_checkpoint(str(base)), edits, output, shards=shards)


def as_snapshot(directory: Path, root: Path) -> Path:
    """The checkpoint as it would lie in the Hub's cache: links to blobs."""
    repository = root / "hub" / "models--ada--base"
    snapshot, blobs = repository / "snapshots" / SHA, repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for name, entry in hash_files(directory).items():
        (blobs / entry["sha256"]).write_bytes((directory / name).read_bytes())
        (snapshot / name).symlink_to(Path("../../blobs") / entry["sha256"])
    return snapshot


@pytest.mark.parametrize("shards", ["copy", *LINKS])
def test_kept_shards_are_the_same_files_and_new_tensors_are_not(make_model, tmp_path, shards):
    base = make_model(TinyModel(sharded=True))
    before = hash_files(base)
    written = write(base, tmp_path / "out", [Add("new.bias", torch.ones(3))], shards)
    kept = [file for file in written.files if file.action == "kept"]
    assert len(kept) == len(written.files) - 1 > 1
    after = hash_files(tmp_path / "out")
    for file in kept:
        target, source = tmp_path / "out" / file.name, base / str(file.base_file)
        assert after[file.name] == before[str(file.base_file)]
        assert target.samefile(source) == (shards != "copy")
        assert target.is_symlink() == (shards == "symlink")
        if shards == "symlink":
            assert target.readlink() == source.resolve()
    assert (tmp_path / "out" / written.files[-1].name).stat().st_nlink == 1


@pytest.mark.parametrize("shards", ["copy", *LINKS])
@pytest.mark.parametrize("cached", [False, True], ids=["directory", "cache"])
def test_a_patch_never_reaches_the_base(make_model, tmp_path, shards, cached):
    source = make_model(TinyModel("gpt2", sharded=True))
    base = as_snapshot(source, tmp_path) if cached else source
    before = hash_files(base)
    checkpoint = open_checkpoint(str(base))
    name = "transformer.h.1.mlp.c_proj.bias"
    patch = Patch(name, checkpoint.read(name) + 1)
    written = write(base, tmp_path / "out", [patch], shards)
    assert hash_files(base) == before
    actions = {file.name: file.action for file in written.files}
    assert set(actions.values()) == {"kept", "patched", "originals"}
    for file, action in actions.items():
        path = tmp_path / "out" / file
        if action != "kept":
            assert not path.is_symlink()
            assert path.stat().st_nlink == 1
    with pytest.raises(FileExistsError):  # nothing is ever written over a file that is there
        write_weights(checkpoint, [patch], tmp_path / "out")
    assert hash_files(base) == before


@pytest.mark.parametrize("shards", LINKS)
def test_a_bake_with_links_loads_verifies_and_says_what_it_shares(
    make_model, tmp_path, pairs_file, prompts_file, shards, capsys
):
    base = as_snapshot(make_model(TinyModel(sharded=True)), tmp_path)
    out = tmp_path / "out"
    result = export(str(base), output=out, pairs=pairs_file, prompts=prompts_file, shards=shards)
    assert result.equivalence.passed
    said = capsys.readouterr().err
    assert "the Hub's cache" in said
    assert shards in said
    blobs = base.parent.parent / "blobs"
    links = [path for path in out.glob("model-*") if path.is_symlink() or path.stat().st_nlink > 1]
    assert len(links) == len(list(out.glob("model-*.safetensors"))) - 1
    assert all(path.resolve().parent == blobs for path in links if path.is_symlink())
    moved = out.rename(tmp_path / "elsewhere")
    _, info = AutoModelForCausalLM.from_pretrained(moved, output_loading_info=True)
    assert not any(info.values())
    assert verify(moved, base=str(base)).equivalence.passed
    export(
        str(base), output=moved, pairs=pairs_file, prompts=prompts_file, overwrite=True
    )  # the old output goes, and only its links
    assert verify(moved, base=str(base)).equivalence.passed


def test_links_change_nothing_in_what_is_recorded(llama, tmp_path, pairs_file, prompts_file):
    options = {"pairs": pairs_file, "prompts": prompts_file}
    export(str(llama), output=tmp_path / "a", **options)
    export(str(llama), output=tmp_path / "b", shards="symlink", **options)
    assert hash_files(tmp_path / "a") == hash_files(tmp_path / "b")


def test_a_hard_link_across_file_systems_is_one_line(llama, tmp_path, pairs_file, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(OutputError, match="different file systems") as caught:
        export(str(llama), output=tmp_path / "out", pairs=pairs_file, shards="hardlink")
    assert "--shards symlink or copy" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_way_is_refused(llama, tmp_path):
    with pytest.raises(BakeError, match="copy, hardlink, symlink"):
        export(str(llama), output=tmp_path / "out", pairs="x", shards="clone")


def test_converted_shards_are_taken_over_and_never_linked_to(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    old = pickle_weights(llama, tmp_path / "old")
    for shards in LINKS:
        with pytest.raises(OutputError, match="leave --shards out"):
            write(old, tmp_path / shards, [], shards)
    checkpoint = open_checkpoint(str(old))
    (tmp_path / "out").mkdir()
    write_weights(checkpoint, [], tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    assert shard.stat().st_nlink == 2  # no byte was written twice
    del checkpoint
    gc.collect()
    assert shard.stat().st_nlink == 1
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())

    def refuse(self, target):
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write(old, tmp_path / "copied", [])
    assert (tmp_path / "copied" / "model.safetensors").read_bytes() == shard.read_bytes()
