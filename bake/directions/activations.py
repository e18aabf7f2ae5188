"""What a site holds for contrast pairs: one vector a text, read at the asked token positions.

The two texts of a pair share a prompt more often than not. Then they run as one row, prompt + positive
+ negative, in which the negative text does not see the positive one and its positions go on from the
prompt: the prompt is computed once. That this changes nothing is measured on the longest pairs first,
because no config says which attention respects such a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bake.directions.shared_prompts import (
    UNLIMITED,
    Reads,
    SharedBatch,
    longest,
    make_reads,
    pack,
    row_length,
    saves,
    tokens_per_batch,
)
from bake.errors import DirectionError
from bake.hooks import check_activation
from bake.models.forward import LanguageModel, run_layers
from bake.support.processes import agree, divide, gather
from bake.support.progress import announce, track
from bake.texts.pair_tokens import EncodedPair
from bake.texts.prompts import Encoded, TokenBatch, make_batches

if TYPE_CHECKING:
    import torch

TOKENS = ("last", "mean", "all")
# How far sharing may move activations, relative to their largest and to their median entry, by dtype.
SHARING_BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 8e-2}


@dataclass(frozen=True)
class PairActivations:
    """What a site holds for pairs, row i for pair i: {layer: (pairs, hidden_size)}, float32, CPU.

    norms: {layer: (2 · pairs,)}, the mean L2 norm of the tokens that were read, text by text. alike: a
    number for every pair, the same for pairs of the same texts; empty where no two are.
    """

    positive: dict[int, torch.Tensor]
    negative: dict[int, torch.Tensor]
    norms: dict[int, torch.Tensor]
    alike: tuple[int, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were read, in order."""
        return tuple(sorted(self.positive))

    @property
    def count(self) -> int:
        """How many pairs there are."""
        return len(next(iter(self.positive.values())))

    def differences(self, layer: int) -> torch.Tensor:
        """Return positive − negative of every pair at a layer, (pairs, hidden_size) float64."""
        return self.positive[layer].double() - self.negative[layer].double()

    def select(self, indices: Sequence[int]) -> PairActivations:
        """Return these pairs only."""
        import torch

        rows = torch.tensor(list(indices), dtype=torch.long)
        texts = torch.stack([2 * rows, 2 * rows + 1], dim=1).flatten()
        return PairActivations(
            {layer: values[rows] for layer, values in self.positive.items()},
            {layer: values[rows] for layer, values in self.negative.items()},
            {layer: values[texts] for layer, values in self.norms.items()},
            tuple(self.alike[index] for index in indices) if self.alike else (),
        )

    def only(self, layers: Sequence[int]) -> PairActivations:
        """Return what these layers hold."""
        return replace(
            self,
            positive={layer: self.positive[layer] for layer in layers},
            negative={layer: self.negative[layer] for layer in layers},
            norms={layer: self.norms[layer] for layer in layers},
        )

    @property
    def groups(self) -> list[list[int]]:
        """The pairs, those of the same texts together, which never stand on both sides of a split."""
        found: dict[int, list[int]] = {}
        for index in range(self.count):
            found.setdefault(self.alike[index] if self.alike else index, []).append(index)
        return list(found.values())


def parse_token(token: str | int) -> str | int:
    """Return "last", "mean", "all" or an index of a completion's tokens; raise DirectionError else."""
    if token in TOKENS:
        return token
    try:
        return int(token)
    except ValueError:
        raise DirectionError(
            f"unknown token position {token!r}; one of {', '.join(TOKENS)}, or an index such as -2"
        ) from None


def choose_positions(pair: EncodedPair, token: str | int, number: int) -> list[tuple[int, ...]]:
    """Return the positions that are read of the pair's two texts; raise DirectionError for a bad index.

    An index counts a completion's tokens, from 0 or, below it, from the end.
    """
    token = parse_token(token)
    found: list[tuple[int, ...]] = []
    for text, completion, side in zip(
        pair.texts, pair.completions, ("positive", "negative"), strict=True
    ):
        if isinstance(token, int):
            if not -len(completion) <= token < len(completion):
                raise DirectionError(
                    f"pair {number}: the {side} completion has {len(completion)} tokens, so none has "
                    f"index {token}; take --token last or mean, or lengthen it"
                )
            found.append((completion[token],))
        elif token == "last":
            found.append(completion[-1:])
        elif token == "mean":
            found.append(completion)
        else:
            found.append(tuple(p for p in range(completion[-1] + 1) if text.content[p]))
    return found


