"""Two processes on the CPU (gloo) find what one finds, and one of them speaks.

They are started by torchrun: on a CPU `accelerate launch` starts one process, whatever it is asked for.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bake.directions.direction_file import load_direction

TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node")
PAIRS = "toy-cheerful-gloomy"


def run(*words, processes):
    """Run Python with these words in one process or in several; return what is finished."""
    launch = (*TORCHRUN, str(processes)) if processes > 1 else ()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def bake(*words, together=False, processes=2):
    """Run the command line in one process or in several; return what is finished."""
    return run("-m", "bake", *words, processes=processes if together else 1)


@pytest.fixture
def both(tmp_path):
    """Return a function: words → the two outputs, of one process and of two."""

    def in_both(*words, suffix=""):
        outputs = []
        for together in (False, True):
            output = tmp_path / f"{'two' if together else 'one'}{suffix}"
            finished = bake(*words, "--output", output, "--json", together=together)
            assert finished.returncode == 0, finished.stderr
            assert finished.stdout.count('"timings"') == 1  # One process speaks.
            outputs.append(output)
        return outputs

    return in_both


def test_there_are_two_that_divide_the_work(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "from bake.support import processes as p\n"
        "def say(*words): os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"
        "own = p.divide('abcde')\n"
        "say(p.count(), p.rank(), own, p.put_together(own), p.agree(p.rank()), p.gather(p.rank()))\n"
        "p.leave_to_main()\n"
        "say('alone', p.count())\n"
    )
    finished = run(script, processes=2)
    assert finished.returncode == 0, finished.stderr
    assert sorted(finished.stdout.splitlines()) == [
        "2 0 ['a', 'c', 'e'] ['a', 'b', 'c', 'd', 'e'] 0 [0, 1]",
        "2 1 ['b', 'd'] ['a', 'b', 'c', 'd', 'e'] 0 [0, 1]",
        "alone 1",
    ]


def alike(one, two, rel=1e-5):
    """Assert that two reports hold the same, figures to rounding."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            alike(one[key], two[key], rel)
    elif isinstance(one, list):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            alike(left, right, rel)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=rel, abs=1e-5)
    else:
        assert one == two


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_norms(both, statistic):
    """Every token's norm is gathered, not sums: the median is that of all tokens."""
    one, two = both("calibrate", "bake-demo", "--statistic", statistic, suffix=".json")
    left, right = json.loads(one.read_text()), json.loads(two.read_text())
    assert left["prompts"] == right["prompts"] == 66
    assert sum(layer["tokens"] for layer in left["layers"]) > 1000
    alike(left, right, rel=1e-6)


def test_a_direction(both):
    one, two = map(
        load_direction,
        both("direction", "bake-demo", "--pairs", PAIRS, "--token", "mean", suffix=".safetensors"),
    )
    assert one.vectors.keys() == two.vectors.keys()
    for layer, vector in one.vectors.items():
        assert float((vector - two.vectors[layer]).abs().max()) < 1e-6
    assert one.metadata["pairs"] == two.metadata["pairs"]


def test_an_export_that_chooses_its_strength(both):
    one, two = both("export", "bake-demo", "--pairs", PAIRS)
    left, right = (json.loads((output / "bake.json").read_text()) for output in (one, two))
    assert left["multiplier"] == right["multiplier"]
    assert left["calibration"]["prompts"] == right["calibration"]["prompts"] == 66
    alike(left["layers"], right["layers"], rel=1e-6)
    alike(left["multiplier_choice"], right["multiplier_choice"], rel=1e-3)
    assert right["equivalence"]["passed"] is True


def test_a_sweep_and_one_that_goes_on(both):
    options = ["--multipliers=-1,1", "--control-seeds", 2, "--samples", 1, "--new-tokens", 8]
    words = ["sweep", "bake-demo", "--direction", "bake-demo", *options]
    one, two = both(*words)
    reports = [json.loads((output / "report.json").read_text()) for output in (one, two)]
    assert reports[1]["complete"] is True
    alike(*reports, rel=1e-3)
    log = two / "measurements.jsonl"
    whole = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(whole[: len(whole) // 2]))
    finished = bake(*words, "--output", two, "--json", together=True)
    assert finished.returncode == 0, finished.stderr
    assert "measured before" in finished.stderr
    assert len(log.read_bytes().splitlines()) == len(whole)
    alike(reports[0], json.loads((two / "report.json").read_text()), rel=1e-3)


def test_a_search(both):
    small = ["--site", "mlp_out", "--method", "mean", "--token", "last", "--minutes", 0]
    one, two = both("tune", "bake-demo", "--pairs", PAIRS, *small)
    alike(*(json.loads((output / "report.json").read_text()) for output in (one, two)), rel=1e-3)
    assert (one / "recipe.yaml").read_text() == (two / "recipe.yaml").read_text()


def test_one_model_in_two_shares(tmp_path):
    """transformers' tensor parallelism: half of every layer in each process."""
    words = ["export", "bake-demo", "--pairs", PAIRS, "--json", "--output"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert bake(*words, alone).returncode == 0
    finished = bake(*words, shared, "--device-map", "tp", together=True)
    assert finished.returncode == 0, finished.stderr
    left, right = (json.loads((output / "bake.json").read_text()) for output in (alone, shared))
    assert left["multiplier"] == right["multiplier"]
    alike(left["layers"], right["layers"], rel=1e-5)
    assert right["equivalence"]["passed"] is True


def test_shares_need_processes_and_heads_that_divide(tmp_path):
    words = ["calibrate", "bake-demo", "-o", tmp_path / "norms.json", "--device-map", "tp"]
    finished = bake(*words)
    assert finished.returncode == 1
    assert "start it with accelerate launch" in finished.stderr
    finished = bake(*words, together=True, processes=3)
    assert finished.returncode == 1
    assert "attention heads (" in finished.stderr
    assert "cannot be divided among 3 processes" in finished.stderr


def test_an_error_ends_all_of_them(tmp_path):
    finished = bake(
        "export", "bake-demo", "--pairs", "nothing", "-o", tmp_path / "out", together=True
    )
    assert finished.returncode == 1
    # Whichever is first: torchrun ends the others, and the main one may not have come to its line.
    kinds = ("bake: error: no pairs", "bake, process 1: error: no pairs")
    lines = [line for line in finished.stderr.splitlines() if line.startswith(kinds)]
    assert 1 <= len(lines) <= 2
    assert not list(Path(tmp_path).iterdir())
