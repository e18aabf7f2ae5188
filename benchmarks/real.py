"""What bake does on two small trained models: what auto chooses, what it costs, what it changes.

    make bench-real
    python benchmarks/real.py --models FOLDER --work FOLDER --page docs/real-models.md

Every cell is one `bake export MODEL --pairs SET` with no other option. The cost is what the proof measures
on texts that no part of the bake saw; the shift is that of all held-out pairs, beside eight random
directions of the same norm; the counted effect is in text that the written checkpoint samples. Cells are
kept under --work: the same command goes on after a break.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_models import make_models

from bake.anatomy.base import Base, load_base, open_base
from bake.api import export
from bake.errors import BakeError
from bake.io.shipped import OPENINGS, REQUESTS
from bake.models.forward import LanguageModel, load_model
from bake.models.generation import WORD, bootstrap_interval, sample_continuations
from bake.sweeps.arms import Arm
from bake.sweeps.controls import random_direction
from bake.sweeps.measurements import Sampling, Texts, encode_openings, measure_pairs
from bake.sweeps.summary import summarise
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts
from bake.texts.rendering import has_template

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
SEEDS, SAMPLES, TOKENS, TEMPERATURE = 8, 2, 40, 0.7

HEDGES = frozenset(
    [
        "may",
        "might",
        "could",
        "perhaps",
        "possibly",
        "probably",
        "maybe",
        "likely",
        "seem",
        "seems",
        "seemed",
        "often",
        "usually",
        "sometimes",
        "generally",
        "think",
        "believe",
        "guess",
        "suppose",
        "suggest",
        "suggests",
        "appear",
        "appears",
        "almost",
        "about",
        "around",
    ]
)
FIRST_PERSON = frozenset(
    [
        "i",
        "me",
        "my",
        "mine",
        "myself",
        "we",
        "us",
        "our",
        "ours",
        "ourselves",
        "i'm",
        "i've",
        "i'd",
        "i'll",
        "we're",
    ]
)


def per_word(counts: Callable[[str], bool]) -> Callable[[str], tuple[int, int]]:
    """Return what counts words of a kind in a text: (of that kind, all)."""

    def count(text: str) -> tuple[int, int]:
        words = [word.lower().replace("’", "'") for word in WORD.findall(text)]
        return sum(map(counts, words)), len(words)

    return count


def sentence_lengths(text: str) -> tuple[int, int]:
    """Return the words and the sentences of a text."""
    sentences = [part for part in re.split(r"[.!?\n]+", text) if part.strip()]
    return len(WORD.findall(text)), len(sentences)


@dataclass(frozen=True)
class Axis:
    """What is counted in sampled text, as a ratio, and which way the positive side moves it."""

    counted: str
    count: Callable[[str], tuple[int, int]]
    sign: int
    factor: float = 100.0
    unit: str = " %"


AXES = {
    "formal-casual": Axis("contractions, of all words", per_word(lambda word: "'" in word), -1),
    "concise-wordy": Axis("words a sentence", sentence_lengths, -1, 1.0, ""),
    "confident-hedging": Axis("hedges, of all words", per_word(HEDGES.__contains__), -1),
    "first-third-person": Axis(
        "first person pronouns, of all words", per_word(FIRST_PERSON.__contains__), 1
    ),
}


def main() -> None:
    """Measure every cell that is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("build/real-models"))
    parser.add_argument("--work", type=Path, default=Path("build/real"))
    parser.add_argument("--page", type=Path, default=Path("docs/real-models.md"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    cells = {}
    for name, directory in make_models(options.models).items():
        model = Model(directory)
        for axis in AXES:
            kept = options.work / f"{name}.{axis}.json"
            if not kept.exists():
                kept.write_text(json.dumps(model.measure(axis, options.work / f"{name}.{axis}")))
            cells[name, axis] = json.loads(kept.read_text())
            print(
                name, axis, json.dumps({k: v for k, v in cells[name, axis].items() if k != "texts"})
            )
    options.page.write_text(write_page(cells), encoding="utf-8")


class Model:
    """A base, opened once; loaded when it is first needed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base: Base = open_base(str(directory))
        self.loaded: LanguageModel = load_base(self.base)
        self.chats = has_template(self.base.tokenizer)
        self.openings = read_prompts(REQUESTS if self.chats else OPENINGS)[:32]
        self.written = self.write(self.loaded)

    def measure(self, axis: str, output: Path) -> dict[str, Any]:
        """Bake an axis and measure what came out; of an axis that is refused, why."""
        try:
            made = export(str(self.directory), pairs=axis, output=output, overwrite=True)
        except BakeError as error:
            return {"refused": str(error)}
        cost = made.equivalence.cost
        steered = self.write(load_model(output, dtype="float32"))
        return {
            "site": made.plan.route.site,
            "multiplier": made.push.multiplier,
            "reason": made.decision.choice.describe(),
            "kl_p95": cost.kl_p95,
            "top1_agreement": cost.top1_agreement,
            **self.compare_with_chance(axis, made),
            **count_effect(AXES[axis], self.written, steered),
            "texts": [
                {"opening": opening, "base": before, "baked": after}
                for opening, before, after in zip(
                    self.openings, self.written[::SAMPLES], steered[::SAMPLES], strict=True
                )
            ],
        }

    def compare_with_chance(self, axis: str, made: Any) -> dict[str, Any]:
        """Return the shift of all held-out pairs, its interval, and the largest of random directions."""
        pairs = tuple(read_pairs(f"{axis}.held-out"))
        push, site = made.push, made.plan.route.site
        layers = [entry.layer for entry in push.layers]
        arms = [
            Arm("base", "base"),
            Arm("push", "direction", push.multiplier, site, push=push.vectors),
        ]
        for seed in range(SEEDS):
            drawn = random_direction(made.direction, layers, push.hidden_size, seed)
            vectors = {
                entry.layer: drawn.layer(entry.layer) * entry.coefficient for entry in push.layers
            }
            arms.append(Arm(f"random {seed}", "random", push.multiplier, site, push=vectors))
        texts = Texts(pairs, (), ())
        measured = {"pairs": measure_pairs(self.loaded, arms, pairs)}
        points = summarise(arms, measured, self.base.tokenizer, texts, Sampling())
        shift, *chance = [point.shift for point in points[1:]]
        return {
            "shift": [shift.value, shift.low, shift.high],
            "gain": points[1].gain.value,
            "largest_random": max(abs(each.value) for each in chance),
        }

    def write(self, loaded: Any) -> list[str]:
        """Sample continuations of every opening; the noise is the same for every checkpoint."""
        tokenizer = self.base.tokenizer
        drawn = sample_continuations(
            loaded,
            encode_openings(tokenizer, self.openings, "auto"),
            new_tokens=TOKENS,
            samples=SAMPLES,
            temperature=TEMPERATURE,
            stop_token=tokenizer.eos_token_id,
        )
        return [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in drawn]


def count_effect(axis: Axis, base: Sequence[str], steered: Sequence[str]) -> dict[str, Any]:
    """Return what is counted in both, and the 95 % interval of the difference, over openings."""
    import numpy as np

    tables = []
    for texts in (base, steered):
        counts = np.array([axis.count(text) for text in texts], dtype=float)
        tables.append(counts.reshape(-1, SAMPLES, 2).sum(axis=1))

    def share(table: Any, rows: Any) -> float:
        top, bottom = table[rows].sum(axis=0)
        return float(axis.factor * top / bottom)

    def difference(rows: Any) -> float:
        return share(tables[1], rows) - share(tables[0], rows)

    low, high = bootstrap_interval(difference, len(tables[0]))
    everything = slice(None)
    return {
        "counted": [share(table, everything) for table in tables],
        "difference": [difference(everything), low, high],
        "excludes_base": axis.sign * (low if axis.sign > 0 else high) > 0,
    }


def write_page(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return the page."""
    lines = [PAGE]
    for name, title in NAMES.items():
        lines += [f"\n## {title}\n", HEADER]
        lines += [_row(axis, cells[name, axis]) for axis in AXES]
        for axis in AXES:
            cell = cells[name, axis]
            if "refused" in cell:
                continue
            lines += [f"\n### {axis}, m = {cell['multiplier']:g}\n"]
            lines += ["| opening | base | baked |", "|---|---|---|"]
            lines += [
                f"| {_cell(t['opening'])} | {_cell(t['base'])} | {_cell(t['baked'])} |"
                for t in cell["texts"][:3]
            ]
    return "\n".join(lines) + "\n"


PAGE = """# On real models

What `bake export MODEL --pairs SET`, with no other option, does to two small trained models. Written by
`make bench-real` (`benchmarks/real.py`), which makes the models itself, from packages on the Python index,
and needs no model hub.

KL is the 95th percentile of KL(base ‖ baked) in nats on texts that no part of the bake saw; above 1 text
comes apart. Shift is log p(positive) − log p(negative) of all 24 held-out pairs, in nats a token, less the
base's; beside it the largest of eight random directions of the same norm and coherence. The counted effect
is in 64 continuations of 32 openings (temperature 0.7, 40 tokens, the same noise), sampled from the written
checkpoint; brackets are 95 % bootstrap intervals. Samples are the first openings."""
HEADER = (
    "| pairs | site | m | KL | shift | largest random | counted | base | baked | difference |\n"
    "|---|---|---:|---:|---:|---:|---|---:|---:|---:|"
)


def _row(axis: str, cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return f"| {axis} | refused: {cell['refused']} | | | | | | | | |"
    about = AXES[axis]
    before, after = (f"{value:.3g}{about.unit}" for value in cell["counted"])
    return (
        f"| {axis} | {cell['site']} | {cell['multiplier']:g} | {cell['kl_p95']:.2f} "
        f"| {_interval(cell['shift'])} | {cell['largest_random']:.2f} | {about.counted} | {before} "
        f"| {after} | {_interval(cell['difference'])} |"
    )


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
