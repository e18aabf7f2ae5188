"""What can go wrong around an export, through the command line: kills, full disks, broken bases.

The promise: the output path is absent or complete, the base is untouched, one line says what to do,
nothing is left, and what a killed run could not clear away the next one does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from canned import passed
from conftest import TinyModel
from safetensors import safe_open
from safetensors.torch import save_file

from bake.api import calibrate
from bake.checkpoint.checkpoint import open_checkpoint
from bake.cli.main import main
from bake.io.hashing import hash_files
from bake.io.work_directory import temporary_directory

ROOT = Path(__file__).parents[2]
KILLS = 20  # at random calls; half of them while an old output is replaced
LAST_CALLS = range(0, 40, 3)


@pytest.fixture(scope="module")
def direction(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(11))
    save_file({"direction": vector}, path, metadata={"site": "mlp_out"})
    return path


def leftovers(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir() if ".bake-" in path.name)


# ---------------------------------------------------------------- kills

# One process that has exported once, so that everything is loaded, and forks a child for every run. A
# child counts its calls into the operating system (mkdir, open, write, copy, rename, …) from the first
# directory that it makes, in all its threads, and kills itself at the one it is told: which moments are
# tried depends on the program and not on how fast the machine is.
SERVER = """
import json, os, signal, sys, threading
from contextlib import nullcontext
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from canned import passed, sketch_figures
sketch_figures()
from bake.plan import destination
from bake.pipeline import decision, export as pipeline
from bake.pipeline.recipe import make_recipe
opened = {{}}
real = pipeline.open_base
def open_once(model, *arguments, **options):
    if model not in opened:
        opened[model] = real(model, *arguments, **options)
    return opened[model]
pipeline.open_base = open_once
pipeline.prove = passed
pipeline.kept_plain_process = lambda **_: nullcontext()
pipeline.announce = decision.announce = destination.announce = lambda message: None
calls = 0
CHANGING = {{
    "mkdir", "open", "write", "copy_file_range", "sendfile", "ioctl", "flock", "fsync", "ftruncate",
    "link", "symlink", "rename", "replace", "unlink", "rmdir", "__exit__", "close",
}}
def count(frame, event, function):
    global calls
    if event != "c_call" or function.__name__ not in CHANGING:
        return
    owner = getattr(function, "__self__", None)
    module = getattr(owner, "__name__", None) or type(owner).__module__
    if module not in ("posix", "_io", "fcntl") or type(owner).__name__ in ("StringIO", "BytesIO"):
        return
    if calls or function.__name__ == "mkdir":
        calls += 1
        if calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
for line in sys.stdin:
    values, die_at, counted = json.loads(line)
    recipe = make_recipe(values)
    if not opened:
        pipeline.export(recipe)
    child = os.fork()
    if child == 0:
        threading.setprofile(count)
        sys.setprofile(count)
        pipeline.export(recipe)
        sys.setprofile(None)
        Path(counted).write_text(str(calls))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@contextmanager
