"""Weights in memory: a checkpoint directory → a model ready to run, with the structure bake needs.

On a CPU everything is computed in float32, whatever the stored dtype: it is more exact, and on
machines without bfloat16 arithmetic nearly three times as fast.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from bake.checkpoint.foreign_config import check_methods, config_errors_named
from bake.checkpoint.loading import load_pretrained
from bake.checkpoint.pretrained import load_config
from bake.errors import BakeError, CheckpointError, PromptError, UnsupportedError
from bake.hooks import captured, steered, submodule
from bake.models.streaming import CheckpointWeights, Placement, stream_model
from bake.sites import LayerStructure
from bake.support.processes import count
from bake.support.text import explain_briefly
from bake.texts.prompts import TokenBatch, batch_prompts, position_limit
from bake.texts.protocols import Config, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

CACHES = ("cache", "past_key_values")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and what transformers reported while loading it.

    weights: what a streamed model reads from; None where the whole model is in memory.
    """

    model: nn.Module
    report: dict[str, list[str]]
    device: torch.device
    weights: CheckpointWeights | None = None

    @property
    def config(self) -> Config:
        """The model's configuration."""
        config: Any = self.model.config
        found: Config = config
        return found

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return int(self.config.get_text_config().hidden_size)


@dataclass(frozen=True, kw_only=True)
class LanguageModel(LoadedModel):
    """A base in memory with all that measuring and steering it takes.

    structure: what its decoder's parts are called. tokenizer: the checkpoint's.
    """

    structure: LayerStructure
    tokenizer: Tokenizer

    def layer(self, index: int, path: str = "") -> nn.Module:
        """Return the module at `path` inside decoder layer `index` (0-based; "" is the layer itself)."""
        return submodule(self.model, self.structure, index, path)

    def batches(self, prompts: Sequence[str]) -> list[TokenBatch]:
        """Return texts as batches of tokens, cut where the model's positions end."""
        return batch_prompts(self.tokenizer, prompts, self.config)

    def steered(
        self, site: str, push: Mapping[int, torch.Tensor], **options: Any
    ) -> AbstractContextManager[None]:
        """Return the context in which a push is added at a site; see `hooks.steered`."""
        return steered(self.model, self.structure, site, push, **options)

    def captured(
        self, site: str, layers: list[int], receive: Callable[[int, torch.Tensor], None]
    ) -> AbstractContextManager[None]:
        """Return the context in which a site's activations are handed over; see `hooks.captured`."""
        return captured(self.model, self.structure, site, layers, receive)


class SpareModel:
    """A loaded model that somebody may use once more, whole; nothing holds it after that."""

    def __init__(self, loaded: LoadedModel | None) -> None:
        self._loaded = loaded

    def take(self, dtype: str) -> LoadedModel | None:
        """Return the model, where it is in memory in that dtype, and forget it."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or loaded.weights is not None:
            return None
        return loaded if str(loaded.model.dtype).removeprefix("torch.") == dtype else None


def read_config(directory: Path) -> PreTrainedConfig:
    """Load a checkpoint's config as transformers' class; raise UnsupportedError where it has none."""
    with config_errors_named(directory):
        config = load_config(directory)
        check_methods(config, directory)
    return config


def default_device() -> torch.device:
    """Return this process's CUDA device where there is one, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def load_model(
    directory: Path,
    *,
    dtype: str | None = None,
    device: torch.device | None = None,
    placement: Placement | None = None,
) -> LoadedModel:
    """Load a checkpoint directory, whole or (with a placement) with its weights left on disk.

    dtype: "float32", "float16" or "bfloat16"; None means float32 on a CPU and the stored dtype
    elsewhere. Raises CheckpointError where transformers cannot load it.
    """
    import torch

    if placement is not None and placement.parallel:
        return _load_share(directory, dtype)
    if placement is not None:
        with _load_errors_named(directory):
            streamed, weights, report, main = stream_model(directory, dtype, placement)
        return LoadedModel(streamed, report, main, weights)
    device = device or default_device()
    chosen: Any = (
        getattr(torch, dtype) if dtype else ("auto" if device.type != "cpu" else torch.float32)
    )
    with _load_errors_named(directory):
        model, report = load_pretrained(directory, dtype=chosen)
    return LoadedModel(model.eval().to(device), report, device)


def _load_share(directory: Path, dtype: str | None) -> LoadedModel:
    """Load this process's share of every layer; raise UnsupportedError where it cannot be divided."""
    import torch
    from transformers.distributed import DistributedConfig

    config = read_config(directory).get_text_config()
    device, processes = default_device(), count()
    heads = [getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")]
    if not getattr(config, "base_model_tp_plan", None):
        raise UnsupportedError(
            f"transformers has no plan to shard {config.model_type} by layers; give --device-map auto"
        )
    if any(number is not None and number % processes for number in heads):
        raise UnsupportedError(
            f"{heads[0]} attention heads ({heads[1]} of keys) cannot be divided among {processes} "
            "processes; start fewer, or give --device-map auto"
        )
    chosen: Any = dtype or ("auto" if device.type != "cpu" else "float32")
    options = {
        "dtype": chosen if chosen == "auto" else getattr(torch, chosen),
        "distributed_config": DistributedConfig(tp_size=processes),
    }
    with _load_errors_named(directory):
        model, report = load_pretrained(directory, **options)
    return LoadedModel(model.eval(), report, device)


@contextmanager
def _load_errors_named(directory: Path) -> Iterator[None]:
    """Turn whatever loading a stranger's checkpoint raises into one line; running out of memory too."""
    try:
        yield
    except BakeError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot load {directory.name}: {explain_briefly(error)}"
        ) from None


