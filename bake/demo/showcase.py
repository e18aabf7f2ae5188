"""`bake demo`: the whole pipeline on the shipped model, and what it did to sampled text, counted.

Two bakes, +1 and −1, of the direction from the shipped contrast pairs; then base and both bakes
continue the same held-out openings with the same sampling noise. What is loaded are the written
checkpoints, not hooked models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.checkpoint.loading import single_thread
from bake.io.shipped import DEMO_DIRECTION, DEMO_MODEL, DEMO_NAME, find_set
from bake.io.work_directory import temporary_directory
from bake.models.forward import LoadedModel, load_model
from bake.models.generation import (
    Tokens,
    bootstrap_interval,
    count_words,
    sample_continuations,
    score_continuations,
)
from bake.pipeline import export as pipeline
from bake.pipeline.recipe import Recipe
from bake.report import describe_export, describe_proven, format_table
from bake.support.progress import announce
from bake.support.timing import Stopwatch, peak_memory
from bake.texts.prompts import encode, load_tokenizer, read_prompts, read_words
from bake.texts.protocols import Tokenizer

if TYPE_CHECKING:
    import numpy as np

MULTIPLIERS = (1.0, -1.0)
SAMPLES, NEW_TOKENS, SEED = 3, 40, 0
WORDS, OPENINGS = "cheerful", "openings"
SHOWN = 3


@dataclass(frozen=True)
class Measured:
    """One model's sampled text: target words and perplexity under the base, relative to the base.

    Ratios come with 95 % bootstrap intervals over openings, paired with the base's text.
    """

    name: str
    continuations: int
    target_share: float
    target_ratio: float
    target_interval: tuple[float, float]
    perplexity: float
    perplexity_ratio: float
    perplexity_interval: tuple[float, float]


@dataclass(frozen=True)
class Showcase:
    """What `bake demo` shows. `texts` are (opening, {model name: continuation})."""

    exports: tuple[pipeline.Export, ...]
    measured: tuple[Measured, ...]
    texts: tuple[tuple[str, dict[str, str]], ...]
    timings: dict[str, float]
    output: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output) if self.output else None,
            "exports": [result.to_dict() for result in self.exports],
            "measured": [asdict(entry) for entry in self.measured],
            "texts": [{"opening": opening, **texts} for opening, texts in self.texts],
            "timings": self.timings,
            "peak_memory": peak_memory(),
        }


def run(output: Path | None = None, overwrite: bool = False) -> Showcase:
    """Bake the shipped direction at +1 and −1 and measure what it does; see the module's text."""
    clock = Stopwatch()
    with _workplace(output) as folder, single_thread():
        exports = []
        for multiplier in MULTIPLIERS:
            announce(f"baking {DEMO_NAME} at m = {multiplier:+g}")
            recipe = Recipe(
                model=DEMO_NAME,
                direction=str(DEMO_DIRECTION),
                output=str(folder / f"demo{multiplier:+g}"),
                multiplier=multiplier,
                overwrite=overwrite,
            )
            with clock.stage(f"export {multiplier:+g}"):
                exports.append(pipeline.export(recipe))
        announce("sampling continuations of held-out openings from base, +1 and -1")
        with clock.stage("sample"):
            measured, texts = measure(
                {"base": DEMO_MODEL, **{f"{e.push.multiplier:+g}": e.output for e in exports}}
            )
    return Showcase(tuple(exports), measured, texts, clock.seconds, output)


@contextmanager
def _workplace(output: Path | None) -> Iterator[Path]:
    if output is not None:
        yield output
        return
    with temporary_directory("bake-demo-") as folder:
        yield folder


def measure(
    models: dict[str, Path],
) -> tuple[tuple[Measured, ...], tuple[tuple[str, dict[str, str]], ...]]:
    """Sample from every model (the first is the base) and compare with the base, paired."""
    loaded = {name: load_model(directory) for name, directory in models.items()}
    drawn = sample(loaded)
    counts = count(drawn, next(iter(loaded.values())))
    base = next(iter(counts.values()))
    measured = tuple(compare(name, found, base) for name, found in counts.items())
    tokenizer, openings = load_tokenizer(DEMO_MODEL), read_prompts(OPENINGS)
    texts = tuple(
        (
            openings[index],
            {name: tokenizer.decode(list(found[index * SAMPLES])) for name, found in drawn.items()},
        )
        for index in range(SHOWN)
    )
    return measured, texts


