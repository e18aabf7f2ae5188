"""Take directions out of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bake.api.given import GivenPairs, GivenTexts, as_files
from bake.options.ablate import ABLATE
from bake.options.documentation import documented

if TYPE_CHECKING:
    from bake.pipeline.ablate import Ablated


@documented(ABLATE)
def ablate(
    model: str | Path,
    *,
    output: str | Path,
    overwrite: bool = False,
    revision: str | None = None,
    direction: Any = None,
    pairs: GivenPairs | None = None,
    layer_offset: int | None = None,
    direction_site: str | None = None,
    from_layer: int | None = None,
    heads: str | None = None,
    neurons: str | None = None,
    mean: bool = False,
    prompts: GivenTexts = "neutral",
    method: str = "mean",
    token: str | int = "last",
    chat_template: str = "auto",
    held_out: GivenPairs | None = None,
    seed: int = 0,
    steps: int = 150,
    kl_weight: float = 0.3,
    scope: str = "stream",
    strength: float = 1.0,
    band: str | tuple[float, float] = "40:90",
    layers: str | int | Sequence[int] | None = None,
    shards: str = "copy",
    dtype: str | None = None,
    name: str | None = None,
    description: str | None = None,
    base_id: str | None = None,
    allow_rounding: bool = False,
    device_map: str | None = None,
    max_memory: str | None = None,
    push_to_hub: str | None = None,
    public: bool = False,
    create_pr: bool = False,
    commit_message: str | None = None,
    accept_licence: bool = False,
) -> Ablated:
    """Take directions out of `model`'s weights and write the checkpoint to `output`.

    Directions, pairs, bands and layers can be objects, as for `bake.export`; a list of directions is the
    subspace that they span. Raises a BakeError that names what is wrong; then nothing is left at `output`.
    """
    options = dict(locals())
    from bake.pipeline.ablate import ablate as run_ablation
    from bake.pipeline.ablate import make_ablation

    with as_files(options) as taken:
        return run_ablation(make_ablation(taken))
