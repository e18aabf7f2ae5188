"""bake: turn a steering direction into ordinary weights.

    from bake import export
    export("path/or/id", direction="direction.safetensors", output="steered")

The public functions load torch and transformers when they are called, not when bake is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bake.version import __version__

__all__ = [
    "ContrastPair",
    "__version__",
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

if TYPE_CHECKING:
    from bake.api import (
        ContrastPair,
        ablate,
        calibrate,
        convert_direction,
        detect,
        diff,
        estimate,
        export,
        extract_direction,
        gguf,
        hear,
        inspect,
        inspect_all,
        publish,
        read_direction,
        reproduce,
        rescale,
        show_direction,
        space,
        steer,
        steered,
        sweep,
        tune,
        undo,
        verify,
        verify_endpoint,
    )


def __getattr__(name: str) -> Any:
    if name in __all__:
        from bake import api

        return getattr(api, name)
    raise AttributeError(f"module 'bake' has no attribute {name!r}")