def read_activations(
    loaded: LanguageModel,
    site: str,
    pairs: Sequence[EncodedPair],
    layers: Sequence[int],
    *,
    token: str | int = "last",
    share: bool = True,
    batch_tokens: int | None = None,
    padding_side: str = "right",
) -> PairActivations:
    """Read a site at `layers` for both texts of every pair; the forward stops after the last layer.

    Of several positions the mean is taken. share: compute a prompt that the two texts share once,
    where that saves work and the model is seen to allow it. batch_tokens: of a forward, padding
    included. Raises DirectionError for a bad token.
    """
    import torch

    batch_tokens = batch_tokens or tokens_per_batch(loaded)
    positions = [
        chosen
        for number, pair in enumerate(pairs, start=1)
        for chosen in choose_positions(pair, token, number)
    ]
    texts = [text for pair in pairs for text in pair.texts]
    together = [i for i, pair in enumerate(pairs) if share and saves(pair)]
    reader = _Reader(loaded, site, layers, texts, positions, padding_side)
    if together and not agree(reader.may_share(pairs, longest(pairs, together))):
        announce("this model computes shared prompts otherwise; every text runs by itself")
        together = []
    rest = set(range(len(pairs))) - set(together)
    alone = [text for i in sorted(rest) for text in (2 * i, 2 * i + 1)]
    batches: list[tuple[TokenBatch | SharedBatch, Reads]] = [
        *reader.shared_batches(pairs, together, batch_tokens),
        *reader.plain_batches(alone, batch_tokens),
    ]
    # A text is in one batch, and zero in the readings of the processes that had others.
    readings = gather(reader.read(list(track(divide(batches), "reading pairs"))))
    found, norms = (
        {layer: sum(part[layer] for part in parts) for layer in layers}
        for parts in zip(*readings, strict=True)
    )
    return PairActivations(
        {layer: values[0::2] for layer, values in found.items()},
        {layer: values[1::2] for layer, values in found.items()},
        {layer: torch.as_tensor(values) for layer, values in norms.items()},
        _number_alike(pairs),
    )


def _number_alike(pairs: Sequence[EncodedPair]) -> tuple[int, ...]:
    """Number the pairs by their tokens; () where no two are alike."""
    first: dict[tuple[tuple[int, ...], ...], int] = {}
    numbers = [
        first.setdefault(tuple(text.ids for text in pair.texts), number)
        for number, pair in enumerate(pairs)
    ]
    return tuple(numbers) if len(first) < len(pairs) else ()


