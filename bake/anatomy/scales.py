"""Factors between a write and the residual stream: what the twin measured, as the real model has it.

A factor that follows from a size is another in a small twin: MiniCPM 3 divides every branch by the
square root of the number of layers. Such a factor is a plain number that a module of the layer keeps, so
the one that was measured is looked up by its value in the twin's layer, and by its name in the real one.
"""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

# What was measured is exact to float32's rounding of a few products.
_TOLERANCE = 1e-4


def scale_of_real(measured: float, twin_layer: nn.Module, real_layer: nn.Module) -> float:
    """Return the real layer's factor for one that was measured on the twin's.

    What no module keeps is no size's doing, and the same in both. One is no factor: modules keep many ones.
    """
    if measured == 1.0:
        return measured
    for name, module in twin_layer.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, float) and isclose(value, measured, rel_tol=_TOLERANCE):
                real = getattr(real_layer.get_submodule(name), key, measured)
                return real if isinstance(real, float) else measured
    return measured
