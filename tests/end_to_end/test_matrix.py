"""Every architecture × site × dtype × layout × tying: plan → write → reload → equals the hook.

A new architecture joins by a line in conftest's CONFIGS and a line in SLOTS. The plain process and
the command line around this are tested in test_equivalence and test_cli; here everything runs in one
process, so that the whole matrix stays fast.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, LAYERS, PROMPTS, TinyModel

from bake.anatomy import Anatomy, examine
from bake.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bake.checkpoint.writer import write_config, write_weights
from bake.hooks import steered
from bake.models.forward import LoadedModel, compute_logits, load_model, read_config
from bake.plan.plan import Plan, make_plan
from bake.proof.equivalence import TOLERANCES
from bake.strength.coefficients import LayerPush, Push
from bake.texts.prompts import encode, load_tokenizer, make_batches

# (architecture, site, slot kind): route and the config keys that the bake sets.
SLOTS = {
    ("llama", "mlp_out", "write"): ("flag", {"mlp_bias": True}),
    ("llama", "attn_out", "write"): ("flag", {"attention_bias": True}),
    ("llama", "attn_in", "projection"): ("flag", {"attention_bias": True}),
    ("llama", "mlp_in", "projection"): ("flag", {"mlp_bias": True}),
    ("gpt2", "mlp_out", "write"): ("native", {}),
    ("gpt2", "attn_out", "write"): ("native", {}),
    ("gpt2", "attn_in", "norm"): ("native", {}),
    ("gpt2", "attn_in", "projection"): ("native", {}),
    ("gpt2", "mlp_in", "norm"): ("native", {}),
    ("gpt2", "mlp_in", "projection"): ("native", {}),
}
BAND = range(2, 5)


@dataclass(frozen=True)
class Case:
    architecture: str
    site: str
    kind: str
    model: TinyModel

    def __str__(self) -> str:
        layout = "sharded" if self.model.sharded else "single"
        tying = "tied" if self.model.tied else "untied"
        return f"{self.architecture}-{self.site}-{self.kind}-{self.model.dtype}-{layout}-{tying}"


# (dtype, sharded, tied): every two of them stand together in one of these; the others are the rest of
# the product.
PAIRWISE = {
    ("float32", False, False),
    ("float32", True, True),
    ("float16", False, True),
    ("float16", True, False),
    ("bfloat16", False, False),
    ("bfloat16", True, True),
}
CASES = [
    pytest.param(
        Case(architecture, site, kind, TinyModel(architecture, *layout)),
        marks=() if layout in PAIRWISE else pytest.mark.exhaustive,
    )
    for architecture, site, kind in SLOTS
    for layout in itertools.product(
        ("float32", "float16", "bfloat16"), (False, True), (False, True)
    )
]


def test_every_two_choices_of_a_layout_stand_together():
    for one, other in itertools.combinations(range(3), 2):
        choices = [{layout[place] for layout in PAIRWISE} for place in (one, other)]
        found = {(layout[one], layout[other]) for layout in PAIRWISE}
        assert found == set(itertools.product(*choices))


@cache
def anatomy_of(directory: Path) -> Anatomy:
    return examine(read_config(directory))


def make_push(strength: float, seed: int = 3) -> Push:
    """Random unit directions with coefficients of one size: the effect is a good part of a logit."""
    generator = torch.Generator().manual_seed(seed)
    directions = {
        layer: torch.nn.functional.normalize(torch.randn(HIDDEN, generator=generator), dim=0)
        for layer in BAND
    }
    layers = tuple(LayerPush(layer, 1.0, strength * (1 + 0.1 * layer)) for layer in BAND)
    return Push("explicit", 1.0, (BAND.start, BAND.stop), HIDDEN, layers, directions)


def bake_into(directory: Path, checkpoint: Checkpoint, plan: Plan) -> Path:
    directory.mkdir()
    write_weights(checkpoint, plan.edits, directory)
    write_config(checkpoint, plan.config_changes, directory)
    return directory


def logits_of(loaded: LoadedModel, tokenizer) -> torch.Tensor:
    return torch.cat(compute_logits(loaded, make_batches(encode(tokenizer, PROMPTS))))


@pytest.fixture(scope="module", params=CASES, ids=str)
def setting(request, make_model):
    """The base of one case: checkpoint, route, model in float32, tokenizer, its logits."""
    case = request.param
    directory = make_model(case.model)
    checkpoint = open_checkpoint(str(directory))
    anatomy = anatomy_of(directory)
    route = anatomy.choose(case.site, kind=case.kind)
    loaded = load_model(directory, dtype="float32", device=torch.device("cpu"))
    tokenizer = load_tokenizer(directory)
    return case, checkpoint, anatomy, route, loaded, tokenizer, logits_of(loaded, tokenizer)


def test_baked_equals_hooked(setting, tmp_path):
    case, checkpoint, anatomy, route, loaded, tokenizer, base = setting
    push = make_push(strength=1.0)
    plan = make_plan(checkpoint, anatomy, route, push)
    baked = bake_into(tmp_path / "baked", checkpoint, plan)

    with steered(loaded.model, anatomy.structure, case.site, push.vectors):
        hooked = logits_of(loaded, tokenizer)
    effect = (hooked - base).abs().max()
    assert effect > 0.1 * base.std()  # The push does something, so equality means something.

    reloaded = load_model(baked, dtype="float32", device=torch.device("cpu"))
    assert not any(reloaded.report.values())
    error = (logits_of(reloaded, tokenizer) - hooked).abs().max() / effect
    assert error <= TOLERANCES[case.model.dtype][0 if plan.slots_are_new else 1]


def test_zero_push_changes_nothing(setting, tmp_path):
    _, checkpoint, anatomy, route, _, tokenizer, base = setting
    plan = make_plan(checkpoint, anatomy, route, make_push(strength=0.0))
    baked = bake_into(tmp_path / "baked", checkpoint, plan)
    reloaded = load_model(baked, dtype="float32", device=torch.device("cpu"))
    assert not any(reloaded.report.values())
    torch.testing.assert_close(
        logits_of(reloaded, tokenizer), base, rtol=0, atol=1e-6 * float(base.abs().max())
    )


def test_only_the_plan_is_written(setting, tmp_path):
    case, checkpoint, anatomy, route, *_ = setting
    plan = make_plan(checkpoint, anatomy, route, make_push(strength=1.0))
    directory = bake_into(tmp_path / "baked", checkpoint, plan)
    baked = open_checkpoint(str(directory))

    expected_route, expected_flags = SLOTS[(case.architecture, case.site, case.kind)]
    assert (route.route, dict(plan.config_changes)) == (expected_route, expected_flags)
    before, after = dict(checkpoint.config), json.loads((directory / "config.json").read_text())
    assert {key for key in after if after[key] != before.get(key)} == set(expected_flags)

    patched = {edit.name for edit in plan.slot_edits if not edit.is_new}
    assert all(
        baked.read_bytes(name) == checkpoint.read_bytes(name)
        for name in checkpoint.tensors
        if name not in patched
    )
    if expected_route == "native":
        assert patched
        originals = open_originals(directory)
        assert originals == {name: checkpoint.read_bytes(name) for name in patched}
        assert all(baked.read_bytes(name) != checkpoint.read_bytes(name) for name in patched)
    else:
        assert not patched
        added = set(baked.tensors) - set(checkpoint.tensors)
        assert added == set(route.new_parameters)
        outside = {name for name in added if not any(f".{layer}." in name for layer in BAND)}
        assert len(outside) == len(added) * (LAYERS - len(BAND)) // LAYERS
        assert all(not baked.read(name).any() for name in outside)


def open_originals(directory: Path) -> dict[str, bytes]:
    from safetensors import safe_open

    with safe_open(directory / "originals.safetensors", framework="pt") as file:
        return {
            name: file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            for name in file.keys()  # noqa: SIM118
        }
