"""A model that Python holds, steered by the hooks of the proof for as long as somebody wants."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from bake.anatomy.base import BaseInMemory, check_not_compiled, take_base
from bake.directions.direction_file import direction_bytes
from bake.directions.formats.objects import with_lengths
from bake.errors import BakeError
from bake.io.atomic import check_file, write_file
from bake.live.hear import recipe_of
from bake.live.steering import Setting, Steering, prepare
from bake.options.export import EXPORT, HOW_FOUND
from bake.pipeline.decision import read_inputs
from bake.strength.coefficients import Push
from bake.strength.norms import ActivationNorms
from bake.strength.saved_norms import read_calibration
from bake.sweeps.measured_law import MEASURED_LAW

_FINDING = EXPORT.group(HOW_FOUND)


class Steered(AbstractContextManager["Steered"]):
    """A steered model: set `multiplier` to turn it, call `remove()` to have the model as it was.

    Also a context manager, which removes it. The push is added at every position of every forward, padded
    ones included, as a baked bias is. unnamed: options that were given as objects, which no file holds.
    """

    def __init__(
        self, steering: Steering, setting: Setting, unnamed: frozenset[str] = frozenset()
    ) -> None:
        self.steering, self.unnamed = steering, unnamed
        self._setting = setting
        self._hooks: ExitStack | None = None
        self._hook(setting)

    def __repr__(self) -> str:
        state = f"m = {self.multiplier:g}" if self._hooks is not None else "removed"
        name = self.steering.base.to_dict()["id"]
        return f"<Steered: {name} at {self.steering.site}, {state}>"

    @property
    def multiplier(self) -> float:
        """The strength m; 0 is the base."""
        return self._setting.multiplier

    @multiplier.setter
    def multiplier(self, value: float) -> None:
        if self._hooks is None:
            raise BakeError("the steering was removed; call bake.steer again")
        self._hook(replace(self._setting, multiplier=float(value)))

    @property
    def push(self) -> Push | None:
        """What is added in which layers; None for m = 0."""
        return self.steering.push(self._setting)

    def remove(self) -> None:
        """Take the hooks away; a second time does nothing."""
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None

    def save(self, path: str | Path) -> Path:
        """Write the recipe that bakes this: `bake export --recipe PATH`.

        A direction and norms that no file holds are written beside it. Raises BakeError at m = 0, and where
        the model has no name that an export finds it by.
        """
        target = Path(path).expanduser()
        check_file(target)
        values = self.steering.recipe_values(self._setting)
        if isinstance(self.steering.base, BaseInMemory):
            values["model"] = _name_of(self.steering.base)
        files = self._beside(target, values)
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        for file, content in {**files, target: text.encode()}.items():
            write_file(file, content)
        return target

    def _beside(self, target: Path, values: dict[str, Any]) -> dict[Path, bytes]:
        """Return the files of what no file held, and name them in a recipe's values."""
        direction, norms = self.steering.material(self._setting)
        files: dict[Path, bytes] = {}
        if self.unnamed & {"direction", "pairs", "held_out"}:
            path = target.with_suffix(".direction.safetensors")
            found = self.steering.given[0].direction if self.steering.given else direction
            files[path] = direction_bytes(with_lengths(found))
            for name in ("pairs", "direction_site", "layer_offset", *_FINDING):
                values.pop(name, None)
            values["direction"] = str(path)
        if values.get("law") == MEASURED_LAW and "held_out" not in values:
            push = self.steering.push(self._setting)
            assert push is not None
            assert push.given is not None
            for name in ("law", "band", "layers"):
                values.pop(name, None)
            named = (f"{layer}={value!r}" for layer, value in sorted(push.given.items()))
            values["coefficients"] = ",".join(named)
        if self.unnamed & {"prompts", "norms"}:
            path = target.with_suffix(".norms.json")
            values.pop("prompts", None)
            values["calibration"] = str(path)
            values_of = {"base": self.steering.base.to_dict(), **norms.to_dict()}
            files[path] = (json.dumps(values_of, indent=2) + "\n").encode()
        return files

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _hook(self, setting: Setting) -> None:
        check_not_compiled(self.steering.loaded.model)
        push = self.steering.push(setting)
        hooks = ExitStack()
        if push is not None:
            hooks.enter_context(self.steering.loaded.steered(self.steering.site, push.vectors))
        self.remove()
        self._hooks, self._setting = hooks, setting


def steer(
    model: tuple[Any, Any],
    given: Mapping[str, Any],
    multiplier: float,
    norms: ActivationNorms | str | Path | None = None,
    unnamed: frozenset[str] = frozenset(),
) -> Steered:
    """Steer (model, tokenizer) as options of an export say. norms: instead of measuring; a file too.

    unnamed: options that were given as objects. Raises a BakeError where `bake export` would.
    """
    if not isinstance(multiplier, float | int) or not math.isfinite(multiplier):
        raise BakeError(f"the multiplier is {multiplier!r}; give a finite number, such as 0.5")
    recipe = replace(recipe_of(model, given), multiplier=1.0)
    recipe.check()
    inputs = read_inputs(recipe)
    base = take_base(model)
    if isinstance(norms, str | Path):
        norms = ActivationNorms.from_dict(read_calibration(Path(norms)))
    steering = prepare(recipe, base, inputs, norms=norms)
    if norms is not None:
        unnamed |= {"norms"}
    return Steered(steering, Setting(float(multiplier)), unnamed)


def _name_of(base: BaseInMemory) -> str:
    name = str(getattr(base.loaded.config, "name_or_path", "") or "")
    if not name:
        raise BakeError("the model has no name or path: save it with save_pretrained first")
    return name
