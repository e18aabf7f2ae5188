"""Strength: what a direction does at each multiplier, what it costs, and what chance would do.

Hooks, not bakes: one load of the model serves everything. In the order in which they read: `arms` are
what is compared, rows of one batch; `measurements` what they do to texts; `summary` turns those into
`points` with intervals; `window` says which strengths stay within bounds; `controls` are random
directions; `design` says what a sweep compares; `findings` what it found; `sweep` runs it and `store`
lets it go on after a break. `attribution` asks which layers do it.
"""

from bake.dose_response.arms import Arm
from bake.dose_response.design import BASE, CONTROL_SEEDS, MULTIPLIERS, Design, Variant, make_arms
from bake.dose_response.findings import DoseResponse, compare_laws
from bake.dose_response.measurements import (
    Sampling,
    Scorer,
    Texts,
    measure_neutral,
    measure_pairs,
    measure_rollouts,
)
from bake.dose_response.points import Interval, Point
from bake.dose_response.summary import summarise
from bake.dose_response.sweep import measure_sites, run_sweep
from bake.dose_response.window import Bounds, Window, find_windows

__all__ = [
    "BASE",
    "CONTROL_SEEDS",
    "MULTIPLIERS",
    "Arm",
    "Bounds",
    "Design",
    "DoseResponse",
    "Interval",
    "Point",
    "Sampling",
    "Scorer",
    "Texts",
    "Variant",
    "Window",
    "compare_laws",
    "find_windows",
    "make_arms",
    "measure_neutral",
    "measure_pairs",
    "measure_rollouts",
    "measure_sites",
    "run_sweep",
    "summarise",
]
