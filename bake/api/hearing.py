"""Hear a direction before it is baked: side by side, around a model that Python holds, on a page."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.api.given import GivenPairs, GivenTexts, Model, as_files
from bake.errors import BakeError, UnsupportedError
from bake.options.documentation import documented
from bake.options.live import HEAR, SPACE, STEER

if TYPE_CHECKING:
    from bake.live.handle import Steered
    from bake.live.hear import Heard
    from bake.play.space import WrittenSpace
    from bake.strength.norms import ActivationNorms

# Options that are not a recipe's.
_OWN = ("multipliers", "system", "base")
_STYLE = {"new_tokens": "new_tokens", "temperature": "temperature", "sampling_seed": "seed"}


@contextmanager
def session_options(
    options: Mapping[str, Any],
) -> Iterator[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Yield (model, options of a recipe that are given, the others), as `open_session` takes them."""
    from bake.live.writing import Style

    with as_files({name: value for name, value in options.items() if name != "model"}) as given:
        style = {_STYLE[name]: given.pop(name) for name in tuple(given) if name in _STYLE}
        own = {name: given.pop(name) for name in tuple(given) if name in _OWN}
        yield options.get("model", ""), given, {**own, "style": Style(**style)}


@documented(HEAR)
def hear(
    model: Model,
    texts: str | Sequence[str],
    *,
    multipliers: Sequence[float] | None = None,
    base: str | None = None,
    revision: str | None = None,
    new_tokens: int = 60,
    temperature: float = 0.7,
    sampling_seed: int = 0,
    system: str | None = None,
    direction: Any = None,
    orthogonalize: bool = False,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: GivenPairs | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    law: str = "inverse-sqrt-d",
    coefficients: str | Mapping[int, float] | None = None,
    prompts: GivenTexts = "neutral",
    calibration: str | Path | None = None,
    statistic: str = "mean",
    band: str | tuple[float, float] = "40:90",
    layers: str | int | Sequence[int] | None = None,
    site: str = "auto",
    route: str = "auto",
    slot: str | None = None,
    target: str | None = None,
    convert_site: bool = False,
    device_map: str | None = None,
    max_memory: str | None = None,
) -> Heard:
    """Continue prompts at several strengths, or by a bake and its base, side by side: `bake try`.

    The prompts are one conversation where the model has a chat template. A model can also be
    (model, tokenizer), a direction and pairs whatever `export` takes. Raises a BakeError that names what
    is wrong.
    """
    options = _that_differ(hear, locals())
    said = [texts] if isinstance(texts, str) else list(texts)
    options.pop("texts", None)
    from bake.live.hear import hear as run

    with session_options(options) as (opened, given, own):
        return run(opened, said, given, **own)


@documented(STEER)
def steer(
    model: Any,
    direction: Any = None,
    *,
    multiplier: float = 1.0,
    tokenizer: Any = None,
    norms: ActivationNorms | str | Path | None = None,
    orthogonalize: bool = False,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    keep_scale: bool = False,
    pairs: GivenPairs | None = None,
    method: str = "mean",
    token: str | int = "last",
    from_layer: int | None = None,
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    law: str = "inverse-sqrt-d",
    coefficients: str | Mapping[int, float] | None = None,
    prompts: GivenTexts = "neutral",
    statistic: str = "mean",
    band: str | tuple[float, float] = "40:90",
    layers: str | int | Sequence[int] | None = None,
    site: str = "auto",
    route: str = "auto",
    slot: str | None = None,
    target: str | None = None,
    convert_site: bool = False,
) -> Steered:
    """Steer a model of transformers that is in memory, by the hooks that a bake is proven against.

    Set `.multiplier` of what is returned to turn it and call `.remove()` to take the hooks away; in a
    `with` statement, where it is also called `steered`, they go at its end:

        with bake.steered(model, direction, multiplier=0.5, tokenizer=tokenizer):
            model.generate(...)

    The activation norms are measured on `prompts`, unless `norms` has them. Raises UnsupportedError for a
    model that is compiled, and where `bake export` would.
    """
    options = _that_differ(steer, locals())
    for name in ("model", "multiplier", "tokenizer", "norms"):
        options.pop(name, None)
    from bake.live.handle import steer as run

    pair = _with_tokenizer(model, tokenizer)
    named = str | Path | None
    objects = ("direction", "pairs", "held_out", "prompts")
    unnamed = {name for name in objects if not isinstance(options.get(name), named)}
    with as_files(options) as given:
        return run(pair, given, multiplier, norms, frozenset(unnamed))


steered = steer


@documented(SPACE)
def space(
    model: str | Path,
    *,
    output: str | Path,
    play: bool = False,
    title: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
) -> WrittenSpace:
    """Write a folder that is a Hugging Face Space of a published bake; publish it where that is asked."""
    from bake.play.space import publish_space, write_space

    if (public or commit_message) and push_to_hub is None:
        idle = "--public" if public else "--commit-message"
        raise BakeError(f"{idle} is about publishing; give --push-to-hub REPO_ID with it")
    written = write_space(str(model), Path(output), revision=revision, play=play, title=title)
    if push_to_hub is None:
        return written
    publication = publish_space(
        written, push_to_hub, private=not public, commit_message=commit_message
    )
    return replace(written, publication=publication)


def _that_differ(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not at their defaults: those that were given."""
    parameters = inspect.signature(function).parameters
    return {
        name: value
        for name, value in options.items()
        if parameters[name].default is not value and not _same(parameters[name].default, value)
    }


def _same(default: Any, value: Any) -> bool:
    plain = str | int | float | bool | None
    return isinstance(value, plain) and bool(value == default)


def _with_tokenizer(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer); the tokenizer that the model's name has, where none is given."""
    if isinstance(model, tuple | list) and len(model) == 2 and tokenizer is None:
        return model[0], model[1]
    if tokenizer is not None:
        return model, tokenizer
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if not name:
        raise UnsupportedError(
            f"a {type(model).__name__} has no name to find its tokenizer by; give tokenizer=…, and a "
            "transformers model"
        )
    from bake.checkpoint.checkpoint import open_description
    from bake.io.shipped import find_model
    from bake.texts.prompts import load_tokenizer

    return model, load_tokenizer(open_description(find_model(name)))
