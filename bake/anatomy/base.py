"""A base that has been opened and examined: what every command starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from bake.anatomy import Anatomy, examine
from bake.checkpoint.checkpoint import Checkpoint, is_path, open_checkpoint
from bake.checkpoint.licences import read_licence
from bake.checkpoint.quantization import check_quantization
from bake.engines.survival import find_rotation
from bake.errors import CheckpointError, UnsupportedError
from bake.io.shipped import DEMO_MODEL, DEMO_NAME, find_model
from bake.models.forward import LanguageModel, load_model, read_config
from bake.models.streaming import Placement
from bake.support.text import one_line
from bake.support.timing import Stopwatch
from bake.texts.prompts import load_tokenizer
from bake.texts.protocols import Tokenizer


@dataclass(frozen=True)
class Base:
    """A base that has been opened and examined: what every command starts from.

    on_hub: which model on the Hub a local one is, see `bake.hub.identify_base`; None where nobody said.
    """

    checkpoint: Checkpoint
    anatomy: Anatomy
    on_hub: Mapping[str, Any] | None = None

    def named(self) -> dict[str, Any]:
        """Return what names the base in a bake: as `to_dict`, or the id that the user gave a local one."""
        if self.on_hub is None or self.on_hub["revision"]:
            return dict(self.on_hub or self.to_dict())
        return {**self.to_dict(), **self.on_hub}

    def to_dict(self) -> dict[str, Any]:
        """Return what names the base by itself: never a local path.

        A local base is named by its directory and by a hash of what its headers and config say.
        """
        if self.checkpoint.source.resolve() == DEMO_MODEL.resolve():
            return {"id": DEMO_NAME, "revision": None}
        identity = {"id": self.checkpoint.model_id, "revision": self.checkpoint.revision}
        if self.checkpoint.revision:
            return identity
        return {**identity, "headers_sha256": self.checkpoint.headers_sha256}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer. Raises CheckpointError where it has none that loads and runs no code."""
        return load_tokenizer(self.checkpoint.directory)

    @cached_property
    def licence(self) -> dict[str, Any]:
        """What the base's card says of its licence, see `licences`; unreadable, it is announced."""
        return read_licence(self.checkpoint.source, self.checkpoint.companions)

    def stat_files(self) -> list[tuple[str, int, int]]:
        """Return name, bytes and time (ns) of every file of the checkpoint: what tells that one changed."""
        files = sorted(path for path in self.checkpoint.source.iterdir() if path.is_file())
        stats = [(path.name, path.stat()) for path in files]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


