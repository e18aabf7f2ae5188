"""Every command and every Python block of README and docs is run; links lead somewhere.

The model of the examples is the toy that ships, under the id that the examples use, on a loopback Hub; the
pairs of the examples are the toy's, as files of the shipped sets' names in the working directory.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from loopback_hub import LoopbackHub

from bake.cli.main import COMMANDS
from bake.io.shipped import DEMO_MODEL, shipped_sets
from bake.pipeline.recipe import make_recipe

ROOT = Path(__file__).parents[2]
# The reference comes last: its examples use what the other pages made.
PAGES = [
    *(ROOT / name for name in ("README.md", "docs/start.md")),
    *sorted(p for p in (ROOT / "docs").glob("*.md") if p.stem not in ("start", "reference")),
    ROOT / "docs" / "reference.md",
]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
FEW = "--control-seeds 1 --samples 1 --new-tokens 4"
FASTER = {
    "--minutes 20": "--minutes 0.02",
    "sweep --html": f"sweep --html {FEW}",
    'moon."': 'moon." --new-tokens 4',
}
# tests/demo runs the first, and judges what it shows; tests/play serves the page; llama.cpp's programs are
# stand-ins in tests/llama_cpp, and run for real by `make test-engines`.
BAKED = "SmolLM2-135M-Instruct-formal"
ELSEWHERE = {
    "bake demo",
    f"bake play {MODEL} --pairs formal-casual",
    f"bake gguf {BAKED} -o formal.gguf --llama-cpp llama.cpp",
    f"bake gguf {BAKED} -o formal-q4.gguf --quantize Q4_K_M --llama-cpp llama.cpp",
}


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def commands(page: Path) -> list[str]:
    """Return the lines that begin with "$ " in a page's console blocks."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def test_pages_have_commands():
    assert len({line for page in PAGES for line in commands(page)}) > 30


def test_only_commands_of_bake_are_in_console_blocks():
    """What stands there is run below; other programs stand in indented blocks."""
    for page in PAGES:
        for line in commands(page):
            assert line.startswith("bake "), (page.name, line)


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\bmake ([a-z-]+)`", page.read_text("utf-8")):
            assert target in targets, (page.name, target)


def test_options_that_pages_name_exist():
    known = {option.flag for command, _ in COMMANDS for option in command.options}
    known |= {"--help", "--version", "--json", "--quiet"}
    for page in PAGES:
        text = re.sub(r"^(    .*|```yaml.*?```)$", "", page.read_text("utf-8"), flags=re.M | re.S)
        for quoted in re.findall(r"`[^`\n]*`", text):
            if not quoted.startswith(("`--", "`bake ")):
                continue
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", quoted):
                if option not in ("--control-vector", "--nproc-per-node"):
                    assert option in known, (page.name, quoted)


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"`[^`]*`", "", page.read_text("utf-8"))
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)


def test_the_readme_is_two_screens():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_recipes_have_known_keys():
    for page in PAGES:
        for block in blocks(page, "yaml"):
            make_recipe(yaml.safe_load(block))


@pytest.fixture
def place(tmp_path):
    """A working directory with what the examples take to be there."""
    named = ("formal-casual", "cheerful-gloomy")
    for name in (f"{each}{part}" for each in named for part in ("", ".held-out")):
        toy = re.sub("|".join(named), "toy-cheerful-gloomy", name)
        shutil.copyfile(shipped_sets("pairs")[toy], tmp_path / name)
    shutil.copyfile(shipped_sets("pairs")["toy-cheerful-gloomy"], tmp_path / "mine.jsonl")
    return tmp_path


def test_every_command_and_python_block_runs(place, tmp_path_factory):
    lines, seen = [], set()
    for page in PAGES:
        ordered = [
            *(("command", line) for line in commands(page)),
            *(("python", block) for block in blocks(page, "python")),
        ]
        for kind, text in ordered:
            for slow, fast in FASTER.items() if kind == "command" else ():
                text = text.replace(slow, fast)
            if text not in seen | ELSEWHERE:
                seen.add(text)
                lines.append({"kind": kind, "text": text, "page": page.name})
    home = tmp_path_factory.mktemp("home")
    (home / "lines.json").write_text(json.dumps(lines))
    with LoopbackHub() as hub:
        hub.add_user("you", "hf_youToken")
        hub.add_user("HuggingFaceTB", "hf_otherToken")
        files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}
        settings = json.loads(files["tokenizer_config.json"])
        settings["chat_template"] = TEMPLATE  # The model of the examples has one.
        files["tokenizer_config.json"] = json.dumps(settings).encode()
        hub.create_repo(MODEL)
        hub.add_files(MODEL, files)
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_youToken",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        finished = subprocess.run(
            [
                sys.executable,
                str(Path(__file__).with_name("run_lines.py")),
                str(home / "lines.json"),
            ],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
    done = [json.loads(line) for line in finished.stdout.splitlines()]
    wrong = [
        f"{entry['page']}: {entry['text']}\nexit {entry['code']}: {entry['said'][-800:]}"
        for entry in done
        if entry["code"] != ("# exit 1" in entry["text"])
    ]
    for entry in sorted(done, key=lambda entry: -entry["seconds"])[:12]:
        print(f"{entry['seconds']:6.1f} s  {entry['text'].splitlines()[0]}")
    assert not wrong, "\n\n".join(wrong)
    assert len(done) == len(lines), finished.stderr[-2000:]
