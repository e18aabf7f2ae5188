"""`bake space`: a folder that is a Hugging Face Space, which lets others hear a bake.

The folder carries this package, so that the Space needs nothing of it from an index; the page is that of
`bake play`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.card.render import describe_model
from bake.checkpoint.checkpoint import is_path
from bake.checkpoint.download import download_record
from bake.checkpoint.front_matter import LICENCE_FIELDS
from bake.errors import BakeError
from bake.io.output_files import DIRECTION_FILE
from bake.io.shipped import DEMO_DIRECTION, DEMO_MODEL, shipped
from bake.io.staging import staged_directory
from bake.pipeline.record import read_result
from bake.play.app import import_gradio
from bake.play.run import RECIPE_FILE, SPACE_FILE
from bake.support.progress import announce
from bake.support.text import one_line

if TYPE_CHECKING:
    from bake.hub.spaces import PublishedSpace

PACKAGE = "bake-steering"
NORMS_FILE = "norms.json"
APP = '''\
"""{title}. Written by bake space; run it here with: python app.py"""

import logging
from pathlib import Path

from bake.play.app import build, launch
from bake.play.run import open_space

logging.basicConfig(format="%(message)s")
logging.getLogger("bake").setLevel(logging.INFO)
# The bake and its base, or the base and a direction, as space.yaml says.
page = build(open_space(Path(__file__).parent))

if __name__ == "__main__":
    launch(page)
'''
CARD = """\
---
{front_matter}---

# {title}

{sentence}

The page is `bake play`'s, and `bake/` is the package that draws it. It runs on a CPU; a base whose files
are gated needs the secret `HF_TOKEN` of somebody who may read them.
"""


@dataclass(frozen=True)
class WrittenSpace:
    """A folder that is a Space, and where it was published, if it was."""

    output: Path
    title: str
    files: int
    publication: PublishedSpace | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        published = {"publication": self.publication.to_dict()} if self.publication else {}
        return {"output": str(self.output), "title": self.title, "files": self.files, **published}

    def describe(self) -> str:
        """Return what a person reads."""
        lines = [f"{self.title}\nwritten to {self.output} ({self.files} files)"]
        lines.append(f"hear it here: python {self.output}/app.py")
        if self.publication is not None:
            lines.append(f"published: {self.publication.url}")
        return "\n".join(lines)


def write_space(
    model: str,
    output: Path,
    *,
    revision: str | None = None,
    play: bool = False,
    title: str | None = None,
) -> WrittenSpace:
    """Write the folder of a Space; model: a published bake, as its directory or its id.

    play: sliders over the base instead of the bake beside its base; then only the base has to be on the
    Hub. Raises BakeError where what it has to fetch is not on the Hub.
    """
    local = Path(model).is_dir() or is_path(model)
    directory = Path(model) if local else download_record(model, revision)
    record = read_result(directory)
    base = record["base"]
    if not base.get(
        "revision"
    ):  # A claimed id is not known to be the base, and neither is its commit.
        raise BakeError(
            f"the base of {model} is not known to be on the Hub ({base['id']}), where a Space would fetch "
            "it: bake one from there, or with a --base-id whose files are the same"
        )
    repo_id = record.get("repo_id") if local else model
    if repo_id is None and not play:
        raise BakeError(
            f"{model} is not known to be on the Hub, where a Space would fetch it: give its id after bake "
            "publish, or --play, which needs the base only"
        )
    words = describe_model(record)
    heading = one_line(title or str(words["title"]))
    with staged_directory(output) as staging:
        _write_package(staging)
        (staging / "requirements.txt").write_text(requirements(), encoding="utf-8")
        (staging / "app.py").write_text(APP.format(title=_in_docstring(heading)), encoding="utf-8")
        space: dict[str, Any] = {"title": heading}
        if play:
            _write_recipe(staging, directory, model, revision, record)
        else:
            space |= {"bake": repo_id, "revision": revision}
        _write_yaml(staging / SPACE_FILE, space)
        models = [str(base["id"]), *([str(repo_id)] if repo_id else [])]
        card = compose_card(heading, record, models, play=play)
        (staging / "README.md").write_text(card, encoding="utf-8")
        count = sum(path.is_file() for path in staging.rglob("*"))
    return WrittenSpace(output, heading, count)


def _write_package(staging: Path) -> None:
    """Copy this package, without the model that ships, and the texts that it measures with."""
    here = Path(__file__).parent.parent
    own = {DEMO_MODEL, DEMO_DIRECTION}

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n == "__pycache__" or Path(folder, n) in own]

    shutil.copytree(here, staging / "bake", ignore=left_out)
    if not (staging / "bake" / "calibration").is_dir():
        shutil.copytree(shipped("calibration"), staging / "bake" / "calibration")


def requirements() -> str:
    """Return what the page needs: bake's own requirements as they are declared, and Gradio."""
    gradio = import_gradio()
    try:
        declared = requires(PACKAGE) or []
    except PackageNotFoundError:
        raise BakeError(
            "what bake requires is not known, because it is not installed: pip install . in a checkout"
        ) from None
    needed = [line for line in declared if "extra ==" not in line]
    return "".join(f"{line}\n" for line in [*sorted(needed), f"gradio=={gradio.__version__}"])


