"""What the page does, without a page: answers, costs, recipes, for whatever its knobs say."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bake.errors import BakeError
from bake.live.hear import Session, describe_figures
from bake.live.knobs import make_voices
from bake.live.steering import USUAL_COST, Setting, Steering
from bake.live.talk import Talk
from bake.live.writing import Continuation, Style, Voice
from bake.support.text import list_numbers, without_controls

Messages = list[dict[str, Any]]
LAYER_CURVE = Path("figures") / "layer-curve.png"  # beside a recipe of bake tune


@dataclass(frozen=True)
class Figures:
    """What stands over the two columns: the names of the voices, with what they did so far."""

    base: str
    other: str


@dataclass(frozen=True)
class Stage:
    """A session that a page shows. curve: a picture of what each layer does, where there is one.

    One thing at a time: the hooks of two answers must not meet.
    """

    session: Session
    title: str
    curve: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def steering(self) -> Steering | None:
        """What the knobs turn; None where a bake stands beside its base."""
        return self.session.knobs.steering if self.session.knobs else None

    @property
    def multiplier(self) -> float:
        """The strength that the page begins with."""
        knobs = self.session.knobs
        return next((m for m in reversed(knobs.multipliers) if m), 1.0) if knobs else 1.0

    @property
    def is_chat(self) -> bool:
        """Whether what is typed is a message; else it is text that is continued."""
        return self.session.talk.is_chat

    def voices(self, setting: Setting | None) -> Sequence[Voice]:
        """Return base and other, at a setting of the knobs."""
        if self.steering is None:
            return self.session.talk.voices
        setting = setting or Setting(self.multiplier)
        base, other = make_voices(self.steering, [replace(setting, multiplier=0.0), setting])
        # At m = 0 there are two columns all the same.
        return base, Voice(replace(other.arm, name=f"m = {setting.multiplier:g}"), other.loaded)

    def answer(
        self,
        text: str,
        before: Sequence[Messages],
        setting: Setting | None,
        style: Style,
    ) -> Iterator[tuple[Messages, Messages, Figures]]:
        """Answer a message in both columns, token by token: (left, right, what stands over them).

        before: what both columns hold already, messages with role and content. Both go through in one
        batch as long as their conversations are of one length. Raises BakeError.
        """
        style.check()
        if not text.strip():
            raise BakeError("nothing was typed")
        talk = self.session.talk
        with self._lock:
            voices = self.voices(setting)
        fresh = Talk(talk.base, voices, style, talk.chat_template, talk.system)
        fresh.number = len(before[0]) // 2  # The same words at the same place draw the same noise.
        fresh.recall(before)
        asked = {"role": "user", "content": text}
        answers = fresh.ask(text)
        try:
            while True:
                with self._lock:
                    heard = next(answers, None)
                if heard is None:
                    return
                left, right = (
                    [*said, asked, {"role": "assistant", "content": without_controls(each.text)}]
                    for said, each in zip(before, heard, strict=True)
                )
                yield left, right, Figures(*map(_name, heard))
        finally:
            with self._lock:
                answers.close()

    def names(self, setting: Setting | None) -> Figures:
        """Return what stands over the columns before anything is said."""
        with self._lock:
            base, other = self.voices(setting)
        return Figures(base.name, other.name)

    def cost(self, setting: Setting) -> str:
        """Say where a setting pushes, how hard, and what that costs on neutral text."""
        steering = self.steering
        assert steering is not None
        with self._lock:
            push = steering.push(setting)
            if push is None:
                return "m = 0 is the base."
            (kl,) = steering.neutral_costs([setting])
        layers = list_numbers(entry.layer for entry in push.layers)
        influence = max(entry.relative_influence for entry in push.layers)
        judged = (
            "gentle" if kl < USUAL_COST / 3 else "usual" if kl <= 1.3 * USUAL_COST else "strong"
        )
        return (
            f"**KL on neutral text {kl:.2g} nats** ({judged}; about {USUAL_COST:g} is what bake export "
            f"aims at). At {steering.site}, layers {layers}; the push is up to {influence:.0%} as long as "
            "the activations."
        )

    def command(self, setting: Setting) -> str:
        """Return the line that bakes a setting."""
        assert self.steering is not None
        with self._lock:
            return self.steering.command(setting)

    def recipe(self, setting: Setting) -> str:
        """Return the recipe of a setting."""
        assert self.steering is not None
        with self._lock:
            return self.steering.recipe_text(setting)


def make_setting(
    multiplier: float,
    band: tuple[float, float] | None,
    layers: str,
    strengths: Sequence[float],
) -> Setting:
    """Return what the page's knobs say; layers win over a band where some are given."""
    named, sizes = layers.strip(), tuple(float(each) for each in strengths)
    written = None if named or band is None else f"{band[0]:g}:{band[1]:g}"
    return Setting(float(multiplier), written, named or None, sizes)


def find_curve(recipe: str | None) -> Path | None:
    """Return the picture of bake tune that lies beside a recipe; None where there is none."""
    path = Path(recipe).expanduser().parent / LAYER_CURVE if recipe else None
    return path if path is not None and path.is_file() else None


def _name(heard: Continuation) -> str:
    return f"{heard.voice.name} · {describe_figures(heard)}" if heard.tokens else heard.voice.name
