"""The wheel carries everything: built, installed into an empty environment, the demo model is baked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built by hatchling from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # No isolation: the build backend is among the pinned development dependencies.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("bake_steering-*.whl")
    return built


def test_the_wheel_holds_model_calibration_and_cards(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (
        ("calibration", "bake/calibration"),
        ("model_cards", "bake/model_cards"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                assert f"{target}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"):
        assert f"bake/demo/model/{name}" in names
    assert "bake/demo/direction.safetensors" in names
    assert "bake/py.typed" in names  # Type checkers look at no annotation without it.
    assert not any(name.startswith(("tests/", "calibration/")) for name in names)


def test_the_demo_model_is_baked_from_an_installed_wheel(wheel, tmp_path):
    """An environment that has the dependencies and no checkout on its path."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    )
    # The dependencies are those that this environment has; bake itself comes from the wheel alone.
    # A plain path entry does not execute the checkout's editable .pth file.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
         "--quiet", "--disable-pip-version-check", wheel],
        check=True,
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["OMP_NUM_THREADS"] = "2"
    where = subprocess.run(
        [python, "-c", "import bake; print(bake.__file__)"],
        cwd=elsewhere, env=clean, check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    assert where.startswith(str(site))
    # What `bake demo` does at each strength; its counting is tested where it is measured.
    finished = subprocess.run(
        [environment / "bin" / "bake", "export", "bake-demo", "--direction", "bake-demo",
         "-o", tmp_path / "baked", "--json"],
        cwd=elsewhere, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    assert result["equivalence"]["passed"] is True
    assert (tmp_path / "baked" / "README.md").is_file()
    assert list(elsewhere.iterdir()) == []
