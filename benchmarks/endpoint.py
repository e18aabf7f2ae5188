"""Whether `bake verify --endpoint` tells bake from base under quantisation, by llama.cpp's own server.

python benchmarks/endpoint.py MODEL LLAMA_CPP [FOLDER] [--words]

Bakes of several directions and strengths and their
base, in every kind of file, are served by llama-server and asked for the bake's forks, all of them once.
A trial is a draw of six of a bake's forks; 60 for each kind, by base and by bake.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import bake
from bake.checkpoint.checkpoint import open_checkpoint
from bake.engines.endpoint import ask_forks, decide, measure_share
from bake.engines.server import Server
from bake.llama_cpp.running import serving
from bake.llama_cpp.source import write_metadata, write_source
from bake.llama_cpp.tools import find_llama_cpp
from bake.pipeline.record import read_forks

KINDS = ("F16", "Q8_0", "Q4_K_M", "Q2_K")
BAKES = (
    ("formal-casual", 0.5),
    ("cheerful-gloomy", 1.0),
    ("confident-hedging", 1.0),
    ("concise-wordy", 0.5),
    ("first-third-person", 1.0),
)
TRIALS, DRAWN = 12, 6  # of each bake
LOGPROBS = (
    "--words" not in sys.argv
)  # else the words alone are counted, as of a server that tells no more


def main() -> None:
    model, checkout = sys.argv[1:3]
    work = Path(sys.argv[3] if len(sys.argv) > 3 else tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    tools = find_llama_cpp(checkout, quantises=True)
    directories = {"base": Path(model)}
    for pairs, strength in BAKES:
        directories[pairs] = work / pairs
        if not directories[pairs].is_dir():
            bake.export(model, pairs=pairs, multiplier=strength, output=directories[pairs])
    files: dict[tuple[str, str], Path] = {}
    for name, directory in directories.items():
        whole = work / f"{name}.gguf"
        if not whole.is_file():
            write_source(open_checkpoint(str(directory)), work / f"{name}-source")
            write_metadata({}, name, work / "metadata.json")
            tools.convert(work / f"{name}-source", whole, "f16", work / "metadata.json")
        for kind in KINDS:
            files[name, kind] = whole if kind == "F16" else work / f"{name}-{kind}.gguf"
            if not files[name, kind].is_file():
                tools.quantise(whole, files[name, kind], kind)
    for kind in KINDS:
        tallies: dict[str, Counter[str]] = {"base": Counter(), "baked": Counter()}
        told: dict[str, Counter[str]] = {"base": Counter(), "baked": Counter()}
        shares: dict[str, list[float]] = {"base": [], "baked": []}
        for name in (*dict(BAKES), "base"):
            with serving(tools.server, files[name, kind]) as url:
                for pairs in [name] if name != "base" else list(dict(BAKES)):
                    forks = read_forks(directories[pairs])
                    truth = "base" if name == "base" else "baked"
                    server = Server(url, "m", "--endpoint")
                    answers = ask_forks(server, forks, time.monotonic() + 300)
                    told[truth].update(answer.word for answer in answers)
                    pairs_of = list(zip(forks, answers, strict=True))
                    draw = random.Random(f"{pairs} {kind}")
                    for _ in range(TRIALS):
                        drawn = draw.sample(pairs_of, min(DRAWN, len(pairs_of)))
                        words = Counter(answer.word for _, answer in drawn)
                        votes = {word: words[word] for word in ("baked", "base", "other")}
                        asked, said = ([*each] for each in zip(*drawn, strict=True))
                        share = measure_share(asked, said) if LOGPROBS else None
                        tallies[truth][decide(votes, share)] += 1
                        if share is not None:
                            shares[truth].append(share.push)
        for truth, tally in tallies.items():
            total = sum(tally.values())
            forks_right = told[truth][truth] / sum(told[truth].values())
            wrong = total - tally[truth] - tally["neither"]
            print(
                f"{kind:7} {truth:5} right in {tally[truth]} of {total}, undecided in {tally['neither']}, "
                f"wrong in {wrong}; one fork is right in {forks_right:.0%}; of the push "
                + (
                    f"{min(shares[truth]):.2f} to {max(shares[truth]):.2f}"
                    if shares[truth]
                    else "unknown"
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
