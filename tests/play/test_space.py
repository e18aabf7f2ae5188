"""`bake space`: the folder, its app as it runs in a Space, and the one commit that publishes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback_hub import LoopbackHub, client_environment
from publishing import TOKEN
from test_page import call, served, texts

import bake
from bake.checkpoint.front_matter import read_front_matter
from bake.cli.main import main
from bake.errors import BakeError, HubError
from bake.io.shipped import DEMO_MODEL

# huggingface_hub's own use of its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

BASE, BAKED = "ada/base", "ada/base-cheerful"


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    """A bake, as it is where it was published: its base and itself are on the Hub."""
    output = tmp_path_factory.mktemp("space") / "baked"
    bake.export("bake-demo", direction="bake-demo", multiplier=2.0, output=output)
    return output


def claim(baked, folder, commit, **more):
    """Copy what `bake space` reads of a bake, with another base."""
    folder.mkdir()
    shutil.copyfile(baked / "direction.safetensors", folder / "direction.safetensors")
    record = json.loads((baked / "bake.json").read_text())
    record |= {"base": {"id": BASE, "revision": commit}, **more}
    (folder / "bake.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def known(baked, tmp_path):
    return claim(baked, tmp_path / "known", "0" * 40, repo_id=BAKED)


@pytest.fixture
def reachable(baked, tmp_path):
    """A loopback Hub that holds base and bake, and the environment of a process that knows it alone."""
    with LoopbackHub() as hub:
        hub.add_user("ada", TOKEN)
        hub.create_repo(BASE)
        files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir()}
        commit = hub.add_files(BASE, files).oid
        hub.create_repo(BAKED)
        told = claim(baked, tmp_path / "told", commit)
        files = {path.name: path.read_bytes() for path in baked.iterdir() if path.is_file()}
        files |= {path.name: path.read_bytes() for path in told.iterdir()}
        hub.add_files(BAKED, files)
        yield client_environment(hub.url, tmp_path / "home", TOKEN)


def run_bake(environment, *words):
    command = [sys.executable, "-m", "bake", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_space(folder, environment, python=sys.executable):
    """Run a Space's app as the Hub does: in its folder, and with no other bake than its own."""
    alone = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    return served([str(python), "app.py"], folder, alone)


def heard(environment, *words):
    options = ("--new-tokens", "12", "--temperature", "0", "--json")
    found = json.loads(run_bake(environment, "try", *words, "Today was", *options))
    return [voice["text"].strip() for voice in found["answers"][0]["voices"]]


def test_a_space_compares_a_bake_with_its_base(reachable, tmp_path):
    folder = tmp_path / "space"
    assert "written to" in run_bake(reachable, "space", BAKED, "-o", str(folder))
    front = read_front_matter((folder / "README.md").read_text())
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [BASE, BAKED])
    assert re.fullmatch(r"[\d.]+", front["sdk_version"])
    needed = (folder / "requirements.txt").read_text()
    assert "torch" in needed
    assert "gradio==" in needed
    assert "extra" not in needed
    assert not list(folder.rglob("__pycache__"))
    assert not (folder / "bake" / "demo" / "model").exists()
    assert len((folder / "app.py").read_text().splitlines()) < 40
    with run_space(folder, reachable) as address:
        _, left, right = call(address, "answer", "Today was", [], [], 12, 0.0, 0)
    assert texts(left)[1] != texts(right)[1]
    assert [texts(left)[1], texts(right)[1]] == heard(reachable, BAKED)


@pytest.mark.browser
def test_a_space_runs_in_an_environment_of_its_requirements(reachable, tmp_path):
    """Nothing of this installation: a new environment, and what requirements.txt names."""
    folder, place = tmp_path / "space", tmp_path / "environment"
    run_bake(reachable, "space", BAKED, "-o", str(folder))
    root = Path(__file__).parents[2]
    pins = root / "constraints.txt"
    torch = next(line for line in pins.read_text().splitlines() if line.startswith("torch=="))
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    # The pinned torch goes first, so that no build for a GPU is fetched.
    for needed in ([torch], ["-r", str(folder / "requirements.txt")]):
        pip = [place / "bin" / "python", "-m", "pip", "install", "-q", "-c", pins]
        subprocess.run([*pip, *needed], check=True)
    with run_space(folder, reachable, place / "bin" / "python") as address:
        _, left, right = call(address, "answer", "Today was", [], [], 12, 0.0, 0)
    assert [texts(left)[1], texts(right)[1]] == heard(reachable, BAKED)


