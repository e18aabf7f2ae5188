"""The commands as Python functions: plain values in, frozen dataclasses out."""

from bake.api.ablating import ablate
from bake.api.afterwards import (
    detect,
    diff,
    gguf,
    publish,
    reproduce,
    rescale,
    undo,
    verify,
    verify_endpoint,
)
from bake.api.baking import calibrate, estimate, export, inspect, inspect_all, sweep, tune
from bake.api.directions import convert_direction, extract_direction, show_direction
from bake.api.hearing import hear, space, steer, steered
from bake.directions.formats import read_direction
from bake.texts.pairs import ContrastPair

__all__ = [
    "ContrastPair",
    "ablate",
    "calibrate",
    "convert_direction",
    "detect",
    "diff",
    "estimate",
    "export",
    "extract_direction",
    "gguf",
    "hear",
    "inspect",
    "inspect_all",
    "publish",
    "read_direction",
    "reproduce",
    "rescale",
    "show_direction",
    "space",
    "steer",
    "steered",
    "sweep",
    "tune",
    "undo",
    "verify",
    "verify_endpoint",
]