def sample(models: Mapping[str, LoadedModel]) -> dict[str, list[Tokens]]:
    """Return {name: continuations of the shipped openings}, SAMPLES of each, with one noise for all."""
    tokenizer = load_tokenizer(DEMO_MODEL)
    return {
        name: sample_continuations(
            loaded,
            _opening_tokens(tokenizer),
            new_tokens=NEW_TOKENS,
            samples=SAMPLES,
            seed=SEED,
            stop_token=tokenizer.eos_token_id,
        )
        for name, loaded in models.items()
    }


def count(drawn: Mapping[str, Sequence[Tokens]], judge: LoadedModel) -> dict[str, Counts]:
    """Count target words, and score every continuation under `judge`, the unsteered base."""
    tokenizer = load_tokenizer(DEMO_MODEL)
    prompts = [prompt for prompt in _opening_tokens(tokenizer) for _ in range(SAMPLES)]
    return {
        name: Counts.of(tokenizer, found, score_continuations(judge, prompts, found))
        for name, found in drawn.items()
    }


def _opening_tokens(tokenizer: Tokenizer) -> list[Tokens]:
    encoded = encode(tokenizer, read_prompts(OPENINGS))
    return [_without_end(text.ids, tokenizer.eos_token_id) for text in encoded]


def _without_end(ids: Tokens, end: int | None) -> Tokens:
    return ids[:-1] if ids and ids[-1] == end else ids


@dataclass(frozen=True)
class Counts:
    """Per opening: target words, words, nats and tokens of its continuations; (openings,) each."""

    targets: np.ndarray
    words: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray
    continuations: int

    @staticmethod
    def of(tokenizer: Tokenizer, continuations: Sequence[Tokens], nats: Sequence[float]) -> Counts:
        import numpy as np

        path = find_set(WORDS, "words")
        assert path is not None, "the word list ships with bake"
        listed = read_words(path)
        counted = [count_words(tokenizer.decode(list(ids)), listed) for ids in continuations]

        def per_opening(values: Sequence[float]) -> np.ndarray:
            array: np.ndarray = np.asarray(values, dtype=float)
            summed: np.ndarray = array.reshape(-1, SAMPLES).sum(axis=1)
            return summed

        return Counts(
            per_opening([targets for targets, _ in counted]),
            per_opening([words for _, words in counted]),
            per_opening(nats),
            per_opening([len(ids) for ids in continuations]),
            len(continuations),
        )

    def target_share(self, rows: Any = slice(None)) -> float:
        """Return target words as a share of all words."""
        return float(self.targets[rows].sum() / self.words[rows].sum())

    def perplexity(self, rows: Any = slice(None)) -> float:
        """Return exp(nats per token)."""
        return math.exp(self.nats[rows].sum() / self.tokens[rows].sum())


def compare(name: str, found: Counts, base: Counts) -> Measured:
    """Return a model's figures relative to the base's, with paired bootstrap intervals."""
    openings = len(found.targets)
    return Measured(
        name=name,
        continuations=found.continuations,
        target_share=found.target_share(),
        target_ratio=found.target_share() / base.target_share(),
        target_interval=bootstrap_interval(
            lambda rows: found.target_share(rows) / base.target_share(rows), openings
        ),
        perplexity=found.perplexity(),
        perplexity_ratio=found.perplexity() / base.perplexity(),
        perplexity_interval=bootstrap_interval(
            lambda rows: found.perplexity(rows) / base.perplexity(rows), openings
        ),
    )


def describe(result: Showcase) -> str:
    """Return what a person reads: the first bake's summary, texts side by side, the counts."""
    # How to load a checkpoint is said of one that is still there.
    describe_first = describe_proven if result.output is None else describe_export
    parts = [describe_first(result.exports[0]), ""]
    for opening, texts in result.texts:
        parts.append(f"> {opening}")
        parts += [f"  {name:>4}: {' '.join(text.split())}" for name, text in texts.items()]
        parts.append("")
    rows = [
        (
            entry.name,
            f"{entry.target_share:.1%}",
            _ratio(entry.target_ratio, entry.target_interval),
            f"{entry.perplexity:.2f}",
            _ratio(entry.perplexity_ratio, entry.perplexity_interval),
        )
        for entry in result.measured
    ]
    header = ("model", f"{WORDS} words", "× base [95 %]", "perplexity", "× base [95 %]")
    parts.append(format_table(header, rows))
    count = result.measured[0].continuations
    parts.append(
        f"{count} sampled continuations each, same openings, same noise; perplexity under the base"
    )
    if result.output is None:
        parts.append("the two checkpoints were temporary; keep them with bake demo --output DIR")
    return "\n".join(parts)


def _ratio(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"