def _write_recipe(
    staging: Path, directory: Path, model: str, revision: str | None, record: Mapping[str, Any]
) -> None:
    """Write the recipe of a bake's push, which needs no measuring: α at m = 1, direction and norms."""
    source = directory / DIRECTION_FILE
    if not source.is_file():
        source = _fetch_direction(model, revision)
    shutil.copyfile(source, staging / DIRECTION_FILE)
    base, multiplier = record["base"], float(record["multiplier"])
    told = {"id": base["id"], "revision": base["revision"]}
    norms = {"base": told, **record["calibration"]}
    (staging / NORMS_FILE).write_text(json.dumps(norms, indent=2) + "\n", encoding="utf-8")
    unit = {entry["layer"]: entry["coefficient"] / multiplier for entry in record["layers"]}
    recipe = {
        "model": base["id"],
        "revision": base["revision"],
        "direction": DIRECTION_FILE,
        "calibration": NORMS_FILE,
        "statistic": record["calibration"]["statistic"],
        "coefficients": ",".join(f"{layer}={value!r}" for layer, value in sorted(unit.items())),
        "site": record["site"],
        "multiplier": multiplier,
    }
    _write_yaml(staging / RECIPE_FILE, recipe)


def _fetch_direction(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    from bake.hub.errors import translated

    with translated(model):
        return Path(hf_hub_download(model, DIRECTION_FILE, revision=revision))


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    import yaml

    given = {name: value for name, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(given, sort_keys=False, allow_unicode=True), encoding="utf-8")


def compose_card(title: str, record: Mapping[str, Any], models: list[str], *, play: bool) -> str:
    """Return the Space's README.md, whose front matter tells the Hub what runs it."""
    import yaml

    gradio = import_gradio()
    licence = record.get("licence") or {}
    front = {
        "title": title[:60],
        "emoji": "🧭",
        "sdk": "gradio",
        "sdk_version": gradio.__version__,
        "app_file": "app.py",
        "models": models,
        "tags": ["steering", "activation-steering", "bake"],
        **{key: licence[key] for key in LICENCE_FIELDS if licence.get(key) and key == "license"},
    }
    named = [_in_markdown(model) for model in models]
    sentence = (
        f"Turn the strength of a steering direction of {named[0]} and hear what it does."
        if play
        else f"{named[-1]} beside its base {named[0]}, with the same noise."
    )
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return CARD.format(front_matter=text, title=_in_markdown(title), sentence=sentence)


def _in_docstring(text: str) -> str:
    return text.replace("\\", " ").replace('"', "'").rstrip("'")


def _in_markdown(text: str) -> str:
    from bake.support.markdown import literal

    return str(literal(text))


def publish_space(
    written: WrittenSpace, repo_id: str, *, private: bool, commit_message: str | None
) -> PublishedSpace:
    """Send a written Space to the Hub in one commit; see `bake.hub.spaces`."""
    from bake.hub.spaces import publish

    announce(f"sending {written.files} files to the Space {repo_id}")
    return publish(written.output, repo_id, private=private, commit_message=commit_message)
