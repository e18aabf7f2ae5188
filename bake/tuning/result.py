"""What a search found, as values: the ranking, the curve over layers, the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bake.anatomy import SiteRoute
from bake.anatomy.base import Base
from bake.anatomy.insertion import Insertion
from bake.strength.coefficients import EXPLICIT_LAW, band_of
from bake.support.html import show
from bake.support.tables import format_table
from bake.sweeps.measured_law import MEASURED_LAW
from bake.sweeps.window import moves
from bake.tuning.bench import Judged
from bake.tuning.options import TuneOptions
from bake.tuning.removals import JudgedAblation
from bake.tuning.search import Ranking

RECIPE_FILE = "recipe.yaml"
SHORT_OF = 0.8  # of the cost: a candidate below it could not be pushed so far


@dataclass(frozen=True)
class Tuned:
    """A finished search.

    coefficients: {finalist's name: {layer: α at its m}}. judging_pairs: how many ranked the finalists.
    divided: whether the pairs that chose and judged were kept out of --pairs. ablations: what taking the
    best direction out does, where that was asked for.
    """

    output: Path
    base: Base
    options: TuneOptions
    routes: Mapping[str, SiteRoute]
    ranking: Ranking
    coefficients: Mapping[str, Mapping[int, float]]
    judging_pairs: int
    divided: bool = False
    ablations: tuple[JudgedAblation, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def __repr__(self) -> str:
        return f"<Tuned: {self.summary}; {self.output}>"

    def _repr_html_(self) -> str:
        rows = [(each.candidate.name, f"{each.multiplier:g}") for each in self.ranking.finalists]
        return show(f"Tuned: {self.summary}", ("candidate", "m"), rows, [self.refusal or ""])

    @property
    def summary(self) -> str:
        """The search in a few words: the model and the best candidate."""
        best = self.best
        return (
            f"{self.base.to_dict()['id']}, best: {best.candidate.name} at m = {best.multiplier:g}"
        )

    @property
    def best(self) -> Judged:
        """What the recipe takes: the first of the ranking; one that adds layers only where asked to."""
        return next(
            (each for each in self.ranking.finalists if not self._is_kept_out(each)),
            self.ranking.finalists[0],
        )

    @property
    def refusal(self) -> str | None:
        """Why there is no recipe; None where there is one."""
        if moves(self.best.point):
            return None
        found = self.best.point.net_shift
        assert found is not None
        return (
            f"nothing moves the {self.judging_pairs} pairs that judge beyond doubt at KL "
            f"{self.options.target_kl:g} (best: {self.best.candidate.name}, {found.value:+.3f} nats a "
            f"token, 95 % interval {found.low:+.3f} to {found.high:+.3f}), so no recipe is written; the "
            f"ranking is in {self.output}. Try more pairs or others, or another --target-kl"
        )

    def _is_kept_out(self, judged: Judged) -> bool:
        return self.options.route != "insert" and self.adds_layers(judged)

    def adds_layers(self, judged: Judged) -> bool:
        """Tell whether a bake of this adds layers."""
        return isinstance(self.routes[judged.candidate.site].rewriter, Insertion)

    def recipe(self) -> dict[str, Any]:
        """Return the best as the options of `bake export`, without an output."""
        chosen, options = self.best, self.options
        candidate = chosen.candidate
        values: dict[str, Any] = {
            "model": options.model,
            "revision": options.revision,
            "direction": options.direction,
            "pairs": options.pairs,
            "site": candidate.site,
            "multiplier": chosen.multiplier,
        }
        if self.adds_layers(chosen):
            values["route"] = "insert"
        if options.direction is None:
            values |= {"method": candidate.method, "token": candidate.token}
            values["held_out"] = options.held_out
            values["chat_template"] = options.chat_template
        band = band_of(candidate.layers, self.base.anatomy.layer_count)
        if candidate.law == MEASURED_LAW or band is None:
            alphas = self.coefficients[candidate.name]
            values["coefficients"] = ",".join(
                f"{layer}={alpha / chosen.multiplier:.6g}"
                for layer, alpha in alphas.items()
                if alpha
            )
        else:
            values |= {"band": band, "law": candidate.law, "prompts": options.prompts}
        left_out = {"chat_template": "auto", "prompts": "neutral"}
        return {
            name: value
            for name, value in values.items()
            if value is not None and left_out.get(name) != value
        }

    def report(self) -> dict[str, Any]:
        """Return what `report.json` holds: no times and no paths."""
        ranking = self.ranking
        return {
            "version": 1,
            "base": self.base.to_dict(),
            "target_kl": self.options.target_kl,
            "finished": ranking.finished,
            "finalists": [self._values(each) for each in ranking.finalists],
            "layers": [self._values(each) for each in ranking.layers],
            "default": ranking.default.name,
            "recipe": {
                **self.recipe(),
                "law": EXPLICIT_LAW if "coefficients" in self.recipe() else self.best.candidate.law,
            },
            **(
                {"ablations": [each.to_dict() for each in self.ablations]} if self.ablations else {}
            ),
            "candidates": ranking.candidates,
            "forwards": ranking.forwards,
            "forwards_of_a_full_grid": ranking.grid,
        }

    def _values(self, judged: Judged) -> dict[str, Any]:
        point = judged.point
        figures = {"shift": point.shift, "gain": point.gain, "net_shift": point.net_shift}
        return {
            **judged.candidate.to_dict(),
            "route": self.routes[judged.candidate.site].route,
            "multiplier": judged.multiplier,
            "neutral_kl_p95": judged.kl,
            **{name: figure.to_dict() if figure else None for name, figure in figures.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `--json`."""
        return {
            "output": str(self.output),
            **self.report(),
            "timings": dict(self.timings),
            "peak_memory": self.peak_memory,
        }

    def describe(self) -> str:
        """Return the ranking and the recipe for people."""
        ranking = self.ranking
        lines = [self.table(), ""]
        if ranking.layers:
            lines.append(self.layers_line())
        for each in ranking.finalists:
            if each.moved > self.best.moved and self._is_kept_out(each):
                lines.append(
                    f"{each.candidate.name} moves more ({each.moved:+.3f}) and adds a layer beside every "
                    "one that it pushes; --route insert lets the recipe take it"
                )
                break
        lines += [each.describe() for each in self.ablations]
        lines += [
            f"{ranking.forwards} texts were run to choose among {ranking.candidates} candidates; all of "
            f"them on every text would have been {ranking.grid}",
            f"bake export --recipe {self.output / RECIPE_FILE} --output DIR bakes the best",
        ]
        return "\n".join(lines)

    def table(self) -> str:
        """Return the ranking as a table."""
        rows = []
        for each in self.ranking.finalists:
            found = each.point.net_shift
            assert found is not None
            note = "default" if each.candidate == self.ranking.default else ""
            if each.kl < SHORT_OF * self.options.target_kl:
                note = f"{note}, as far as it goes".strip(", ")
            rows.append(
                (
                    each.candidate.name,
                    self.routes[each.candidate.site].route,
                    f"{each.multiplier:g}",
                    f"{each.kl:.2f}",
                    f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
                    note,
                )
            )
        return format_table(("candidate", "route", "m", "KL", "net shift, nats/token", ""), rows)

    def layers_line(self) -> str:
        """Say which layer does most by itself."""
        best = max(self.ranking.layers, key=lambda judged: judged.moved)
        found = best.point.net_shift
        assert found is not None
        return (
            f"of single layers {best.candidate.layers[0]} does most at this cost: {found.value:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}]"
        )
