"""llama.cpp's programs: where they are, and running them so that what they say of a failure is told."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bake.errors import BakeError
from bake.support.progress import announce
from bake.support.text import one_line

CONVERTER, QUANTISER, SERVER = "convert_hf_to_gguf.py", "llama-quantize", "llama-server"
# Below a checkout, and below llama-cpp-python's unpacked source, which holds one.
_ROOTS = ("", "vendor/llama.cpp")
_FOLDERS = ("", "build/bin", "bin", "build/bin/Release")
REMEDY = "put llama.cpp's programs on PATH, or name a checkout in which it was built with --llama-cpp DIR"
_SAID = 3  # lines of a program that failed


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's programs. quantiser: None where nothing is to be quantised."""

    converter: Path
    server: Path
    quantiser: Path | None = None

    def convert(self, source: Path, output: Path, outtype: str, metadata: Path) -> None:
        """Write a checkpoint's directory as a GGUF file."""
        command: list[str | Path] = [sys.executable, self.converter, source, "--outfile", output]
        _run(
            [*command, "--outtype", outtype, "--metadata", metadata],
            CONVERTER,
            "convert it",
        )

    def quantise(self, source: Path, output: Path, kind: str) -> None:
        """Write a GGUF file quantised, as llama-quantize does it."""
        assert self.quantiser is not None
        _run([self.quantiser, source, output, kind], QUANTISER, f"write {kind}")


def find_llama_cpp(checkout: str | None, *, quantises: bool) -> LlamaCpp:
    """Find llama.cpp's programs: in a directory that the user names, or on PATH.

    Raises BakeError naming the program that is not there.
    """
    return LlamaCpp(
        _find(CONVERTER, checkout),
        _find(SERVER, checkout),
        _find(QUANTISER, checkout) if quantises else None,
    )


def _find(program: str, checkout: str | None) -> Path:
    if checkout is None:
        found = shutil.which(program)
        if found is None:
            raise BakeError(f"{program} is not on PATH: {REMEDY}")
        return Path(found)
    directory = Path(checkout).expanduser()
    if not directory.is_dir():
        raise BakeError(f"--llama-cpp {checkout} is no directory: {REMEDY}")
    for folder in (directory / root / place for root in _ROOTS for place in _FOLDERS):
        if (folder / program).is_file():
            return (folder / program).resolve()
    found = shutil.which(program)  # Built elsewhere and installed.
    if found is None:
        raise BakeError(f"{program} is neither in {checkout} nor on PATH: {REMEDY}")
    return Path(found)


def _run(command: Sequence[str | Path], program: str, task: str) -> None:
    announce(f"running {program}")
    # No token, no notebook's hooks: the converter needs files and nothing else.
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    }
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise BakeError(f"{program} could not {task}: {one_line(' / '.join(lines[-_SAID:]), 400)}")
