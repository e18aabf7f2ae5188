"""`bake gguf`: a bake as a GGUF file that was run in llama.cpp, and what Ollama and LM Studio want."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.checkpoint import Checkpoint, find_bake, open_checkpoint
from bake.errors import BakeError, CheckpointError, EquivalenceError, OutputError
from bake.io.atomic import check_file, write_file
from bake.io.shipped import find_model
from bake.io.work_directory import scratch_directory
from bake.lifecycle.rescale import undo
from bake.llama_cpp.check import GgufCheck, compare, transformers_log_probabilities
from bake.llama_cpp.running import read_log_probabilities, serving
from bake.llama_cpp.source import write_metadata, write_source
from bake.llama_cpp.tools import LlamaCpp, find_llama_cpp
from bake.pipeline.record import read_any_result
from bake.support.progress import announce
from bake.support.text import one_line
from bake.texts.prompts import load_tokenizer, read_prompts

if TYPE_CHECKING:
    import torch

PROMPTS, LONGEST = 12, 24  # how many texts the files are compared on, and tokens of each


@dataclass(frozen=True)
class Gguf:
    """What was written. left_out: biases of zeros that llama.cpp has no place for."""

    output: str
    kind: str
    left_out: int
    size: int
    modelfile: str
    lm_studio: str
    check: GgufCheck

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": self.output,
            "kind": self.kind,
            "left_out": self.left_out,
            "size": self.size,
            "modelfile": self.modelfile,
            "lm_studio": self.lm_studio,
            "check": self.check.to_dict(),
        }

    def describe(self) -> str:
        """Return what a person reads."""
        name = Path(self.output).stem
        return "\n".join(
            (
                self.check.describe(),
                f"written to {self.output} ({self.size / 1e6:.3g} MB)",
                "",
                f"llama-server -m {self.output}",
                f"ollama create {name.lower()} -f {self.modelfile}",
                f"LM Studio: copy what is in {self.lm_studio} into its models folder",
            )
        )


def make_gguf(
    model: str,
    output: Path,
    *,
    quantise: str | None = None,
    base: str | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    llama_cpp: str | None = None,
    overwrite: bool = False,
) -> Gguf:
    """Write a bake as a GGUF file, after base and bake were run in llama.cpp beside transformers.

    model: a bake's directory or Hub id. base: what it was made of, where the bake alone cannot tell.
    quantise: one of llama-quantize's kinds. Raises BakeError where llama.cpp or a part of it is not there
    or does not take the model, CheckpointError for a bake or base that cannot be read, EquivalenceError
    where the file does not steer as the bake does; nothing is written then.
    """
    if output.suffix != ".gguf":
        raise OutputError(f"{output} does not end in .gguf, by which programs know such files")
    check_file(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output} is there already; give another path, or --overwrite")
    tools = find_llama_cpp(llama_cpp, quantises=quantise is not None)
    directory = find_bake(find_model(model), revision)
    recorded = read_any_result(directory)
    baked = open_checkpoint(str(directory))
    kind = quantise or _kind_of(baked)
    output.parent.mkdir(parents=True, exist_ok=True)
    with (
        scratch_directory(output, "bake-gguf-") as work,
        _base_of(model, revision, base, base_revision, work) as original,
    ):
        prompts, harmless = _prompts(directory)
        announce("transformers: base and bake")
        there = tuple(
            transformers_log_probabilities(each.directory, prompts) for each in (original, baked)
        )
        files, left_out = [], 0
        for name, checkpoint in (("base", original), ("bake", baked)):
            left_out = write_source(checkpoint, work / name)
            files.append(_convert(tools, work, name, recorded, output.stem, quantise))
            shutil.rmtree(work / name)
        here = tuple(_run(tools, file, prompts, there[0].shape[-1], harmless) for file in files)
        check = compare(output.name, kind, (here[0], here[1]), (there[0], there[1]))
        if not check.holds:
            raise EquivalenceError(
                f"{check.describe()}: {_blame(check)}, so {output} is not written"
            )
        files[1].replace(output)
    modelfile = output.with_suffix(".Modelfile")
    write_file(modelfile, f"FROM ./{output.name}\n".encode())
    return Gguf(
        str(output),
        kind,
        left_out,
        output.stat().st_size,
        str(modelfile),
        str(_lay_out(output, recorded)),
        check,
    )


def _blame(check: GgufCheck) -> str:
    if check.kl_base > 0.05 and not check.quantised:
        return "llama.cpp computes another model already for the base, whatever was baked into it"
    if check.effect <= 1e-6:
        return "the push is gone"
    return "that is not the push"


def _kind_of(checkpoint: Checkpoint) -> str:
    """Return what the converter's `auto` makes of it: 16 bits, or 32 where the weights have them."""
    stored = {entry.dtype for entry in checkpoint.tensors.values() if len(entry.shape) > 1}
    return "F32" if stored == {"F32"} else "F16" if "F16" in stored else "BF16"


@contextmanager
def _base_of(
    model: str, revision: str | None, base: str | None, base_revision: str | None, work: Path
) -> Iterator[Checkpoint]:
    """Yield the base: as given, or written from the bake alone."""
    if base is not None:
        yield open_checkpoint(find_model(base), revision=base_revision)
        return
    try:
        undo(model, work / "undone", revision=revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"what was pushed or taken out cannot be told from the bake alone ({one_line(error)}): give "
            "its base with --base"
        ) from None
    try:
        yield open_checkpoint(str(work / "undone"))
    finally:
        shutil.rmtree(work / "undone")


def _prompts(directory: Path) -> tuple[list[list[int]], int]:
    """Return the token ids that base and bake are compared on, and a token that is a letter."""
    tokenizer = load_tokenizer(directory)
    texts = [text for text in read_prompts("neutral") if len(text) > 40]
    chosen = texts[:: max(1, len(texts) // PROMPTS)][:PROMPTS]
    ids = [list(tokenizer(text)["input_ids"])[:LONGEST] for text in chosen]
    return ids, int(tokenizer("a")["input_ids"][-1])


def _convert(
    tools: LlamaCpp, work: Path, name: str, recorded: Any, title: str, quantise: str | None
) -> Path:
    metadata = work / f"{name}.json"
    write_metadata(recorded if name == "bake" else {}, title if name == "bake" else name, metadata)
    whole = work / f"{name}.gguf"
    outtype = {"F32": "f32"}.get(_kind_of(open_checkpoint(str(work / name))), "auto")
    tools.convert(work / name, whole, outtype, metadata)
    if quantise is None:
        return whole
    small = work / f"{name}-{quantise}.gguf"
    tools.quantise(whole, small, quantise)
    whole.unlink()
    return small


def _run(
    tools: LlamaCpp,
    file: Path,
    prompts: Sequence[Sequence[int]],
    vocabulary: int,
    harmless: int,
) -> torch.Tensor:
    announce(f"llama.cpp: {file.name}")
    with serving(tools.server, file) as url:
        return read_log_probabilities(url, prompts, vocabulary, harmless)


def _lay_out(output: Path, recorded: Any) -> Path:
    """Put the file where LM Studio looks, publisher/model/file, without taking its room twice."""
    publisher = str((recorded.get("base") or {}).get("id") or "bake").partition("/")[0]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in publisher)
    root = output.parent / "lm-studio"
    folder = root / (name.strip(".") or "bake") / f"{output.stem}-GGUF"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / output.name
    target.unlink(missing_ok=True)
    try:
        os.link(output, target)
    except OSError:
        try:
            shutil.copyfile(output, target)
        except OSError as error:
            raise BakeError(f"{target} cannot be written: {error.strerror or error}") from None
    return root
