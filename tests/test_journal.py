"""Files that change together: a rescale that dies at any of its steps is whole or has not been."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model

from bake import export, rescale, verify
from bake.cli import main
from bake.errors import OutputError
from bake.hashing import hash_files
from bake.hub.manifest import read_manifest
from bake.journal import JOURNAL, changing

ROOT = Path(__file__).parent.parent

# Everything is loaded once; a child is forked for every run and kills itself at its n-th step: before it
# opens a file to write, makes, renames or removes one. No time decides where it dies.
KILLER = """
import os, shutil, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from bake import rescale
from bake.hashing import hash_files
steps = left = 0
def watch(event, arguments):
    global steps
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if left and (writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")):
        steps += 1
        if steps == left:
            os.kill(os.getpid(), signal.SIGKILL)
bake, place = Path({bake!r}), Path({place!r})
shutil.copytree(bake, place / "warm")
rescale(place / "warm", multiplier=2.0)  # imports what is imported on the way
sys.addaudithook(watch)
step, code = 0, -9
while code == -9:
    step += 1
    copy = place / str(step)
    shutil.copytree(bake, copy)
    child = os.fork()
    if child == 0:
        left = step
        rescale(copy, multiplier=2.0)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(step, code, flush=True)
"""


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def bake(request, tmp_path_factory):
    """A bake whose slots lie in several patched shards, and one whose slots are new."""
    folder = tmp_path_factory.mktemp(request.param)
    base = build_model(folder / "base", TinyModel(request.param, sharded=True))
    export(str(base), output=folder / "bake", direction=torch.arange(HIDDEN).float())
    return folder / "bake"


def test_killed_at_any_step_it_is_as_before_or_the_next_command_ends_it(bake, tmp_path):
    code = KILLER.format(root=str(ROOT), bake=str(bake), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runs = [line.split() for line in done.stdout.splitlines()]
    assert runs[-1][1] == "0"
    old, new = hash_files(bake), hash_files(tmp_path / "warm")
    changed = {name for name in old if old[name] != new[name]}
    assert {"bake.json", "README.md"} < changed
    recorded = json.loads((bake / "bake.json").read_text())
    shards = {name for name in changed if name.startswith("model")}
    assert len(shards) > 1 or not recorded["plan"]["patched"]
    seen = {"as before": 0, "half": 0, "whole": 0}
    for step, _ in runs:
        directory = tmp_path / step
        found = hash_files(directory)
        state = "as before" if found == old else "whole" if found == new else "half"
        seen[state] += 1
        begun = (directory / JOURNAL).is_dir()
        assert begun or state != "half"
        manifest = read_manifest(directory, unproven_allowed=True)
        assert hash_files(directory) == (new if begun or state == "whole" else old)
        assert manifest.proven is not (begun or state == "whole")
        assert not (directory / JOURNAL).exists()
        with changing(directory):  # The next change clears away what was not complete.
            pass
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
        shutil.rmtree(directory)
    assert seen["as before"] > 5  # the steps of writing it aside
    assert seen["half"] >= len(changed) - 1  # and those of putting it in place
    assert seen["whole"] >= 1


def test_a_full_disk_leaves_it_as_it_was(bake, tmp_path, monkeypatch, capsys):
    shutil.copytree(bake, tmp_path / "it")
    before = hash_files(bake)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("bake.journal.sync", full)
        assert main(["rescale", str(tmp_path / "it"), "-m", "2"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written: No space left on device; it is as it was" in said
    assert hash_files(tmp_path / "it") == before
    assert not list((tmp_path / "it").glob(".*"))


def change(directory):
    with changing(directory) as journal:
        journal.patch("shard", 4, b"SLOTS")
        journal.write("figures/one.png", b"one")


def test_what_could_not_be_put_in_its_place_is_said_and_ended_later(tmp_path, monkeypatch):
    (tmp_path / "shard").write_bytes(b"old slots")
    with monkeypatch.context() as patched:
        patched.setattr("bake.journal._patch", lambda *_: (tmp_path / "none").read_bytes())
        with pytest.raises(OutputError, match="half made, and the next command on it goes on"):
            change(tmp_path)
    assert (tmp_path / "shard").read_bytes() == b"old slots"
    with changing(tmp_path):
        pass
    assert (tmp_path / "shard").read_bytes() == b"old SLOTS"
    assert (tmp_path / "figures/one.png").read_bytes() == b"one"


def test_two_runs_do_not_change_one_directory_together(bake):
    before = hash_files(bake)
    descriptor = os.open(bake, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="is being changed by another run"):
            rescale(bake, multiplier=2.0)
    finally:
        os.close(descriptor)
    assert hash_files(bake) == before


def test_hidden_files_are_no_part_of_a_bake(bake, tmp_path):
    """A file manager's droppings, for one, that publishing leaves out."""
    shutil.copytree(bake, tmp_path / "it")
    (tmp_path / "it" / ".DS_Store").write_bytes(b"x")
    rescale(tmp_path / "it", multiplier=2.0)
    verify(tmp_path / "it", base=str(bake.parent / "base"))
    assert ".DS_Store" not in read_manifest(tmp_path / "it").files
    assert (tmp_path / "it" / ".DS_Store").read_bytes() == b"x"


def test_what_is_no_directory_is_one_line(capsys, tmp_path):
    assert main(["rescale", str(tmp_path / "none"), "-m", "2"]) == 1
    assert "give a directory that bake export wrote" in capsys.readouterr().err
