"""Writing: which bytes stay, which change, what transformers reads, what a failure leaves."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import build_tiny_llama, change_index
from transformers import AutoModelForCausalLM

from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.config_json import edit_json
from bake.checkpoint.edits import REMOVED, Add, Drop, Merge, Patch, Rename, Transform
from bake.checkpoint.writer import copy_companions, write_config, write_weights
from bake.errors import CheckpointError, OutputError
from bake.io import copy as copying
from bake.io.copy import copy_file
from bake.io.hashing import hash_files
from bake.io.staging import check_output, staged_directory

ROOT = Path(__file__).parents[2]
DOWN = "model.layers.{}.mlp.down_proj.weight"
BIASES = {"gate_proj": 32, "up_proj": 32, "down_proj": 16}
INDEX = "model.safetensors.index.json"


def bias_edits(checkpoint, value=0.5):
    """What `mlp_bias` needs: explicit biases on every layer, `value` in down_proj of layer 1."""
    dtype = checkpoint.read(DOWN.format(0)).dtype
    edits = []
    for layer in range(2):
        for name, size in BIASES.items():
            amount = value if (layer, name) == (1, "down_proj") else 0.0
            bias = torch.full((size,), amount, dtype=dtype)
            edits.append(Add(f"model.layers.{layer}.mlp.{name}.bias", bias))
    return edits


def bake(base, output, edits, changes=None, **options):
    """The writer's flow without the stages around it."""
    checkpoint = open_checkpoint(str(base))
    with staged_directory(output, base_directory=base, **options) as staging:
        written = write_weights(checkpoint, edits, staging)
        write_config(checkpoint, changes or {}, staging)
        copy_companions(checkpoint, staging)
    return written


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 9)[None]).logits.float()


def assert_kept(base, output, names):
    """Tensors `names` have the same dtype, shape and bytes in both checkpoints."""
    before, after = open_checkpoint(str(base)), open_checkpoint(str(output))
    assert names
    for name in names:
        old, new = before.tensors[name], after.tensors[name]
        assert (old.dtype, old.shape) == (new.dtype, new.shape)
        assert before.read_bytes(name) == after.read_bytes(name), name


def leftovers(parent):
    return sorted(path.name for path in parent.iterdir() if ".bake-" in path.name)


@pytest.fixture
def single(tmp_path):
    return build_tiny_llama(tmp_path / "single")


