"""Whether `bake verify --endpoint` tells bake from base, by real servers and under quantisation.

    python benchmarks/endpoint.py MODEL FOLDER [--server NAME] [--python PATH] [--llama-cpp DIR] [--words]

Bakes of several directions and strengths and their base are served, in every kind of file that the server
takes, and asked for the bake's forks, all of them once. A trial is a draw of six of a bake's forks; 60 for
each kind, by base and by bake. FOLDER keeps bakes and files for the next run. --python: of an environment
with the server's package. --words: the words alone are counted, as of a server that tells no more.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "engines"))

from harness.servers import served  # noqa: E402

import bake  # noqa: E402
from bake.checkpoint.checkpoint import open_checkpoint  # noqa: E402
from bake.engines.endpoint import ask_forks, decide, measure_share  # noqa: E402
from bake.engines.server import Server  # noqa: E402
from bake.llama_cpp.running import serving  # noqa: E402
from bake.llama_cpp.source import write_metadata, write_source  # noqa: E402
from bake.llama_cpp.tools import find_llama_cpp  # noqa: E402
from bake.pipeline.record import read_forks  # noqa: E402

BAKES = (
    ("formal-casual", 0.5),
    ("cheerful-gloomy", 1.0),
    ("confident-hedging", 1.0),
    ("concise-wordy", 0.5),
    ("first-third-person", 1.0),
)
TRIALS, DRAWN = 12, 6  # of each bake
GGUF = ("F16", "Q8_0", "Q4_K_M", "Q2_K")
KINDS = {
    "llama-server": GGUF,
    "llama-cpp-python": GGUF,
    "mlx": ("as stored", "8 bits", "4 bits"),
    "vllm": ("as stored",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server", choices=KINDS, default="llama-server")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--llama-cpp")
    parser.add_argument("--words", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    directories = {"base": Path(asked.model)}
    for pairs, strength in BAKES:
        directories[pairs] = asked.folder / pairs
        if not directories[pairs].is_dir():
            bake.export(asked.model, pairs=pairs, multiplier=strength, output=directories[pairs])
    for kind in KINDS[asked.server]:
        tallies: dict[str, Counter[str]] = {"base": Counter(), "baked": Counter()}
        shares: dict[str, list[float]] = {"base": [], "baked": []}
        for name, directory in directories.items():
            truth = "base" if name == "base" else "baked"
            with _serve(asked, kind, name, directory) as (url, model):
                for pairs in [name] if name != "base" else list(dict(BAKES)):
                    forks = read_forks(directories[pairs])
                    server = Server(url, model, "--endpoint")
                    answers = ask_forks(server, forks, time.monotonic() + 300)
                    answered = list(zip(forks, answers, strict=True))
                    draw = random.Random(f"{pairs} {kind}")
                    for _ in range(TRIALS):
                        drawn = draw.sample(answered, min(DRAWN, len(answered)))
                        words = Counter(answer.word for _, answer in drawn)
                        votes = {word: words[word] for word in ("baked", "base", "other")}
                        some, said = ([*each] for each in zip(*drawn, strict=True))
                        share = None if asked.words else measure_share(some, said)
                        tallies[truth][decide(votes, share)] += 1
                        if share is not None:
                            shares[truth].append(share.push)
        for truth, tally in tallies.items():
            total = sum(tally.values())
            wrong = total - tally[truth] - tally["neither"]
            found = shares[truth]
            push = f"{min(found):.2f} to {max(found):.2f}" if found else "unknown"
            print(
                f"{asked.server} {kind:9} {truth:5} right in {tally[truth]} of {total}, undecided in "
                f"{tally['neither']}, wrong in {wrong}; of the push {push}",
                flush=True,
            )


@contextmanager
def _serve(
    asked: argparse.Namespace, kind: str, name: str, directory: Path
) -> Iterator[tuple[str, str]]:
    """Yield the address and what the server calls the model."""
    model = _file(asked, kind, name, directory)
    if asked.server == "llama-server":
        with serving(find_llama_cpp(asked.llama_cpp, quantises=False).server, model) as url:
            yield url, "m"
        return
    with served(asked.server, asked.python, model) as url:
        yield url, str(model)


def _file(asked: argparse.Namespace, kind: str, name: str, directory: Path) -> Path:
    """Return what is to be served, which is made where it is not there yet."""
    if kind == "as stored":
        return directory
    if asked.server == "mlx":
        small = asked.folder / f"{name}-mlx-{kind[0]}"
        if not small.is_dir():
            options = ["--hf-path", directory, "--mlx-path", small, "-q", "--q-bits", kind[0]]
            command = [asked.python, "-m", "mlx_lm.convert", *options]
            subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return small
    whole = asked.folder / f"{name}.gguf"
    tools = find_llama_cpp(asked.llama_cpp, quantises=True)
    if not whole.is_file():
        source, metadata = asked.folder / f"{name}-source", asked.folder / "metadata.json"
        write_source(open_checkpoint(str(directory)), source)
        write_metadata({}, name, metadata)
        tools.convert(source, whole, "f16", metadata)
    small = whole if kind == "F16" else asked.folder / f"{name}-{kind}.gguf"
    if not small.is_file():
        tools.quantise(whole, small, kind)
    return small


if __name__ == "__main__":
    main()
