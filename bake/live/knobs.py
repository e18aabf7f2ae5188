"""The knobs of `bake try`: which strengths are heard side by side, and where they push."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bake.errors import BakeError
from bake.io.atomic import check_file, write_file
from bake.live.steering import Setting, Steering
from bake.live.talk import Talk
from bake.live.writing import Voice
from bake.options.sweep import read_numbers
from bake.support.text import did_you_mean

HELP = """\
/m 0.7, /m -1,0,1      strengths, side by side; 0 is the base
/layers 10-14          the layers that are pushed
/band 40:90            the same in per cent of the depth
/reset                 forget what was said
/save recipe.yaml      the strength that is heard, as bake export --recipe takes it
/quit                  or Ctrl-D"""


class Knobs:
    """Strengths and layers, turned by lines that begin with a slash."""

    def __init__(self, talk: Talk, steering: Steering, multipliers: Sequence[float]) -> None:
        self.talk, self.steering = talk, steering
        self.multipliers = tuple(multipliers)
        self.place = Setting(1.0)

    def settings(self, multipliers: Sequence[float] | None = None) -> list[Setting]:
        """Return the setting of every strength that is heard."""
        sizes = self.multipliers if multipliers is None else multipliers
        return [Setting(size, self.place.band, self.place.layers) for size in sizes]

    def obey(self, line: str) -> str:
        """Do what a line asks for; return what is said to that. Raises BakeError, and nothing is turned."""
        word, _, given = line.strip().partition(" ")
        known: dict[str, Callable[[str], str]] = {
            "/m": self._strengths,
            "/layers": self._layers,
            "/band": self._band,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: HELP,
        }
        if word not in known:
            hint = did_you_mean(word, known) or f"; there are {', '.join(known)}, /quit"
            raise BakeError(f"no such command: {word}{hint}")
        return known[word](given.strip())

    def _strengths(self, given: str) -> str:
        try:
            multipliers = beside_base(read_numbers(given))
        except ValueError:
            raise BakeError(f"/m {given}: give numbers, such as /m 0.7 or /m -1,0,1") from None
        return self._turn(multipliers, self.place)

    def _layers(self, given: str) -> str:
        if not given:
            raise BakeError("/layers needs layers, such as /layers 10-14")
        return self._turn(self.multipliers, Setting(1.0, layers=given))

    def _band(self, given: str) -> str:
        if not given:
            raise BakeError("/band needs a band, such as /band 40:90")
        return self._turn(self.multipliers, Setting(1.0, band=given))

    def _turn(self, multipliers: Sequence[float], place: Setting) -> str:
        settings = [Setting(size, place.band, place.layers) for size in multipliers]
        voices = make_voices(self.steering, settings)
        self.multipliers, self.place = tuple(multipliers), place
        self.talk.reset(voices)
        return f"{self.describe()}; a new conversation"

    def _reset(self, _: str) -> str:
        self.talk.reset()
        return "a new conversation"

    def _save(self, given: str) -> str:
        if not given:
            raise BakeError("/save needs a file, such as /save recipe.yaml")
        pushed = [setting for setting in self.settings() if setting.multiplier]
        if len(pushed) != 1:
            raise BakeError("a recipe has one strength: choose it first, such as /m 0.7")
        path = Path(given).expanduser()
        check_file(path)
        write_file(path, self.steering.recipe_text(pushed[0]).encode())
        return f"written: bake export --recipe {given}"

    def describe(self) -> str:
        """Say what is heard, and where it pushes."""
        from bake.support.text import list_numbers

        strengths = ", ".join(f"{size:g}" for size in self.multipliers)
        pushed = next((size for size in self.multipliers if size), None)
        if pushed is None:
            return "m = 0: the base alone"
        push = self.steering.push(Setting(pushed, self.place.band, self.place.layers))
        assert push is not None
        layers = list_numbers(entry.layer for entry in push.layers)
        return f"m = {strengths} at {self.steering.site}, layers {layers}"


def beside_base(multipliers: Sequence[float]) -> tuple[float, ...]:
    """Return strengths to hear side by side: one alone stands beside the base, and none comes twice."""
    sizes = tuple(dict.fromkeys(multipliers))
    return (0.0, *sizes) if len(sizes) == 1 and sizes[0] else sizes


def make_voices(steering: Steering, settings: Sequence[Setting]) -> list[Voice]:
    """Return a voice for every setting, on the one model."""
    return [Voice(steering.arm(setting), steering.loaded) for setting in settings]
