"""The commands: what they print, their exit codes, and one clear line for every bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import save_file

from bake.cli.main import COMMANDS, main


@pytest.fixture
def run(capsys):
    """Return a function (arguments) → (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def direction(tmp_path):
    """Return a function that writes a direction file holding one tensor."""

    def make(tensor: torch.Tensor, **metadata: str) -> Path:
        path = tmp_path / "given.safetensors"
        save_file({"direction": tensor}, path, metadata={"site": "mlp_out", **metadata})
        return path

    return make


def test_help_is_instant_because_nothing_heavy_is_imported():
    check = (
        "import sys, bake, bake.cli.main\n"
        "try: bake.cli.main.main(['--help'])\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for command in ("export", "direction", "calibrate", "inspect", "verify", "publish", "demo"):
        assert command in finished.stdout


def test_usage_errors_exit_with_2(run):
    wrong = ["export", "m", "--law", "no-such-law"]
    for arguments in (["no-such-command"], wrong, [], ["--json"], ["--", "demo"], ["prompts"]):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2


def test_json_may_stand_anywhere(run):
    for arguments in (
        ["--json", "prompts", "list"],
        ["prompts", "--json", "list"],
        ["prompts", "list", "--json"],
    ):
        code, text, _ = run(*arguments)
        assert code == 0
        assert json.loads(text)["sets"]


def test_a_number_that_is_none_is_named(capsys):
    for arguments, words in (
        (["export", "m", "-m", "strong"], "'strong' is neither a number nor auto"),
        (["sweep", "m", "--direction", "d", "-o", "o", "--multipliers", "x"], "'x' is no list"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert words in capsys.readouterr().err


def test_every_command_and_option_says_what_it_is():
    """A default in brackets, or nothing, does not."""
    for command, _ in COMMANDS:
        assert command.description, command.name
        for option in command.options:
            text = re.sub(r"\(.*?\)", "", option.help)
            assert len(text.split()) > 1, (command.name, option.name)


def test_what_is_not_known_is_told_with_what_was_meant(capsys):
    for words, meant in (
        (["exprot", "m"], "export"),
        (["export", "m", "--multplier", "2"], "--multiplier"),
        (["export", "m", "--law=inverse-sqrt"], "inverse-sqrt-d"),
        (["prompts", "lst"], "list"),
        (["export", "m", "--device", "cpu"], "--device-map"),
        (["prompts", "list", "--js"], "--json"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err


def test_the_whole_line(run, llama, pairs_file, prompts_file, tmp_path):
    """direction → calibrate → export → verify, each with --json."""
    vector, norms, out = tmp_path / "d.safetensors", tmp_path / "norms.json", tmp_path / "out"
    code, text, _ = run("direction", llama, "--pairs", pairs_file, "-o", vector, "--json")
    assert code == 0
    assert json.loads(text)["layers"] == list(range(6))
    code, text, _ = run("calibrate", llama, "--prompts", prompts_file, "-o", norms, "--json")
    assert code == 0
    assert json.loads(text)["timings"]["total"] > 0
    assert json.loads(text)["peak_memory"] > 1e6
    assert json.loads(text)["layers"] == json.loads(norms.read_text())["layers"]
    code, text, errors = run(
        "export", llama, "--direction", vector, "--prompts", prompts_file, "-o", out, "--json"
    )
    assert code == 0
    values = json.loads(text)
    assert values["equivalence"]["passed"]
    assert set(values["timings"]) >= {
        "checkpoint",
        "anatomy",
        "calibrate",
        "write",
        "prove",
        "hash",
    }
    assert values["peak_memory"] > 1e6
    assert "site mlp_out" in errors  # What auto chose is announced.
    measured = {e["layer"]: e["mean"] for e in json.loads(norms.read_text())["layers"]}
    for entry in values["layers"]:
        assert entry["activation_norm"] == pytest.approx(measured[entry["layer"]], rel=1e-6)
    code, text, _ = run("verify", out, "--base", llama, "--json")
    assert code == 0
    assert json.loads(text)["equivalence"]["passed"]


def test_a_person_reads_the_table_and_how_to_load(run, llama, pairs_file, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run("export", llama, "--pairs", pairs_file, "-o", out, "-m", "-1")
    assert code == 0
    assert "norm μ" in text
    assert "equivalent to the hooked model" in text
    assert f'AutoModelForCausalLM.from_pretrained("{out}")' in text


def test_verify_failure_exits_with_3(run, llama, pairs_file, prompts_file, tmp_path):
    out = tmp_path / "out"
    options = ("--pairs", pairs_file, "--prompts", prompts_file, "-o", out)
    assert run("export", llama, *options)[0] == 0
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "mlp_bias": False}))
    code, text, errors = run("verify", out, "--base", llama)
    assert code == 3
    assert "NOT equivalent" in text
    assert "the reloaded model is the base model" in errors


def test_inspect_lists_four_sites(run, llama, make_model):
    code, text, _ = run("inspect", llama)
    assert code == 0
    for line in (
        "exact, flag: mlp.down_proj.bias (created by mlp_bias)",
        "exact, flag: self_attn.o_proj.bias (created by attention_bias)",
        "config: mlp_bias: true; adds",
    ):
        assert line in text
    code, text, _ = run("inspect", make_model(TinyModel("gpt2")))
    assert code == 0
    for line in ("native: mlp.c_proj.bias", "native: ln_1.bias", "native: attn.c_attn.bias"):
        assert line in text
    assert "config: unchanged" in text


def test_a_recipe_file_with_an_override(run, llama, pairs_file, prompts_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    values = {"model": llama, "pairs": pairs_file, "prompts": prompts_file, "multiplier": 2.0}
    recipe.write_text("".join(f"{key}: {value}\n" for key, value in values.items()))
    out = tmp_path / "out"
    code, text, _ = run("export", "--recipe", recipe, "-o", out, "-m", "0.5", "--json")
    assert code == 0
    assert json.loads(text)["multiplier"] == 0.5


class TestBadInput:
    """One line that names the thing and the remedy, exit 1, nothing left behind."""

    @pytest.fixture(autouse=True)
    def prepare(self, run, llama, pairs_file, tmp_path):
        self.run, self.llama, self.pairs = run, llama, pairs_file
        self.output = tmp_path / "results" / "out"

    def refused(self, *arguments: object, model: object = None, code: int = 1) -> str:
        """Run an export that must be refused; return its one line."""
        source = (
            ()
            if any(a in ("--direction", "--pairs") for a in arguments)
            else ("--pairs", self.pairs)
        )
        found, text, errors = self.run(
            "export", model or self.llama, "-o", self.output, *source, *arguments
        )
        lines = [line for line in errors.splitlines() if line.startswith("bake: error:")]
        assert found == code
        assert text == ""
        assert len(lines) == 1
        assert "Traceback" not in errors
        assert not self.output.parent.exists()
        return lines[0]

    def test_no_such_model(self, tmp_path):
        assert "no/such/model" in self.refused(model=tmp_path / "no/such/model")

    def test_no_config(self, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "config.json" in self.refused(model=tmp_path / "empty")

    def test_unknown_architecture(self, tmp_path):
        import shutil

        model = Path(shutil.copytree(self.llama, tmp_path / "model"))
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
        assert "no_such_type" in self.refused(model=model)

    def test_architecture_without_the_site(self, make_model):
        line = self.refused("--site", "attn_out", model=make_model(TinyModel("mistral")))
        assert "mistral cannot take attn_out exactly" in line
        assert "exact here: " in line

    def test_slot_that_the_site_does_not_have(self):
        line = self.refused("--site", "attn_in", "--slot", "norm")
        assert "norm slot" in line
        assert "exact here" in line

    def test_direction_of_the_wrong_width(self, direction):
        line = self.refused("--direction", direction(torch.ones(48), model="other/model"))
        assert "48" in line
        assert "32" in line
        assert "other/model" in line

    def test_zero_direction(self, direction):
        assert "all zeros" in self.refused("--direction", direction(torch.zeros(32)))

    def test_nan_direction(self, direction):
        assert "NaN" in self.refused("--direction", direction(torch.full((32,), torch.nan)))

    def test_missing_direction(self):
        assert "no direction file" in self.refused("--direction", "nowhere.safetensors")

    def test_direction_from_another_space(self, direction):
        line = self.refused("--direction", direction(torch.ones(32)), "--site", "attn_in")
        assert "--convert-site" in line

    def test_multiplier_zero(self):
        assert "multiplier 0" in self.refused("-m", "0")

    def test_empty_band(self):
        assert "holds no layer" in self.refused("--band", "40:41")

    def test_malformed_band(self):
        assert "START:STOP" in self.refused("--band", "middle")

    def test_layer_that_the_model_does_not_have(self):
        assert "layer 9" in self.refused("--coefficients", "2=0.5,9=1")

    def test_neither_direction_nor_pairs(self):
        code, _, errors = self.run("export", self.llama, "-o", self.output)
        assert code == 2
        assert errors.startswith("usage: bake export [MODEL] [options]\n")
        assert "--direction FILE and --pairs FILE" in errors

    def test_no_prompts(self, tmp_path):
        (tmp_path / "empty.txt").write_text("\n\n")
        assert "holds no prompts" in self.refused("--prompts", tmp_path / "empty.txt")

    def test_missing_prompts(self):
        assert "neutral" in self.refused("--prompts", "no-such-set")

    def test_prompts_without_content(self, tmp_path):
        (tmp_path / "special.txt").write_text("<s>\n</s>\n")
        assert "no content tokens" in self.refused("--prompts", tmp_path / "special.txt")

    def test_mistakes_in_small_files_are_told_before_a_model_is_opened(self, tmp_path):
        """A model that does not exist would be complained about as soon as it is opened."""
        latin = tmp_path / "latin.txt"
        latin.write_bytes(b"\xe9t\xe9\n")
        for options, words in (
            (("--pairs", "no-such-set"), "no pairs file or set 'no-such-set'"),
            (("--pairs", self.pairs, "--held-out", "no-such-set"), "no pairs file or set"),
            (("--pairs", self.pairs, "--calibration", latin), "measure it with bake calibrate"),
            (("--pairs", self.pairs, "--prompts", latin), "as UTF-8"),
            (("--pairs", self.pairs, "--seed", "-1"), "seed -1 is out of range"),
            (("--pairs", self.pairs, "--method", "optimize", "--steps", "0"), "0 steps"),
            (("--direction", "bake-demo", "--band", "middle"), "START:STOP"),
            (("--direction", ""), "direction is empty"),
        ):
            assert words in self.refused(*options, model=tmp_path / "no-such-model")

    def test_a_model_with_too_few_positions_for_the_proof(self, make_model):
        short = make_model(TinyModel("gpt2", config=(("n_positions", 16),)))
        assert "12 tokens and 20 new ones do not fit the model's 16 positions" in self.refused(
            model=short
        )

    def test_output_exists(self, run, llama, tmp_path):
        taken = tmp_path / "taken"
        taken.mkdir()
        (taken / "config.json").write_text("{}")
        code, _, errors = run("export", llama, "--pairs", self.pairs, "-o", taken)
        assert code == 1
        assert "--overwrite" in errors
        assert [path.name for path in taken.iterdir()] == ["config.json"]

    def test_base_with_missing_weights(self, tmp_path):
        import shutil

        from safetensors.torch import load_file

        model = Path(shutil.copytree(self.llama, tmp_path / "model"))
        tensors = load_file(model / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        assert "model.layers.1.mlp.up_proj.weight" in self.refused(model=model)


@pytest.mark.parametrize("command", ["calibrate", "direction"])
def test_files_that_cannot_be_written_are_told_before_a_model_is_opened(
    run, pairs_file, tmp_path, command
):
    (tmp_path / "file").write_text("")
    pairs = ("--pairs", pairs_file) if command == "direction" else ()
    for output, words in (
        (".", "is a directory"),
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "below", "is a file"),
    ):
        code, text, errors = run(command, tmp_path / "no-such-model", *pairs, "-o", output)
        assert (code, text) == (1, "")
        assert words in errors
        assert len(errors.splitlines()) == 1


class TestStreams:
    """What is printed where: a gone reader, closed streams, a full disk, an encoding without Greek."""

    COMMAND = (sys.executable, "-m", "bake")

    def test_python_dash_m_bake_is_the_command(self):
        finished = subprocess.run([*self.COMMAND, "--version"], capture_output=True, text=True)
        assert (finished.returncode, finished.stdout) == (0, "bake 0.1.0\n")

    def test_a_reader_that_has_gone_is_no_error(self):
        for words in (["prompts", "list"], ["export", "--help"]):
            reader, writer = os.pipe()
            os.close(reader)
            finished = subprocess.run(
                [*self.COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, text=True
            )
            os.close(writer)
            assert finished.stderr == ""
            # The argparse of some releases of Python forgives.
            assert finished.returncode in ((0, 141) if "--help" in words else (141,))

    def test_a_full_disk_under_stdout_is_one_line(self):
        with Path("/dev/full").open("w") as full:
            finished = subprocess.run(
                [*self.COMMAND, "prompts", "list"], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert finished.returncode == 1
        assert finished.stderr == (
            "bake: error: the result cannot be printed: No space left on device\n"
        )

    def test_messages_stay_out_of_stdout_where_stderr_is_closed(self):
        """Python prints to stdout what is meant for a stderr that is None."""
        command = " ".join([*self.COMMAND, "prompts", "show", "no-such-set", "2>&-"])
        finished = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
        assert (finished.returncode, finished.stdout) == (1, "")

    def test_an_encoding_without_greek_letters(self):
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        for words in (["export", "--help"], ["prompts", "show", "multilingual"]):
            finished = subprocess.run(
                [*self.COMMAND, *words], capture_output=True, text=True, env=environment
            )
            assert (finished.returncode, finished.stderr) == (0, "")
            assert "?" in finished.stdout
        finished = subprocess.run(
            [*self.COMMAND, "prompts", "show", "multilingual", "--json"],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert any(not text.isascii() for text in json.loads(finished.stdout)["entries"])
