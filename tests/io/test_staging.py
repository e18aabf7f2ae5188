"""Files that change together: a rescale that dies at any of its steps is whole or has not been."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model

from bake import export, rescale, verify
from bake.cli.main import main
from bake.errors import OutputError
from bake.hub.manifest import read_manifest
from bake.io.hashing import hash_files
from bake.io.staging import changed_directory, staged_directory

ROOT = Path(__file__).parents[2]

# Everything is loaded once; a child is forked for every run and kills itself at its n-th step: before it
# opens a file to write, makes, links, renames or removes one. No time decides where it dies.
KILLER = """
import os, shutil, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from canned import sketch_figures
sketch_figures()
from bake import rescale
from bake.io import staging
if not {exchanges}:
    staging.exchange = lambda *_: False
steps = left = 0
def watch(event, arguments):
    global steps
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
    if left and (writes or event in changes):
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
    copy = place / str(step) / "it"
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


@pytest.fixture
def copied(bake, tmp_path):
    shutil.copytree(bake, tmp_path / "it")
    return tmp_path / "it"


# Both kinds of bake, and directories exchanged or not; not their product.
@pytest.mark.parametrize(
    ("bake", "exchanges"), [("gpt2", True), ("llama", False)], indirect=["bake"]
)
def test_killed_at_any_step_it_is_as_before_or_whole(bake, tmp_path, exchanges):
    code = KILLER.format(
        root=str(ROOT),
        tests=str(ROOT / "tests"),
        bake=str(bake),
        place=str(tmp_path),
        exchanges=exchanges,
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    runs = [line.split() for line in done.stdout.splitlines()]
    assert runs[-1][1] == "0"
    old, new = hash_files(bake), hash_files(tmp_path / "warm")
    changed = {name for name in old if old[name] != new[name]}
    assert {"bake.json", "README.md"} < changed
    recorded = json.loads((bake / "bake.json").read_text())
    shards = {name for name in changed if name.startswith("model")}
    assert len(shards) > 1 or not recorded["plan"]["patched"]
    seen = {"as before": 0, "away": 0, "whole": 0, "left": 0}
    for step, _ in runs:
        directory = tmp_path / step / "it"
        seen["left"] += len(list((tmp_path / step).iterdir())) > directory.exists()
        if directory.exists():
            found = hash_files(directory)
            assert found in (old, new)
            seen["as before" if found == old else "whole"] += 1
            read_manifest(directory, unproven_allowed=True)
            assert hash_files(directory) == found  # Reading changes nothing.
        else:  # Between the two renames, where the file system has no exchange.
            assert not exchanges
            seen["away"] += 1
        with changed_directory(directory):  # The next change clears away what is left.
            pass
        assert hash_files(directory) in (old, new)
        assert [path.name for path in (tmp_path / step).iterdir()] == ["it"]
        shutil.rmtree(directory)
    assert seen["as before"] > 5  # the steps of writing aside
    assert seen["whole"] > 5  # and those of clearing away
    assert seen["left"] > 10
    assert (seen["away"] > 0) is not exchanges


def test_a_full_disk_leaves_it_as_it_was(copied, monkeypatch, capsys):
    before = hash_files(copied)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("bake.io.staging.sync", full)
        assert main(["rescale", str(copied), "-m", "2"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written: No space left on device; it is as it was" in said
    assert hash_files(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == ["it"]


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


def test_a_directory_that_was_replaced_meanwhile_is_left_alone(tmp_path):
    it = tmp_path / "it"
    it.mkdir()
    for name in ("config.json", "bake.json"):
        (it / name).write_text("{}")

    def change_slowly() -> None:
        with changed_directory(it) as staging:
            (staging / "slow").write_text("x")
            with staged_directory(it, overwrite=True) as other:
                (other / "config.json").write_text("{}")
                (other / "fast").write_text("x")

    with pytest.raises(OutputError, match="replaced meanwhile by another run"):
        change_slowly()
    assert sorted(path.name for path in it.iterdir()) == ["config.json", "fast"]


def test_what_bake_did_not_write_comes_along(copied, tmp_path, bake):
    """A file manager's droppings, a user's notes, a repository, links: none of them is bake's."""
    (copied / ".DS_Store").write_bytes(b"x")
    (copied / ".git" / "objects").mkdir(parents=True, mode=0o700)
    (copied / ".git" / "objects" / "pack").write_bytes(b"pack")
    (copied / ".git" / "objects" / "pack").chmod(0o444)
    (copied / "notes.txt").write_text("mine")
    (copied / "link").symlink_to("notes.txt")
    (copied / "README.md").chmod(0o640)
    copied.chmod(0o750)
    shards = {path.name: path.stat().st_ino for path in copied.glob("model-0000[12]*")}
    notes = (copied / "notes.txt").stat()
    kept = {n for n, h in hash_files(copied).items() if n in shards}
    before = hash_files(copied)

    rescale(copied, multiplier=2.0)

    assert (copied / ".DS_Store").read_bytes() == b"x"
    assert (copied / ".git/objects/pack").read_bytes() == b"pack"
    assert stat.S_IMODE((copied / ".git/objects/pack").stat().st_mode) == 0o444
    assert stat.S_IMODE((copied / ".git/objects").stat().st_mode) == 0o700
    assert (copied / "notes.txt").stat().st_ino == notes.st_ino
    assert (copied / "notes.txt").stat().st_nlink == 1
    assert (copied / "link").readlink() == Path("notes.txt")
    assert stat.S_IMODE((copied / "README.md").stat().st_mode) == 0o640
    assert stat.S_IMODE(copied.stat().st_mode) == 0o750
    after = hash_files(copied)
    changed = {name for name in after if after[name] != before[name]}
    assert "bake.json" in changed
    for name in kept - changed:  # A shard without a change costs nothing.
        assert (copied / name).stat().st_ino == shards[name]
    for name in ("notes.txt", "link"):
        (copied / name).unlink()
    (copied / "bake.json").write_text(
        json.dumps(
            json.loads((copied / "bake.json").read_text())
            | {"files": hash_files(copied, exclude=["bake.json"])}
        )
    )
    verify(copied, base=str(bake.parent / "base"))
    assert ".DS_Store" not in read_manifest(copied).files
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_files_that_cannot_be_linked_are_copied(copied, monkeypatch):
    (copied / "notes.txt").write_text("mine")
    (copied / "notes.txt").chmod(0o640)
    before = (copied / "notes.txt").stat().st_ino

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    rescale(copied, multiplier=2.0)
    assert (copied / "notes.txt").read_text() == "mine"
    assert (copied / "notes.txt").stat().st_ino != before
    assert stat.S_IMODE((copied / "notes.txt").stat().st_mode) == 0o640


def what_is_in(directory: Path) -> dict[str, tuple[int, int]]:
    """{name: (inode, time of change)} of everything below a directory."""
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(directory))] = status.st_ino, status.st_mtime_ns
    return found


def test_a_leftover_journal_is_never_acted_on(copied, tmp_path, capsys):
    """What earlier versions left where they died, or what a stranger laid there."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("theirs")
    planted = copied / ".bake-journal" / "files"
    planted.mkdir(parents=True)
    (planted / "config.json").write_text("planted")
    (planted / "new").write_text("planted")
    patches = copied / ".bake-journal" / "patches" / "reached"
    patches.mkdir(parents=True)
    (patches / "0").write_bytes(b"THEIRS")
    (copied / "reached").symlink_to(outside / "file")
    before = what_is_in(copied)
    main(["diff", str(copied), str(copied)])
    main(["verify", str(copied)])
    assert what_is_in(copied) == before
    (copied / "reached").unlink()
    assert main(["diff", str(copied), str(copied)]) == 0
    del before["reached"]
    assert what_is_in(copied) == before
    assert (outside / "file").read_text() == "theirs"
    capsys.readouterr()
    assert main(["rescale", str(copied), "-m", "2"]) == 0, capsys.readouterr().err
    assert (outside / "file").read_text() == "theirs"
    assert "planted" not in (copied / "config.json").read_text()
    assert not (copied / "new").exists()
    assert not (copied / ".bake-journal").exists()


def test_a_linked_folder_is_not_written_through(copied, tmp_path):
    outside = tmp_path / "outside"
    (copied / "figures").rename(outside)
    with changed_directory(copied) as staging:
        pass
    (copied / "figures").symlink_to(outside)
    (copied / "config.json").rename(outside / "config.json")
    (copied / "config.json").symlink_to(outside / "config.json")
    before = hash_files(outside)
    with changed_directory(copied) as staging:
        (staging / "figures").mkdir()
        (staging / "figures" / "norms.png").write_bytes(b"new")
        (staging / "config.json").write_text("new")
    assert hash_files(outside) == before
    assert not (copied / "figures").is_symlink()
    assert [path.name for path in (copied / "figures").iterdir()] == ["norms.png"]
    assert not (copied / "config.json").is_symlink()


def test_the_working_directory_may_be_the_bake_or_a_link_to_it(
    copied, tmp_path, monkeypatch, capsys
):
    (tmp_path / "named").symlink_to("it")
    before = hash_files(copied)
    monkeypatch.chdir(copied)
    assert main(["rescale", ".", "-m", "2"]) == 0
    assert "a shell that stands in it needs cd ." in capsys.readouterr().err
    assert Path.cwd() == copied
    assert Path("bake.json").is_file()
    changed = hash_files(copied)
    assert changed != before
    monkeypatch.chdir(tmp_path)
    assert main(["rescale", "named", "-m", "1"]) == 0
    assert "cd ." not in capsys.readouterr().err
    assert Path("named").is_symlink()
    assert hash_files(copied) != changed


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
@pytest.mark.parametrize("what", ["it", "."])
def test_a_read_only_place_is_one_line_and_stays_as_it_was(copied, tmp_path, what, capsys):
    before = hash_files(copied)
    (tmp_path / what).chmod(0o555)
    try:
        assert main(["rescale", str(copied), "-m", "2"]) == 1
    finally:
        (tmp_path / what).chmod(0o755)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be written" in said
    assert hash_files(copied) == before
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_what_is_no_directory_is_one_line(capsys, tmp_path):
    assert main(["rescale", str(tmp_path / "none"), "-m", "2"]) == 1
    assert "give one that bake export wrote" in capsys.readouterr().err
