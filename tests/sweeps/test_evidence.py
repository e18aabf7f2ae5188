"""A sweep attached to a bake: believed of the bake that it was made for, refused for any other."""

import json
import shutil

import pytest
from matplotlib import image

from bake.cli.main import main


@pytest.fixture(scope="module")
def directions(tmp_path_factory, llama, pairs_file):
    """A direction of the small model, and another."""
    folder = tmp_path_factory.mktemp("directions")
    for name, token in (("own", "last"), ("other", "mean")):
        options = ("--pairs", pairs_file, "--token", token, "-o", folder / name)
        assert main(["direction", *map(str, (llama, *options))]) == 0
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, llama, directions, pairs_file, prompts_file):
    """A small sweep of the small model."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    texts = [
        item for name in ("--prompts", "--neutral", "--openings") for item in (name, prompts_file)
    ]
    options = (
        "--control-seeds", "1", "--samples", "1", "--new-tokens", "4", "--multipliers=-1,1,2",
        "--pairs", pairs_file, *texts, "-o", output,
    )  # fmt: skip
    command = ("sweep", llama, "--direction", directions / "own", *options)
    assert main([str(part) for part in command]) == 0
    return output


@pytest.fixture
def export(llama, directions, prompts_file, tmp_path, capsys):
    """Return a function: sweep's directory, options → (exit code, stderr, output)."""

    def call(sweep, *options, direction="own"):
        capsys.readouterr()
        output = tmp_path / "out"
        command = (
            "export", llama, "--direction", directions / direction, "--prompts", prompts_file,
            "--sweep", sweep, "-o", output, *options,
        )  # fmt: skip
        code = main([str(part) for part in command])
        return code, capsys.readouterr().err, output

    return call


@pytest.mark.usefixtures("drawn_figures")
def test_the_bake_carries_table_figures_and_samples(export, swept, tmp_path):
    code, errors, output = export(swept, "-m", "2")
    assert code == 0, errors
    assert sorted(path.name for path in (output / "figures").iterdir()) == [
        "dose-response.png", "norms.png", "separation.png",
    ]  # fmt: skip
    for path in (output / "figures").iterdir():
        assert image.imread(path).std() > 0.05  # Something is on the paper.
    drawn = (output / "figures" / "dose-response.png").read_bytes()
    assert drawn == (swept / "figures" / "dose-response.png").read_bytes()
    result = json.loads((output / "bake.json").read_text())
    assert [entry["multiplier"] for entry in result["sweep"]["points"]] == [-1, 0, 1, 2]
    report = json.loads((swept / "report.json").read_text())
    shift = {point["name"]: point["shift"] for point in report["points"]}
    assert result["sweep"]["points"][2]["shift"] == shift["m=+1"]
    assert len(result["sweep"]["samples"]) == 3
    assert {"figures/norms.png", "figures/dose-response.png"} <= set(result["files"])
    card = (output / "README.md").read_text()
    assert "| **2** | " in card
    assert "of 1 random directions" in card
    assert "1 sampled continuation (temperature 1, 4 tokens) of each of" in card
    assert "](figures/dose-response.png)" in card
    first = output.rename(tmp_path / "first")
    assert export(swept, "-m", "2")[0] == 0
    for name in ("figures/norms.png", "README.md", "bake.json"):
        assert (first / name).read_bytes() == (output / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "direction", "named"),
    [
        (("--law", "flat"), "own", "another law (inverse-sqrt-d; this bake has flat)"),
        (("--band", "0:50"), "own", "another layers"),
        (("--site", "attn_out"), "own", "another site (mlp_out; this bake has attn_out)"),
        ((), "other", "another direction"),
        (("--statistic", "median"), "own", "calibrate both on the same prompts"),
    ],
)
def test_a_sweep_of_another_bake_is_refused(export, swept, options, direction, named):
    code, errors, output = export(swept, *options, direction=direction)
    assert code == 1
    assert named in errors.splitlines()[-1]
    assert not output.exists()


def test_a_sweep_of_another_base_is_refused(export, swept, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(swept, copy)
    report = json.loads((copy / "report.json").read_text())
    report["base"]["id"] = "org/other"
    (copy / "report.json").write_text(json.dumps(report))
    code, errors, _ = export(copy)
    assert code == 1
    assert "another base (org/other; this bake has " in errors


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": 1}'])
def test_a_directory_without_a_report_is_refused(export, tmp_path, content):
    folder = tmp_path / "nothing"
    folder.mkdir()
    if content is not None:
        (folder / "report.json").write_text(content)
    code, errors, _ = export(folder)
    assert code == 1
    assert len(errors.splitlines()) == 1
    assert "bake sweep" in errors
