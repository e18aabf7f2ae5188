"""`bake gguf` with stand-ins for llama.cpp's programs: what is asked of them, and what a failure becomes.

The stand-in converter keeps what it is given, and the stand-in server answers as llama-server does, with
transformers' log-probabilities. The real programs are run by tests/engines/test_llama_cpp_for_real.py.
"""

from __future__ import annotations

import json
import stat
import sys

import pytest
import torch
from conftest import CONFIGS, HIDDEN, TinyModel
from safetensors.torch import load_file, save_file

from bake.api import export, gguf
from bake.cli.main import main
from bake.errors import BakeError, EquivalenceError, OutputError
from bake.llama_cpp.check import compare

CONVERTER = """
import json, shutil, sys
from pathlib import Path
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
output = Path(options["--outfile"])
if {fails!r}:
    print("INFO: fine so far", file=sys.stderr)
    sys.exit("NotImplementedError: no such pre-tokenizer")
kept = Path({store!r}) / output.name
shutil.copytree(sys.argv[1], kept)
said = Path(options["--metadata"]).read_text()
kept.with_suffix(".options.json").write_text(json.dumps({{**options, "said": said}}))
output.write_text(str(kept))
"""
QUANTISER = """
import shutil, sys
shutil.copyfile(sys.argv[1], sys.argv[2])
"""
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if {fails!r}:
    sys.exit("llama_model_load: error loading model: wrong number of tensors")
import torch
from transformers import AutoModelForCausalLM
directory = Path(options["-m"]).read_text()
if {drops!r}:
    directory = directory.replace("bake.gguf", "base.gguf")
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

class Handler(BaseHTTPRequestHandler):
    def answer(self, values):
        body = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with torch.no_grad():
            logits = model(torch.tensor([asked["prompt"]])).logits[0, -1]
        values = logits.log_softmax(-1).tolist()
        top = [{{"id": place, "logprob": value}} for place, value in enumerate(values)]
        self.answer({{"completion_probabilities": [{{"top_logprobs": top[: asked["n_probs"]]}}]}})

    def log_message(self, *_):
        pass

HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def programs(tmp_path):
    """Return a function that writes stand-ins and returns the checkout that holds them."""

    def make(converter_fails=False, server_fails=False, drops=False):
        folder = tmp_path / "llama.cpp"
        (folder / "build" / "bin").mkdir(parents=True)
        store = tmp_path / "store"
        store.mkdir()
        converter = CONVERTER.format(store=str(store), fails=converter_fails)
        (folder / "convert_hf_to_gguf.py").write_text(converter)
        for name, code in (
            ("llama-quantize", QUANTISER),
            ("llama-server", SERVER.format(fails=server_fails, drops=drops)),
        ):
            path = folder / "build" / "bin" / name
            path.write_text(f"#!{sys.executable}\n{code}")
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return folder

    return make


@pytest.fixture
def baked(make_model, tmp_path):
    def make(architecture="llama", site="mlp_out", **options):
        file = tmp_path / "direction.safetensors"
        vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))
        save_file({"direction": vector}, file, metadata={"site": site})
        output = tmp_path / "baked"
        base = make_model(TinyModel(architecture))
        export(base, direction=file, site=site, multiplier=3.0, output=output, **options)
        return output

    return make


def test_a_bake_becomes_a_file_that_was_run(programs, baked, tmp_path):
    output = tmp_path / "out" / "formal.gguf"
    found = gguf(baked(), output=output, llama_cpp=programs())
    assert found.check.holds
    assert found.check.cosine > 0.9999
    assert found.check.effect > 0.01
    assert found.kind == "F32"
    assert output.is_file()
    assert (output.parent / "formal.Modelfile").read_text() == "FROM ./formal.gguf\n"
    (copy,) = (output.parent / "lm-studio").rglob("*.gguf")
    assert copy.parts[-2:] == ("formal-GGUF", "formal.gguf")
    assert copy.samefile(output)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "formal.Modelfile",
        "formal.gguf",
        "lm-studio",
    ]
    text = found.describe()
    assert "the shift has cosine 1.0000" in text
    assert "ollama create formal -f" in text
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def weights(directory):
    found = {}
    for shard in directory.glob("model*.safetensors"):
        found |= load_file(shard)
    return found


def test_what_the_converter_gets(programs, baked, tmp_path):
    """Zeros that attn_in created in o_proj are left out, the pushed biases not; the facts go in."""
    found = gguf(
        baked("qwen3", "attn_in"),
        output=tmp_path / "q.gguf",
        quantize="Q4_K_M",
        llama_cpp=programs(),
    )
    assert found.kind == "Q4_K_M"
    given = weights(tmp_path / "store" / "bake.gguf")
    biases = [name for name in given if name.endswith("proj.bias")]
    assert biases
    assert all(bool(given[name].any()) for name in biases)
    assert not any("o_proj" in name for name in biases)
    assert found.left_out > 0
    options = json.loads((tmp_path / "store" / "bake.options.json").read_text())
    said = json.loads(options["said"])
    assert said["general.name"] == "q"
    assert "steered by bake" in said["general.description"]
    assert "attn_in of layers 2 to 4" in said["general.description"]
    base = weights(tmp_path / "store" / "base.gguf")
    assert not any(name.endswith("proj.bias") for name in base)