@pytest.fixture
def sharded(tmp_path):
    return build_tiny_llama(tmp_path / "sharded", sharded=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_added_biases_load_and_everything_else_stays(tmp_path, dtype, is_sharded, tied):
    base = build_tiny_llama(tmp_path / "base", dtype=dtype, sharded=is_sharded, tied=tied)
    (base / "tokenizer.json").write_text('{"kept": "byte for byte"}')
    before = hash_files(base)
    checkpoint = open_checkpoint(str(base))
    assert ("lm_head.weight" in checkpoint.tensors) != tied
    output = tmp_path / "output"
    written = bake(base, output, bias_edits(checkpoint), {"mlp_bias": True})

    count = len(checkpoint.shards) + 1
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [file.name for file in written.files] == names
    assert [file.action for file in written.files] == ["kept"] * (count - 1) + ["added"]
    assert [path.name for path in sorted(output.glob("*.safetensors"))] == names
    for old, new in zip(checkpoint.shards, names, strict=False):
        assert (base / old).read_bytes() == (output / new).read_bytes()
    assert [file.size for file in written.files] == [(output / n).stat().st_size for n in names]
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert_kept(base, output, list(checkpoint.tensors))

    index = json.loads((output / INDEX).read_text())
    baked = open_checkpoint(str(output))
    assert index["weight_map"] == {name: entry.file for name, entry in baked.tensors.items()}
    assert index["metadata"]["total_size"] == baked.size
    if is_sharded:
        old = checkpoint.index_metadata["total_parameters"]
        assert index["metadata"]["total_parameters"] == old + 2 * sum(BIASES.values())

    model, report = AutoModelForCausalLM.from_pretrained(
        output, dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == getattr(torch, dtype)
    assert torch.all(model.model.layers[1].mlp.down_proj.bias == 0.5)
    assert torch.all(model.model.layers[0].mlp.down_proj.bias == 0)
    original = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert not torch.allclose(logits(model), logits(original), atol=1e-3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.bias.zero_()
    assert torch.equal(logits(model), logits(original))
    assert hash_files(base) == before  # the base is never written to


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_patch_changes_its_bytes_and_the_originals_undo_it(tmp_path, is_sharded):
    base = build_tiny_llama(tmp_path / "base", dtype="bfloat16", sharded=is_sharded)
    checkpoint = open_checkpoint(str(base))
    name, norm = DOWN.format(1), "model.norm.weight"
    new = checkpoint.read(name) + 1
    edits = [Patch(name, new), Patch(norm, checkpoint.read(norm) * 2)]
    assert not torch.equal(new, checkpoint.read(name))
    output = tmp_path / "output"
    written = bake(base, output, edits)
    baked = open_checkpoint(str(output))
    assert torch.equal(baked.read(name), new)
    assert torch.equal(baked.read(norm), checkpoint.read(norm) * 2)
    assert_kept(base, output, sorted(set(checkpoint.tensors) - {name, norm}))
    assert baked.shards == checkpoint.shards  # nothing is added, so no name changes
    originals = load_file(output / "originals.safetensors")
    assert sorted(originals) == sorted([name, norm])
    assert all(torch.equal(originals[key], checkpoint.read(key)) for key in originals)
    patched = {file.base_file for file in written.files if file.action == "patched"}
    assert patched == {checkpoint.tensors[name].file, checkpoint.tensors[norm].file}
    assert written.files[-1].action == "originals"

    # The originals lie beside the weights and are never taken for weights.
    assert "originals.safetensors" not in (output / INDEX).read_text()
    model, report = AutoModelForCausalLM.from_pretrained(
        output, dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, new)

    undo = [Patch(key, tensor) for key, tensor in originals.items()]
    bake(output, tmp_path / "undone", undo)
    for shard in checkpoint.shards:
        assert (tmp_path / "undone" / shard).read_bytes() == (base / shard).read_bytes()


def test_a_single_file_keeps_its_name_and_gets_an_index_for_other_engines(single, tmp_path):
    bake(single, tmp_path / "output", [])
    index = json.loads((tmp_path / "output" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    kept = (tmp_path / "output" / "model.safetensors").read_bytes()
    assert kept == (single / "model.safetensors").read_bytes()


@pytest.mark.parametrize("is_sharded", [False, True])
def test_rename_transform_and_drop_rewrite_only_their_shards(tmp_path, is_sharded):
    base = build_tiny_llama(tmp_path / "base", dtype="bfloat16", sharded=is_sharded)
    checkpoint = open_checkpoint(str(base))
    split, norm = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight"
    renamed, dropped = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
    patched = DOWN.format(0)
    edits = [
        Rename(renamed, "other.name"),
        Drop(dropped),
        Transform(
            split,
            {"half.0": (16, 16), "half.1": (16, 16)},
            lambda gate: {
                "half.1": gate[16:],
                "half.0": gate[:16],
            },
        ),
        Transform(norm, {norm: (16,)}, lambda weight: {norm: weight.float() + 1}, dtype="F32"),
        Patch(patched, checkpoint.read(patched) - 1),
        Add("extra.bias", torch.ones(3)),
    ]
    output = tmp_path / "output"
    written = bake(base, output, edits)
    baked = open_checkpoint(str(output))
    gone = {renamed, dropped, split, norm, patched}
    assert set(baked.tensors) == (set(checkpoint.tensors) - gone) | {
        *("other.name", "half.0", "half.1", norm, patched, "extra.bias"),
    }
    assert_kept(base, output, sorted(set(checkpoint.tensors) - gone))
    assert baked.read_bytes("other.name") == checkpoint.read_bytes(renamed)
    halves = torch.cat([baked.read("half.0"), baked.read("half.1")])
    assert torch.equal(halves, checkpoint.read(split))
    assert torch.equal(baked.read(norm), checkpoint.read(norm).float() + 1)
    assert torch.equal(baked.read(patched), checkpoint.read(patched) - 1)
    assert torch.equal(
        load_file(output / "originals.safetensors")[patched], checkpoint.read(patched)
    )
    touched = {checkpoint.tensors[name].file for name in gone}
    actions = {file.base_file: file.action for file in written.files if file.base_file}
    assert all(actions[file] == "kept" for file in set(checkpoint.shards) - touched)
    assert "rewritten" in actions.values()
    for file in written.files:
        assert (output / file.name).stat().st_size == file.size
        header = baked.headers.get(file.name)
        for entry in header.tensors if header else ():
            assert entry.start % (4 if entry.dtype == "F32" else 2) == 0  # readers map them
            assert header.metadata["format"] == "pt"
    assert load_file(output / baked.tensors[norm].file)[norm].dtype == torch.float32


def test_a_rename_chain_and_a_freed_name(single, tmp_path):
    checkpoint = open_checkpoint(str(single))
    first, second = DOWN.format(0), DOWN.format(1)
    zeros = torch.zeros(1).expand(16, 32)
    edits = [Rename(first, second), Rename(second, DOWN.format(2)), Add(first, zeros)]
    bake(single, tmp_path / "output", edits)
    baked = open_checkpoint(str(tmp_path / "output"))
    assert baked.read_bytes(second) == checkpoint.read_bytes(first)
    assert baked.read_bytes(DOWN.format(2)) == checkpoint.read_bytes(second)
    assert not baked.read(first).any()
    assert baked.read(first).shape == (16, 32)


def test_wide_dtypes_begin_aligned(single, tmp_path):
    odd, wide = torch.ones(3, dtype=torch.uint8), torch.ones(2)
    bake(single, tmp_path / "output", [Add("a", odd), Add("b", wide), Add("c", odd)])
    baked = open_checkpoint(str(tmp_path / "output"))
    assert baked.tensors["b"].start % 4 == 0
    assert torch.equal(baked.read("a"), odd)
    assert torch.equal(baked.read("b"), wide)


@pytest.mark.parametrize("adds", [[], [Add("another", torch.ones(1))]])
def test_a_shard_that_loses_all_its_tensors_is_left_out(sharded, tmp_path, adds):
    checkpoint = open_checkpoint(str(sharded))
    shard = checkpoint.shards[1]
    drops = [Drop(entry.name) for entry in checkpoint.headers[shard].tensors]
    bake(sharded, tmp_path / "output", [*drops, *adds])
    baked = open_checkpoint(str(tmp_path / "output"))
    assert len(baked.shards) == len(checkpoint.shards) - 1 + len(adds)
    assert set(checkpoint.tensors) - set(baked.tensors) == {drop.name for drop in drops}
    assert all(name.endswith(f"-of-{len(baked.shards):05d}.safetensors") for name in baked.shards)


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        ([Patch("ghost", torch.ones(1))], "Patch of ghost: single has no such tensor"),
        ([Rename("ghost", "a")], "Rename of ghost: single has no such tensor"),
        ([Drop("ghost")], "Drop of ghost: single has no such tensor"),
        ([Transform("ghost", {}, dict)], "Transform of ghost: single has no such tensor"),
        ([Add("model.norm.weight", torch.ones(16))], "two tensors named model.norm.weight"),
        ([Add("a", torch.ones(1)), Add("a", torch.ones(1))], "two tensors named a"),
        ([Add("lm_head.weight", torch.ones(1)), Rename("model.norm.weight", "lm_head.weight")],
         "two tensors named lm_head.weight"),
        ([Patch("model.norm.weight", torch.ones(17))], "F32 [17], the stored one F32 [16]"),
        ([Patch("model.norm.weight", torch.ones(16).half())], "F16 [16], the stored one F32"),
        ([Drop("lm_head.weight"), Drop("lm_head.weight")], "it has a Drop already"),
        ([Drop("lm_head.weight"), Rename("lm_head.weight", "a")], "it has a Drop already"),
        ([Rename("lm_head.weight", "a"), Rename("model.norm.weight", "a")], "two tensors named a"),
        ([Transform("lm_head.weight", {"a": (1,)}, dict, dtype="F99")], "no safetensors dtype F99"),
        ([Add("a", torch.ones(1, dtype=torch.complex128))], "complex128"),
        ([Merge(("lm_head.weight", "ghost"), {}, dict)], "Merge of ghost: single has no such tensor"),
        ([Merge(("lm_head.weight", "model.norm.weight"), {"a": (1,)}, dict), Drop("model.norm.weight")],
         "Drop of model.norm.weight: it has a Drop already"),
        ([Drop("model.norm.weight"), Merge(("lm_head.weight", "model.norm.weight"), {}, dict)],
         "Merge of model.norm.weight: it has a Drop already"),
        ([Merge(("lm_head.weight",), {"a": (1,)}, dict, "F99")], "Merge of lm_head.weight: no safet"),
    ],
)  # fmt: skip
def test_edits_that_contradict_the_checkpoint_move_no_byte(single, tmp_path, edits, problem):
    checkpoint = open_checkpoint(str(single))
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(CheckpointError) as excinfo:
        write_weights(checkpoint, edits, staging)
    assert problem in str(excinfo.value)
    assert "\n" not in str(excinfo.value)
    assert not list(staging.iterdir())


@pytest.mark.parametrize(
    "made", [{"a": torch.ones(3)}, {"b": torch.ones(2)}, {"a": torch.ones(2).half()}, {}]
)
def test_a_transform_that_breaks_its_promise_is_caught(single, tmp_path, made):
    edit = Transform("lm_head.weight", {"a": (2,)}, lambda tensor: made)
    with pytest.raises(CheckpointError, match="had promised"):
        bake(single, tmp_path / "output", [edit])
    assert not (tmp_path / "output").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_merge_takes_tensors_from_every_shard(tmp_path, is_sharded):
    base = build_tiny_llama(tmp_path / "base", dtype="bfloat16", sharded=is_sharded)
    checkpoint = open_checkpoint(str(base))
    names = tuple(DOWN.format(layer) for layer in (1, 0))
    shape = checkpoint.tensors[names[0]].shape
    assert len(names) == 2
    assert (len({checkpoint.tensors[name].file for name in names}) == 2) == is_sharded
    edit = Merge(
        names,
        {"stacked": (2, *shape)},
        lambda parts: {"stacked": torch.stack([parts[name] for name in names]).float()},
        dtype="F32",
    )
    bake(base, tmp_path / "output", [edit])
    baked = open_checkpoint(str(tmp_path / "output"))
    assert set(baked.tensors) == set(checkpoint.tensors) - set(names) | {"stacked"}
    expected = torch.stack([checkpoint.read(name) for name in names]).float()
    assert torch.equal(baked.read("stacked"), expected)
    assert_kept(base, tmp_path / "output", sorted(set(checkpoint.tensors) - set(names)))


def rename_shards(directory, names):
    """Give the shards of a sharded base other names, in the index too."""
    shards = open_checkpoint(str(directory)).shards
    new = dict(zip(shards, names, strict=False))
    for old in new:
        (directory / old).rename(directory / new[old])

    def change(index):
        index["weight_map"] = {k: new.get(v, v) for k, v in index["weight_map"].items()}

    change_index(directory, change)


def test_irregular_shard_names_are_kept(sharded, tmp_path):
    count = len(open_checkpoint(str(sharded)).shards)
    names = sorted(f"part.{number}.safetensors" for number in range(count))
    rename_shards(sharded, names)
    checkpoint = open_checkpoint(str(sharded))
    assert list(checkpoint.shards) == names
    bake(sharded, tmp_path / "output", bias_edits(checkpoint), {"mlp_bias": True})
    baked = open_checkpoint(str(tmp_path / "output"))
    assert set(baked.shards) == {*names, "model-bake.safetensors"}
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not any(report.values())
    # A bake of the bake finds the name taken.
    bake(tmp_path / "output", tmp_path / "again", [Add("another", torch.ones(1))])
    again = open_checkpoint(str(tmp_path / "again"))
    assert set(again.shards) == {*baked.shards, "model-bake-2.safetensors"}


def test_a_shard_with_a_name_that_bake_needs_is_refused(sharded, tmp_path):
    rename_shards(sharded, ["originals.safetensors"])
    with pytest.raises(CheckpointError, match=r"originals\.safetensors, which bake needs"):
        bake(sharded, tmp_path / "output", [])


def test_weights_that_the_config_named_get_the_standard_name(single, tmp_path):
    (single / "model.safetensors").rename(single / "other.safetensors")
    config = json.loads((single / "config.json").read_text())
    named = {**config, "transformers_weights": "other.safetensors"}
    (single / "config.json").write_text(json.dumps(named, indent=2))
    edits = bias_edits(open_checkpoint(str(single)))
    bake(single, tmp_path / "output", edits, {"mlp_bias": True})
    assert "transformers_weights" not in (tmp_path / "output" / "config.json").read_text()
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not any(report.values())


def test_two_bakes_write_the_same_bytes(tmp_path):
    base = build_tiny_llama(tmp_path / "base", dtype="bfloat16", sharded=True)
    checkpoint = open_checkpoint(str(base))
    edits = [*bias_edits(checkpoint), Patch(DOWN.format(0), checkpoint.read(DOWN.format(0)) + 1)]
    bake(base, tmp_path / "one", edits, {"mlp_bias": True})
    bake(base, tmp_path / "two", edits[::-1], {"mlp_bias": True})
    assert len(hash_files(tmp_path / "one")) > 5
    assert hash_files(tmp_path / "one") == hash_files(tmp_path / "two")
    bake(base, tmp_path / "three", bias_edits(checkpoint, 0.25), {"mlp_bias": True})
    assert hash_files(tmp_path / "three") != hash_files(tmp_path / "one")


def test_hashes_are_those_of_the_files(single):
    hashes = hash_files(single, exclude={"config.json"})
    assert "config.json" not in hashes
    theirs = subprocess.run(
        ["sha256sum", "model.safetensors"], cwd=single, capture_output=True, text=True, check=True
    )
    size = (single / "model.safetensors").stat().st_size
    assert hashes["model.safetensors"] == {"sha256": theirs.stdout.split()[0], "size": size}
    done = []
    assert (
        hash_files(single, known={"config.json": "abc"}, progress=done.append)["config.json"][
            "sha256"
        ]
        == "abc"
    )
    assert sum(done) == sum(entry["size"] for entry in hashes.values())


# ---------------------------------------------------------------- config.json


CONFIG = """{
  "architectures": ["LlamaForCausalLM"],
  "eps": 1e-5, "note": "a, {\\"b\\": 1}",
  "mlp_bias": false,
  "rope": [16, 24,
           24],
  "text_config": {
    "deep": {},
    "mlp_bias": false
  },
  "last": null
}
"""


def test_only_the_changed_keys_of_a_config_change():
    text = edit_json(CONFIG, {"mlp_bias": True, "text_config.mlp_bias": True, "new": [1]})
    expected = CONFIG.replace('"mlp_bias": false', '"mlp_bias": true')
    expected = expected.replace('"last": null', '"last": null,\n  "new": [\n    1\n  ]')
    assert text == expected
    assert text != CONFIG
    assert edit_json(CONFIG, {}) == CONFIG


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eps": 2.0}, {"eps": 2.0}),
        ({"note": "x"}, {"note": "x"}),
        ({"rope": {"type": "é"}}, {"rope": {"type": "é"}}),
        ({"text_config.new": 1}, {"text_config": {"deep": {}, "mlp_bias": False, "new": 1}}),
        ({"text_config.deep.x": {"y": 1}},
         {"text_config": {"deep": {"x": {"y": 1}}, "mlp_bias": False}}),
        ({"last": REMOVED}, {"last": REMOVED}),
        ({"architectures": REMOVED}, {"architectures": REMOVED}),
        ({"eps": REMOVED, "note": REMOVED}, {"eps": REMOVED, "note": REMOVED}),
        ({"absent": REMOVED}, {}),
        ({"text_config": {"a": 1}, "text_config.b": 2}, {"text_config": {"a": 1, "b": 2}}),
    ],
)  # fmt: skip
def test_config_edits_mean_what_they_say(changes, expected):
    wanted = {**json.loads(CONFIG), **expected}
    wanted = {key: value for key, value in wanted.items() if value is not REMOVED}
    for text in (CONFIG, CONFIG.replace("\n", "\r\n"), json.dumps(json.loads(CONFIG))):
        edited = edit_json(text, changes)
        assert json.loads(edited) == wanted
        assert list(json.loads(edited))[:2] == list(wanted)[:2]
        assert edited.count("\r\n") == (edited.count("\n") if "\r\n" in text else 0)


def test_small_objects_and_odd_keys():
    assert edit_json("{}", {"a": 1}) == '{"a": 1}'
    assert edit_json(' {"a": 1} ', {"a": REMOVED}) == " {} "
    assert json.loads(edit_json('{"a.b": 1}', {"a.b": 2})) == {"a.b": 2}
    with pytest.raises(CheckpointError, match="no object text_config"):
        edit_json('{"a": 1}', {"text_config.mlp_bias": True})
    with pytest.raises(CheckpointError, match="no object a"):
        edit_json('{"a": 1}', {"a.b": True})


# ---------------------------------------------------------------- copying


def plain(monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", unavailable, raising=False)


def unavailable(*arguments, **options):
    raise OSError(errno.EXDEV, "not between these")


def returns_nothing(monkeypatch):
    monkeypatch.setattr(os, "copy_file_range", lambda *arguments, **options: 0, raising=False)


@pytest.mark.parametrize("way", [None, plain, returns_nothing])
def test_every_way_of_copying_gives_the_same_bytes(tmp_path, monkeypatch, way):
    monkeypatch.setattr(copying, "_CHUNK", 1000)
    if way is not None:
        way(monkeypatch)
    content = os.urandom(4567)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "link").symlink_to(tmp_path / "source")
    done = []
    copy_file(tmp_path / "link", tmp_path / "target", done.append)
    assert (tmp_path / "target").read_bytes() == content
    assert not (tmp_path / "target").is_symlink()
    assert sum(done) == len(content)


def test_a_clone_is_used_where_the_file_system_has_it(tmp_path, monkeypatch):
    def clone(target, request, source):
        assert request == 0x40049409
        os.write(target, os.pread(source, 100, 0))

    monkeypatch.setattr(copying.fcntl, "ioctl", clone)
    monkeypatch.setattr(copying, "copy_range", unavailable)
    (tmp_path / "source").write_bytes(b"content")
    copy_file(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"


def test_a_missing_source_is_the_checkpoints_fault(single, tmp_path):
    checkpoint = open_checkpoint(str(single))
    (single / "model.safetensors").unlink()
    with (
        pytest.raises(CheckpointError, match="cannot be read"),
        staged_directory(tmp_path / "output") as staging,
    ):
        write_weights(checkpoint, [], staging)
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------- the output path


def stage_and_fail(output, look=None):
    """A run that writes a file, calls `look`, and fails."""
    with staged_directory(output) as staging:
        (staging / "file").write_text("x")
        assert staging.parent.parent == output.parent
        assert not output.exists()
        if look is not None:
            look()
        raise RuntimeError


def test_a_failure_leaves_nothing(tmp_path):
    output = tmp_path / "new" / "parents" / "output"
    with pytest.raises(RuntimeError):
        stage_and_fail(output)
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), staged_directory(output):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with staged_directory(output) as staging:
        (staging / "file").write_text("x")
    assert (output / "file").read_text() == "x"
    assert [path.name for path in output.parent.iterdir()] == ["output"]
    assert output.stat().st_mode == output.parent.stat().st_mode  # not mkdtemp's 0700


def test_overwriting_replaces_only_at_the_end(tmp_path):
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "model.safetensors").write_text("old")
    (output / "stale.bin").write_text("old")
    with pytest.raises(OutputError, match="exists already"), staged_directory(output):
        pass
    with pytest.raises(RuntimeError), staged_directory(output, overwrite=True):
        raise RuntimeError
    assert (output / "config.json").read_text() == "old"
    with staged_directory(output, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
        assert (output / "config.json").read_text() == "old"
    assert (output / "config.json").read_text() == "new"
    assert not (output / "stale.bin").exists()
    assert not leftovers(tmp_path)


def test_an_output_that_is_replaced_is_never_absent(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if not copying.exchange(tmp_path / "one", tmp_path / "two"):
        pytest.skip("this file system cannot exchange two directories")
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "model.safetensors").write_text("old")
    real, there = Path.rename, []

    def rename(self, target):
        found = real(self, target)
        there.append(output.exists())
        return found

    monkeypatch.setattr(Path, "rename", rename)
    with staged_directory(output, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"
    assert all(there)
    assert not leftovers(tmp_path)


def test_where_nothing_can_be_exchanged_two_renames_do(tmp_path, monkeypatch):
    monkeypatch.setattr("bake.io.staging.exchange", lambda *_: False)
    test_overwriting_replaces_only_at_the_end(tmp_path)


def test_a_failed_swap_puts_the_old_output_back(tmp_path, monkeypatch):
    monkeypatch.setattr("bake.io.staging.exchange", lambda *_: False)
    output = tmp_path / "output"
    output.mkdir()
    (output / "config.json").write_text("old")
    (output / "model.safetensors").write_text("old")
    real = Path.rename

    def rename(self, target):
        if self.name == "model":
            raise OSError(errno.EIO, "no")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OutputError), staged_directory(output, overwrite=True) as staging:
        (staging / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "old"
    assert not leftovers(tmp_path)


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    output = tmp_path / "output"

    def appear():
        output.mkdir()
        (output / "config.json").write_text("theirs")

    with pytest.raises(OutputError, match="exists already"), staged_directory(output):
        appear()
    assert (output / "config.json").read_text() == "theirs"
    assert not leftovers(tmp_path)


def test_outputs_that_are_refused_before_any_work(tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    cases = [
        (base, True, "lies in the base"),
        (base / "inside", False, "lies in the base"),
        (tmp_path, True, "lies in the base"),
        (tmp_path / "file", True, "is a file"),
        (tmp_path / "file" / "below", False, "is a file"),
        (tmp_path / "photos", True, "neither a bake's output nor a checkpoint"),
        (tmp_path / "project", True, "neither a bake's output nor a checkpoint"),
        (tmp_path / "photos", False, "exists already"),
        (Path("~no-such-user/output"), False, "home of a user that is not known"),
        (tmp_path / ("long" * 100), False, "too long"),
    ]
    for output, overwrite, problem in cases:
        with pytest.raises(OutputError, match=problem) as excinfo:
            check_output(output, overwrite=overwrite, base_directory=base)
        assert "\n" not in str(excinfo.value)
        assert str(output) in str(excinfo.value)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "output", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "photos", "project"]


def test_a_link_to_an_output_is_followed(tmp_path):
    real = tmp_path / "disk" / "output"
    real.parent.mkdir()
    (tmp_path / "link").symlink_to(real)
    with staged_directory(tmp_path / "link") as staging:
        (staging / "config.json").write_text("{}")
    assert (real / "config.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_disk_without_room_is_refused_before_writing(single, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(OutputError, match="make room") as excinfo:
        bake(single, tmp_path / "output", [])
    assert "\n" not in str(excinfo.value)
    assert not leftovers(tmp_path)


def test_a_write_that_the_kernel_refuses_is_one_line_and_leaves_nothing(single, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # bytes; the base's file has more
    try:
        with pytest.raises(OutputError) as excinfo:
            bake(single, tmp_path / "output", [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(excinfo.value)
    assert "\n" not in str(excinfo.value)
    assert not (tmp_path / "output").exists()
    assert not leftovers(tmp_path)
    bake(single, tmp_path / "output", [])  # and there was nothing else in the way


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_errors_of_the_place_name_the_output(tmp_path, number):
    output = tmp_path / "output"
    with pytest.raises(OutputError, match=os.strerror(number)), staged_directory(output):
        raise OSError(number, os.strerror(number))
    with pytest.raises(OSError, match="elsewhere"), staged_directory(output):
        raise OSError(errno.EACCES, "denied", "/elsewhere")
    assert not list(tmp_path.iterdir())


WRITE_AND_HANG = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from bake.checkpoint.checkpoint import open_checkpoint
from bake.checkpoint.edits import Transform
from bake.io.staging import staged_directory
from bake.checkpoint.writer import write_weights

def hang(tensor):
    print("writing", flush=True)
    time.sleep(60)

checkpoint = open_checkpoint({base!r})
with staged_directory(Path({output!r})) as staging:
    write_weights(checkpoint, [Transform("model.norm.weight", {{"a": (16,)}}, hang)], staging)
"""


def test_a_killed_run_leaves_no_output_and_the_next_run_clears_up(sharded, tmp_path):
    output = tmp_path / "output"
    code = WRITE_AND_HANG.format(root=str(ROOT), base=str(sharded), output=str(output))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        (living,) = leftovers(tmp_path)
        shards = list((tmp_path / living / "model").glob("*.safetensors"))
        assert shards  # it was killed in the middle of its work
        # While it lives, another run for the same output leaves it alone.
        seen = []
        with pytest.raises(RuntimeError):
            stage_and_fail(output, lambda: seen.extend(leftovers(tmp_path)))
        assert len(seen) == 2
        assert living in seen
        assert leftovers(tmp_path) == [living]
        assert all(shard.exists() for shard in shards)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    assert leftovers(tmp_path) == [living]
    other = tmp_path / "output-2"  # another output's run does not touch it
    with pytest.raises(RuntimeError):
        stage_and_fail(other)
    assert leftovers(tmp_path) == [living]
    bake(sharded, output, [])
    assert (output / "config.json").exists()
    assert not leftovers(tmp_path)


def test_a_run_that_died_between_its_two_renames_has_its_old_output_put_back(tmp_path):
    work = tmp_path / ".output.bake-00000000"
    (work / "replaced").mkdir(parents=True)
    (work / "model").mkdir()
    (work / "replaced" / "config.json").write_text("old")
    (work / "lock").touch()
    output = tmp_path / "output"
    with pytest.raises(OutputError, match="exists already"), staged_directory(output):
        pass
    assert (output / "config.json").read_text() == "old"
    assert not leftovers(tmp_path)


def test_an_old_output_that_is_being_removed_is_never_put_back(tmp_path, monkeypatch):
    """A run that died while it removed the output that it had replaced has left half of it."""
    output = tmp_path / "output"
    output.mkdir()
    for name in ("config.json", "bake.json"):
        (output / name).write_text("old")

    def removes_one_and_dies(directory, **_options):
        if (directory / "bake.json").exists():
            (directory / "bake.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bake.io.staging.shutil.rmtree", removes_one_and_dies)
        with pytest.raises(KeyboardInterrupt), staged_directory(output, overwrite=True) as staging:
            (staging / "config.json").write_text("new")
    assert (output / "config.json").read_text() == "new"
    assert len(list(tmp_path.glob(".output.bake-*/*/config.json"))) == 1  # the half that was left
    (output / "config.json").unlink()  # its user removes the new one
    output.rmdir()
    with staged_directory(output) as staging:
        assert not output.exists()
        (staging / "config.json").write_text("newer")
    assert not leftovers(tmp_path)


def test_clearing_up_takes_nothing_that_is_not_a_dead_runs(tmp_path):
    stranger = tmp_path / ".output.bake-notes"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    (tmp_path / ".output.bake-file").write_text("mine")
    with staged_directory(tmp_path / "output") as staging:
        (staging / "config.json").write_text("{}")
    assert (stranger / "notes.txt").read_text() == "mine"
    assert (tmp_path / ".output.bake-file").read_text() == "mine"
