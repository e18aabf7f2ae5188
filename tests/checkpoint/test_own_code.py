"""Code of a base: none of it runs, nothing is asked on stdin, and a bake does not hand it on."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from bake.checkpoint import pretrained
from bake.checkpoint.loading import load_pretrained
from bake.cli.main import main
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.models.forward import read_config
from bake.texts.prompts import load_tokenizer

ROOT = Path(__file__).parents[2]
OWN = "modeling_own.OwnForCausalLM"
KERNEL = "kernels-community/flash-attn2"


class Yes:
    """A stdin that answers every question with "y", as `yes | bake …` does."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.asked = 0

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("not a terminal")

    def readline(self, *_: object) -> str:
        self.asked += 1
        return "y\n"


@pytest.fixture
def stdin(monkeypatch):
    answers = Yes()
    monkeypatch.setattr(sys, "stdin", answers)
    return answers


@pytest.fixture
def own_base(make_model, tmp_path, monkeypatch):
    """A copy of a small Llama with code beside it that leaves a mark where it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    directory = tmp_path / "base"
    shutil.copytree(make_model(), directory)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for name in ("modeling_own.py", "configuration_own.py", "tokenization_own.py"):
        (directory / name).write_text(code, encoding="utf-8")
    return directory


def change(path: Path, **values: object) -> None:
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**old, **values}, indent=2), encoding="utf-8")


def one_error(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("bake: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("command", ["inspect", "calibrate", "export"])
@pytest.mark.parametrize("own", ["config", "model"])
def test_a_base_that_needs_its_own_code_is_refused_and_nothing_is_asked(
    own_base, pairs_file, tmp_path, stdin, capsys, command, own
):
    if own == "config":
        own_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": OWN}
        change(own_base / "config.json", model_type="own", auto_map=own_map)
        named = "OwnConfig in configuration_own.py"
    else:  # transformers knows the config's class, and no language model of it.
        change(own_base / "config.json", model_type="vit", auto_map={"AutoModelForCausalLM": OWN})
        named = "OwnForCausalLM in modeling_own.py"
    more = {"inspect": [], "calibrate": ["-o", str(tmp_path / "norms.json")]}
    more["export"] = ["--pairs", str(pairs_file), "-o", str(tmp_path / "out")]
    assert main([command, str(own_base), *more[command]]) == 1
    line = one_error(capsys)
    assert named in line
    assert "bake runs none" in line
    assert stdin.asked == 0
    assert not (tmp_path / "ran").exists()


def test_the_stock_class_is_taken_of_an_architecture_that_transformers_knows(
    own_base, tmp_path, stdin, capsys
):
    change(own_base / "config.json", auto_map={"AutoModelForCausalLM": OWN})
    change(
        own_base / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    )
    assert main(["inspect", str(own_base)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    model, report = load_pretrained(own_base, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.")
    assert not any(report.values())
    assert load_tokenizer(own_base)("abc")["input_ids"]
    assert stdin.asked == 0
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_of_its_own_is_refused(own_base, tmp_path, stdin):
    """Where transformers knows neither its class nor its file, guessing would give other tokens."""
    (own_base / "tokenizer.json").unlink()
    shutil.copy(own_base / "config.json", own_base / "own.tiktoken")
    for own in (
        {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        ["tokenization_own.OwnTokenizer", None],
    ):
        change(own_base / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
        with pytest.raises(UnsupportedError, match=r"OwnTokenizer in tokenization_own\.py"):
            load_tokenizer(own_base)
    assert stdin.asked == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["RagTokenizer", "AutoTokenizer", "AutoModel", "pipeline"])
def test_a_tokenizer_class_that_loads_something_else_is_refused(own_base, stdin, name):
    change(own_base / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(CheckpointError, match=f"names {name} .*which is no tokenizer"):
        load_tokenizer(own_base)
    assert stdin.asked == 0


def test_an_inner_call_of_transformers_asks_nothing(own_base, tmp_path, stdin):
    """A wrapper builds its towers by calls that pass no trust_remote_code on."""
    from transformers import AutoConfig

    change(own_base / "config.json", model_type="own", auto_map={"AutoConfig": OWN})

    def ask() -> None:
        with pytest.raises(ValueError, match="custom code"):
            AutoConfig.from_pretrained(own_base)

    with pretrained.unasked():
        ask()
    assert stdin.asked == 0
    nested = {"model_type": "llama", "auto_map": {"AutoModel": f"{own_base}--{OWN}"}}
    change(own_base / "config.json", model_type="llava", text_config=nested, auto_map={})
    config = read_config(own_base)
    assert type(config.text_config).__name__ == "LlamaConfig"
    assert not hasattr(config.text_config, "auto_map")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (KERNEL, None),
        ("somebody/kernel@main:run", None),
        ("flash_attention_2", None),
        ({"": KERNEL}, None),
        (3, None),
        ("eager", "eager"),
    ],
)
def test_a_kernel_of_the_hub_is_not_followed(own_base, monkeypatch, key, value, kept):
    from transformers.integrations import hub_kernels

    fetched = []
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: fetched.append(name))
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda: True)
    change(own_base / "config.json", **{key: value})
    assert read_config(own_base)._attn_implementation == kept
    model, _ = load_pretrained(own_base, dtype=torch.float32)
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not fetched


def test_a_kernel_for_a_part_of_a_wrapper_is_not_followed_either(own_base):
    text = {
        "model_type": "llama",
        "attn_implementation": KERNEL,
        "experts_implementation": "sonicmoe",
    }
    vision = {"model_type": "clip_vision_model", "_attn_implementation": KERNEL}
    change(own_base / "config.json", model_type="llava", text_config=text, vision_config=vision)
    config = read_config(own_base)
    for part in (config, config.text_config, config.vision_config):
        assert part._attn_implementation is None
        assert part._experts_implementation is None


def test_an_adapter_beside_the_weights_is_not_applied(own_base, monkeypatch):
    """transformers would load it where peft is installed."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    looked = []

    def find(model_id, *, subfolder="", **_):
        looked.append(subfolder)
        path = Path(model_id, subfolder, "adapter_config.json")
        return str(path) if path.is_file() else None

    for module in (peft, auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
        monkeypatch.setattr(module, "find_adapter_config_file", find)
    change(own_base / "adapter_config.json", base_model_name_or_path="somebody/else")
    model, report = load_pretrained(own_base, dtype=torch.float32)
    assert looked  # otherwise transformers has another way, and this shows nothing
    assert not any(report.values())
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "values",
    [
        {"auto_map": "AutoConfig"},
        {"auto_map": ["AutoConfig"]},
        {"auto_map": 3},
        {"auto_map": None},
        {"auto_map": {"AutoConfig": 3}},
        {"auto_map": {"AutoConfig": None}},
        {"configuration_files": ["../config.4.0.0.json"]},
    ],
)
def test_what_else_a_config_may_send_its_reader_to(own_base, values):
    change(own_base / "config.json", **values)
    with pytest.raises(BakeError, match=next(iter(values))):
        read_config(own_base)


@pytest.mark.parametrize(
    "own", [None, 3, "own.T", [], ["own.T"], {"AutoTokenizer": []}, {"AutoTokenizer": [None, None]}]
)
def test_a_malformed_auto_map_of_a_tokenizer_is_one_line(own_base, own):
    change(own_base / "tokenizer_config.json", auto_map=own)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json has an auto_map"):
        load_tokenizer(own_base)


def calls(tree: ast.AST) -> list[ast.Call]:
    """Every call of a from_pretrained or from_config."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]


def test_every_loading_call_says_that_no_code_is_trusted():
    files = [*ROOT.glob("bake/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    doors = set()
    for path in files:
        for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            receiver = ast.unparse(call.func.value)
            if receiver == "AutoHfQuantizer":  # It takes a dictionary and loads nothing.
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            trusted = given.get("trust_remote_code")
            assert isinstance(trusted, ast.Constant), f"{path}:{call.lineno}"
            assert trusted.value is False, f"{path}:{call.lineno}"
            if path.is_relative_to(ROOT / "bake"):
                doors.add(path.relative_to(ROOT / "bake").as_posix())
    assert doors == {"checkpoint/pretrained.py", "proof/plain.py"}