def test_a_space_plays_a_direction_over_the_base(reachable, tmp_path):
    folder = tmp_path / "space"
    title = 'A "title" \\ <b>'
    run_bake(reachable, "space", BAKED, "-o", str(folder), "--play", "--title", title)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["multiplier"]) == (BASE, 2.0)
    with run_space(folder, reachable) as address:
        _, left, right = call(address, "answer", "Today was", [], [], 12, 0.0, 0, 2.0, 40, 90, "")
        _, _, other = call(address, "answer", "Today was", [], [], 12, 0.0, 0, -3.0, 40, 90, "")
        cost, *_ = call(address, "describe", 2.0, 40, 90, "")
    assert [texts(left)[1], texts(right)[1]] == heard(reachable, BAKED)
    assert texts(other)[1] not in (texts(left)[1], texts(right)[1])
    assert "KL on neutral text" in cost


def test_a_space_is_published_in_one_commit_and_again_in_none(known, hub, tmp_path, capsys):
    command = ["space", str(known), "-o", str(tmp_path / "one"), "--push-to-hub", "ada/hear-it"]
    assert main(command) == 0
    assert "published:" in capsys.readouterr().out
    assert len(hub.commits("ada/hear-it")) == 2  # The Hub's own first, and this.
    assert hub.repos["ada/hear-it"].private
    sent = hub.files("ada/hear-it")
    here = {
        path.relative_to(tmp_path / "one").as_posix(): path.read_bytes()
        for path in (tmp_path / "one").rglob("*")
        if path.is_file()
    }
    assert {name: body for name, body in sent.items() if name != ".gitattributes"} == here
    again = bake.space(known, output=tmp_path / "two", push_to_hub="ada/hear-it")
    assert again.publication.already_there
    assert len(hub.commits("ada/hear-it")) == 2
    changed = bake.space(known, output=tmp_path / "three", play=True, push_to_hub="ada/hear-it")
    assert not changed.publication.already_there
    assert len(hub.commits("ada/hear-it")) == 3
    assert "recipe.yaml" in hub.files("ada/hear-it")


def test_what_is_no_space_of_bakes_is_left_alone(known, hub, tmp_path):
    hub.create_repo("ada/mine", private=True)
    hub.add_files("ada/mine", {"app.py": b"print('mine')"})
    with pytest.raises(HubError, match="did not write"):
        bake.space(known, output=tmp_path / "one", push_to_hub="ada/mine")
    hub.create_repo("ada/open")
    with pytest.raises(HubError, match="is public"):
        bake.space(known, output=tmp_path / "two", push_to_hub="ada/open")
    assert len(hub.commits("ada/open")) == 1
    with pytest.raises(HubError, match="write"):
        bake.space(known, output=tmp_path / "three", push_to_hub="museum/hear-it")


def test_what_cannot_be_a_space_is_one_line(baked, tmp_path):
    with pytest.raises(BakeError, match=r"base of .* is not known to be on the Hub"):
        bake.space(baked, output=tmp_path / "space")
    with pytest.raises(BakeError, match="--public is about publishing"):
        bake.space(baked, output=tmp_path / "space", public=True)
    with pytest.raises(BakeError, match="has no bake"):
        bake.space(tmp_path, output=tmp_path / "space")
    local = claim(baked, tmp_path / "local", "0" * 40)
    with pytest.raises(BakeError, match="not known to be on the Hub"):
        bake.space(local, output=tmp_path / "space")
    assert not (tmp_path / "space").exists()
    assert bake.space(local, output=tmp_path / "space", play=True).files > 100
    with pytest.raises(BakeError, match="exists already"):
        bake.space(local, output=tmp_path / "space", play=True)
