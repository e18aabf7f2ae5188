"""`bake sweep`: a model, a direction and texts → measurements, figures and a page in one directory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake import processes
from bake.base import Base, load_base, open_base
from bake.direction import Direction, hash_vectors
from bake.dose_response import (
    CONTROL_SEEDS,
    MEASUREMENTS_FILE,
    MULTIPLIERS,
    REPORT_FILE,
    Bounds,
    Design,
    DoseResponse,
    Variant,
    compare_laws,
    measure_sites,
    run_sweep,
)
from bake.errors import BakeError, OutputError
from bake.figures import FIGURES, draw_dose_response, draw_norms
from bake.formats import fit_direction, read_direction
from bake.model import LoadedModel
from bake.pairs import read_pairs
from bake.progress import announce
from bake.prompts import load_tokenizer, read_prompts
from bake.resources import find_set, tried_on
from bake.response import Point, Sampling, Scorer, Texts
from bake.sampling import read_words
from bake.streaming import choose_placement
from bake.timing import Stopwatch, peak_memory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from bake.attribution import Attribution

PAGE_FILE = "index.html"


@dataclass(frozen=True)
class TrialOptions:
    """What `bake sweep` is asked for; names as on the command line."""

    model: str
    direction: str
    output: str
    multipliers: tuple[float, ...] = MULTIPLIERS
    bands: tuple[str, ...] = ("40:90",)
    sites: tuple[str, ...] = ("auto",)
    laws: tuple[str, ...] = ("inverse-sqrt-d",)
    pairs: str | None = None
    words: str | None = None
    openings: str = "openings"
    neutral: str | None = None
    prompts: str = "neutral"
    scorer: str | None = None
    instruction: str = ""
    control_seeds: int = CONTROL_SEEDS
    samples: int = 2
    new_tokens: int = 40
    max_fluency: float = 1.5
    max_kl: float = 1.0
    last_token: bool = False
    by_layer: bool = False
    html: bool = False
    seed: int = 0
    revision: str | None = None
    device_map: str | None = None
    max_memory: str | None = None


@dataclass(frozen=True)
class Trial:
    """A finished sweep: what it found and where it was written."""

    output: Path
    base: Base
    direction: Direction
    found: DoseResponse
    texts: Texts
    attribution: Attribution | None
    timings: dict[str, float]
    peak_memory: int

    def report(self) -> dict[str, Any]:
        """Return what `report.json` holds: no times and no paths."""
        values = {
            "base": self.base.to_dict(),
            "direction": {**self.direction.to_dict(), "sha256": hash_vectors(self._vectors())},
            "texts": {
                "pairs": len(self.texts.pairs),
                "neutral": len(self.texts.neutral),
                "openings": len(self.texts.openings),
            },
            **self.found.to_dict(),
        }
        if self.attribution is not None:
            values["by_layer"] = self.attribution.to_dict()
        return values

    def _vectors(self) -> dict[int, torch.Tensor]:
        """Return the unit vectors that were pushed."""
        return {layer: self.direction.layer(layer) for layer in self.found.coefficients}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            **self.report(),
            "timings": self.timings,
            "peak_memory": self.peak_memory,
        }


def sweep(options: TrialOptions) -> Trial:
    """Run a sweep and write its directory; see `bake sweep --help`.

    The directory keeps what is measured as it is made: the same command again goes on from there.
    Raises a BakeError that names what is wrong.
    """
    if processes.count() > 1:
        raise BakeError("bake sweep runs in one process; start it without accelerate launch")
    clock = Stopwatch()
    texts = read_texts(options)
    scorer = load_scorer(options.scorer)
    given = read_direction(options.direction)
    base = open_base(options.model, options.revision, clock)
    direction, notes = fit_direction(
        given,
        options.direction,
        hidden_size=base.anatomy.hidden_size,
        layer_count=base.anatomy.layer_count,
    )
    for note in notes:
        announce(note)
    design = make_design(options, base, direction)
    output = _prepare(Path(options.output))
    tokenizer = load_tokenizer(base.checkpoint.directory)
    with clock.stage("load"):
        placement = choose_placement(options.device_map, options.max_memory)
        loaded = load_base(base.checkpoint, placement)
    layer_count = base.anatomy.layer_count
    with clock.stage("calibrate"):
        norms = measure_sites(
            loaded,
            base.anatomy.structure,
            tokenizer,
            [variant.site for variant in design.variants],
            read_prompts(options.prompts),
            layer_count,
        )
    with clock.stage("sweep"):
        found = run_sweep(
            loaded,
            base.anatomy.structure,
            tokenizer,
            direction,
            design,
            texts,
            norms,
            layer_count,
            folder=output,
            scorer=scorer,
        )
    attribution = None
    if options.by_layer:
        with clock.stage("by layer"):
            attribution = _attribute(loaded, base, tokenizer, direction, design, texts, norms)
    trial = Trial(output, base, direction, found, texts, attribution, clock.seconds, peak_memory())
    with clock.stage("report"):
        try:
            write_report(trial, html=options.html)
        except OSError as error:
            raise OutputError(
                f"{output} cannot be written: {error.strerror or error}; what was measured is kept, so "
                f"the same command goes on from there"
            ) from None
    return replace(trial, timings=clock.seconds, peak_memory=peak_memory())


def read_texts(options: TrialOptions) -> Texts:
    """Read what the arms are run on. Raises a BakeError where no held-out pairs are named."""
    known = tried_on(options.direction)
    pairs, words = options.pairs or known.get("pairs"), options.words or known.get("words")
    if pairs is None:
        raise BakeError(
            "a sweep measures the shift on contrast pairs that the direction was not found from: "
            "give them with --pairs FILE"
        )
    read = tuple(read_pairs(pairs))
    if len(read) < 2:
        raise BakeError(f"{pairs} holds one contrast pair; an interval needs two or more")
    listed: frozenset[str] = frozenset()
    if words is not None:
        path = find_set(words, "words")
        if path is None:
            raise BakeError(f"no word list {words!r}; give a file with one word a line")
        listed = read_words(path)
    return Texts(
        read,
        tuple(read_prompts(options.neutral or known.get("neutral", "neutral"))),
        tuple(read_prompts(options.openings)),
        listed,
    )


def load_scorer(name: str | None) -> Scorer | None:
    """Import a scorer given as `module:function`, text → number; the current directory is looked in."""
    import sys

    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        sys.path.insert(0, str(Path.cwd()))
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BakeError(
            f"--scorer {name}: {error}; give module:function, a function from text to a number"
        ) from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise BakeError(f"--scorer {name} is not a function from text to a number")

    def score(text: str) -> float:
        try:
            return float(found(text))
        except (
            Exception
        ) as error:  # The user's code may raise anything; it is not bake's traceback.
            raise BakeError(f"--scorer {name} failed on {text[:40]!r}: {error!r}") from error

    return score


def make_design(options: TrialOptions, base: Base, direction: Direction) -> Design:
    """Return what is compared: every combination of site, law and band, the first one leading."""
    from bake.coefficients import LAWS, band_layers, parse_band
    from bake.sites import check_direction_site

    multipliers = tuple(sorted({m for m in options.multipliers if m}))
    if not multipliers:
        raise BakeError("a sweep needs multipliers other than 0, such as --multipliers=-1,1")
    if min(options.samples, options.new_tokens) < 1 or options.control_seeds < 0:
        raise BakeError("--samples and --new-tokens are 1 or more, --control-seeds 0 or more")
    unknown = next((law for law in options.laws if law not in LAWS), None)
    if unknown:
        raise BakeError(f"unknown law {unknown!r}; the laws are {', '.join(LAWS)}")
    sites = [
        base.anatomy.choose("auto", found_at=direction.site).site if site == "auto" else site
        for site in options.sites
    ]
    for site in sites:
        check_direction_site(direction.site, site, convert=False)
    variants = [
        Variant(site, law, parse_band(band))
        for site in sites
        for law in options.laws
        for band in options.bands
    ]
    for variant in variants:
        layers = band_layers(base.anatomy.layer_count, variant.band)
        direction.select(layers, base.anatomy.hidden_size)
    if options.last_token:
        variants.append(replace(variants[0], injection="last-token"))
    return Design(
        tuple(dict.fromkeys(variants)),
        multipliers,
        options.control_seeds,
        options.instruction,
        Sampling(options.samples, options.new_tokens, seed=options.seed),
        Bounds(options.max_fluency, options.max_kl),
    )


def write_report(trial: Trial, *, html: bool) -> None:
    """Write report.json, the figures, and the page where it is asked for."""
    figures = trial.output / FIGURES
    first = trial.found.design.variants[0]
    draw_norms(figures / "norms.png", trial.found.norms, trial.found.coefficients, first.site)
    draw_dose_response(figures / "dose-response.png", trial.found)
    if trial.attribution is not None:
        trial.attribution.draw(figures / "layers.png")
    text = json.dumps(trial.report(), indent=2, ensure_ascii=False) + "\n"
    (trial.output / REPORT_FILE).write_text(text, encoding="utf-8")
    if html:
        from bake.page import render_page

        (trial.output / PAGE_FILE).write_text(render_page(trial), encoding="utf-8")


def _attribute(
    loaded: LoadedModel,
    base: Base,
    tokenizer: PreTrainedTokenizerBase,
    direction: Direction,
    design: Design,
    texts: Texts,
    norms: Any,
) -> Attribution:
    from bake.attribution import attribute

    return attribute(
        loaded,
        base.anatomy.structure,
        tokenizer,
        direction,
        design.variants[0],
        texts,
        norms,
        base.anatomy.layer_count,
    )


def _prepare(output: Path) -> Path:
    """Make the directory; one that holds something else than a sweep is left alone."""
    partial = Path(MEASUREMENTS_FILE).with_suffix(".partial").name
    known = {MEASUREMENTS_FILE, partial, REPORT_FILE, PAGE_FILE, FIGURES}
    try:
        if output.is_dir():
            strange = sorted({entry.name for entry in output.iterdir()} - known)
            if strange:
                raise OutputError(
                    f"{output} holds {strange[0]}, which is no sweep's: give another --output"
                )
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be made: {error.strerror or error}") from None
    return output


def describe(trial: Trial) -> str:
    """Return what a person reads: the curve, chance beside it, the window."""
    from bake.report import format_table

    found = trial.found
    rows = [_row(point) for point in found.points if point.arm.kind != "random"]
    header = (
        "arm", "shift [95 %]", "pairs", "words", "text's ppl", "neutral ppl", "KL p95", "repeats",
    )  # fmt: skip
    parts = [
        f"{trial.base.to_dict()['id']}: {len(found.points)} arms, "
        f"{len(found.samples)} openings, held-out pairs in nats a token",
        "",
        format_table(header, rows),
        "",
    ]
    if found.specificity is not None:
        parts.append(found.specificity.describe())
    for window in found.windows:
        sign = "positive" if window.sign > 0 else "negative"
        if window.best is None:
            parts.append(f"no {sign} m is within the bounds: {window.reason}")
        else:
            parts.append(
                f"{sign} window: up to m = {window.largest:+g}, best shift at m = {window.best:+g} "
                f"({window.reason})"
            )
    costs = found.laws_at_equal_shift()
    if len(costs) > 1:
        parts.append(f"at equal shift, {compare_laws(costs)}")
    if trial.attribution is not None:
        parts += ["", trial.attribution.describe()]
    parts += ["", f"written to {trial.output}: {', '.join(_written(trial.output))}"]
    if any(variant.injection == "last-token" for variant in found.design.variants):
        parts.append("last-token injection is there to compare with; no weights can do it")
    return "\n".join(parts)


def _written(output: Path) -> Sequence[str]:
    return sorted(
        path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()
    )


def _row(point: Point) -> tuple[str, ...]:
    def ratio(value: Any) -> str:
        return f"× {value.value:.3g}" if value else "-"

    shift, accuracy = point.shift, point.accuracy
    return (
        point.arm.name,
        f"{shift.value:+.3f} [{shift.low:+.3f}, {shift.high:+.3f}]" if shift else "-",
        f"{accuracy.value:.0%}" if accuracy else "-",
        ratio(point.target_ratio),
        ratio(point.fluency_ratio),
        ratio(point.neutral_ratio),
        f"{point.neutral_kl['p95'].value:.3f}" if point.neutral_kl else "-",
        f"{point.repetition.value:.1%}" if point.repetition else "-",
    )
