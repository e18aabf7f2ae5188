"""Streamed models: the same numbers from weights that stay on disk, and the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, TinyModel

from bake.anatomy.base import load_base, open_base
from bake.api import export, verify
from bake.errors import BakeError, UnsupportedError
from bake.io.hashing import hash_files
from bake.models.forward import LoadedModel, compute_logits, load_model
from bake.models.streaming import Placement, choose_placement, hold, parse_max_memory
from bake.texts.prompts import encode, load_tokenizer, make_batches

MODELS = [
    TinyModel("llama", "bfloat16", sharded=True, tied=True),
    TinyModel("llama", "float16", sharded=False, tied=False),
    TinyModel("gpt2", "bfloat16", sharded=True, tied=True),
]


def logits_of(loaded: LoadedModel, directory: Path) -> torch.Tensor:
    batches = make_batches(encode(load_tokenizer(directory), PROMPTS))
    return torch.cat(compute_logits(loaded, batches))


def on_disk(loaded: LoadedModel) -> int:
    """How many parameters hold no memory."""
    return sum(parameter.device.type == "meta" for parameter in loaded.model.parameters())


@pytest.mark.parametrize("wanted", MODELS, ids=lambda model: f"{model.architecture}-{model.dtype}")
def test_streamed_logits_are_bit_identical(make_model, wanted):
    directory = make_model(wanted)
    whole = load_model(directory)
    expected = logits_of(whole, directory)
    assert on_disk(whole) == 0
    counts = []
    for budget in (1_000, 90_000, 10**9):
        streamed = load_model(directory, placement=Placement({"cpu": budget}))
        counts.append(on_disk(streamed))
        assert torch.equal(logits_of(streamed, directory), expected)
        assert streamed.report == whole.report
    assert counts[0] >= counts[1] > counts[2] == 0


def test_calibration_reads_each_weight_once_and_no_head(make_model):
    from bake.strength.norms import measure_norms

    directory = make_model(MODELS[0])
    streamed = load_base(open_base(str(directory)), Placement({"cpu": 1_000}))
    read: list[str] = []
    checkpoint = streamed.weights.checkpoint
    original = type(checkpoint).read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(checkpoint),
            "read",
            lambda self, name: (read.append(name), original(self, name))[1],
        )
        measure_norms(
            streamed,
            "mlp_out",
            streamed.batches(PROMPTS),
            [2, 3],
        )
    matrices = [name for name in read if name.endswith("proj.weight")]
    assert sorted(matrices) == sorted(set(matrices))
    assert {name.split(".")[2] for name in matrices} == {"0", "1", "2", "3"}
    assert not any("head" in name or "model.norm" in name for name in read)


def test_held_values_replace_stored_ones(make_model):
    directory = make_model(MODELS[1])
    name = "model.layers.3.mlp.down_proj.weight"
    streamed = load_model(directory, placement=Placement({"cpu": 1_000}))
    whole = load_model(directory)
    before = logits_of(whole, directory)
    value = torch.zeros_like(whole.model.get_parameter(name))
    hold(streamed.model, streamed.weights, {name: value})
    hold(whole.model, None, {name: value})
    after = logits_of(whole, directory)
    assert (after - before).abs().max() > 0.01
    assert torch.equal(logits_of(streamed, directory), after)


@pytest.mark.parametrize("site", ["mlp_out", "attn_in"])
def test_streamed_and_whole_exports_write_the_same_bytes(
    make_model, pairs_file, prompts_file, tmp_path, site
):
    base = make_model(MODELS[0])
    options = {"pairs": pairs_file, "prompts": prompts_file, "site": site}
    export(str(base), output=tmp_path / "whole", **options)
    export(str(base), output=tmp_path / "streamed", max_memory="1KB", **options)
    told = ("README.md", "bake.json")  # with samples, which a streamed model writes none of
    whole, streamed = (hash_files(tmp_path / name) for name in ("whole", "streamed"))
    assert len(whole) > 5
    assert {k: v for k, v in streamed.items() if k not in told} == {
        k: v for k, v in whole.items() if k not in told
    }
    records = [json.loads((tmp_path / n / "bake.json").read_text()) for n in ("whole", "streamed")]
    samples = [len(record["equivalence"].pop("samples")) for record in records]
    assert samples == [3, 0]
    for record in records:
        del record["files"]["README.md"]
    assert records[0] == records[1]
    found = verify(tmp_path / "whole", base=str(base), max_memory="1KB").equivalence
    assert found.passed


def test_streaming_catches_a_dropped_flag(make_model, pairs_file, prompts_file, tmp_path):
    base = make_model(MODELS[0])
    export(str(base), output=tmp_path / "out", pairs=pairs_file, prompts=prompts_file)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    found = verify(tmp_path / "out", base=str(base), max_memory="1KB").equivalence
    assert any("the reloaded model is the base model" in failure for failure in found.failures)


def test_names_that_are_rearranged_are_refused(make_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    base = Path(shutil.copytree(make_model(MODELS[1]), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    renamed = {
        name.replace("mlp", "feed_forward").replace("self_attn", "a"): t
        for name, t in tensors.items()
    }
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="--max-memory"):
        load_model(base, placement=Placement({"cpu": 1_000}))


def test_sizes_are_read_as_people_write_them():
    assert parse_max_memory("600MB") == Placement({"cpu": 600_000_000})
    assert parse_max_memory("0=20GB, cpu=1.5GiB") == Placement({0: 20 * 10**9, "cpu": 1610612736})
    assert choose_placement(None, None) is None
    assert choose_placement("auto", None) == Placement()
    for wrong in ("lots", "12XB", "disk=3GB", "", "0=,cpu=1GB"):
        with pytest.raises(BakeError, match="--max-memory"):
            parse_max_memory(wrong)
