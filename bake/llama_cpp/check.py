"""Whether a GGUF file steers as the bake does: base and bake in llama.cpp beside transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.models.forward import last_logits, load_model

if TYPE_CHECKING:
    import torch

# What the shift has to keep of its direction and length: in 16 and 32 bits, and quantised, where Q2_K of
# SmolLM2-135M keeps 0.93.
LEAST_COSINE, MOST_RATIO = 0.9995, 0.01
LEAST_QUANTISED, MOST_QUANTISED = 0.8, 0.35
EFFECT = 1e-6  # nats of KL, below which nothing steers


@dataclass(frozen=True)
class GgufCheck:
    """One file against transformers, over the next tokens of some prompts.

    cosine, ratio: of the shift log p(bake) − log p(base), llama.cpp's against transformers'; ratio is of
    their lengths. effect: KL(bake ‖ base) in llama.cpp, in nats. kl_bake, kl_base: KL(transformers ‖
    llama.cpp) of each: what the engine and the quantisation cost by themselves.
    """

    file: str
    kind: str
    cosine: float
    ratio: float
    effect: float
    kl_bake: float
    kl_base: float

    @property
    def quantised(self) -> bool:
        """Whether the file has less than 16 bits a weight."""
        return self.kind not in ("F32", "F16", "BF16")

    @property
    def holds(self) -> bool:
        """Whether the push is there, as far as this kind of file can hold it."""
        cosine, ratio = (
            (LEAST_QUANTISED, MOST_QUANTISED) if self.quantised else (LEAST_COSINE, MOST_RATIO)
        )
        return self.effect > EFFECT and self.cosine >= cosine and abs(self.ratio - 1) <= ratio

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "holds": self.holds}

    def describe(self) -> str:
        """Return it in a sentence."""
        return (
            f"{self.file} ({self.kind}): the shift has cosine {self.cosine:.4f} with transformers' and "
            f"{self.ratio:.3f} of its length; KL(bake ‖ base) {self.effect:.3g} nats; llama.cpp is off by "
            f"{self.kl_bake:.2g} nats for the bake and {self.kl_base:.2g} for the base"
        )


def compare(
    file: str,
    kind: str,
    here: tuple[torch.Tensor, torch.Tensor],
    there: tuple[torch.Tensor, torch.Tensor],
) -> GgufCheck:
    """Compare (base, bake) of llama.cpp with (base, bake) of transformers.

    Each (prompts, vocabulary), log-probabilities; a token that one of them does not know is left out.
    """
    import torch

    known = ~torch.stack([*here, *there]).isnan().any(dim=0).any(dim=0)
    base, bake, old_base, old_bake = (each[:, known].double() for each in (*here, *there))
    shift, wanted = (
        _centred(after - before) for before, after in ((base, bake), (old_base, old_bake))
    )
    return GgufCheck(
        file,
        kind,
        cosine=float(
            torch.nn.functional.cosine_similarity(shift.flatten(), wanted.flatten(), dim=0)
        ),
        ratio=float(shift.norm() / wanted.norm().clamp(min=1e-300)),
        effect=_kl(bake, base),
        kl_bake=_kl(old_bake, bake),
        kl_base=_kl(old_base, base),
    )


def _centred(shift: torch.Tensor) -> torch.Tensor:
    """Take out what the same for all tokens is, which no probability depends on."""
    return shift - shift.mean(dim=1, keepdim=True)


def _kl(first: torch.Tensor, second: torch.Tensor) -> float:
    return max(0.0, float((first.exp() * (first - second)).sum(dim=1).mean()))


def transformers_log_probabilities(
    directory: Path, prompts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return log p(next token) after each prompt, (prompts, vocabulary) float64, run in float32."""
    import torch

    loaded = load_model(directory, dtype="float32", device=torch.device("cpu"))
    with torch.no_grad():
        rows = [last_logits(loaded, torch.tensor([list(ids)]), 1)[0][0, -1] for ids in prompts]
    return torch.stack(rows).double().log_softmax(dim=-1)
