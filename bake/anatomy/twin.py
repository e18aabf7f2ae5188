"""The twin: a small random model of the same architecture, on which every route is proven.

A route is believed when, on the twin, a zero push changes nothing, a real push equals the hook, and
the saved model reloads cleanly. What is tried here costs milliseconds; what it saves is a checkpoint
of many gigabytes that reloads as the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from bake.anatomy.flags import with_flags
from bake.anatomy.shrink import shrink
from bake.anatomy.tables import LAYERS, VOCABULARY
from bake.anatomy.wrappers import prepare_wrapper
from bake.checkpoint.loading import build_model, build_on_meta, load_pretrained, quiet_transformers
from bake.checkpoint.quantization import without_quantization
from bake.errors import UnsupportedError
from bake.hooks import steered
from bake.io.work_directory import temporary_directory
from bake.models.forward import LoadedModel, compute_logits
from bake.models.padding import CAUSE, PaddingError, compare_padding, plan_trial
from bake.sites import LayerStructure, Slot

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig

    from bake.anatomy.erasure import Edits
    from bake.anatomy.rewriting import Rewriter, Rewritten
    from bake.checkpoint.checkpoint import Checkpoint
    from bake.texts.prompts import TokenBatch

    # From a mask (texts, positions), None for everywhere, to the hooks that add the push there.
    Hooks = Callable[[torch.Tensor | None], AbstractContextManager[None]]

MAX_PARAMETERS = 5_000_000
# Relative to the largest logit, float32. A rewritten twin may multiply apart what was one matrix, and
# then sums in another order.
ZERO_PUSH_TOLERANCE = 5e-6
PUSH_TOLERANCE = 1e-4  # relative to the largest effect, float32
GREEDY_TOKENS = 10


# What the constructors and forwards of 190 architectures raise when a shrunk configuration does not suit
# them. Each is a refusal with its reason, never a crash; what they hide is said in the message.
TWIN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def one_line(error: Exception) -> str:
    """Return an error's type and the start of its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


