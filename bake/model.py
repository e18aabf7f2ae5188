"""Weights in memory: a checkpoint directory → a model ready to run, with the structure bake needs.

On a CPU everything is computed in float32, whatever the stored dtype: it is more exact, and on
machines without bfloat16 arithmetic nearly three times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.errors import CheckpointError, UnsupportedError
from bake.loading import load_report, quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from bake.prompts import TokenBatch

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what transformers reported while loading it."""

    model: nn.Module
    report: dict[str, list[str]]
    device: torch.device

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        config: Any = self.model.config
        return int(config.get_text_config().hidden_size)


def read_config(directory: Path) -> PreTrainedConfig:
    """Load a checkpoint's config as transformers' class; raise UnsupportedError where it has none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedError(
            f"{directory.name}: transformers cannot read its config.json ({reason})"
        ) from None


def default_device() -> torch.device:
    """Return the first CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    directory: Path, *, dtype: str | None = None, device: torch.device | None = None
) -> LoadedModel:
    """Load a checkpoint directory with plain transformers.

    dtype: "float32", "float16" or "bfloat16"; None means float32 on a CPU and the stored dtype
    elsewhere. Raises CheckpointError where transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = device or default_device()
    chosen: Any = (
        getattr(torch, dtype) if dtype else ("auto" if device.type != "cpu" else torch.float32)
    )
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory, dtype=chosen, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"transformers cannot load {directory.name}: {reason}") from None
    return LoadedModel(model.eval().to(device), load_report(info), device)


class _LayersDone(BaseException):
    """Raised inside a forward once the last layer that is needed has run."""


def run_layers(
    loaded: LoadedModel,
    batches: Iterable[TokenBatch],
    last: nn.Module,
    before: Callable[[TokenBatch], None],
) -> None:
    """Run batches through the layers up to and including `last`; no later layer and no LM head runs.

    before(batch) is called ahead of each forward, so that hooks know what they are looking at.
    """
    import torch

    def stop(*_: Any) -> None:
        raise _LayersDone

    with torch.no_grad():
        for batch in batches:
            before(batch)
            handle = last.register_forward_hook(stop)
            try:
                loaded.model(**batch.inputs(loaded.device), use_cache=False)
            except _LayersDone:
                pass
            finally:
                handle.remove()


def compute_logits(loaded: LoadedModel, batches: Iterable[TokenBatch]) -> list[torch.Tensor]:
    """Return the logits of every text, in the texts' order: each (positions, vocabulary), float32, CPU."""
    import torch

    logits: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            output = loaded.model(**batch.inputs(loaded.device), use_cache=False).logits
            for row, index in enumerate(batch.indices):
                kept = batch.attention_mask[row].bool()
                logits[index] = output[row][kept.to(output.device)].float().cpu()
    return [logits[index] for index in sorted(logits)]


def continue_greedily(
    loaded: LoadedModel, prompts: Iterable[tuple[int, ...]], new_tokens: int
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, exactly `new_tokens` token ids."""
    import torch

    continuations = []
    for ids in prompts:
        prompt = torch.tensor([ids], device=loaded.device)
        with torch.no_grad(), quiet_transformers():
            output = loaded.model.generate(  # type: ignore[operator]
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        continuations.append(output[0, len(ids) :].tolist())
    return continuations
