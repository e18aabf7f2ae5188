"""What bake does on two small trained models: what auto chooses, what it costs, what it changes.

    make bench-real
    python benchmarks/real.py --models FOLDER --work FOLDER --page docs/real-models.md

Every cell is one `bake export MODEL --pairs SET` with no other option, then what the written checkpoint
does, and comparisons on the same model. Cells are kept under --work: the same command goes on after a
break.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from real_models import make_models

from bake.anatomy.base import Base, load_base, open_base
from bake.api import export, sweep
from bake.card.figures import draw_norms
from bake.errors import BakeError
from bake.io.shipped import OPENINGS, REQUESTS
from bake.models.forward import LanguageModel, load_model
from bake.models.generation import WORD, bootstrap_interval, sample_continuations
from bake.strength.norms import measure_norms
from bake.sweeps.arms import Arm
from bake.sweeps.controls import random_direction
from bake.sweeps.measured_law import follow_measured_law
from bake.sweeps.measurements import Sampling, Texts, encode_openings, measure_pairs
from bake.sweeps.summary import pair_gaps, summarise
from bake.texts.pairs import read_pairs
from bake.texts.prompts import read_prompts
from bake.texts.rendering import has_template
from bake.tuning.bench import Bench
from bake.tuning.candidates import Candidate

NAMES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma 3 270M"}
SEEDS, SAMPLES, TOKENS, TEMPERATURE = 8, 2, 40, 0.7
DOSES = (0.5, 1.0, 2.0)  # × the multiplier that auto chose
SINGLES = 4  # layers of the band that are tried by themselves

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
    figures = options.page.parent / "figures"
    figures.mkdir(exist_ok=True)
    cells = {}
    for name, directory in make_models(options.models).items():
        model = Model(directory)
        model.draw_norms(figures / f"{name}-norms.png")
        for axis in AXES:
            work = options.work / f"{name}.{axis}"
            kept = work.with_name(f"{work.name}.json")
            if not kept.exists():
                kept.write_text(json.dumps(model.measure(axis, work)))
            drawn = work.with_name(f"{work.name}.sweep") / "figures" / "dose-response.png"
            if drawn.exists():
                shutil.copy(drawn, figures / f"{name}-{axis}.png")
            cells[name, axis] = json.loads(kept.read_text())
            shown = {key: value for key, value in cells[name, axis].items() if key != "texts"}
            print(name, axis, json.dumps(shown), flush=True)
    options.page.write_text(write_page(cells), encoding="utf-8")


class Model:
    """A base, opened once, with what it writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base: Base = open_base(str(directory))
        self.loaded: LanguageModel = load_base(self.base)
        self.chats = has_template(self.base.tokenizer)
        self.openings = read_prompts(REQUESTS if self.chats else OPENINGS)[:32]
        self.neutral = read_prompts("neutral")

    def draw_norms(self, path: Path) -> None:
        """Draw the norms of every layer, and the coefficients of the default band at m = 1."""
        if path.exists():
            return
        layers = list(range(self.base.anatomy.layer_count))
        batches = self.loaded.batches(self.neutral)
        norms = measure_norms(self.loaded, "mlp_out", batches, layers).values()
        size = self.loaded.hidden_size
        band = layers[int(0.4 * len(layers)) : int(0.9 * len(layers))]
        draw_norms(path, norms, {layer: norms[layer] / size**0.5 for layer in band}, "mlp_out")

    def measure(self, axis: str, output: Path) -> dict[str, Any]:
        """Bake an axis and measure what came out; of an axis that is refused, why."""
        try:
            made = export(str(self.directory), pairs=axis, output=output, overwrite=True)
        except BakeError as error:
            return {"refused": str(error)}
        pairs = tuple(read_pairs(f"{axis}.held-out"))
        related = [pair.prompt.strip() for pair in pairs]
        steered = load_model(output, dtype="float32")
        openings = {"related": related, "unrelated": self.openings}
        written = {
            kind: [self.write(loaded, texts) for loaded in (self.loaded, steered)]
            for kind, texts in openings.items()
        }
        del steered
        cost = made.equivalence.cost
        return {
            "site": made.plan.route.site,
            "multiplier": made.push.multiplier,
            "reason": made.decision.choice.describe(),
            "kl_p95": cost.kl_p95,
            "top1_agreement": cost.top1_agreement,
            **self.compare_with_chance(made, pairs),
            "counted": {kind: count_effect(AXES[axis], *texts) for kind, texts in written.items()},
            "doses": self.sweep(made, axis, output),
            "laws": self.compare_laws(made, pairs),
            "texts": [
                {"opening": opening, "base": base, "baked": baked}
                for kind, texts in openings.items()
                for opening, base, baked in zip(
                    texts, written[kind][0][::SAMPLES], written[kind][1][::SAMPLES], strict=True
                )
            ],
        }

    def compare_with_chance(self, made: Any, pairs: tuple[Any, ...]) -> dict[str, Any]:
        """Return the shift of all held-out pairs, its interval, and the largest of random directions."""
        push, site = made.push, made.plan.route.site
        layers = [entry.layer for entry in push.layers]
        arms = [
            Arm("base", "base"),
            Arm("push", "direction", push.multiplier, site, push=push.vectors),
            Arm(
                "last",
                "direction",
                push.multiplier,
                site,
                injection="last-token",
                push=push.vectors,
            ),
        ]
        for seed in range(SEEDS):
            drawn = random_direction(made.direction, layers, push.hidden_size, seed)
            vectors = {
                entry.layer: drawn.layer(entry.layer) * entry.coefficient for entry in push.layers
            }
            arms.append(Arm(f"random {seed}", "random", push.multiplier, site, push=vectors))
        measured = {"pairs": measure_pairs(self.loaded, arms, pairs)}
        texts = Texts(pairs, (), ())
        points = summarise(arms, measured, self.base.tokenizer, texts, Sampling())
        shift, last, *chance = [point.shift for point in points[1:]]
        return {
            "shift": [shift.value, shift.low, shift.high],
            "last_token": [last.value, last.low, last.high],
            "gain": points[1].gain.value,
            "largest_random": max(abs(each.value) for each in chance),
        }

    def sweep(self, made: Any, axis: str, output: Path) -> list[dict[str, Any]]:
        """Sweep the direction around the chosen multiplier; return the figures of every arm but samples."""
        neutral = output.with_name(f"{output.name}.neutral.txt")
        neutral.write_text("\n".join(self.neutral[8:20]))
        openings = output.with_name(f"{output.name}.openings.txt")
        openings.write_text("\n".join(self.openings[:8]))
        judging = output.with_name(f"{output.name}.pairs.jsonl")
        source = Path("calibration/pairs") / f"{axis}.held-out.jsonl"
        judging.write_text("".join(source.read_text().splitlines(keepends=True)[12:]))
        found = sweep(
            str(self.directory),
            direction=made.direction,
            sites=(made.plan.route.site,),
            multipliers=tuple(float(f"{made.push.multiplier * dose:.2g}") for dose in DOSES),
            output=output.with_name(f"{output.name}.sweep"),
            pairs=judging,
            neutral=neutral,
            openings=openings,
            control_seeds=4,
            samples=1,
            new_tokens=24,
        )
        return [point.to_dict() for point in found.found.points]

    def compare_laws(self, made: Any, pairs: tuple[Any, ...]) -> dict[str, Any]:
        """Bring laws to one cost; return what each moves, on pairs and texts that chose nothing."""
        site, push = made.plan.route.site, made.push
        layers = tuple(entry.layer for entry in push.layers)
        choosing = Texts(pairs[:12], tuple(self.neutral[:8]), ())
        judging = Texts(pairs[12:], tuple(self.neutral[8:20]), ())
        unit = push.at(1.0)
        measured = follow_measured_law(self.loaded, site, unit, choosing)

        def push_of(candidate: Candidate) -> Any:
            if candidate.law == "measured":
                return measured
            kept = tuple(entry for entry in unit.layers if entry.layer in candidate.layers)
            return replace(unit, law=candidate.law, layers=kept).at(1.0)

        bench = Bench(self.loaded, push_of, target=0.7, usual=len(layers))
        step = max(1, len(layers) // SINGLES)
        singles = [Candidate(site, "mean", "last", (layer,)) for layer in layers[::step]]
        best = bench.compare("choosing", singles, choosing)[0].candidate
        laws = ("inverse-sqrt-d", "flat", "measured")
        candidates = [Candidate(site, "mean", "last", layers, law) for law in laws] + [best]
        found = {each.candidate: each for each in bench.compare("judging", candidates, judging)}
        arms = [bench.arm(each, bench.sizes[each]) for each in candidates]
        scored = measure_pairs(self.loaded, arms, judging.pairs)
        base = pair_gaps(measure_pairs(self.loaded, [Arm("base", "base")], judging.pairs)["base"])
        # Costs agree to 5 %; the shift grows with the root of the cost.
        gaps = [
            (pair_gaps(scored[arm.name]) - base) * (bench.target / found[each].kl) ** 0.5
            for arm, each in zip(arms, candidates, strict=True)
        ]
        return {
            "active": sum(entry.coefficient > 0 for entry in measured.layers),
            "laws": {
                candidate.name: {
                    "kl": found[candidate].kl,
                    "shift": _mean_interval(gap),
                    "less": _mean_interval(gap - gaps[0]),
                }
                for candidate, gap in zip(candidates, gaps, strict=True)
            },
        }

    def write(self, loaded: Any, openings: Sequence[str]) -> list[str]:
        """Sample continuations of every opening; the noise is the same for every checkpoint."""
        tokenizer = self.base.tokenizer
        drawn = sample_continuations(
            loaded,
            encode_openings(tokenizer, openings, "auto"),
            new_tokens=TOKENS,
            samples=SAMPLES,
            temperature=TEMPERATURE,
            stop_token=tokenizer.eos_token_id,
        )
        return [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in drawn]


def _mean_interval(values: Any) -> list[float]:
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), len(values))
    return [float(values.mean()), low, high]