@dataclass(frozen=True)
class TwinVerdict:
    """What the twin showed: relative errors in float32, and whether the reload was clean.

    zero_push_error: max|Δlogit| / max|logit| with every new bias zero. push_error: max|baked − hooked|
    / max|hooked − base|. effect: max|hooked − base| in units of the logits' standard deviation.
    greedy_equal: whether the reloaded twin continues the first text with the same tokens as the hooked.
    padding: {how batches are padded: what that does at real tokens, relative to the effect}.
    """

    zero_push_error: float
    push_error: float
    effect: float
    reload_clean: bool
    greedy_equal: bool
    padding: Mapping[str, PaddingError] = field(default_factory=dict)

    @property
    def leaks(self) -> Mapping[str, PaddingError]:
        """The ways of padding that reach real tokens more than the base's own does."""
        return {
            name: found for name, found in self.padding.items() if found.is_beyond(PUSH_TOLERANCE)
        }

    @property
    def passed(self) -> bool:
        """Whether the route is exact on the twin."""
        return (
            self.zero_push_error <= ZERO_PUSH_TOLERANCE
            and self.push_error <= PUSH_TOLERANCE
            and self.effect > 1e-3
            and self.reload_clean
            and self.greedy_equal
            and not self.leaks
        )

    @property
    def reason(self) -> str | None:
        """Why the route is refused; None when it passed."""
        if self.passed:
            return None
        if not self.reload_clean:
            return "the saved twin does not reload cleanly"
        if self.zero_push_error > ZERO_PUSH_TOLERANCE:
            return f"on the twin a zero push moves the logits by {self.zero_push_error:.1e}"
        if self.effect <= 1e-3:
            return "on the twin the hook has no effect"
        if self.push_error <= PUSH_TOLERANCE and not self.greedy_equal:
            return "on the twin greedy continuations differ from the hook's"
        if self.leaks:
            name, found = max(self.leaks.items(), key=lambda item: item[1].leak)
            side = name.partition(",")[0]
            return (
                f"{CAUSE} (padded on the {side}, the twin moves by {found.leak:.1e} of the effect)"
            )
        return f"on the twin the baked push differs from the hook by {self.push_error:.1e} of its effect"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for `bake.json`."""
        return {**asdict(self), "passed": self.passed}


class Twin:
    """A small random float32 model of a config's architecture, with its token ids and base logits."""

    def __init__(
        self, config: PreTrainedConfig, seed: int = 0, keep: Sequence[int] = range(LAYERS)
    ) -> None:
        """Build the twin; `keep` has the real model's layers that its own are to be like."""
        import torch

        self.config = small_config(config, keep)
        size = sum(parameter.numel() for parameter in build_on_meta(self.config).parameters())
        if size > MAX_PARAMETERS:
            raise UnsupportedError(
                f"{config.model_type}: its configuration does not shrink ({size / 1e6:.0f} million "
                f"parameters are left), so no twin can prove a route"
            )
        self.model = build_random(self.config, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        self.input_ids = torch.randint(3, VOCABULARY, (2, 12), generator=generator)
        self.logits = self.run(self.model)

    def run(
        self,
        model: nn.Module,
        context: AbstractContextManager[None] | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits (batch, positions, vocabulary) of the twin's tokens, float32."""
        import torch

        given = self.input_ids if input_ids is None else input_ids
        with torch.no_grad(), context or nullcontext():
            logits: torch.Tensor = model(input_ids=given, use_cache=False).logits
        return logits.float()

    def continue_greedily(
        self, model: nn.Module, context: AbstractContextManager[None] | None = None
    ) -> torch.Tensor:
        """Return the first text with its greedy continuation, (1, positions + GREEDY_TOKENS)."""
        import torch

        ids = self.input_ids[:1]
        with context or nullcontext():
            for _ in range(GREEDY_TOKENS):
                following = self.run(model, input_ids=ids)[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], dim=1)
        return ids

    def with_flags(self, flags: Mapping[str, Any]) -> nn.Module:
        """Return the twin with the flags set: the same weights, every new bias zero."""
        import torch

        with quiet_transformers():
            model = build_model(with_flags(self.config, flags))
        model.eval()
        old = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers())
        with torch.no_grad():
            for name, parameter in model.named_parameters(remove_duplicate=False):
                parameter.copy_(old[name]) if name in old else parameter.zero_()
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        return model

    def prove(
        self,
        structure: LayerStructure,
        site: str,
        flags: Mapping[str, Any],
        slots: Mapping[int, Sequence[Slot]],
    ) -> TwinVerdict:
        """Fold a random push into `slots` on every layer they cover, reload, and compare with the hook."""
        import torch

        generator = torch.Generator().manual_seed(7)
        push = {layer: torch.randn(self.hidden_size, generator=generator) * 0.5 for layer in slots}
        flagged = self.with_flags(flags)
        unpushed, clean_before = self._reload(flagged)
        fold(flagged, slots, push)
        baked, clean_after = self._reload(flagged)
        hooks = self._hooks(structure, site, push)
        return self._judge(unpushed, baked, clean_before and clean_after, hooks)

    def prove_rewriting(
        self, structure: LayerStructure, site: str, rewriter: Rewriter, layers: Sequence[int]
    ) -> TwinVerdict:
        """Write the twin to disk, rewrite it as the real checkpoint would be, and compare with the hook.

        Raises what the rewriter, the writer and transformers raise for a rewriting that does not fit.
        """
        import torch

        from bake.checkpoint.checkpoint import open_checkpoint

        generator = torch.Generator().manual_seed(7)
        push = {layer: torch.randn(self.hidden_size, generator=generator) * 0.5 for layer in layers}
        with temporary_directory("bake-twin-") as directory:
            with quiet_transformers():
                self.model.save_pretrained(directory / "twin")  # type: ignore[operator]
            checkpoint = open_checkpoint(str(directory / "twin"))
            rewritten = rewriter.rewrite(checkpoint, self.config, layers)
            results = []
            for name, vectors in (("unpushed", {}), ("pushed", push)):
                target = directory / name
                _write_rewritten(checkpoint, rewritten, vectors, target)
                results.append(self._load(target))
        (unpushed, clean_before), (baked, clean_after) = results
        hooks = self._hooks(structure, site, push)
        return self._judge(unpushed, baked, clean_before and clean_after, hooks)

    def prove_edits(self, edit: Edits, hooks: Hooks) -> TwinVerdict:
        """Write the twin to disk, edit it as the real checkpoint would be, and compare with hooks.

        Raises what the edits, the writer and transformers raise for edits that do not fit.
        """
        from bake.checkpoint.checkpoint import open_checkpoint
        from bake.checkpoint.writer import write_config, write_weights

        with temporary_directory("bake-twin-") as directory:
            with quiet_transformers():
                self.model.save_pretrained(directory / "twin")  # type: ignore[operator]
            checkpoint = open_checkpoint(str(directory / "twin"))
            unpushed, clean_before = self._load(directory / "twin")
            edits, changes = edit(checkpoint)
            target = directory / "edited"
            target.mkdir()
            write_weights(checkpoint, edits, target)
            write_config(checkpoint, changes, target)
            edited, clean_after = self._load(target)
        return self._judge(unpushed, edited, clean_before and clean_after, hooks)

    def _hooks(
        self, structure: LayerStructure, site: str, push: Mapping[int, torch.Tensor]
    ) -> Hooks:
        return lambda mask: steered(self.model, structure, site, push, mask=mask)

    def _judge(
        self, unpushed: nn.Module, baked: nn.Module, clean: bool, hooks: Hooks
    ) -> TwinVerdict:
        """Compare the reloaded models with the base and with the hooked twin."""
        import torch

        hooked = self.run(self.model, hooks(None))
        effect = _largest(hooked - self.logits)
        push_error = _largest(self.run(baked) - hooked) / max(effect, 1e-12)
        exact = push_error <= PUSH_TOLERANCE
        return TwinVerdict(
            zero_push_error=_largest(self.run(unpushed) - self.logits) / _largest(self.logits),
            push_error=push_error,
            effect=effect / self.logits.std().item(),
            reload_clean=clean,
            greedy_equal=exact
            and torch.equal(
                self.continue_greedily(baked), self.continue_greedily(self.model, hooks(None))
            ),
            padding=self._judge_padding(baked, hooks, effect) if exact else {},
        )

    def _judge_padding(
        self, baked: nn.Module, hooks: Hooks, effect: float
    ) -> Mapping[str, PaddingError]:
        """Run texts of unlike length padded and alone; see `PaddingError`, relative to the effect.

        Nothing is found of an architecture that takes no padded batch.
        """
        trial = plan_trial(self.model, self.input_ids.tolist())
        try:
            with hooks(None):
                alone = _logits_of(self.model, trial.alone)
            hooked = {}
            for name, batch in trial.padded.items():
                with hooks(batch.attention_mask):
                    hooked[name] = _logits_of(self.model, [batch])
        except (*TWIN_ERRORS, UnsupportedError):
            return {}
        return {
            name: compare_padding(alone, hooked[name], _logits_of(baked, [batch]), effect)
            for name, batch in trial.padded.items()
        }

    @cached_property
    def round_trips(self) -> bool:
        """Whether transformers saves and reloads the twin unchanged, before anything is baked."""
        reloaded, clean = self._reload(self.model)
        return clean and _largest(self.run(reloaded) - self.logits) <= (
            ZERO_PUSH_TOLERANCE * _largest(self.logits)
        )

    @property
    def hidden_size(self) -> int:
        """The width of the twin's residual stream."""
        return int(self.config.get_text_config().hidden_size)

    def _reload(self, model: nn.Module) -> tuple[nn.Module, bool]:
        with temporary_directory("bake-twin-") as directory:
            with quiet_transformers():
                model.save_pretrained(directory)  # type: ignore[operator]
            return self._load(directory)

    def _load(self, directory: Path) -> tuple[nn.Module, bool]:
        """Return what transformers loads, and whether it loads without a remark."""
        import torch

        loaded, report = load_pretrained(directory, dtype=torch.float32)
        return loaded.eval(), not any(report.values())


