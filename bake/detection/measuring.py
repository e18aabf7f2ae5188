"""A found push beside what it is added to: how strongly it steers, by which law, and what it says.

For this the model runs, without what was found in it: the base, or the suspect with the push taken off by
hooks. `bake detect --measure` asks for it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bake.anatomy.base import load_base, open_base
from bake.detection.findings import PushFound
from bake.detection.strength import Strength, fit_laws
from bake.directions.logit_lens import LayerTokens, read_tokens
from bake.errors import BakeError
from bake.sites import RESIDUAL_SITES
from bake.strength.norms import measure_norms
from bake.texts.prompts import read_prompts

if TYPE_CHECKING:
    from bake.models.forward import LanguageModel

TOKENS = 8


def measure(
    push: PushFound, model: str, revision: str | None, prompts: str, *, alone: bool
) -> PushFound:
    """Return a push with its strength, measured on a model that is loaded for it.

    model: the base; alone: it is the suspect itself, whose push is taken off while it runs. prompts: as
    for `bake calibrate`. Raises CheckpointError where the model does not load, PromptError for the prompts.
    """
    texts = read_prompts(prompts)
    base = open_base(model, revision)
    loaded = load_base(base)
    layers = sorted(push.vectors)
    taken_off = {layer: -vector.float() for layer, vector in push.vectors.items()}
    hidden = alone and push.loaded
    with loaded.steered(push.site, taken_off if hidden else {}):
        # A push is captured with what it was added to: at its own site the hook above comes first.
        norms = measure_norms(loaded, push.site, loaded.batches(texts), layers).values()
    lengths = push.lengths
    strength = Strength(
        norms,
        {layer: lengths[layer] / norms[layer] for layer in layers},
        fit_laws(lengths, norms, loaded.hidden_size),
        _read_tokens(loaded, push),
    )
    return replace(push, strength=strength)


def _read_tokens(loaded: LanguageModel, push: PushFound) -> LayerTokens | None:
    if push.site not in RESIDUAL_SITES:
        return None
    last = max(push.vectors)
    direction = push.direction()
    only = replace(direction, vectors={last: direction.vectors[last]}, lengths={})
    try:
        return read_tokens(loaded, only, count=TOKENS)[0]
    except BakeError:
        return None
