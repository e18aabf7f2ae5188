"""What config.json alone says of a model's sizes is what its architecture has."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, TinyModel
from safetensors.torch import save_file

from bake.anatomy import examine
from bake.anatomy.catalogue import default_config
from bake.checkpoint.outline import Outline, read_outline
from bake.directions.first_look import look_first
from bake.errors import BakeError, CheckpointError, DirectionError
from bake.models.forward import read_config


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_sizes_are_those_of_the_anatomy(make_model, architecture):
    model = make_model(TinyModel(architecture))
    anatomy = examine(read_config(model))
    found = read_outline(str(model))
    assert found.hidden_size in (anatomy.hidden_size, None)
    assert found.layer_count in (anatomy.layer_count, None)


def test_a_nested_text_config_is_read_and_what_is_unusual_is_unknown(tmp_path):
    for config, found in (
        ({"text_config": {"hidden_size": 8, "num_hidden_layers": 3}, "hidden_size": 99}, (8, 3)),
        ({"hidden_size": 8, "d_model": 9, "n_layer": 2}, (None, 2)),
        ({"hidden_size": [8, 8], "num_layers": True}, (None, None)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_outline(str(tmp_path)) == Outline(*found)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        read_outline(str(tmp_path))


def test_a_first_look_finds_widths_layers_and_broken_files(llama, tmp_path):
    good, narrow, broken = (tmp_path / f"{n}.safetensors" for n in ("good", "narrow", "broken"))
    save_file({"direction": torch.ones(32)}, good, metadata={"site": "mlp_out"})
    save_file({"direction": torch.ones(48)}, narrow, metadata={"site": "mlp_out"})
    broken.write_bytes(b"x" * 40)
    assert look_first(str(llama), directions=[good]).hidden_size == 32
    for wrong, words in ((narrow, "48 wide"), (broken, "not a safetensors file")):
        with pytest.raises(DirectionError, match=words):
            look_first(str(llama), directions=[good, good, wrong])

    def too_deep(count):
        raise BakeError(f"{count} layers")

    with pytest.raises(BakeError, match="6 layers"):
        look_first(str(llama), layers=[too_deep])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--band", "90:40"), "ends before it begins; did you mean 40:90?"),
        (("--band", "0.4:0.9"), "holds no layer; did you mean 40:90?"),
        (("--band", "40:140"), "not within 0:100"),
        (("--layers", "99"), "layer 99 is named; the model has layers 0 to 8"),
        (("--layers", "3-"), "not a list such as 3,5-8"),
        (("--coefficients", "99=1"), "layer 99 is named"),
        (("--pairs", "formal-casul"), "did you mean formal-casual?"),
        (("--output", "/proc/bake/out"), "not writable"),
        (("--direction", "narrow.safetensors"), "8 wide and the model's hidden size is 128"),
        (("--site", "mlp_ot"), "did you mean mlp_out?"),
    ],
)
def test_mistakes_are_told_without_torch(tmp_path, options, words):
    save_file({"direction": torch.ones(8)}, tmp_path / "narrow.safetensors", {"site": "mlp_out"})
    source = () if options[0] in ("--direction", "--pairs") else ("--pairs", "formal-casual")
    check = (
        "import sys\nfrom bake.cli.main import main\n"
        f"try: code = main({['export', 'bake-demo', *source, *options]!r})\n"
        "except SystemExit as done: code = done.code\n"
        "assert code in (1, 2), code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert words in finished.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["narrow.safetensors"]


def test_no_architecture_is_refused_for_a_size_that_it_has(tmp_path):
    """The golden table has every architecture's layers; a config may say more, as hrm_text's does."""
    table = Path(__file__).parents[1] / "data" / "architectures.csv"
    with table.open(newline="") as lines:
        layers = {
            row["model_type"]: int(row["layers"].split()[-1])
            for row in csv.DictReader(lines)
            if row["layers"]
        }
    assert len(layers) > 140
    for model_type, count in layers.items():
        config = default_config(model_type)
        (tmp_path / "config.json").write_text(config.to_json_string(use_diff=False))
        found = read_outline(str(tmp_path))
        assert found.layer_count is None or found.layer_count >= count, model_type
        assert found.hidden_size in (config.get_text_config().hidden_size, None), model_type