def count_effect(axis: Axis, base: Sequence[str], steered: Sequence[str]) -> dict[str, Any]:
    """Return what is counted in both, and the 95 % interval of the difference, over openings."""
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
        "values": [share(table, everything) for table in tables],
        "difference": [difference(everything), low, high],
        "excludes_base": axis.sign * (low if axis.sign > 0 else high) > 0,
    }


def write_page(cells: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """Return the page."""
    lines = [PAGE]
    for name, title in NAMES.items():
        baked = {axis: cells[name, axis] for axis in AXES if "refused" not in cells[name, axis]}
        lines += [f"\n## {title}\n", EXPORTED]
        lines += [_row(axis, cells[name, axis]) for axis in AXES]
        lines += ["\n### Dose and response\n", DOSED]
        for axis, cell in baked.items():
            lines += _doses(axis, cell["doses"])
        lines += [f"\n![{axis}](figures/{name}-{axis}.png)" for axis in baked]
        lines += ["\n### Laws at one cost\n", JUDGED]
        lines += [_laws(axis, cell["laws"]) for axis, cell in baked.items()]
        lines += ["\n### Activation norms\n", f"![Norms over depth](figures/{name}-norms.png)"]
        lines += [
            "\n### What it writes\n",
            "| pairs | opening | base | baked |",
            "|---|---|---|---|",
        ]
        for axis, cell in baked.items():
            texts = cell["texts"]
            unrelated = len(texts) - 32
            for text in (texts[0], texts[1], texts[unrelated]):
                shown = (text["opening"], text["base"], text["baked"])
                lines.append(f"| {axis} | {' | '.join(map(_cell, shown))} |")
    return "\n".join(lines) + "\n"


PAGE = """# On real models

What `bake export MODEL --pairs SET`, with no other option, does to two small trained models. Written by
`make bench-real` (`benchmarks/real.py`), which makes the models itself, from packages on the Python
index, and needs no model hub.

KL is the 95th percentile of KL(base ‖ baked) in nats on texts that no part of the bake saw; above 1
text comes apart. Shift is log p(positive) − log p(negative) of all 24 held-out pairs, in nats a token,
less the base's; beside it the largest of eight random directions of the same norm and coherence, and
the shift of the same push at the prompt's last token alone, which no weights can do. Counted is text
sampled from the written checkpoint (temperature 0.7, 40 tokens, twice an opening, the same noise for
base and bake): related openings are the prompts of the held-out pairs, unrelated ones the 32 that ship.
Brackets are 95 % bootstrap intervals over openings or pairs.

Dose and response is a sweep on 12 of the held-out pairs and 12 neutral texts, at half, once and twice
the multiplier that was chosen; random is the largest of four random directions. Laws are brought to KL
0.7 on 12 neutral texts that chose nothing and judged on the 12 held-out pairs that chose nothing;
columns are what each moves beyond `inverse-sqrt-d`, paired by pair, scaled to the same cost; the single
layer is the best of a few."""
EXPORTED = (
    "| pairs | site | m | KL | shift | random | last token | counted | related: base | baked | "
    "difference | unrelated: difference |\n|---|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|"
)
DOSED = (
    "| pairs | m | shift | random | KL | KL of random | perplexity of its text, × base |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)
JUDGED = (
    "| pairs | `inverse-sqrt-d` | `flat` | `measured` | its layers | one layer |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def _row(axis: str, cell: Mapping[str, Any]) -> str:
    if "refused" in cell:
        return f"| {axis} | refused: {cell['refused']} |" + " |" * 10
    about = AXES[axis]
    related, unrelated = cell["counted"]["related"], cell["counted"]["unrelated"]
    before, after = (f"{value:.3g}{about.unit}" for value in related["values"])
    return (
        f"| {axis} | {cell['site']} | {cell['multiplier']:g} | {cell['kl_p95']:.2f} "
        f"| {_interval(cell['shift'])} | {cell['largest_random']:.2f} | {cell['last_token'][0]:+.2f} "
        f"| {about.counted} | {before} | {after} | {_interval(related['difference'])} "
        f"| {_interval(unrelated['difference'])} |"
    )


def _doses(axis: str, points: Sequence[Mapping[str, Any]]) -> list[str]:
    chance = [point for point in points if point["kind"] == "random"]
    lines = []
    for point in points:
        if point["kind"] != "direction":
            continue
        same = [other for other in chance if other["multiplier"] == point["multiplier"]]
        shift = [point["shift"][key] for key in ("value", "low", "high")]
        largest = max(abs(other["shift"]["value"]) for other in same)
        costs = max(other["neutral_kl"]["p95"]["value"] for other in same)
        lines.append(
            f"| {axis} | {point['multiplier']:g} | {_interval(shift)} | {largest:.2f} "
            f"| {point['neutral_kl']['p95']['value']:.2f} | {costs:.2f} "
            f"| {point['fluency_ratio']['value']:.2f} |"
        )
    return lines


def _laws(axis: str, found: Mapping[str, Any]) -> str:
    first, flat, measured, single = found["laws"].values()
    layer = list(found["laws"])[-1].split(", ")[2]
    return (
        f"| {axis} | {_interval(first['shift'])} | {_interval(flat['less'])} "
        f"| {_interval(measured['less'])} | {found['active']} | {layer}: {_interval(single['less'])} |"
    )


def _interval(values: Sequence[float]) -> str:
    value, low, high = values
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
