"""Which experts a mixture-of-experts model sends its tokens to: recorded in one run, held in another.

Where two experts' scores are nearly equal, the rounding of the stored push decides between them, and
one token that goes elsewhere moves its logits far more than the rounding itself does. With the choices
held, what is left is the rounding alone. Routers are found by what all of them call, `topk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Choices = list["torch.Tensor"]  # each (…, chosen), int64, in the order of the calls


@dataclass
class Held:
    """How many choices a run would have made, and how many of them otherwise.

    fits: whether the run chose as often, and among as many, as was recorded; if not, nothing was held
    from there on.
    """

    choices: int = 0
    flipped: int = 0
    fits: bool = True

    @property
    def share(self) -> float:
        """The share of choices, one a token and router, that held another set of experts."""
        return self.flipped / max(self.choices, 1)


@contextmanager
def record_choices() -> Iterator[Choices]:
    """Yield a list that every choice among the inside's scores is appended to."""
    choices: Choices = []

    def record(chosen: Any, *_: Any) -> Any:
        choices.append(chosen.indices.cpu())
        return chosen

    with _around_topk(record):
        yield choices


@contextmanager
def hold_choices(choices: Sequence[torch.Tensor]) -> Iterator[Held]:
    """Make the inside choose as was recorded, with its own scores; count what it would have changed."""
    import torch

    remaining, held = iter(choices), Held()

    def replay(chosen: Any, scores: torch.Tensor, dim: int) -> Any:
        wanted = next(remaining, None)
        held.fits &= wanted is not None and wanted.shape == chosen.indices.shape
        if wanted is None or not held.fits:
            return chosen
        wanted = wanted.to(scores.device)
        differs = (wanted.sort(dim=dim).values != chosen.indices.sort(dim=dim).values).any(dim=dim)
        held.choices += differs.numel()
        held.flipped += int(differs.sum())
        return torch.return_types.topk((scores.gather(dim, wanted), wanted))

    with _around_topk(replay):
        yield held
    held.fits &= next(remaining, None) is None


def _around_topk(change: Callable[[Any, Any, int], Any]) -> AbstractContextManager[Any]:
    """Return a context in which the results of every `topk` go through `change`."""
    import torch
    from torch.overrides import TorchFunctionMode

    class AroundTopk(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func not in (torch.topk, torch.Tensor.topk):
                return result
            named = dict(zip(("input", "k", "dim"), args, strict=False)) | (kwargs or {})
            return change(result, named["input"], named.get("dim", -1))

    return AroundTopk()
