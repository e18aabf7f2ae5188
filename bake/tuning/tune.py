"""`bake tune`: a model and contrast pairs → a recipe, and the ranking that it was chosen from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bake.anatomy.base import Base, load_base, open_base
from bake.directions.activations import PairActivations, read_activations
from bake.directions.direction import Direction
from bake.directions.first_look import look_first
from bake.directions.fit import fit_directions
from bake.directions.formats import fit_direction, read_direction
from bake.errors import BakeError, UnsupportedError
from bake.models.forward import LanguageModel
from bake.models.streaming import choose_placement
from bake.strength.coefficients import DEFAULT_LAW, Push, band_layers, compute_push
from bake.support.processes import on_main
from bake.support.progress import announce
from bake.support.timing import Stopwatch, peak_memory
from bake.sweeps.measured_law import MEASURED_LAW, follow_measured_law
from bake.sweeps.store import Store
from bake.sweeps.sweep import measure_sites
from bake.texts.pair_tokens import encode_pairs
from bake.texts.prompts import position_limit, read_prompts
from bake.tuning.bench import Bench
from bake.tuning.candidates import GIVEN, Candidate, Space
from bake.tuning.files import check_place, prepare_directory, write_all
from bake.tuning.options import Material, TuneOptions, choose_routes, read_material
from bake.tuning.removals import JudgedAblation, judge_ablations
from bake.tuning.result import Tuned
from bake.tuning.search import Ranking, Search
from bake.version import __version__
from bake.writes import WriteMap

if TYPE_CHECKING:
    import torch


def tune(options: TuneOptions) -> Tuned:
    """Compare candidates and write a directory; see `bake tune --help`.

    The directory keeps what is measured as it is made: the same command again goes on from there. Raises a
    BakeError that names what is wrong, also, once the ranking is written, where nothing moves the pairs.
    """
    clock = Stopwatch(("checkpoint", "anatomy", "load", "calibrate", "tune", "report"))
    options.check()
    material = read_material(options)
    prompts = read_prompts(options.prompts)
    placement = choose_placement(options.device_map, options.max_memory)
    check_place(Path(options.output))
    look_first(
        options.model,
        options.revision,
        directions=[options.direction] if options.direction else (),
    )
    file = read_direction(options.direction) if options.direction else None
    base = open_base(options.model, options.revision, clock)
    anatomy, given = base.anatomy, None
    if file is not None:
        given, notes = fit_direction(
            file,
            str(options.direction),
            hidden_size=anatomy.hidden_size,
            layer_count=anatomy.layer_count,
        )
        for note in notes:
            announce(note)
    routes = choose_routes(anatomy, options, given.site if given else None)
    space = make_space(options, base, {s: route.layers for s, route in routes.items()}, given)
    writes = anatomy.ablation.choose("stream", anatomy.model_type) if options.ablate else None
    output = on_main(lambda: prepare_directory(Path(options.output)))
    with Store(output, fingerprint_of(base, options, material, prompts, given)) as store:
        with clock.stage("load"):
            loaded = load_base(base, placement)
        with clock.stage("calibrate"):
            norms = measure_sites(loaded, space.pushable, prompts, store.keep)
        pushes = Pushes(loaded, space, material, norms, given, store)
        bench = Bench(
            loaded,
            pushes.of,
            target=options.target_kl,
            usual=len(band_layers(anatomy.layer_count)),
            sign=-1 if options.reverse else 1,
            chat_template=options.chat_template,
            each=store.each,
        )
        default = default_candidate(base, space)
        search = Search(bench, space, default, material.choosing, material.judging, options.minutes)
        with clock.stage("tune"):
            ranking = search.run()
            ablations = judge(loaded, writes, ranking, pushes, search) if writes else ()
        ranking = replace(ranking, forwards=ranking.forwards + pushes.forwards)
        coefficients, judges = pushes.coefficients(ranking), len(material.judging.pairs)
        tuned = Tuned(
            *(output, base, options, routes, ranking, coefficients, judges, material.divided),
            ablations,
        )
        with clock.stage("report"):
            on_main(lambda: write_all(tuned, html=options.html))
    if tuned.refusal is not None:
        raise BakeError(tuned.refusal)
    return replace(tuned, timings=clock.seconds, peak_memory=peak_memory())


def make_space(
    options: TuneOptions,
    base: Base,
    pushable: Mapping[str, Sequence[int]],
    given: Direction | None,
) -> Space:
    """Return all that is compared; of a given direction only the layers that it has a vector for."""
    methods, tokens = options.methods, options.tokens
    if given is not None:
        methods, tokens = (GIVEN,), ("",)
        own = [layer for layer in given.vectors if layer is not None]
        pushable = {
            site: [layer for layer in layers if not own or layer in own]
            for site, layers in pushable.items()
        }
    laws = tuple(dict.fromkeys((DEFAULT_LAW, *options.laws)))
    space = Space(pushable, methods, tokens, laws, base.anatomy.layer_count)
    if not space.ways():
        raise UnsupportedError("no layer of the band 40:90 can be pushed; give another --site")
    return space


def default_candidate(base: Base, space: Space) -> Candidate:
    """Return what `bake export` takes with no option; the first way where it would refuse."""
    taken = base.anatomy.automatic
    ways = space.ways()
    usual = {
        way
        for way in ways
        if way.token in ("last", "")
        and way.method in ("mean", GIVEN)
        and taken is not None
        and way.site == taken.site
    }
    return next(iter(usual), ways[0])


def judge(
    loaded: LanguageModel, writes: WriteMap, ranking: Ranking, pushes: Pushes, search: Search
) -> tuple[JudgedAblation, ...]:
    """Measure what taking the direction out does, beside pushes of the same cost that reverse it."""

    def bench(cost: float) -> Bench:
        return Bench(
            loaded,
            pushes.of,
            target=cost,
            usual=search.bench.usual,
            sign=-1,
            chat_template=search.bench.chat_template,
            each=search.bench.each,
        )

    return judge_ablations(
        loaded,
        writes,
        ranking,
        pushes.vector,
        pushes.space.pushable,
        search.choosing,
        search.judging,
        bench,
        search.bench.each,
    )


class Pushes:
    """The push of every candidate at m = 1. forwards: texts that finding and measuring them took."""

    def __init__(
        self,
        loaded: LanguageModel,
        space: Space,
        material: Material,
        norms: Mapping[str, Mapping[int, float]],
        given: Direction | None,
        store: Store,
    ) -> None:
        self.loaded, self.space, self.material = loaded, space, material
        self.norms, self.given, self.store = norms, given, store
        self.forwards = 0
        self.of = cache(self._of)
        self._read = cache(self._read_activations)
        self._fitted = cache(self._fit)

    def coefficients(self, ranking: Ranking) -> dict[str, dict[int, float]]:
        """Return {candidate's name: {layer: α at its m}} of the finalists."""
        return {
            judged.candidate.name: {
                entry.layer: entry.coefficient
                for entry in self.of(judged.candidate).at(judged.multiplier).layers
            }
            for judged in ranking.finalists
        }

    def _of(self, candidate: Candidate) -> Push:
        measured = candidate.law == MEASURED_LAW
        push = compute_push(
            {layer: self.norms[candidate.site][layer] for layer in candidate.layers},
            {layer: self.vector(candidate, layer) for layer in candidate.layers},
            hidden_size=self.loaded.hidden_size,
            law=DEFAULT_LAW if measured else candidate.law,
        )
        if not measured:
            return push

        def measure() -> dict[str, float]:
            found = follow_measured_law(
                self.loaded, candidate.site, push, self.material.choosing
            ).given
            return {str(layer): value for layer, value in (found or {}).items()}

        kept = self.store.keep(f"law: {candidate.name}", measure)
        texts = self.material.choosing
        rows = len(candidate.layers) + 1
        self.forwards += rows * (2 * len(texts.pairs) + len(texts.neutral))
        given = {int(layer): value for layer, value in kept.items()}
        return replace(push, law=MEASURED_LAW, given=given).at(1.0)

    def vector(self, candidate: Candidate, layer: int) -> torch.Tensor:
        """Return the unit vector of a candidate's way in a layer."""
        if self.given is not None:
            return self.given.layer(layer)
        return self._fitted(candidate.site, candidate.token, candidate.method, layer)

    def _fit(self, site: str, token: str, method: str, layer: int) -> torch.Tensor:
        return fit_directions(self._read(site, token).only([layer]), method)[layer]

    def _read_activations(self, site: str, token: str) -> PairActivations:
        limit = position_limit(self.loaded.config)
        encoded = encode_pairs(
            self.loaded.tokenizer,
            self.material.pairs,
            chat_template=self.material.choosing.chat_template,
            limit=limit,
        )
        self.forwards += 2 * len(encoded)
        return read_activations(
            self.loaded, site, encoded, list(self.space.pushable[site]), token=token
        )


def fingerprint_of(
    base: Base,
    options: TuneOptions,
    material: Material,
    prompts: Sequence[str],
    given: Direction | None,
) -> str:
    """Return a hash of everything that decides what is measured, whatever is compared and for how long."""
    texts = [material.choosing, material.judging]
    values = {
        "bake": __version__,
        "tune": 1,
        "base": base.to_dict(),
        "files": base.stat_files(),
        "direction": {str(k): v.tolist() for k, v in given.vectors.items()} if given else None,
        "pairs": [asdict(pair) for pair in material.pairs],
        "texts": [[[asdict(p) for p in each.pairs], each.neutral] for each in texts],
        "chat template": options.chat_template,
        "target": options.target_kl,
        "reverse": options.reverse,
        "prompts": list(prompts),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