def test_what_an_engine_drops_is_not_written(programs, baked, tmp_path):
    output = tmp_path / "out" / "formal.gguf"
    with pytest.raises(EquivalenceError, match="the push is gone"):
        gguf(baked(), output=output, llama_cpp=programs(drops=True))
    assert not output.exists()
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("converter_fails", "could not convert it: .*no such pre-tokenizer"),
        ("server_fails", "llama.cpp does not load base.gguf: .*wrong number of tensors"),
    ],
)
def test_what_a_program_says_of_its_failure_is_told(broken, says, programs, baked, tmp_path):
    output = tmp_path / "out" / "formal.gguf"
    with pytest.raises(BakeError, match=says):
        gguf(baked(), output=output, llama_cpp=programs(**{broken: True}))
    assert not list((tmp_path / "out").rglob("*"))


def test_programs_that_are_not_there_are_named(baked, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    directory = baked()
    with pytest.raises(BakeError, match=r"convert_hf_to_gguf.py is not on PATH: .*--llama-cpp DIR"):
        gguf(directory, output=tmp_path / "x.gguf")
    with pytest.raises(BakeError, match="is no directory"):
        gguf(directory, output=tmp_path / "x.gguf", llama_cpp=tmp_path / "nowhere")
    with pytest.raises(BakeError, match="is neither in"):
        gguf(directory, output=tmp_path / "x.gguf", llama_cpp=tmp_path)


def test_nothing_is_overwritten(baked, tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        gguf(tmp_path, output=tmp_path / "x.gguf")
    with pytest.raises(OutputError, match=r"does not end in \.gguf"):
        gguf(tmp_path, output=tmp_path / "x.bin")
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_a_base_that_the_bake_does_not_hold_is_asked_for(
    programs, baked, make_model, tmp_path, monkeypatch
):
    """Gemma's norms are stored otherwise in its host, so that the bake does not hold them."""
    monkeypatch.setitem(CONFIGS, "gemma", {**CONFIGS["llama"], "head_dim": 8})
    directory = baked("gemma")
    checkout = programs()
    with pytest.raises(BakeError, match="give its base with --base"):
        gguf(directory, output=tmp_path / "x.gguf", llama_cpp=checkout)
    base = make_model(TinyModel("gemma"))
    assert gguf(directory, output=tmp_path / "x.gguf", base=base, llama_cpp=checkout).check.holds


def test_the_command_says_it_in_json(programs, baked, tmp_path, capsys):
    directory = baked()
    capsys.readouterr()
    words = ["gguf", str(directory), "-o", str(tmp_path / "x.gguf"), "--llama-cpp", str(programs())]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["holds"] is True
    assert main(words) == 1
    assert "is there already" in capsys.readouterr().err


class TestComparison:
    """Cosine, ratio and KL are what they say."""

    def draw(self, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(4, 50, generator=generator).double().log_softmax(-1)

    def test_the_same_is_the_same(self):
        base, bake = self.draw(1), self.draw(2)
        found = compare("x", "F16", (base, bake), (base, bake))
        assert (found.cosine, found.ratio) == (pytest.approx(1), pytest.approx(1))
        assert (found.kl_bake, found.kl_base) == (0, 0)
        assert found.holds

    def test_half_of_a_shift_is_half(self):
        base, bake = self.draw(1), self.draw(2)
        half = (base + 0.5 * (bake - base)).log_softmax(-1)
        found = compare("x", "Q8_0", (base, half), (base, bake))
        assert found.cosine == pytest.approx(1)
        assert found.ratio == pytest.approx(0.5)
        assert not found.holds

    def test_another_model_that_hardly_shows_does_not_hold(self):
        """Gemma as Granite, run with SiLU: cosine 0.9925 and 1.03 of the length."""
        base, bake = self.draw(1), self.draw(2)
        off = (bake + 0.1 * self.draw(3)).log_softmax(-1)
        found = compare("x", "F16", (base, off), (base, bake))
        assert 0.98 < found.cosine < 0.9995
        assert not found.holds

    def test_what_one_side_does_not_tell_is_left_out(self):
        base, bake = self.draw(1), self.draw(2)
        partly = base.clone()
        partly[1, 7] = float("nan")
        assert compare("x", "F16", (partly, bake), (base, bake)).holds


def test_the_converter_gets_no_code_of_strangers(programs, baked, tmp_path):
    """llama.cpp's converter trusts remote code, so that nothing it is given may name any."""
    directory = baked()
    evil = "from pathlib import Path\nPath('ran').write_text('')\n"
    (directory / "evil.py").write_text(evil)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((directory / name).read_text())
        values["auto_map"] = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]}
        (directory / name).write_text(json.dumps(values))
    gguf(directory, output=tmp_path / "x.gguf", llama_cpp=programs())
    for given in ("base.gguf", "bake.gguf"):
        folder = tmp_path / "store" / given
        assert not list(folder.rglob("*.py"))
        for path in folder.glob("*.json"):
            assert "auto_map" not in path.read_text(), path.name
