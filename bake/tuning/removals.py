"""Taking the direction out, beside the pushes of a search: each with the push that costs as much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.directions.direction import Direction
from bake.errors import BakeError
from bake.sites import RESIDUAL_SITES
from bake.support.progress import announce
from bake.sweeps.arms import Arm
from bake.sweeps.cost_curve import cost_of
from bake.sweeps.design import BASE, AblationVariant
from bake.sweeps.layer_choice import choose_layer
from bake.sweeps.measurements import Each, Sampling, Texts, measure_neutral, measure_pairs
from bake.sweeps.points import Interval
from bake.sweeps.summary import summarise
from bake.tuning.bench import Bench, Judged
from bake.tuning.candidates import Candidate
from bake.tuning.search import Ranking
from bake.writes import MappedAblation, WriteMap

if TYPE_CHECKING:
    import torch

    from bake.models.forward import LanguageModel

STRENGTHS = (1.0, 2.0)  # of writes in the default band
LEAST_COST = 0.01  # nats, below which no push is brought to the same


@dataclass(frozen=True)
class JudgedAblation:
    """An ablation on the texts that judge. kl: 95th percentile on neutral text, nats.

    net_shift: of pairs away from the positive side, less what the negative completions lose, nats a token.
    push: the best way of pushing there, at the same cost; None where it costs next to nothing.
    """

    variant: AblationVariant
    candidate: Candidate
    kl: float
    net_shift: Interval
    push: Judged | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        push = self.push and {"multiplier": self.push.multiplier, "net_shift": self.push.moved}
        return {
            "name": self.variant.name,
            "scope": self.variant.scope,
            "strength": self.variant.strength,
            "from_layer": self.variant.from_layer,
            "method": self.candidate.method,
            "token": self.candidate.token,
            "neutral_kl_p95": self.kl,
            "net_shift": self.net_shift.to_dict(),
            "push": push,
            "text": self.describe(),
        }

    def describe(self) -> str:
        """Return the comparison as a sentence."""
        found = self.net_shift
        text = (
            f"{self.variant.name}: moves the pairs from the positive side by {found.value:+.3f} "
            f"[{found.low:+.3f}, {found.high:+.3f}] at KL {self.kl:.2g}"
        )
        if self.push is None:
            return text
        return (
            f"{text}; a push of m = {self.push.multiplier:+.2g} ({self.push.candidate.name}) by "
            f"{self.push.moved:+.3f} at the same cost"
        )


def judge_ablations(
    loaded: LanguageModel,
    writes: WriteMap,
    ranking: Ranking,
    vector: Callable[[Candidate, int], torch.Tensor],
    layers: Mapping[str, Any],
    choosing: Texts,
    judging: Texts,
    bench: Callable[[float], Bench],
    each: Callable[[str], Each],
) -> tuple[JudgedAblation, ...]:
    """Measure what taking the direction out does, on the texts that chose nothing.

    vector: (candidate, layer) → its unit vector. layers: {site: those that it can be found in}. bench: a
    cost → what brings pushes away from the positive side to it. The layer whose direction is taken out of
    the stream is chosen on the texts that choose; where none will do, that is announced. each: stage → what
    measures its texts.
    """
    found = [each.candidate for each in ranking.finalists]
    best = next((each for each in found if each.site in RESIDUAL_SITES), None)
    if best is None:
        raise BakeError(
            "--ablate takes a direction of the residual stream out, and none was compared: add --site "
            "mlp_out, or leave it out"
        )
    vectors: dict[int | None, torch.Tensor] = {
        layer: vector(best, layer) for layer in layers[best.site]
    }
    direction = Direction(vectors, best.site, {})
    count = len(writes.by_layer)
    variants = []
    try:
        choice = choose_layer(
            loaded, writes, direction, choosing, each=lambda stage: each(f"{best.name}: {stage}")
        )
        variants.append(AblationVariant(from_layer=choice.layer))
    except BakeError as error:
        announce(f"left out: {error}")
    variants += [AblationVariant("writes", strength) for strength in STRENGTHS]
    held = [v for v in variants if v.scope == "stream" or set(v.layers(count)) <= set(vectors)]
    arms = [Arm(BASE, "base")]
    for variant in held:
        ablation = variant.remove(direction, count, loaded.hidden_size)
        removal = MappedAblation(writes, ablation)
        arms.append(Arm(variant.name, "ablation", -variant.strength, removal=removal))
    template = judging.chat_template
    stage = f"{best.name} taken out {', '.join(arm.name for arm in arms)}"
    pairs = measure_pairs(
        loaded, arms, judging.pairs, each(f"{stage}: pairs"), chat_template=template
    )
    neutral = measure_neutral(
        loaded, arms, judging.neutral, each(f"{stage}: neutral"), chat_template=template
    )
    points = summarise(arms, {"pairs": pairs}, loaded.tokenizer, judging, Sampling())[1:]
    judged = []
    for variant, arm, point in zip(held, arms[1:], points, strict=True):
        assert point.net_shift is not None
        kl = cost_of(neutral[arm.name]["kl"])
        push = None
        if kl >= LEAST_COST:
            (push,) = bench(kl).compare(f"beside {variant.name}", [best], judging)
        judged.append(JudgedAblation(variant, best, kl, point.net_shift, push))
    return tuple(judged)
