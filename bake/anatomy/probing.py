"""Experiments on one layer of the twin: push here, see what moves there.

Knows how to run the twin and to compare what it saw; what is tried, and what it means, is decided in
`bake.anatomy.residual` and `bake.anatomy.slots`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from bake.hooks import INPUT_NAMES, captured, submodule
from bake.sites import LayerStructure

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bake.anatomy.twin import Twin


def probe_vector(twin: Twin) -> torch.Tensor:
    """Return the random vector (hidden_size,) that biases are moved by."""
    import torch

    return torch.randn(twin.hidden_size, generator=torch.Generator().manual_seed(5)) * 0.5


def read_activation(
    twin: Twin, model: nn.Module, structure: LayerStructure, site: str, layer: int
) -> torch.Tensor:
    """Return the site's activation in a layer, (batch, positions, hidden_size)."""
    seen: list[torch.Tensor] = []
    with captured(
        model, structure, site, [layer], lambda _layer, x: seen.append(x.detach().clone())
    ):
        twin.run(model)
    return seen[0]


def read_children(
    twin: Twin,
    structure: LayerStructure,
    layer: int,
    context: AbstractContextManager[None] | None = None,
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return {module inside the layer: (its input, its output)} in the order of their calls.

    The layer itself is "". Where a module is called several times the first call counts; what is no
    tensor is None.
    """
    import torch

    seen: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def keep(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, arguments: tuple, keywords: dict, output: Any) -> None:
            given = arguments[0] if arguments else _named_input(keywords)
            result = output[0] if isinstance(output, tuple | list) and output else output
            copies = (x.detach().clone() if torch.is_tensor(x) else None for x in (given, result))
            seen.setdefault(name, tuple(copies))  # type: ignore[arg-type]

        return look

    with ExitStack() as hooks:
        for name, module in submodule(twin.model, structure, layer, "").named_modules():
            handle = module.register_forward_hook(keep(name), with_kwargs=True)
            hooks.callback(handle.remove)
        twin.run(twin.model, context)
    return seen


def _named_input(keywords: dict[str, Any]) -> Any:
    return next((keywords[name] for name in INPUT_NAMES if name in keywords), None)


@contextmanager
def zeroed(module: nn.Module) -> Iterator[None]:
    """Set every parameter of a module to zero while the context is open."""
    import torch

    originals = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    with torch.no_grad():
        for parameter, _ in originals:
            parameter.zero_()
        try:
            yield
        finally:
            for parameter, original in originals:
                parameter.copy_(original)


def uniform_ratio(moved: torch.Tensor, push: torch.Tensor) -> float | None:
    """Return s where every row of `moved` is s · push to rounding; None where it is not."""
    rows = moved.reshape(-1, push.shape[0]).double()
    direction = push.double()
    ratio = (rows @ direction / direction.dot(direction)).mean()
    error = (rows - ratio * direction).abs().max()
    # Written so that NaN is no ratio either.
    if not (ratio.abs() >= 1e-6 and error <= 1e-4 * (ratio * direction).abs().max()):
        return None
    rounded = round(float(ratio), 4)
    # A scale that rounds to a short decimal is that decimal: multipliers come from a config.
    return rounded if abs(rounded - float(ratio)) < 1e-5 * abs(float(ratio)) else float(ratio)
