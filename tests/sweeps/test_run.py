"""`bake sweep`: the directory it writes, what it says, and one clear line for every bad input."""

import contextlib
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from bake.anatomy import examine
from bake.cli.main import main
from bake.errors import BakeError
from bake.sweeps import options as trial
from bake.sweeps.evidence import read_evidence
from bake.sweeps.options import pushable_layers

SMALL = (
    "--control-seeds", "1", "--samples", "1", "--new-tokens", "8", "--multipliers=-1,1,3",
)  # fmt: skip


@pytest.fixture
def run(capsys):
    """Return a function (arguments) → (exit code, stdout, stderr)."""

    def call(*arguments):
        code = main(["sweep", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Few texts, so that a whole sweep takes seconds: openings, neutral text, held-out pairs."""
    from bake.texts.pairs import read_pairs
    from bake.texts.prompts import read_prompts

    folder = tmp_path_factory.mktemp("texts")
    for name, count in (("openings", 6), ("toy-neutral", 4)):
        (folder / name).write_text("\n".join(read_prompts(name)[:count]) + "\n")
    pairs = [
        {"prompt": pair.prompt, "positive": pair.positive, "negative": pair.negative}
        for pair in read_pairs("toy-cheerful-gloomy.held-out")[:8]
    ]
    (folder / "pairs").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return (
        "--openings", folder / "openings", "--neutral", folder / "toy-neutral",
        "--prompts", folder / "toy-neutral", "--pairs", folder / "pairs",
    )  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory, texts):
    """A sweep with everything that can be asked for; its directory and what it printed."""
    output = tmp_path_factory.mktemp("sweep") / "out"
    printed = io.StringIO()
    options = ("--law", "inverse-sqrt-d", "flat", "--last-token", "--by-layer", "--html")
    with contextlib.redirect_stdout(printed):
        code = main(
            ["sweep", "bake-demo", "--direction", "bake-demo", "-o", str(output), *SMALL]
            + [str(text) for text in texts]
            + [*options, "--words", "cheerful", "--instruction", "A <b>cheerful</b> story:"]
        )
    assert code == 0
    return output, printed.getvalue()


def test_the_directory_holds_report_figures_and_page(swept):
    output, text = swept
    found = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    assert found == [
        "figures/dose-response-narrow.png", "figures/dose-response.png", "figures/layers.png",
        "figures/norms.png", "index.html", "measurements.jsonl", "report.json",
    ]  # fmt: skip
    for name in found:
        assert name in text


def test_a_sweep_again_takes_what_was_measured_and_leaves_nothing_old(swept, texts, tmp_path, run):
    """Other words and bounds judge the same measurements; figures and page that were not asked for go."""
    output = tmp_path / "out"
    shutil.copytree(swept[0], output)
    log = (output / "measurements.jsonl").read_bytes()
    common = ("bake-demo", "--direction", "bake-demo", "-o", output, *SMALL, *texts)
    options = (
        "--law", "inverse-sqrt-d", "flat", "--last-token", "--max-fluency", "1e9", "--max-kl", "99",
        "--instruction", "A <b>cheerful</b> story:",
    )  # fmt: skip
    code, _, errors = run(*common, *options)
    assert code == 0
    assert "sampled text: 6 of 6 measured before" in errors
    assert (output / "measurements.jsonl").read_bytes() == log
    found = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    assert found == [
        "figures/dose-response.png", "figures/norms.png", "measurements.jsonl", "report.json",
    ]  # fmt: skip
    windows = [
        json.loads((folder / "report.json").read_text())["windows"][1]["largest"]
        for folder in (swept[0], output)
    ]
    assert (windows[0] or 0) < windows[1]


def test_another_model_under_the_same_name_is_measured_anew(
    make_model, tmp_path, run, pairs_file, prompts_file
):
    """Norms and pushes stay the same where only the head differs; what the model says does not."""
    vector, output = tmp_path / "d.safetensors", tmp_path / "out"
    save_file({"direction": torch.arange(1.0, 33)}, vector, metadata={"site": "mlp_out"})
    files = ("--prompts", prompts_file, "--neutral", prompts_file, "--openings", prompts_file)
    directory = tmp_path / "model"
    shutil.copytree(make_model(), directory)

    def shift():
        options = ("--direction", vector, "-o", output, *SMALL, "--pairs", pairs_file, *files)
        code, text, errors = run(directory, *options, "--json")
        assert code == 0, errors
        return json.loads(text)["points"][1]["shift"]["value"]

    before = shift()
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert abs(shift() - before) > 1e-5


def test_a_sweep_that_is_not_finished_says_so(swept, texts, tmp_path, run, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(swept[0], output)

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("bake.sweeps.run.write_pictures", die)
    options = ("--direction", "bake-demo", "-o", output, *SMALL, *texts, "--seed", "1")
    with contextlib.suppress(KeyboardInterrupt):
        run("bake-demo", *options)
    report = json.loads((output / "report.json").read_text())
    assert not report["complete"]
    assert report["design"]["sampling"]["seed"] == 1
    with pytest.raises(BakeError, match="is not finished"):
        read_evidence(output)


def test_the_report_has_the_published_shape(swept):
    values = json.loads(
        (swept[0] / "report.json").read_text(),
        parse_constant=lambda name: pytest.fail(f"{name} is not JSON"),
    )
    points = {point["name"]: point for point in values["points"]}
    shift = {name: points[name]["shift"]["value"] for name in ("m=-1", "base", "m=+1", "m=+3")}
    assert shift["m=-1"] < shift["base"] == 0 < shift["m=+1"]
    assert points["m=+3"]["fluency_ratio"]["value"] > 1.5
    assert "neutral_ratio" in points["m=+1"]
    assert "neutral_ratio" not in points["last-token m=+1"]
    assert points["instruction"]["kind"] == "prompt"
    assert values["base"]["id"] == "bake-demo"
    assert values["specificity"]["seeds"] == 1
    assert len(values["samples"]) == 6
    assert set(values["fluency_at_equal_shift"]) == {"inverse-sqrt-d", "flat"}
    layers = values["by_layer"]
    assert [entry["layer"] for entry in layers["layers"]] == list(range(*points["m=+1"]["band"]))
    assert layers["smallest_shift"] >= 0.9 * layers["shift"]


def test_a_person_is_told_what_cannot_be_baked_and_what_chance_does(swept):
    text = swept[1]
    assert "last-token injection is there to compare with; no weights can do it" in text
    assert "of 1 random directions of the same norm" in text
    assert "costs the least" in text
    assert re.search(r"positive window: up to m = |no positive m is within the bounds: ", text)


class Page(HTMLParser):
    """Collects what a page would fetch, and its cells."""

    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_is_self_contained_and_escapes_its_texts(swept):
    html = (swept[0] / "index.html").read_text()
    page = Page()
    page.feed(html)
    assert page.sources
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    assert page.tags.count("img") == 3
    assert "m=+1" in html


def test_a_model_whose_weights_stay_on_disk_gives_the_same_figures(swept, texts, tmp_path, run):
    output = tmp_path / "out"
    options = ("--law", "inverse-sqrt-d", "--words", "cheerful", "--max-memory", "1MB")
    code, text, _ = run(
        "bake-demo", "--direction", "bake-demo", "-o", output, *SMALL[2:-1],
        "--control-seeds", "0", "--multipliers=1", *texts, *options, "--json",
    )  # fmt: skip
    assert code == 0
    values = json.loads(text)
    assert set(values["timings"]) >= {"load", "calibrate", "sweep", "report"}
    (_, own) = values["points"]
    expected = next(
        point
        for point in json.loads((swept[0] / "report.json").read_text())["points"]
        if point["name"] == "m=+1"
    )
    for figure in ("shift", "neutral_ratio", "fluency_ratio"):
        assert own[figure]["value"] == pytest.approx(expected[figure]["value"], abs=2e-4)


def test_another_architecture_with_a_users_own_texts_and_scorer(
    make_model, tmp_path, run, pairs_file, prompts_file, monkeypatch
):
    directory, vector = make_model(architecture="gpt2"), tmp_path / "d.safetensors"
    save_file({"direction": torch.arange(1.0, 33)}, vector, metadata={"site": "mlp_out"})
    (tmp_path / "my_scorer.py").write_text(
        "def vowels(text): return sum(c in 'aeiou' for c in text)"
    )
    monkeypatch.chdir(tmp_path)
    common = (directory, "--direction", vector, *SMALL, "--pairs", pairs_file)
    files = ("--prompts", prompts_file, "--neutral", prompts_file, "--openings", prompts_file)
    code, text, errors = run(
        *common, *files, "--scorer", "my_scorer:vowels", "--site", "mlp_out", "attn_out",
        "--band", "40:90", "0:50", "-o", "out", "--json",
    )  # fmt: skip
    assert code == 0, errors
    points = {point["name"]: point for point in json.loads(text)["points"]}
    assert {"m=+1", "attn_out m=+1", "0:50 m=+1", "attn_out 0:50 m=+1"} <= set(points)
    assert points["m=+3"]["score"]["value"] >= 0
    assert points["m=+3"]["shift"]["value"] != 0


def test_layers_are_those_that_a_bake_would_push(capsys):
    hybrid = examine(CONFIG_MAPPING["qwen3_next"](num_hidden_layers=8))
    assert pushable_layers(hybrid, ["attn_out"]) == {"attn_out": (3, 7)}
    assert capsys.readouterr().err == ""
    behind_a_norm = examine(CONFIG_MAPPING["gemma2"](num_hidden_layers=2))
    assert list(pushable_layers(behind_a_norm, ["mlp_out"])["mlp_out"]) == [0, 1]
    assert "mlp_out is swept with hooks only, no bake can push there" in capsys.readouterr().err


class TestBadInput:
    """One line that names the thing and the remedy, exit 1."""

    @pytest.fixture(autouse=True)
    def prepare(self, run, llama, pairs_file, tmp_path):
        self.run, self.pairs, self.output = run, pairs_file, tmp_path / "out"
        self.vector = tmp_path / "d.safetensors"
        save_file({"direction": torch.arange(1.0, 33)}, self.vector, metadata={"site": "mlp_out"})
        self.common = (llama, "--direction", self.vector, "-o", self.output)

    def refuse(self, *options, code=1):
        found, out, errors = self.run(*self.common, *options)
        assert (found, out) == (code, "")
        said = errors.splitlines()
        (line,) = (each for each in said if each.startswith("bake: error: "))
        assert line == said[-1]
        return line

    def test_no_pairs(self):
        found, _, errors = self.run(*self.common)
        assert found == 2
        assert "give them with --pairs FILE" in errors

    def test_one_pair(self, tmp_path):
        single = tmp_path / "single.jsonl"
        single.write_text(self.pairs.read_text().splitlines()[0])
        assert "an interval needs two or more" in self.refuse("--pairs", single)

    def test_missing_pairs_and_words(self):
        assert "no pairs file or set 'none'" in self.refuse("--pairs", "none")
        assert "no word list 'none'" in self.refuse("--pairs", self.pairs, "--words", "none")

    @pytest.mark.parametrize(
        "scorer", ["no_such_module:f", "json:no_such_function", "json", "json:__name__"]
    )
    def test_unknown_scorer(self, scorer):
        line = self.refuse("--pairs", self.pairs, "--scorer", scorer)
        assert f"--scorer {scorer}" in line

    def test_a_scorer_that_fails_is_named_with_its_own_error(self):
        score = trial.load_scorer("json:loads")
        with pytest.raises(Exception, match=r"--scorer json:loads failed on 'no json'"):
            score("no json")

    def test_only_zero(self):
        line = self.refuse("--pairs", self.pairs, "--multipliers=0,0")
        assert "multipliers other than 0" in line

    def test_multipliers_that_cannot_be_told_apart(self):
        line = self.refuse("--pairs", self.pairs, "--multipliers=1,1.0000001")
        assert "agree in six digits" in line

    @pytest.mark.parametrize("seed", ["-1", "9" * 30])
    def test_a_seed_that_is_none(self, seed):
        assert f"the seed {seed} is out of range" in self.refuse(
            "--pairs", self.pairs, "--seed", seed
        )

    def test_a_residual_direction_at_a_normalised_input(self):
        line = self.refuse("--pairs", self.pairs, "--site", "mlp_in")
        assert "bake direction --site mlp_in" in line
        assert "--convert-site" not in line  # bake sweep has no such option.

    def test_nothing_to_sample(self):
        assert "--samples" in self.refuse("--pairs", self.pairs, "--samples", "0")

    def test_a_direction_of_another_width(self, tmp_path):
        save_file({"direction": torch.ones(48)}, self.vector)
        assert "48 wide" in self.refuse("--pairs", self.pairs)

    def test_a_directory_that_holds_something_else_is_left_alone(self):
        self.output.mkdir()
        (self.output / "thesis.txt").write_text("mine")
        line = self.refuse("--pairs", self.pairs)
        assert "thesis.txt, which is no sweep's" in line
        assert [path.name for path in self.output.iterdir()] == ["thesis.txt"]

    def test_an_output_that_is_a_file(self):
        self.output.write_text("mine")
        assert "cannot be made" in self.refuse("--pairs", self.pairs)

    def test_multipliers_that_are_no_numbers(self):
        with pytest.raises(SystemExit) as caught:
            self.run(*self.common, "--pairs", self.pairs, "--multipliers=a,b")
        assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seed", "-1"), "seed -1 is out of range"),
        (("--prompts", "no-such-set"), "no prompt file or set"),
        (("--multipliers", "0"), "other than 0"),
        (("--multipliers", "nan"), "finite numbers"),
        (("--samples", "0"), "1 or more"),
        (("--max-kl", "nan"), "bounds above 0"),
        (("--band", "middle"), "START:STOP"),
        (("--max-memory", "much"), "not a size"),
    ],
)
def test_mistakes_are_told_before_a_model_is_opened(run, tmp_path, options, words):
    """A model that does not exist would be complained about as soon as it is opened."""
    output = tmp_path / "out"
    code, text, errors = run(
        tmp_path / "no-such-model", "--direction", "bake-demo", "-o", output, *options
    )
    assert (code, text) == (1, "")
    assert words in errors
    assert not output.exists()


@pytest.fixture(scope="module")
def ablating(tmp_path_factory, texts):
    """A sweep of pushes and ablations together: its report and what it printed."""
    output = tmp_path_factory.mktemp("ablating") / "out"
    printed = io.StringIO()
    options = ("--ablate", "stream", "writes", "--strengths", "0.5,1", "--from-layer", "5", "6")
    with contextlib.redirect_stdout(printed):
        code = main(
            [
                *("sweep", "bake-demo", "--direction", "bake-demo", "-o", str(output), "--html"),
                *("--control-seeds", "2", "--samples", "1", "--new-tokens", "4"),
                *("--multipliers=-4,-2,-1,1", "--words", "cheerful", *map(str, texts), *options),
            ]
        )
    assert code == 0
    report = json.loads((output / "report.json").read_text())
    return report, printed.getvalue(), (output / "index.html").read_text()


ABLATED = (
    "ablated, layer 5", "ablated, layer 6", "ablated writes 40:90 s=0.5",
    "ablated writes 40:90 s=1",
)  # fmt: skip


def test_ablations_are_arms_beside_pushes(ablating):
    report, printed, page = ablating
    points = {point["name"]: point for point in report["points"]}
    for name in ABLATED:
        assert points[name]["kind"] == "ablation"
        assert points[name]["shift"]["value"] < 0  # away from the cheerful side
        assert points[name]["neutral_kl"]["p95"]["value"] > 0
        assert points[name]["fluency_ratio"]["value"] > 0
        assert name in printed
        assert name in page
        assert f"random 1 {name}" not in printed
    shifts = [points[name]["shift"]["value"] for name in ABLATED[2:]]
    assert shifts[1] < shifts[0]
    assert {window["sign"] for window in report["windows"]} == {-1, 1}


def test_an_ablation_stands_beside_chance_and_the_push_that_costs_as_much(ablating):
    report, printed, page = ablating
    beside = {entry["name"]: entry for entry in report["ablations"]}
    assert set(beside) == set(ABLATED)
    pushes = {p["multiplier"]: p for p in report["points"] if p["kind"] in ("base", "direction")}
    for entry in beside.values():
        assert entry["seeds"] == 2
        assert entry["random_largest"] < abs(entry["shift"]["value"])
        assert entry["text"] in printed
        if entry["push"] is not None:
            multiplier, shift = entry["push"]
            assert -4 <= multiplier < 0
            assert shift < 0
            costs = [0.0, *(pushes[m]["neutral_kl"]["p95"]["value"] for m in (-1, -2, -4))]
            assert min(costs) <= entry["kl"] <= max(costs)
    assert any(entry["push"] for entry in beside.values())
    assert "costs as much and shifts" in page


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ablate", "writes", "--strengths", "0"), "--strengths are finite numbers other than 0"),
        (("--strengths", "2"), "--strengths is for --ablate writes"),
        (("--ablate", "writes", "--from-layer", "3"), "--from-layer is for --ablate stream"),
        (("--ablate", "stream", "--from-layer", "77"), "the direction has no vector for layer 77"),
    ],
)
def test_a_wrong_ablation_is_told(run, tmp_path, texts, options, says):
    code, _, errors = run(
        "bake-demo", "--direction", "bake-demo", "-o", tmp_path / "out", *texts, *options
    )
    assert code == 1
    assert says in errors
    assert not (tmp_path / "out").exists()
