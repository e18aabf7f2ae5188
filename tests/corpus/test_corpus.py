"""Hostile and foreign files, each with the line that bake must give; `corpus/README.md` explains a row."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from bake.cli.main import main

CORPUS = Path(__file__).parent
KNOWN = {
    *("name", "model", "config", "remove", "files", "links", "bake", "record", "build", "inputs"),
    *("command", "exit", "says", "writes"),
}


def cases() -> list[Any]:
    found = []
    for file in sorted(CORPUS.glob("*/cases.yaml")):
        for case in yaml.safe_load(file.read_text(encoding="utf-8")):
            assert not case.keys() - KNOWN, f"{file}: {case}"
            area = file.parent.name
            found.append(pytest.param(area, case, id=f"{area}-{case['name']}"))
    return found


class NoInput:
    """A stdin that nobody may ask."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def _asked(self, *arguments: Any) -> str:
        raise AssertionError("bake read from stdin")

    read = readline = __iter__ = fileno = _asked


@pytest.fixture(scope="session")
def finished_bake(make_model, tmp_path_factory):
    """Return a function: architecture → a finished bake of the small model."""
    built: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in built:
            folder = tmp_path_factory.mktemp("bakes")
            vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
            save_file({"direction": vector}, folder / "d.safetensors", {"site": "mlp_out"})
            arguments = ["--direction", str(folder / "d.safetensors"), "-o", str(folder / "bake")]
            assert main(["export", str(make_model(architecture=architecture)), *arguments]) == 0
            built[architecture] = folder / "bake"
        return built[architecture]

    return make


@pytest.mark.parametrize(("area", "case"), cases())
def test_a_foreign_file_gives_its_line(
    area, case, make_model, finished_bake, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("bake.texts.rendering.SECONDS", 2)  # as hostile, and sooner told
    places = {name: tmp_path / name.lower() for name in ("MODEL", "BAKE", "INPUT", "OUTSIDE")}
    places |= {"HERE": CORPUS / area, "OUT": tmp_path / "out"}
    places["OUTSIDE"].mkdir()
    (places["OUTSIDE"] / "secret").write_text("nobody reads or changes this", encoding="utf-8")
    (places["OUTSIDE"] / "folder").mkdir()
    (places["OUTSIDE"] / "folder" / "secret.jinja").write_text("nor this", encoding="utf-8")
    if "model" in case or case.get("bake"):
        kind = "BAKE" if case.get("bake") else "MODEL"
        make = finished_bake if case.get("bake") else make_model
        wanted = case.get("model", "llama")
        original = make(wanted) if case.get("bake") else make(architecture=wanted)
        shutil.copytree(original, places[kind])
        edit(places[kind], case, places)
    places["INPUT"].mkdir()
    write_files(places["INPUT"], case.get("inputs", {}))
    if "build" in case:
        builder(area, case["build"])(places["INPUT"])
    command = [replace(word, places) for word in case["command"]]
    before = {name: snapshot(path) for name, path in places.items() if name != "OUT"}
    monkeypatch.setattr(sys, "stdin", NoInput())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()

    code = main(command)

    out, err = capsys.readouterr()
    said = f"{out}\n{err}"
    assert code == case["exit"], said
    assert "Traceback" not in said
    assert {name: snapshot(path) for name, path in places.items() if name != "OUT"} == before
    assert case.get("writes") or not places["OUT"].exists()
    line = said
    if code == 1:
        line = err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("bake: error: "), said
        assert len(line) < 1500, line
        assert out == ""
    wanted = case["says"] if isinstance(case["says"], list) else [case["says"]]
    for part in wanted:
        assert replace(part, places) in line


def replace(text: Any, places: Mapping[str, Path]) -> str:
    text = str(text)
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


def edit(directory: Path, case: Mapping[str, Any], places: Mapping[str, Path]) -> None:
    for name in case.get("remove", ()):
        (directory / name).unlink()
    for key, file in (("config", "config.json"), ("record", "bake.json")):
        if key in case:
            values = json.loads((directory / file).read_text(encoding="utf-8"))
            for dotted, value in case[key].items():
                put(values, dotted.split("."), value)
            (directory / file).write_text(json.dumps(values), encoding="utf-8")
    write_files(directory, case.get("files", {}))
    for name, target in case.get("links", {}).items():
        (directory / name).unlink(missing_ok=True)
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).symlink_to(replace(target, places))


def write_files(directory: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def put(values: Any, keys: list[str], value: Any) -> None:
    *above, last = [int(key) if key.isdigit() else key for key in keys]
    for key in above:
        values = values[key] if isinstance(values, list) else values.setdefault(key, {})
    values[last] = value


def builder(area: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"corpus_{area}", CORPUS / area / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def snapshot(path: Path) -> dict[str, str]:
    """Every file and link below a folder, with what it holds."""
    found = {}
    for entry in sorted(path.rglob("*")) if path.is_dir() else ():
        if "__pycache__" in entry.parts:
            continue
        name = str(entry.relative_to(path))
        if entry.is_symlink():
            found[name] = f"-> {entry.readlink()}"
        elif entry.is_file():
            found[name] = hashlib.sha256(entry.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found
