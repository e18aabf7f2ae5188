"""Bakes loaded in MLX for real: `pytest -m engines`, with the extra `engines`. Never skipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HIDDEN
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bake.api import export
from bake.engines import survival

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]

IDS = [[1, 72, 104, 111, 35, 119, 100], [1, 90, 35, 3, 47, 200, 11]]


@pytest.fixture(scope="session")
def load_in_mlx():
    """Return a function directory → logits (batch, positions, vocabulary) as MLX computes them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError as error:
        pytest.fail(f"MLX is not installed ({error}): pip install 'bake-steering[engines]'")

    def load(directory: Path) -> np.ndarray:
        model, _ = load_model(directory)
        return np.array(model(mx.array(IDS)).astype(mx.float32))

    return load


@pytest.fixture
def bake(tmp_path, prompts_file):
    """Return a function (base, site) → the directory of its bake."""

    def make(base: Path, site: str) -> Path:
        direction = tmp_path / "direction.safetensors"
        vector = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5))
        save_file({"direction": vector}, direction, metadata={"site": site})
        output = tmp_path / "baked"
        export(
            str(base),
            output=output,
            direction=direction,
            site=site,
            multiplier=4.0,
            prompts=prompts_file,
        )
        return output

    return make


def transformers_logits(directory: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize(
    ("architecture", "site"),
    [
        ("llama", "mlp_out"),
        ("llama", "attn_out"),
        ("llama", "attn_in"),
        ("llama", "mlp_in"),
    ],
)
def test_mlx_computes_what_transformers_computes(architecture, site, make_model, bake, load_in_mlx):
    base = make_model(architecture=architecture)
    baked = bake(base, site)
    expected = transformers_logits(baked)
    found = load_in_mlx(baked)
    effect = np.abs(load_in_mlx(base) - found).max()
    assert effect > 0.1, "the bake has to be seen before equality says anything"
    assert np.abs(found - expected).max() < 1e-3 * effect


def test_mlx_refuses_the_biases_that_its_qwen3_has_no_slot_for(make_model, bake, load_in_mlx):
    base = make_model(architecture="qwen3")
    assert np.abs(load_in_mlx(base) - transformers_logits(base)).max() < 1e-3
    baked = bake(base, "attn_out")
    with pytest.raises(ValueError, match=r"(?s)not in model.*self_attn.o_proj.bias"):
        load_in_mlx(baked)
    slot = "model.layers.0.self_attn.o_proj.bias"
    assert survival("mlx", "qwen3", [slot]).verdict == "error"
