"""Find a push by gradient descent: what makes positive completions likelier than negative ones.

One vector a layer is trained through the same hooks that steer, every weight frozen. The loss of a pair
is −log σ(Δ), Δ the difference of the two completions' log-likelihoods per token, as preference
optimisation of steering vectors has it (BiPO, arXiv 2406.00045); a penalty on KL(base ‖ steered) over
neutral prompts keeps the push from buying Δ with damage. Training starts from the difference of means,
as long as the default law makes it at m = 1, and keeps the step that is best on pairs left out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bake.directions.activations import PairActivations
from bake.directions.fit import fit_directions
from bake.errors import DirectionError, UnsupportedError
from bake.models.forward import LanguageModel, LoadedModel
from bake.support.progress import track
from bake.texts.pair_tokens import EncodedPair
from bake.texts.prompts import Encoded, TokenBatch, make_batches

if TYPE_CHECKING:
    import torch

STEPS, KL_WEIGHT = 150, 0.3
# Adam moves every entry by about this part of a unit vector's root mean square entry, each step.
RATE = 0.15
PAIRS_A_STEP, NEUTRAL_A_STEP = 16, 8
CHECK_EVERY, PATIENCE = 10, 5
LEFT_OUT = 0.2  # of the pairs, for early stopping
LEAST_PAIRS = 5
BATCH_TOKENS = 1024
NEUTRAL_CHECKED = 16  # neutral prompts that take part in deciding when to stop
NEUTRAL_TOKENS = 64  # of a neutral prompt


@dataclass(frozen=True)
class Effect:
    """What a push does: margin is the mean over pairs of the completions' log-likelihood per token,
    positive − negative, in nats; divergence is the mean KL(base ‖ steered) over neutral tokens."""

    margin: float
    divergence: float

    def to_dict(self) -> dict[str, float]:
        """Return plain values."""
        return {"margin": self.margin, "divergence": self.divergence}


@dataclass(frozen=True)
class Optimization:
    """The vectors that were found, as long as they came out, and what they do to the pairs left out.

    vectors: {layer: (hidden_size,) float32, CPU}. steps: how many were made; best: which one was kept.
    left_out: the pairs that decided that. before and after: their effect without a push and with it.
    """

    vectors: Mapping[int, torch.Tensor]
    steps: int
    best: int
    left_out: tuple[int, ...]
    before: Effect
    after: Effect

    @property
    def lengths(self) -> dict[int, float]:
        """‖v_l‖ of every layer, in the activations' own unit."""
        return {layer: float(vector.norm()) for layer, vector in self.vectors.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the vectors."""
        return {
            "steps": self.steps,
            "best_step": self.best,
            "left_out_pairs": len(self.left_out),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }


def optimize_push(
    loaded: LanguageModel,
    site: str,
    pairs: Sequence[EncodedPair],
    read: PairActivations,
    neutral: Sequence[Encoded],
    *,
    steps: int = STEPS,
    kl_weight: float = KL_WEIGHT,
    seed: int = 0,
) -> Optimization:
    """Train one vector for every layer of `read`, the activations of `pairs` at `site`.

    neutral: prompts on which the steered model should stay the base. Raises UnsupportedError for a
    streamed model, DirectionError for too few pairs or a loss that is not finite.
    """
    import torch

    _check(loaded, len(read.groups), neutral, steps, kl_weight)
    generator = torch.Generator().manual_seed(seed)
    groups = read.groups  # Pairs of the same texts are trained on, or left out, together.
    order = torch.randperm(len(groups), generator=generator).tolist()
    count = max(1, round(LEFT_OUT * len(groups)))
    left_out, kept = (
        sorted(index for place in places for index in groups[place])
        for places in (order[:count], order[count:])
    )
    units = fit_directions(read.select(kept), "mean")
    push = _Push.starting_from(units, read, loaded)
    trainer = _Trainer(loaded, site, kl_weight)
    checked = ([pairs[index] for index in left_out], _shorten(neutral[:NEUTRAL_CHECKED]))
    with _frozen(loaded):
        with torch.no_grad():
            before, _ = trainer.measure({}, *checked)
            best = _Best.of(0, push, *trainer.measure(push(), *checked))
        step = 0
        for step in track(range(1, steps + 1), "optimising"):
            chosen = [kept[int(i)] for i in _draw(len(kept), PAIRS_A_STEP, generator)]
            texts = [neutral[int(i)] for i in _draw(len(neutral), NEUTRAL_A_STEP, generator)]
            push.optimizer.zero_grad()
            trainer.descend(push, [pairs[index] for index in chosen], _shorten(texts))
            push.optimizer.step()
            if step % CHECK_EVERY and step != steps:
                continue
            with torch.no_grad():
                reached = _Best.of(step, push, *trainer.measure(push(), *checked))
            if not math.isfinite(reached.loss):
                raise DirectionError(
                    f"the optimisation's loss is not finite at step {step}; try --dtype float32, or "
                    "take --method mean"
                )
            if reached.loss < best.loss:
                best = reached
            elif step - best.step >= PATIENCE * CHECK_EVERY:
                break
    vectors = {layer: vector.float().cpu() for layer, vector in best.vectors.items()}
    return Optimization(vectors, step, best.step, tuple(left_out), before, best.effect)


@dataclass(frozen=True)
class _Push:
    """The vectors that are trained: weights (hidden_size,) in units of their layer's norm."""

    weights: Mapping[int, torch.Tensor]
    scales: Mapping[int, float]
    optimizer: torch.optim.Optimizer

    @staticmethod
    def starting_from(
        units: Mapping[int, torch.Tensor], read: PairActivations, loaded: LoadedModel
    ) -> _Push:
        import torch

        size = math.sqrt(loaded.hidden_size)
        scales = {layer: float(read.norms[layer].mean()) / size for layer in read.layers}
        weights = {layer: unit.to(loaded.device).requires_grad_() for layer, unit in units.items()}
        return _Push(weights, scales, torch.optim.Adam(weights.values(), lr=RATE / size))

    def __call__(self) -> dict[int, torch.Tensor]:
        return {layer: weight * self.scales[layer] for layer, weight in self.weights.items()}


@dataclass(frozen=True)
class _Best:
    """A push on the way, with its loss and effect on the pairs that are left out."""

    step: int
    vectors: Mapping[int, torch.Tensor]
    effect: Effect
    loss: float

    @staticmethod
    def of(step: int, push: _Push, effect: Effect, loss: float) -> _Best:
        return _Best(step, {layer: v.detach().clone() for layer, v in push().items()}, effect, loss)


def check_training(steps: int, kl_weight: float) -> None:
    """Raise DirectionError for a number of steps or a KL weight that trains nothing."""
    if steps < 1 or not (math.isfinite(kl_weight) and kl_weight >= 0):
        raise DirectionError(
            f"{steps} steps with a KL weight of {kl_weight:g}: give at least one step, and a weight of 0 "
            "or more"
        )


def _check(
    loaded: LoadedModel,
    pairs: int,
    neutral: Sequence[Encoded],
    steps: int,
    kl_weight: float,
) -> None:
    if loaded.weights is not None:
        raise UnsupportedError(
            "--method optimize needs the whole model in memory, for the way back through it: leave "
            "--device-map and --max-memory out, or take --method mean"
        )
    if pairs < LEAST_PAIRS:
        raise DirectionError(
            f"--method optimize needs {LEAST_PAIRS} pairs, some of them to know when to stop, and there "
            f"are {pairs} different ones; give more, or take --method mean"
        )
    check_training(steps, kl_weight)
    if not any(any(text.content) for text in neutral):
        raise DirectionError("the neutral prompts hold no content token; give longer ones")


@dataclass(frozen=True)
class _Trainer:
    """The loss of a push, and its gradient."""

    loaded: LanguageModel
    site: str
    kl_weight: float

    def descend(self, push: Any, pairs: Sequence[EncodedPair], neutral: Sequence[Encoded]) -> None:
        """Add the gradient of the loss; batch by batch, so that one batch's graph is held at a time.

        push() makes the vectors anew for each batch, because going back frees what it went through.
        """
        import torch

        for group in _pair_batches(pairs):
            with torch.enable_grad(), self._pushed(push()):
                loss = _pair_losses(self._margins(group)).sum() / len(pairs)
                loss.backward()
        if not self.kl_weight:
            return
        batches = make_batches(neutral, batch_tokens=BATCH_TOKENS)
        tokens = sum(int(batch.content_mask.sum()) for batch in batches)
        for batch in batches:
            with torch.no_grad():
                base = self._log_probabilities(batch)
            with torch.enable_grad(), self._pushed(push()):
                divergence = _divergence(base, self._log_probabilities(batch))
                (self.kl_weight * divergence / tokens).backward()

    def measure(
        self,
        push: Mapping[int, torch.Tensor],
        pairs: Sequence[EncodedPair],
        neutral: Sequence[Encoded],
    ) -> tuple[Effect, float]:
        """Return the effect of a push, and its loss."""
        import torch

        margins, divergence, tokens = [], 0.0, 0
        for group in _pair_batches(pairs):
            with self._pushed(push):
                margins.append(self._margins(group))
        for batch in make_batches(neutral, batch_tokens=BATCH_TOKENS) if push else ():
            base = self._log_probabilities(batch)
            with self._pushed(push):
                divergence += float(_divergence(base, self._log_probabilities(batch)))
            tokens += int(batch.content_mask.sum())
        every = torch.cat(margins)
        effect = Effect(float(every.mean()), divergence / max(1, tokens))
        return effect, float(_pair_losses(every).mean()) + self.kl_weight * effect.divergence

    def _pushed(self, push: Mapping[int, torch.Tensor]) -> Any:
        vectors = {layer: vector.to(self.loaded.device) for layer, vector in push.items()}
        return self.loaded.steered(self.site, vectors)

    def _margins(self, pairs: Sequence[EncodedPair]) -> torch.Tensor:
        """Return Δ of every pair, (pairs,): log-likelihood per completion token, positive − negative."""
        import torch

        texts = [text for pair in pairs for text in pair.texts]
        completions = [tuple(p for p in c if p > 0) for pair in pairs for c in pair.completions]
        # Padded on the right: recurrences and models without position ids read what stands before.
        (batch,) = make_batches(texts, batch_tokens=10**9)
        # What predicts the first completion's first token, and all behind it.
        first = min(completion[0] for completion in completions) - 1
        log_probabilities = self._forward(batch, first).log_softmax(dim=-1)
        likelihoods: list[Any] = [None] * len(texts)
        for row, index in enumerate(batch.indices):
            places = torch.tensor(completions[index])
            targets = batch.input_ids[row, places].to(log_probabilities.device)
            chosen = log_probabilities[row, (places - 1 - first).to(targets.device)]
            likelihoods[index] = chosen.gather(1, targets[:, None]).mean()
        values: torch.Tensor = torch.stack(likelihoods)
        return values[0::2] - values[1::2]

    def _log_probabilities(self, batch: TokenBatch) -> torch.Tensor:
        """Return (content tokens, vocabulary): what is predicted at each content token."""
        mask = batch.content_mask.to(self.loaded.device)
        return self._forward(batch, 0)[mask].log_softmax(dim=-1)

    def _forward(self, batch: TokenBatch, first: int) -> torch.Tensor:
        """Return the logits from position `first` on, (texts, positions − first, vocabulary)."""
        model: Any = self.loaded.model
        count = batch.input_ids.shape[1] - first
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            options["logits_to_keep"] = count
        logits: torch.Tensor = model(**batch.inputs(self.loaded.device), **options).logits
        return logits[:, -count:].float()


def _pair_losses(margins: torch.Tensor) -> torch.Tensor:
    import torch

    return -torch.nn.functional.logsigmoid(margins)


def _divergence(base: torch.Tensor, steered_model: torch.Tensor) -> torch.Tensor:
    """Return KL(base ‖ steered) summed over tokens; both (tokens, vocabulary) log-probabilities."""
    import torch

    return torch.nn.functional.kl_div(steered_model, base, log_target=True, reduction="sum")


def _pair_batches(pairs: Sequence[EncodedPair]) -> Iterator[list[EncodedPair]]:
    """Yield pairs of like length, as many as fit a batch."""
    order = sorted(pairs, key=_longest)
    group: list[EncodedPair] = []
    for pair in order:
        if group and 2 * (len(group) + 1) * _longest(pair) > BATCH_TOKENS:
            yield group
            group = []
        group.append(pair)
    yield group


def _longest(pair: EncodedPair) -> int:
    return max(len(text.ids) for text in pair.texts)


def _shorten(texts: Sequence[Encoded]) -> list[Encoded]:
    return [
        Encoded(t.ids[:NEUTRAL_TOKENS], t.content[:NEUTRAL_TOKENS], t.offsets[:NEUTRAL_TOKENS])
        for t in texts
    ]


def _draw(count: int, most: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    return torch.randperm(count, generator=generator)[:most]


@contextmanager
def _frozen(loaded: LoadedModel) -> Iterator[None]:
    """Take no gradient of any weight while the context is open."""
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