@dataclass(frozen=True)
class _Reader:
    """One reading: the model, where it is read, the texts, and the positions that are read of each."""

    loaded: LanguageModel
    site: str
    layers: Sequence[int]
    texts: Sequence[Encoded]
    positions: Sequence[tuple[int, ...]]
    padding_side: str

    def plain_batches(
        self, chosen: Sequence[int], batch_tokens: int
    ) -> list[tuple[TokenBatch, Reads]]:
        """Return batches of texts that run by themselves."""
        made = make_batches(
            [self.texts[index] for index in chosen],
            batch_tokens=batch_tokens,
            padding_side=self.padding_side,
        )
        found = []
        for batch in made:
            width = batch.input_ids.shape[1]
            owners = [chosen[place] for place in batch.indices]
            left = self.padding_side == "left"
            shifts = [width - len(self.texts[index].ids) if left else 0 for index in owners]
            columns = [
                tuple(position + shift for position in self.positions[index])
                for index, shift in zip(owners, shifts, strict=True)
            ]
            found.append((batch, make_reads(owners, range(len(owners)), columns)))
        return found

    def shared_batches(
        self, pairs: Sequence[EncodedPair], chosen: Sequence[int], batch_tokens: int
    ) -> list[tuple[SharedBatch, Reads]]:
        """Return batches of rows of prompt + positive + negative, rows of like length together."""
        order = sorted(chosen, key=lambda index: (row_length(pairs[index]), index))
        groups: list[list[int]] = []
        for index in order:
            width = row_length(pairs[index])
            if groups and (len(groups[-1]) + 1) * width <= batch_tokens:
                groups[-1].append(index)
            else:
                groups.append([index])
        dtype = next(self.loaded.model.parameters()).dtype
        return [
            (pack([pairs[index] for index in group], dtype), self._packed_reads(pairs, group))
            for group in groups
        ]

    def _packed_reads(self, pairs: Sequence[EncodedPair], group: Sequence[int]) -> Reads:
        owners, rows, columns = [], [], []
        for row, index in enumerate(group):
            pair = pairs[index]
            behind = len(pair.texts[0].ids) - pair.shared  # how far the negative text is moved
            owners += [2 * index, 2 * index + 1]
            rows += [row, row]
            columns.append(self.positions[2 * index])
            columns.append(
                tuple(p if p < pair.shared else p + behind for p in self.positions[2 * index + 1])
            )
        return make_reads(owners, rows, columns)

    def may_share(self, pairs: Sequence[EncodedPair], chosen: Sequence[int]) -> bool:
        """Measure on these pairs whether a shared prompt gives what two whole texts give."""
        texts = [text for index in chosen for text in (2 * index, 2 * index + 1)]
        try:
            packed, _ = self.read(self.shared_batches(pairs, chosen, UNLIMITED))
        except (
            ValueError,
            RuntimeError,
            TypeError,
            NotImplementedError,
            AttributeError,
            IndexError,
        ):
            return False  # A model that takes no such mask says so in many ways.
        plain, _ = self.read(self.plain_batches(texts, UNLIMITED))
        bound = SHARING_BOUNDS[str(next(self.loaded.model.parameters()).dtype).split(".")[1]]
        return all(
            _alike(packed[layer][texts], plain[layer][texts], bound) for layer in self.layers
        )

    def read(
        self, batches: Sequence[tuple[TokenBatch | SharedBatch, Reads]]
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Run batches; return {layer: (texts, hidden_size)} and {layer: (texts,)} mean norms.

        Rows of texts in no batch stay zero.
        """
        import torch

        kept: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {
            layer: [] for layer in self.layers
        }
        reads = iter([entry for _, entry in batches])
        current: list[tuple[TokenBatch | SharedBatch, Reads]] = []

        def before(batch: TokenBatch | SharedBatch) -> None:
            current[:] = [(batch, next(reads))]

        def receive(layer: int, activation: torch.Tensor) -> None:
            (batch, entry), device = current[0], activation.device
            check_activation(activation, batch.input_ids, self.loaded.hidden_size)
            chosen = activation[entry.rows.to(device), entry.columns.to(device)].double()
            weights, owners = entry.weights.to(device), entry.owners.to(device)
            shape = (len(entry.texts), chosen.shape[-1])
            sums = torch.zeros(shape, dtype=torch.float64, device=device)
            sums.index_add_(0, owners, chosen * weights[:, None])
            norms = torch.zeros(shape[0], dtype=torch.float64, device=device)
            norms.index_add_(0, owners, chosen.norm(dim=-1) * weights)
            kept[layer].append((sums.float(), norms.float()))

        last = self.loaded.layer(max(self.layers), "")
        with self.loaded.captured(self.site, list(self.layers), receive):
            run_layers(self.loaded, [batch for batch, _ in batches], last, before)
        order = torch.tensor([text for _, entry in batches for text in entry.texts])
        found = {}
        norms = {}
        for layer in self.layers:
            found[layer] = torch.zeros(len(self.texts), self.loaded.hidden_size)
            norms[layer] = torch.zeros(len(self.texts))
            if kept[layer]:
                sums, lengths = (torch.cat(part).cpu() for part in zip(*kept[layer], strict=True))
                found[layer].index_copy_(0, order, sums)
                norms[layer].index_copy_(0, order, lengths)
        return found, norms


def _alike(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Tell whether two readings agree, in their largest entries and in their usual ones.

    Largest entries alone would not tell in half precision: one that is a hundred times the rest, as
    models have them, makes an allowance in which all the rest can be wrong.
    """
    if not bool(expected.isfinite().all()):
        return True  # Which is reported where the direction is made of them.
    error, scale = (found - expected).abs(), expected.abs()
    return bool(error.max() <= bound * scale.max() and error.median() <= bound * scale.median())
