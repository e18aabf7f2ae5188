"""Arms: the things that a sweep compares, and one forward for many of them.

An arm is a model with a push, with a direction taken out, or with neither. All arms see the same tokens,
so one batch holds one text under every arm, a row each, and nothing is padded: a row's hook adds that
row's vector. Results do not depend on which arms share a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from bake.hooks import ablated_rows, register
from bake.models.forward import LanguageModel, LoadedModel, find_cache, last_logits
from bake.sites import addition_location
from bake.writes import MappedAblation

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["base", "direction", "random", "prompt", "ablation", "random ablation"]
Injection = Literal["broadcast", "last-token"]
ROW_BYTES = 512 * 1024 * 1024  # of one forward's logits, and of a key-value cache, in float32


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    multiplier: of the push; of an ablation −strength, since it moves away from what a push moves towards.
    push: {layer: (hidden_size,) tensor}, empty for the base. injection: `broadcast` adds it at every
    position, as a bake does; `last-token` at the prompt's last token only, which no bake can do.
    instruction: text put before every prompt (the prompt baseline). variant: what distinguishes this
    arm's way of pushing from the sweep's first, "" where nothing does. removal: what is taken out; the map
    of a model's writes is the same for all of them.
    """

    name: str
    kind: Kind
    multiplier: float = 0.0
    site: str = "mlp_out"
    law: str = ""
    band: tuple[int, int] = (0, 0)
    injection: Injection = "broadcast"
    push: Mapping[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    instruction: str = ""
    seed: int | None = None
    variant: str = ""
    removal: MappedAblation | None = field(default=None, repr=False, compare=False)

    @property
    def is_control(self) -> bool:
        """Whether its direction is a random one."""
        return self.kind.startswith("random")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: everything but the vectors."""
        return {
            "name": self.name,
            "kind": self.kind,
            "multiplier": self.multiplier,
            "site": self.site,
            "law": self.law,
            "band": list(self.band),
            "injection": self.injection,
            "instruction": self.instruction,
            "seed": self.seed,
            "variant": self.variant,
            **({"ablation": self.removal.ablation.to_dict()} if self.removal else {}),
        }


@contextmanager
def steered_rows(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    prompt_length: int | None = None,
) -> Iterator[None]:
    """Push each row, or take out of it, what its own arm says, while the context is open.

    Row r belongs to arms[r].

    prompt_length: positions of the prompt, whose last one `last-token` arms are pushed at; None: the
    last position of the first forward.
    """
    import torch

    past = [0]  # positions that a key-value cache holds already

    def look(_module: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
        past[0] = sum(int(cache.get_seq_length()) for cache in find_cache(keywords).values())

    everywhere = torch.tensor([arm.injection == "broadcast" for arm in arms])
    partial = not bool(everywhere.all())

    def adder(matrix: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def add(activation: torch.Tensor) -> torch.Tensor:
            rows = matrix.to(activation.device, activation.dtype)[:, None, :]
            if not partial:
                return activation + rows
            places = torch.arange(activation.shape[1]) + past[0]
            last = places == (prompt_length or activation.shape[1]) - 1
            mask = everywhere[:, None] | last[None, :]
            return activation + rows * mask.to(activation.device, activation.dtype)[:, :, None]

        return add

    with ExitStack() as hooks:
        if partial:
            handle = loaded.model.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
        removals = {row: arm.removal for row, arm in enumerate(arms) if arm.removal}
        if removals:
            writes = next(iter(removals.values())).writes
            taken = {row: mapped.ablation for row, mapped in removals.items()}
            hooks.enter_context(ablated_rows(loaded.model, writes, taken))
        for site in dict.fromkeys(arm.site for arm in arms if arm.push):
            for layer in sorted({key for arm in arms if arm.site == site for key in arm.push}):
                location, scale = addition_location(site, loaded.structure.at(layer))
                matrix = torch.zeros(len(arms), loaded.hidden_size)
                for row, arm in enumerate(arms):
                    if arm.site == site and layer in arm.push:
                        matrix[row] = arm.push[layer].float() * scale
                module = loaded.layer(layer, location.module)
                hooks.callback(register(module, location, adder(matrix)).remove)
        yield


def rows_per_forward(loaded: LoadedModel, positions: int, *, cached: bool = False) -> int:
    """Return how many rows of so many positions go through at once, by the memory of their logits.

    cached: keys and values stay in memory as well, counted as if every head had its own.
    """
    text = loaded.config.get_text_config()
    width = int(text.vocab_size)
    if cached:
        width += 2 * int(text.num_hidden_layers) * loaded.hidden_size
    return max(1, ROW_BYTES // (4 * width * max(positions, 1)))


def compare_arms(
    loaded: LanguageModel,
    arms: Sequence[Arm],
    ids: Sequence[int],
    prompt_length: int | None = None,
    *,
    start: int = 1,
) -> Iterator[tuple[Arm, torch.Tensor]]:
    """Run one text under every arm; yield (arm, log-probabilities (positions, vocabulary), float32).

    prompt_length: as for `steered_rows`. start: the positions are those that predict token `start`, the
    ones after it, and what follows the text.
    """
    import torch

    keep = len(ids) - start + 1
    step = rows_per_forward(loaded, len(ids))
    for first in range(0, len(arms), step):
        chunk = arms[first : first + step]
        tokens = torch.tensor([list(ids)] * len(chunk))
        with torch.no_grad(), steered_rows(loaded, chunk, prompt_length):
            logits, _ = last_logits(loaded, tokens, keep, use_cache=False)
        for row, arm in enumerate(chunk):
            yield arm, logits[row].float().log_softmax(dim=-1)
        del logits