@dataclass(frozen=True)
class BaseInMemory:
    """A model and a tokenizer that Python holds already, examined: for what needs no files."""

    loaded: LanguageModel
    anatomy: Anatomy

    def to_dict(self) -> dict[str, Any]:
        """Return what names the model: its Hub id or its folder's name, as its config has it."""
        name = str(getattr(self.loaded.config, "name_or_path", "") or "a model in memory")
        if Path(name).exists() and Path(name).resolve() == DEMO_MODEL.resolve():
            return {"id": DEMO_NAME, "revision": None}
        if is_path(name) or Path(name).exists():
            return {"id": one_line(Path(name).name), "revision": None}
        revision = getattr(self.loaded.config, "_commit_hash", None)
        return {"id": one_line(name), "revision": revision}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that was given."""
        return self.loaded.tokenizer

    def stat_files(self) -> list[tuple[str, int, float]]:
        """Return name, size and sum of every parameter: what tells that one changed."""
        return [
            (name, each.numel(), float(each.detach().double().sum()))
            for name, each in self.loaded.model.named_parameters()
        ]


def _device_of(model: Any) -> Any:
    """Return where a model takes its inputs: where the first part runs of one that is spread."""
    import torch

    hook = getattr(model, "_hf_hook", None)
    found = getattr(hook, "execution_device", None)
    if found is None:
        held = (each.device for each in model.parameters() if each.device.type != "meta")
        found = next(held, "cpu")
    return torch.device(found)


def check_not_compiled(model: Any) -> None:
    """Raise UnsupportedError for a model of torch.compile, whose graph takes no notice of new hooks.

    model: by itself, or with its tokenizer; what is no module is left alone.
    """
    from torch import nn

    for each in model if isinstance(model, tuple | list) else (model,):
        modules = each.modules() if isinstance(each, nn.Module) else ()
        if any(_is_compiled(module) for module in modules):
            raise UnsupportedError(
                "the model is compiled (torch.compile), and its graph takes no notice of hooks: give one "
                "that is not, or bake the direction, which needs no hooks"
            )


def _is_compiled(module: Any) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
    )


AnyBase = Base | BaseInMemory
MODEL_IN_MEMORY = "(model, tokenizer)"


def take_base(given: Any) -> BaseInMemory:
    """Return a base from (model, tokenizer), both transformers'; the model is used as it is.

    Raises UnsupportedError for another kind of object, a model in training mode, and one without the
    decoder that its config describes, such as a PEFT adapter around it.
    """
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    check_not_compiled(given)
    pair = given if isinstance(given, tuple | list) and len(given) == 2 else (None, None)
    model, tokenizer = pair
    if not isinstance(model, PreTrainedModel) or not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UnsupportedError(
            f"a model is a path, a Hub id, or {MODEL_IN_MEMORY} of transformers, not "
            f"{type(given).__name__}"
        )
    if model.training:
        raise UnsupportedError("the model is in training mode; call model.eval() first")
    anatomy = examine(model.config)
    try:
        model.get_submodule(anatomy.structure.layers)
    except AttributeError:
        raise UnsupportedError(
            f"the model has no {anatomy.structure.layers}, where {anatomy.model_type} has its layers; "
            "give the transformers model itself"
        ) from None
    device = _device_of(model)
    loaded = LanguageModel(
        model,
        {},
        device,
        structure=anatomy.structure,
        tokenizer=cast("Tokenizer", tokenizer),
    )
    return BaseInMemory(loaded, anatomy)


def open_any(
    model: Any,
    revision: str | None = None,
    clock: Stopwatch | None = None,
    *,
    briefly: bool = False,
) -> AnyBase:
    """Return the base that a user's MODEL means: a path, a Hub id, or (model, tokenizer).

    briefly: as for `examine`.
    """
    if isinstance(model, str | Path):
        return open_base(str(model), revision, clock, briefly=briefly)
    return take_base(model)


def open_base(
    model: str,
    revision: str | None = None,
    clock: Stopwatch | None = None,
    *,
    headers_only: bool = False,
    briefly: bool = False,
) -> Base:
    """Open a checkpoint and examine its architecture, on headers and the twin alone.

    headers_only: weights that are on the Hub stay there. briefly: as for `examine`.
    """
    clock = clock or Stopwatch()
    with clock.stage("checkpoint"):
        checkpoint = open_checkpoint(
            find_model(model), revision=revision, headers_only=headers_only
        )
        check_quantization(checkpoint.config, checkpoint.model_id, checkpoint.directory)
    with clock.stage("anatomy"):
        anatomy = examine(read_config(checkpoint.directory), briefly=briefly)
    return Base(checkpoint, replace(anatomy, rotation=find_rotation(checkpoint.config)))


def load_base(base: AnyBase, placement: Placement | None = None) -> LanguageModel:
    """Load the base; refuse one whose weights are incomplete, which transformers fills at random."""
    if isinstance(base, BaseInMemory):
        return base.loaded
    checkpoint, tokenizer = base.checkpoint, base.tokenizer  # the cheap part first
    loaded = load_model(checkpoint.directory, placement=placement)
    missing = loaded.report["missing_keys"] + loaded.report["mismatched_keys"]
    if missing:
        raise CheckpointError(
            f"{checkpoint.model_id} lacks weights that its architecture needs ({missing[0]}); "
            f"transformers would fill them at random, so it cannot be measured"
        )
    return LanguageModel(
        loaded.model,
        loaded.report,
        loaded.device,
        loaded.weights,
        structure=base.anatomy.structure,
        tokenizer=tokenizer,
    )