def export_server(counted: Path) -> Iterator[Callable[..., int]]:
    """Yield a function (recipe, die_at call) → the exit code, −9 for a killed run.

    counted: the file in which a run that lived writes how many calls it made.
    """
    code = SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"))
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(recipe: dict, die_at: int = 0) -> int:
            server.stdin.write(json.dumps([recipe, die_at, str(counted)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        try:
            yield run
        finally:
            server.stdin.close()


def test_killed_at_any_moment_the_output_is_absent_or_complete(
    make_model, direction, prompts_file, tmp_path
):
    base = make_model(TinyModel(sharded=True))
    before = hash_files(base)
    norms, output = tmp_path / "norms.json", tmp_path / "results" / "out"
    calibrate(str(base), output=norms, prompts=prompts_file)
    recipe = {
        "model": str(base), "output": str(output), "direction": str(direction),
        "calibration": str(norms), "overwrite": True,
    }  # fmt: skip
    generator = random.Random(5)
    seen = {"left": 0, "absent": 0, "old": 0, "new": 0}
    with export_server(tmp_path / "calls") as run:

        def prepare(*, replaces: bool) -> None:
            shutil.rmtree(output, ignore_errors=True)
            if replaces:
                assert run({**recipe, "multiplier": 1.0}) == 0

        assert run({**recipe, "multiplier": 2.0}) == 0  # loads everything
        for replaces in (False, True):
            prepare(replaces=replaces)
            assert run({**recipe, "multiplier": 2.0}) == 0
            calls = int((tmp_path / "calls").read_text())
            assert calls > 5 * KILLS
            moments = [generator.randint(1, calls) for _ in range(KILLS // 2)]
            moments += [calls - before_last for before_last in LAST_CALLS]  # the output appears
            for moment in moments:
                prepare(replaces=replaces)
                assert run({**recipe, "multiplier": 2.0}, moment) == -signal.SIGKILL
                seen["left"] += bool(output.parent.exists() and leftovers(output.parent))
                assert hash_files(base) == before
                if not output.exists():
                    seen["absent"] += 1
                    continue
                recorded = json.loads((output / "bake.json").read_text())
                assert hash_files(output, exclude=("bake.json",)) == recorded["files"]
                seen["old" if recorded["multiplier"] == 1.0 else "new"] += 1
                assert set(open_checkpoint(str(output)).tensors) > set(
                    open_checkpoint(str(base)).tensors
                )
        assert run({**recipe, "multiplier": 2.0}) == 0
    assert not leftovers(output.parent)
    assert hash_files(base) == before
    # Otherwise nothing was tested: runs that died while writing, before the output appeared and after.
    assert seen["left"] >= KILLS // 2, seen
    assert all(seen.values()), seen


# An export that stops in its proof, says so and waits.
STOPPED = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP):  # Where the tests run under nohup, they ignore these.
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
import bake.proof.equivalence
from bake.cli.main import main

def stop(*_):
    print("in the proof", flush=True)
    time.sleep(60)

bake.proof.equivalence.run_plain = stop
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def stopped_export(make_model, direction, tmp_path):
    """Return a function signal → exit code and message of an export that was sent it in its proof."""
    (tmp_path / "temporary").mkdir()

    def run(number: int) -> tuple[int, str]:
        command = ["export", make_model(TinyModel()), "--direction", direction]
        with subprocess.Popen(
            [sys.executable, "-c", STOPPED, *map(str, command), "-o", tmp_path / "results" / "out"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        ) as process:
            assert process.stdout.readline() == "in the proof\n"
            assert [path.name for path in (tmp_path / "temporary").iterdir()]
            process.send_signal(number)
            _, message = process.communicate()
        return process.returncode, message

    (tmp_path / "results").mkdir()
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_told_to_end_leaves_nothing(stopped_export, tmp_path, number):
    code, message = stopped_export(number)
    assert code == 128 + number
    assert message.splitlines()[-1] == "bake: interrupted; no output is half written"
    assert not list((tmp_path / "results").iterdir())
    assert not list((tmp_path / "temporary").iterdir())


def test_what_a_killed_proof_left_is_cleared_by_the_next(
    stopped_export, make_model, direction, tmp_path, monkeypatch
):
    stopped_export(signal.SIGKILL)
    left = [path.name for path in (tmp_path / "temporary").iterdir()]
    assert any(name.startswith("bake-proof-") for name in left)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with temporary_directory("bake-proof-") as alive:
        options = ("--direction", direction, "-o", tmp_path / "results" / "out")
        assert main(["export", *map(str, [make_model(TinyModel()), *options])]) == 0
        assert [path.name for path in (tmp_path / "temporary").iterdir()] == [alive.parent.name]


# ---------------------------------------------------------------- places that cannot be written


@contextmanager
def small_disk(place: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `place`, or a skip where this process may not mount one."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs rights that this process does not have")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def refused(capsys, *arguments: object) -> str:
    """Run an export that must be refused; return its one line."""
    code = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("bake: error:")]
    assert (code, captured.out, len(lines)) == (1, "", 1), captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_a_disk_that_is_too_small_is_said_before_writing(llama, direction, tmp_path, capsys):
    with small_disk(tmp_path / "disk", "size=300k") as disk:
        line = refused(capsys, llama, "--direction", direction, "-o", disk / "out")
        assert "make room" in line
        assert not list(disk.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    llama, direction, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "bake.checkpoint.writer.free_bytes", lambda place: 10**12
    )  # it looked large enough
    before = hash_files(llama)
    with small_disk(tmp_path / "disk", "size=300k") as disk:
        line = refused(capsys, llama, "--direction", direction, "-o", disk / "out")
        assert "No space left on device" in line
        assert "nothing was left behind" in line
        assert not list(disk.iterdir())
    assert hash_files(llama) == before


def test_a_read_only_place_is_said_before_any_work(llama, direction, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bake.pipeline.export.open_base", None)  # nothing is opened
    with small_disk(tmp_path / "disk", "size=1m,ro") as disk:
        line = refused(capsys, llama, "--direction", direction, "-o", disk / "out")
    assert "not writable" in line


# ---------------------------------------------------------------- bases that are broken


def truncate(base: Path) -> None:
    shard = sorted(base.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def change_header(base: Path, change: Callable[[dict], None]) -> None:
    shard = sorted(base.glob("model-*.safetensors"))[1]
    data = shard.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(next(entry for name, entry in header.items() if name != "__metadata__"))
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def lie_about_offsets(base: Path) -> None:
    change_header(base, lambda entry: entry["data_offsets"].__setitem__(1, 10**15))


def lie_about_shape(base: Path) -> None:
    change_header(base, lambda entry: entry["shape"].append(2))


def change_index(base: Path, file: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = file
    path.write_text(json.dumps(index))


def name_outside(base: Path) -> None:
    (base.parent / "outside.safetensors").write_bytes(b"")
    change_index(base, "../outside.safetensors")


def name_missing(base: Path) -> None:
    change_index(base, "model-00099-of-00099.safetensors")


def lose_a_shard(base: Path) -> None:
    sorted(base.glob("model-*.safetensors"))[0].unlink()


@pytest.mark.parametrize("option", [(), ("--estimate",), ("--shards", "symlink")], ids=" ".join)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "truncated"),
        (lie_about_offsets, "needs"),
        (lie_about_shape, "needs"),
        (name_outside, "leads out of its directory"),
        (name_missing, "model-00099-of-00099.safetensors, which is not there"),
        (lose_a_shard, "which is not there"),
    ],
)
def test_a_broken_base_is_one_line_and_leaves_nothing(
    make_model, direction, tmp_path, capsys, spoil, says, option
):
    base = Path(shutil.copytree(make_model(TinyModel(sharded=True)), tmp_path / "in" / "base"))
    spoil(base)
    line = refused(
        capsys, base, "--direction", direction, "-o", tmp_path / "results" / "out", *option
    )
    assert says in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ---------------------------------------------------------------- what survives


def test_what_the_plan_does_not_change_keeps_every_byte(
    make_model, direction, prompts_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("bake.pipeline.export.prove", passed)
    for architecture in ("llama", "gpt2"):
        base = make_model(TinyModel(architecture, dtype="bfloat16", sharded=True))
        out = tmp_path / architecture
        arguments = [base, "--direction", direction, "--prompts", prompts_file, "-o", out]
        assert main(["export", *map(str, arguments)]) == 0
        before, after = open_checkpoint(str(base)), open_checkpoint(str(out))
        changed = set(json.loads((out / "bake.json").read_text())["plan"]["patched"])
        assert bool(changed) == (architecture == "gpt2")
        for name in set(before.tensors) - changed:
            assert before.read_bytes(name) == after.read_bytes(name)
        for name in changed:
            assert before.read_bytes(name) != after.read_bytes(name)
        touched = {before.tensors[name].file for name in changed}
        old, new = hash_files(base), hash_files(out)
        kept = [old[file]["sha256"] for file in before.shards if file not in touched]
        assert kept
        assert set(kept) <= {entry["sha256"] for entry in new.values()}
        assert not {old[file]["sha256"] for file in touched} & {e["sha256"] for e in new.values()}


def test_a_tensor_that_no_model_class_knows_survives(
    make_model, direction, prompts_file, tmp_path, capsys
):
    """Multi-token prediction heads and the like: unexpected in the base already, and kept."""
    base = Path(shutil.copytree(make_model(TinyModel(sharded=True)), tmp_path / "base"))
    extra = {
        "model.layers.6.mtp.weight": torch.randn(4, 32),
        "model.layers.6.mlp.down_proj.weight": torch.randn(32, 88),
        "mtp.fc.weight": torch.randn(3),
    }
    save_file(extra, base / "mtp-head.safetensors", metadata={"format": "pt"})
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(extra, "mtp-head.safetensors")
    path.write_text(json.dumps(index))
    out = tmp_path / "out"
    arguments = [base, "--direction", direction, "--prompts", prompts_file, "-o", out]
    assert main(["export", *map(str, arguments)]) == 0
    assert "only what is new counts" in capsys.readouterr().err
    found = open_checkpoint(str(out))
    for name, tensor in extra.items():
        assert torch.equal(found.read(name), tensor)
    with safe_open(out / found.tensors["mtp.fc.weight"].file, framework="pt") as file:
        assert set(file.keys()) == set(extra)
    recorded = json.loads((out / "bake.json").read_text())["equivalence"]
    assert recorded["passed"]
    assert set(extra) <= set(recorded["loading_info"]["unexpected_keys"])
    assert main(["verify", str(out), "--base", str(base)]) == 0
