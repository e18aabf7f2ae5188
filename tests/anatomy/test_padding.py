"""A bias fires at padded positions: sites from where that reaches real tokens are refused, others not."""

from __future__ import annotations

import pytest
import torch
from conftest import HIDDEN, byte_tokenizer
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake import export
from bake.anatomy import examine
from bake.anatomy.catalogue import default_config
from bake.errors import EquivalenceError
from bake.models.padding import CAUSE


@pytest.mark.parametrize("model_type", ["mamba2", "bamba", "jamba", "lfm2_moe"])
def test_a_mixer_that_zeroes_its_padding_has_no_attn_in(model_type):
    found = examine(default_config(model_type))
    assert "attn_in" not in {route.site for route in found.routes}
    assert CAUSE in found.refusals["attn_in"]
    assert "padded on the left" in found.refusals["attn_in"]
    assert found.routes  # Its writes into the residual stream are exact.


def test_attention_masks_its_padding():
    found = examine(CONFIG_MAPPING["llama"](num_hidden_layers=3))
    routes = [route for route in found.routes if route.site == "attn_in"]
    assert routes
    for route in routes:
        assert len(route.twin.padding) >= 2
        assert not route.twin.leaks


def test_the_proof_of_what_is_written_finds_a_leak_by_itself(tmp_path, monkeypatch, examined_anew):
    """Here the twin lets it through; the written checkpoint is run padded too."""
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mamba2"](
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        vocab_size=len(byte_tokenizer()),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    save_file({"direction": torch.randn(HIDDEN)}, tmp_path / "d.safetensors", {"site": "attn_in"})
    monkeypatch.setattr("bake.anatomy.twin.TwinVerdict.leaks", {})
    with pytest.raises(EquivalenceError, match="padded on the left, hooked and baked differ by"):
        export(
            str(base),
            output=tmp_path / "out",
            direction=tmp_path / "d.safetensors",
            site="attn_in",
            multiplier=4.0,
        )
    assert not (tmp_path / "out").exists()
