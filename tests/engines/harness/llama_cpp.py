"""Runs cases in llama.cpp, as `bake gguf` does it: its own converter, zero biases left out, its own server.

The cases are others than `run.py`'s in their vocabulary: the converter has to know the tokenizer. They take
room, so one family is written, run and deleted before the next.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from bake.checkpoint.checkpoint import open_checkpoint
from bake.errors import BakeError
from bake.llama_cpp.running import read_log_probabilities, serving
from bake.llama_cpp.source import write_source
from bake.llama_cpp.tools import LlamaCpp, find_llama_cpp

from .cases import FAMILIES, IDS, write_cases
from .judge import Row, judge

_NEEDS_A_GEMMA_S = "gemma4_text"  # tokenizer: the converter takes no other


def run(
    llama_cpp: str, models: Path, work: Path, date: str, families: Mapping[str, Any] = FAMILIES
) -> Iterator[Row]:
    """Yield the rows of every case, family by family.

    llama_cpp: a checkout in which it was built. models: where the two real models are, whose tokenizers it
    knows.
    """
    tools = find_llama_cpp(llama_cpp, quantises=False)
    work.mkdir(parents=True, exist_ok=True)
    converter = _Converter(tools, work)
    for family, special in families.items():
        cases, output = work / "cases", work / "output"
        own = family == _NEEDS_A_GEMMA_S
        known = AutoTokenizer.from_pretrained(
            models / ("gemma3" if own else "smollm2"), trust_remote_code=False
        )
        if not own:
            known.add_tokens(["<|user|>", "<|observation|>", "[gMASK]", "<sop>"])  # Of every GLM.
        write_cases(cases, {family: special}, {"vocab_size": len(known)})
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        (output / "version").write_text(_version(tools), encoding="utf-8")
        told = _fewer(json.loads((cases / "cases.json").read_text(encoding="utf-8")))
        (cases / "cases.json").write_text(json.dumps(told), encoding="utf-8")
        for name in dict.fromkeys(name for case in told for name in (case["base"], case["name"])):
            known.save_pretrained(cases / name)
            if family.startswith(("gemma", "nemotron")) and not own:
                write_sentencepiece(cases / name)
            _run_one(tools, converter, cases / name, output, len(known), work)
        yield from judge("llama.cpp", cases, output, date)
    converter.close()
    shutil.rmtree(work)


def _version(tools: LlamaCpp) -> str:
    """Return llama.cpp's commit, or its package's version where it was built outside a repository."""
    done = subprocess.run(
        [tools.server, "--version"], capture_output=True, text=True, check=False, timeout=60
    )
    said = done.stdout + done.stderr
    found = re.search(r"commit (\w+)", said) or re.search(r"version: (\S+)", said)
    return found[1] if found else "unknown"


def _fewer(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keep of the bakes as transformers 5 spells them every host's and one more: each takes ten seconds."""
    kept, seen = [], set()
    for case in cases:
        first = case["family"] not in seen
        if case["spelling"] != "rope_parameters" or case["host"] or first:
            kept.append(case)
        if case["spelling"] == "rope_parameters" and not case["host"]:
            seen.add(case["family"])
    return kept


# Converts what each line names: the converter imports torch, which would cost seconds a file.
_CONVERT = """
import json, os, runpy, sys
converter = sys.argv[1]
sys.path.insert(0, os.path.dirname(converter))
for line in sys.stdin:
    source, file, metadata = json.loads(line)
    sys.argv = [converter, source, "--outfile", file, "--outtype", "f32", "--metadata", metadata]
    try:
        runpy.run_path(converter, run_name="__main__")
        said = ""
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}" if getattr(error, "code", 1) else ""
    print("DONE", json.dumps(said), flush=True)
"""


class _Converter:
    """llama.cpp's converter in a process of its own, which stays."""

    def __init__(self, tools: LlamaCpp, work: Path) -> None:
        self.metadata = work / "metadata.json"
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(tools.converter)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def convert(self, source: Path, file: Path) -> None:
        """Write a checkpoint as a GGUF file in 32 bits; raise BakeError with the converter's words."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.metadata.write_text("{}", encoding="utf-8")
        line = json.dumps([str(source), str(file), str(self.metadata)])
        print(line, file=self.process.stdin, flush=True)
        for answer in self.process.stdout:
            if answer.startswith("DONE "):
                if said := json.loads(answer.removeprefix("DONE ")):
                    raise BakeError(f"the converter refuses it: {said}")
                return
        raise BakeError("the converter's process ended")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _run_one(
    tools: LlamaCpp, converter: _Converter, case: Path, output: Path, vocabulary: int, work: Path
) -> None:
    source, file = work / "source", work / "case.gguf"
    shutil.rmtree(source, ignore_errors=True)
    asked = (1, 3, 6)  # Beginnings: each answer is the whole vocabulary in JSON.
    prompts = [IDS[: last + 1] for last in asked]
    try:
        write_source(open_checkpoint(str(case)), source)
        _pose(source)
        converter.convert(source, file)
        with serving(tools.server, file) as url:
            found = read_log_probabilities(url, prompts, vocabulary, harmless=100)
    except BakeError as error:
        (output / f"{case.name}.error").write_text(str(error), encoding="utf-8")
        return
    rows = np.full((len(IDS) - 1, vocabulary), np.nan)
    rows[list(asked)] = found.numpy()
    np.save(output / f"{case.name}.npy", rows)


def _pose(directory: Path) -> None:
    """Let a Qwen 2's tokenizer be read as its files say; the converter goes by `architectures`."""
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["model_type"] == "qwen2":
        path.write_text(json.dumps({**values, "model_type": "llama"}), encoding="utf-8")


def write_sentencepiece(directory: Path) -> None:
    """Write the tokenizer as SentencePiece's model, which the converter wants of some."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    told = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = sorted(told["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {entry["content"] for entry in told["added_tokens"] if entry.get("special")}
    ids = told["model"]["vocab"]
    model = proto.ModelProto()
    trained, normal = model.trainer_spec, model.normalizer_spec
    trained.model_type, trained.vocab_size, trained.byte_fallback = 2, len(pieces), "<0x00>" in ids
    trained.bos_id, trained.eos_id = ids.get("<bos>", 1), ids.get("<eos>", 2)
    trained.unk_id = ids.get("<unk>", 3)
    normal.name, normal.add_dummy_prefix, normal.remove_extra_whitespaces = "identity", False, False
    for number, (text, _) in enumerate(pieces):
        piece = model.pieces.add()
        piece.piece, piece.score = text, -float(number)
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        piece.type = 2 if number == trained.unk_id else 6 if byte else 3 if text in special else 1
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