def small_config(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """Return the twin's config: towers of a wrapper prepared, no quantisation, everything small."""
    small = shrink(prepare_wrapper(without_quantization(config)), keep)
    small.architectures = config.architectures  # Which says whether it is a wrapper.
    return small


def build_random(config: PreTrainedConfig, seed: int) -> nn.Module:
    """Build a float32 model whose every parameter is random, biases and norms included.

    Zero-initialised biases and unit norms would hide mistakes: a wrong slot could look right. Sets
    torch's seed: call it where the random state is forked.
    """
    import torch

    torch.manual_seed(seed)
    with quiet_transformers():
        model = build_model(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            spread = (
                0.1 if parameter.ndim < 2 else 0.7 / max(8, min(parameter.shape[-1], 64)) ** 0.5
            )
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model


def fold(
    model: nn.Module, slots: Mapping[int, Sequence[Slot]], push: Mapping[int, torch.Tensor]
) -> None:
    """Add every slot's delta to a model in memory; the arithmetic that the plan does on disk."""
    import torch

    with torch.no_grad():
        for layer, layer_slots in slots.items():
            for slot in layer_slots:
                weight = model.get_parameter(slot.weight) if slot.weight else None
                bias = model.get_parameter(slot.bias)
                bias.copy_(bias.double() + slot.delta(push[layer], weight, tuple(bias.shape)))


def _write_rewritten(
    checkpoint: Checkpoint,
    rewritten: Rewritten,
    push: Mapping[int, torch.Tensor],
    target: Path,
) -> None:
    """Write a checkpoint as the writer would the real one, with the push folded in."""
    from bake.anatomy.folding import fold_push, place_push
    from bake.checkpoint.writer import write_config, write_weights

    target.mkdir()
    edits = tuple(place_push(rewritten, fold_push(rewritten, push, checkpoint.read)))
    write_weights(checkpoint, edits, target)
    write_config(checkpoint, rewritten.config_changes, target)


def _logits_of(model: nn.Module, batches: Sequence[TokenBatch]) -> list[torch.Tensor]:
    """Return the logits of every text of the batches at its real tokens."""
    import torch

    return compute_logits(LoadedModel(model, {}, torch.device("cpu")), batches)


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()