class ForwardBatch(Protocol):
    """Anything that knows the keyword arguments of a model's forward."""

    def inputs(self, device: Any = "cpu") -> dict[str, torch.Tensor]:
        """Return them, on a device."""
        ...


B = TypeVar("B", bound=ForwardBatch)


class _LayersDone(BaseException):
    """Raised inside a forward once the last layer that is needed has run."""


def run_layers(
    loaded: LoadedModel,
    batches: Iterable[B],
    last: nn.Module,
    before: Callable[[B], None],
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


def compute_logits(
    loaded: LoadedModel, batches: Iterable[TokenBatch], folder: Path | None = None
) -> list[torch.Tensor]:
    """Return the logits of every text, in the texts' order: each (positions, vocabulary), float32, CPU.

    With a folder they are memory maps of files there, which the kernel can drop from memory.
    """
    import torch

    logits: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches:
            output = loaded.model(**batch.inputs(loaded.device), use_cache=False).logits
            for row, index in enumerate(batch.indices):
                kept = batch.attention_mask[row].bool()
                values = output[row][kept.to(output.device)].float().cpu()
                logits[index] = values if folder is None else _on_disk(values, folder, index)
            del output
    return [logits[index] for index in sorted(logits)]


def _on_disk(values: torch.Tensor, folder: Path, index: int) -> torch.Tensor:
    import torch

    path = folder / f"{index}.logits"
    mapped = torch.from_file(str(path), shared=True, size=values.numel(), dtype=values.dtype)
    return mapped.view(values.shape).copy_(values)


def last_logits(
    loaded: LoadedModel, tokens: torch.Tensor, keep: int, **keywords: Any
) -> tuple[torch.Tensor, Any]:
    """Run tokens (rows, positions); return (logits (rows, keep, vocabulary) of the last positions, output).

    The LM head, a quarter of a small model's work, runs on those positions only where the architecture can.
    """
    known = inspect.signature(loaded.model.forward).parameters
    options = {"logits_to_keep": keep} if "logits_to_keep" in known else {}
    output = loaded.model(tokens.to(loaded.device), **options, **keywords)
    return output.logits[:, -keep:], output


class Decoding:
    """Rows of one length that are continued token by token, with a key-value cache where the model has one.

    prompts: (rows, positions). Raises PromptError where the model has too few positions for them and
    `new_tokens`, of which learned ones end in an index error, or on a GPU in worse.
    """

    def __init__(self, loaded: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> None:
        limit, length = position_limit(loaded.config), prompts.shape[1]
        if limit is not None and length + new_tokens > limit:
            raise PromptError(
                f"a prompt of {length} tokens and {new_tokens} new ones do not fit the model's {limit} "
                f"positions: shorten one of them"
            )
        self.loaded = loaded
        self._tokens = prompts.to(loaded.device)
        self._cache: dict[str, Any] = {}

    def logits(self) -> torch.Tensor:
        """Run what is new; return the next token's logits (rows, vocabulary), float32 on the CPU."""
        import torch

        with torch.no_grad():
            logits, output = last_logits(
                self.loaded, self._tokens, 1, use_cache=True, **self._cache
            )
        self._cache = find_cache(output)
        return logits[:, -1].float().cpu()

    def append(self, picked: torch.Tensor) -> None:
        """Take the tokens (rows,) that follow."""
        import torch

        new = picked[:, None].to(self.loaded.device)
        self._tokens = new if self._cache else torch.cat([self._tokens, new], dim=1)


def decode(
    loaded: LoadedModel,
    prompts: torch.Tensor,
    new_tokens: int,
    choose: Callable[[torch.Tensor, int], torch.Tensor],
) -> torch.Tensor:
    """Continue prompts of one length, see `Decoding`; return (rows, new_tokens) on the CPU.

    choose: (logits (rows, vocabulary) float32 on the CPU, step) → (rows,) token ids.
    """
    import torch

    decoding = Decoding(loaded, prompts, new_tokens)
    chosen: list[torch.Tensor] = []
    for step in range(new_tokens):
        chosen.append(choose(decoding.logits(), step))
        decoding.append(chosen[-1])
    return torch.stack(chosen, dim=1)


def find_cache(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return {its name: the key-value cache} of a model's output or keywords; {} where there is none.

    transformers calls it `cache` from 5.24 on, and warns of the older name.
    """
    return next(({name: values[name]} for name in CACHES if values.get(name) is not None), {})


def continue_greedily(
    loaded: LoadedModel, prompts: Sequence[tuple[int, ...]], new_tokens: int
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, exactly `new_tokens` token ids.

    Prompts of one length go through together.
    """
    import torch

    found: dict[int, list[int]] = {}
    for length in {len(prompt) for prompt in prompts}:
        rows = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        tokens = torch.tensor([prompts[index] for index in rows])
        drawn = decode(loaded, tokens, new_tokens, lambda logits, _step: logits.argmax(dim=-1))
        found.update(zip(rows, drawn.tolist(), strict=True))
    return [found[index] for index in range(len(prompts))]


def choose_greedily(
    loaded: LoadedModel, prompts: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Return the most likely token at each place of given continuations, in one forward a prompt.

    It equals the given continuation exactly where the model would have continued so by itself.
    """
    import torch

    choices = []
    with torch.no_grad():
        for prompt, continuation in zip(prompts, continuations, strict=True):
            ids = torch.tensor([[*prompt, *continuation]], device=loaded.device)
            logits = loaded.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            choices.append(logits.argmax(dim=-1).tolist())
    return choices
