"""What was baked in is read out again: site, layers, direction and strength; and no false alarm."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import CONFIGS, TinyModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bake.api import ablate, detect, diff, export, rescale, undo, verify
from bake.cli.main import main
from bake.directions.direction_file import load_direction
from bake.errors import BakeError, CheckpointError, UnsupportedError
from bake.io.shipped import DEMO_MODEL

WIDTH, LAYERS = 32, 6
DRAWN = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
UNIT, OTHER, THIRD = torch.nn.functional.normalize(DRAWN, dim=-1)


def bake_push(base, output, site="mlp_out", multiplier=0.5, **options):
    file = output.with_name(f"{output.name}.direction.safetensors")
    save_file({"direction": UNIT.clone()}, file, {"site": site})
    values = {"multiplier": multiplier, "site": site, "allow_rounding": True, **options}
    return export(base, direction=file, output=output, **values)


def check_push(found, result, site, least=0.999, length=0.01):
    """Site, layers, cosine and strength of what was found are those of the export."""
    assert found.verdict == "push"
    (push,) = found.pushes
    assert push.site == site
    wanted = result.push.vectors
    assert sorted(push.vectors) == sorted(wanted)
    for layer, vector in wanted.items():
        own = push.vectors[layer]
        assert torch.cosine_similarity(own, vector.double(), dim=0) >= least
        assert float(own.norm()) == pytest.approx(float(vector.double().norm()), rel=length)


CELLS = [
    ("llama", "mlp_out", {}),
    ("llama", "attn_out", {}),
    ("llama", "attn_in", {}),
    ("llama", "mlp_in", {}),
    ("gpt2", "mlp_out", {}),
    ("gpt2", "attn_out", {}),
    ("gpt2", "attn_in", {"slot": "norm"}),
    ("gpt2", "attn_in", {"slot": "projection"}),
    ("gpt2", "mlp_in", {"slot": "norm"}),
    ("qwen3", "attn_in", {}),
    ("mistral", "mlp_out", {}),
    ("granite", "mlp_out", {}),
    ("llama", "mlp_out", {"route": "insert"}),
    ("qwen3", "mlp_out", {"route": "insert"}),
    ("gemma2", "mlp_out", {"route": "insert"}),
    ("gpt_oss", "mlp_out", {}),
    ("qwen2", "mlp_out", {}),
    ("mixtral", "mlp_out", {}),
    ("dots1", "mlp_out", {}),
    ("gemma4_text", "mlp_out", {}),
]


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    """Families of hosts and of experts with biases, which no other test builds."""
    common = CONFIGS["llama"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    monkeypatch.setitem(CONFIGS, "qwen2", common)
    heads_of_their_own = {"num_key_value_heads": common["num_attention_heads"]}
    monkeypatch.setitem(CONFIGS, "stablelm", {**common, **heads_of_their_own})
    shared = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    norm = {"norm_topk_prob": True, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    monkeypatch.setitem(CONFIGS, "dots1", {**common, **shared, **norm})
    heads = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
    monkeypatch.setitem(CONFIGS, "gemma4_text", {**common, **heads})
    monkeypatch.setitem(CONFIGS, "gemma", {**common, "head_dim": 8})
    monkeypatch.setitem(CONFIGS, "gpt_oss", {**common, **experts, "sliding_window": 8})


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("multiplier", [0.5, 0.05])
@pytest.mark.parametrize(("architecture", "site", "options"), CELLS)
def test_a_push_is_read_out(architecture, site, options, multiplier, make_model, tmp_path):
    base = make_model(TinyModel(architecture))
    result = bake_push(base, tmp_path / "out", site, multiplier, **options)
    found = detect(tmp_path / "out", base=base)
    check_push(found, result, site)
    assert found.lies == ()
    assert found.others == ()
    text = found.describe()
    assert f"a push at {site} in layers" in text
    assert detect(base, base=base).verdict == "none"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("architecture", "site"), [("llama", "mlp_out"), ("llama", "attn_in"), ("gpt2", "attn_out")]
)
def test_a_push_in_half_precision_is_read_out(architecture, site, dtype, make_model, tmp_path):
    base = make_model(TinyModel(architecture, dtype))
    result = bake_push(base, tmp_path / "out", site)
    check_push(detect(tmp_path / "out", base=base), result, site, least=0.99)


def test_an_ablation_is_read_out(make_model, tmp_path):
    for cell in (TinyModel("llama", tied=True), TinyModel("gpt2"), TinyModel("mixtral")):
        base = make_model(cell)
        output = tmp_path / cell.architecture
        ablate(base, direction=UNIT, output=output)
        found = detect(output, base=base)
        assert found.verdict == "ablation", cell
        (ablation,) = found.ablations
        assert ablation.scope == "stream"
        assert abs(float(ablation.basis[0].float() @ UNIT)) > 0.9999
        assert ablation.strength == pytest.approx(1.0, abs=1e-3)
        assert found.others == ()


def test_a_share_that_some_writes_lost_is_read_out(make_model, tmp_path):
    base = make_model(TinyModel("llama", "bfloat16"))
    options = {"scope": "writes", "strength": 2.0, "layers": (2, 3)}
    ablate(base, direction=UNIT, output=tmp_path / "out", **options)
    (ablation,) = detect(tmp_path / "out", base=base).ablations
    assert (ablation.scope, ablation.layers) == ("writes", (2, 3))
    assert ablation.strength == pytest.approx(2.0, rel=0.02)
    assert abs(float(ablation.basis[0].float() @ UNIT)) > 0.99


def test_heads_that_write_nothing_are_named(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    ablate(base, heads="2.1", neurons="3:17", output=tmp_path / "out")
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "ablation"
    columns = found.ablations[0].columns
    assert columns == {
        "model.layers.2.self_attn.o_proj.weight": tuple(range(8, 16)),
        "model.layers.3.mlp.down_proj.weight": (17,),
    }


def test_heads_of_transposed_matrices_are_named(make_model, tmp_path):
    """In GPT-2 a head's inputs are rows, of which a few would not show it."""
    base = make_model(TinyModel("gpt2"))
    ablate(base, heads="2.1", output=tmp_path / "out")
    (ablation,) = detect(tmp_path / "out", base=base).ablations
    assert ablation.columns == {"transformer.h.2.attn.c_proj.weight": tuple(range(8, 16))}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_both_are_told_apart(architecture, make_model, tmp_path):
    base = make_model(TinyModel(architecture))
    result = export(base, direction=OTHER, ablate=UNIT, multiplier=1.0, output=tmp_path / "out")
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "both"
    check_push(type(found)(found.suspect, found.base, found.pushes), result, "mlp_out", length=0.01)
    assert abs(float(found.ablations[0].basis[0].float() @ UNIT)) > 0.9999
    assert found.lies == ()


def test_a_sum_is_taken_apart(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    folder = tmp_path / "known"
    folder.mkdir()
    for name, vector in (("one", UNIT), ("two", OTHER), ("three", THIRD)):
        save_file(
            {"direction": vector.clone()}, folder / f"{name}.safetensors", {"site": "mlp_out"}
        )
    given = [f"{folder / 'one.safetensors'}:1.5", f"{folder / 'two.safetensors'}:-1.0"]
    export(base, direction=given, multiplier=0.5, output=tmp_path / "out")
    found = detect(tmp_path / "out", base=base, against=[folder])
    assert found.shares["one"] / found.shares["two"] == pytest.approx(-1.5, rel=1e-3)
    assert abs(found.shares["three"]) < 1e-4
    assert set(found.whose) == {"one", "two", "three"}


def test_what_peers_leave_is_found(make_model, tmp_path):
    """A bias of one layer; and a bias in every layer, set in memory and saved: dropped on loading."""
    base = make_model(TinyModel("llama"))
    model = AutoModelForCausalLM.from_pretrained(base)
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(0.3 * UNIT.clone())
    model.save_pretrained(tmp_path / "dropped")
    for given in ({"base": base}, {}):
        found = detect(tmp_path / "dropped", **given)
        assert found.verdict == "push"
        (push,) = found.pushes
        assert not push.loaded
        assert (push.site, sorted(push.vectors)) == ("mlp_out", list(range(LAYERS)))
        assert "present but never loaded" in found.describe()
    model = AutoModelForCausalLM.from_pretrained(make_model(TinyModel("gpt2")))
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias += 0.3 * UNIT
    model.save_pretrained(tmp_path / "one")
    found = detect(tmp_path / "one", base=make_model(TinyModel("gpt2")))
    (push,) = found.pushes
    assert sorted(push.vectors) == [3]
    assert float(push.vectors[3].norm()) == pytest.approx(0.3, rel=1e-3)


def test_without_a_base(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    assert detect(base).verdict == "none"
    result = bake_push(base, tmp_path / "push")
    check_push(detect(tmp_path / "push"), result, "mlp_out")
    ablate(base, direction=UNIT, output=tmp_path / "ablated")
    found = detect(tmp_path / "ablated")
    assert found.verdict == "ablation"
    assert abs(float(found.ablations[0].basis[0].float() @ UNIT)) > 0.999


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_layers_that_only_add_a_constant_are_found_without_a_base(
    architecture, make_model, tmp_path
):
    base = make_model(TinyModel(architecture))
    result = bake_push(base, tmp_path / "out", route="insert")
    found = detect(tmp_path / "out")
    check_push(found, result, "mlp_out")
    with pytest.raises(BakeError, match="not known without the base"):
        detect(tmp_path / "out", undo=tmp_path / "back")


def test_inputs_that_only_add_a_constant_are_found_without_a_base(make_model, tmp_path):
    """Gemma 4 with per-layer inputs that say nothing: one that uses them is no push."""
    base = make_model(TinyModel("gemma4_text"))
    assert detect(base).verdict == "none"
    result = bake_push(base, tmp_path / "out")
    check_push(detect(tmp_path / "out"), result, "mlp_out")

    def misshape(tensors):
        tensors["model.layers.2.layer_scalar"] = torch.ones(3)
        tensors["model.layers.3.post_per_layer_input_norm.weight"].fill_(torch.nan)

    rewrite(tmp_path / "out", tmp_path / "odd", misshape)
    assert detect(tmp_path / "odd").pushes[0].vectors.keys() == {2, 4} & {*result.push.vectors}
    used = TinyModel("gemma4_text", config=(("hidden_size_per_layer_input", 8),))
    assert detect(make_model(used)).verdict == "none"


def test_a_layer_that_was_emptied_is_no_push(make_model, tmp_path):
    base = make_model(TinyModel("llama"))

    def change(tensors):
        for name, tensor in tensors.items():
            if ".layers.2." in name and name.endswith("proj.weight"):
                tensor.zero_()
            if ".layers.4." in name and name.endswith("o_proj.weight"):
                tensor.zero_()

    rewrite(base, tmp_path / "out", change)
    assert detect(tmp_path / "out").verdict == "none"


def drifting(base, output):
    """Biases as training leaves them: nearly parallel from layer to layer, a little further each."""
    generator = torch.Generator().manual_seed(4)
    model = AutoModelForCausalLM.from_pretrained(base)
    biases = torch.randn(2, WIDTH, generator=generator)
    with torch.no_grad():
        for block in model.transformer.h:
            biases += 0.3 * torch.randn(2, WIDTH, generator=generator)
            block.mlp.c_proj.bias.copy_(biases[0])
            block.attn.c_proj.bias.copy_(biases[1])
    shutil.copytree(base, output)
    model.save_pretrained(output)


def test_a_step_in_trained_biases_is_found_without_a_base(make_model, tmp_path):
    drifting(make_model(TinyModel("gpt2")), tmp_path / "base")
    clean = detect(tmp_path / "base")
    assert clean.verdict == "none"
    assert any("cannot be told from training without the base" in note for note in clean.notes)
    result = bake_push(tmp_path / "base", tmp_path / "out", multiplier=20.0)
    found = detect(tmp_path / "out")
    assert found.verdict == "push"
    (push,) = found.pushes
    assert push.site == "mlp_out"
    assert sorted(push.vectors) == sorted(result.push.vectors)
    for layer, vector in result.push.vectors.items():
        own = push.vectors[layer]
        assert torch.cosine_similarity(own, vector.double(), dim=0) > 0.9
        assert float(own.norm()) == pytest.approx(float(vector.norm()), rel=0.2)
    assert "most likely a push at mlp_out in layers 2-4" in found.describe()
    assert found.to_dict()["pushes"][0]["step"]["score"] > 0.9
    with pytest.raises(BakeError, match="not known without the base"):
        detect(tmp_path / "out", undo=tmp_path / "back")


@pytest.mark.parametrize("given_base", [True, False])
def test_value_biases_alone_are_a_push_after_attention(given_base, make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    bake_push(base, tmp_path / "baked", "attn_in")
    shared = torch.randn(16, generator=torch.Generator().manual_seed(2))
    wanted = {}

    def change(tensors):
        for name in list(tensors):
            if name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias")):
                tensors[name].zero_()
        for layer in (2, 3):
            tensors[f"model.layers.{layer}.self_attn.v_proj.bias"].copy_(shared)
            output = tensors[f"model.layers.{layer}.self_attn.o_proj.weight"]
            heads = shared.view(2, 8).repeat_interleave(2, dim=0).flatten()
            wanted[layer] = (output @ heads).double()

    rewrite(tmp_path / "baked", tmp_path / "out", change)
    (tmp_path / "out" / "bake.json").unlink()
    found = detect(tmp_path / "out", base=base if given_base else None)
    if not given_base:  # W_o differs by layer, so that the vectors are not alike.
        assert found.verdict == "none"
        return
    (push,) = found.pushes
    assert (push.site, sorted(push.vectors)) == ("attn_out", [2, 3])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base)
    seen = []
    for each in (model, plain):
        module = each.model.layers[2].self_attn
        module.register_forward_hook(lambda _m, _a, output: seen.append(output[0].double()))
        each(torch.arange(3, 12)[None])
    for layer, vector in wanted.items():
        torch.testing.assert_close(push.vectors[layer], vector, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        seen[0] - seen[1], push.vectors[2].expand_as(seen[0]), rtol=1e-3, atol=1e-5
    )


class TestStrength:
    """--measure: relative influence, the law and m that fit, and what the push says."""

    @pytest.mark.parametrize("given_base", [True, False])
    def test_m_and_the_law_are_read_back(self, given_base, tmp_path):
        result = export(
            "bake-demo", direction=bake_demo_direction(), multiplier=0.8, output=tmp_path / "out"
        )
        given = {"base": "bake-demo"} if given_base else {}
        found = detect(tmp_path / "out", measure="neutral", **given)
        strength = found.pushes[0].strength
        assert strength.law == "inverse-sqrt-d"
        assert strength.laws["inverse-sqrt-d"][0] == pytest.approx(0.8, rel=0.01)
        for entry in result.push.layers:
            assert strength.influences[entry.layer] == pytest.approx(
                entry.relative_influence, rel=0.01
            )
        assert len(strength.tokens.raised) == 8
        text = found.describe()
        assert "law inverse-sqrt-d with m = 0.8 fits its lengths" in text
        assert "raises '" in text
        json.loads(json.dumps(found.to_dict(), allow_nan=False))

    def test_a_flat_push_is_called_so(self, tmp_path):
        export("bake-demo", direction=bake_demo_direction(), law="flat", output=tmp_path / "flat")
        found = detect(tmp_path / "flat", base="bake-demo", measure="neutral")
        assert found.pushes[0].strength.law == "flat"

    def test_lengths_of_no_law_are_said(self, tmp_path):
        explicit = {2: 0.1, 3: 5.0, 4: 0.1}
        export(
            "bake-demo",
            direction=bake_demo_direction(),
            coefficients=explicit,
            output=tmp_path / "odd",
        )
        found = detect(tmp_path / "odd", base="bake-demo", measure="neutral")
        assert found.pushes[0].strength.law is None
        assert "no law fits its lengths" in found.describe()


def test_a_push_through_value_biases_is_exact_and_read_out(make_model, tmp_path):
    """StableLM has no output bias: at another strength, undone, and refused where it would round."""
    base = make_model(TinyModel("stablelm"))
    result = bake_push(base, tmp_path / "out", "attn_out", slot="value", allow_rounding=False)
    assert result.equivalence.passed
    check_push(detect(tmp_path / "out", base=base), result, "attn_out")
    rescale(tmp_path / "out", multiplier=0.25)
    assert verify(tmp_path / "out", base=base).equivalence.passed
    again = detect(tmp_path / "out", base=base).pushes[0]
    for layer, vector in result.push.vectors.items():
        assert torch.allclose(again.vectors[layer], vector.double() / 2, rtol=1e-3, atol=1e-5)
    undo(tmp_path / "out", output=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        base / "model.safetensors"
    ).read_bytes()
    with pytest.raises(
        UnsupportedError, match=r"done on request only; exact here: attn_out \(--slot value"
    ):
        bake_push(base, tmp_path / "no", "attn_out")
    with pytest.raises(UnsupportedError, match="bfloat16 would change both: leave --dtype out"):
        bake_push(base, tmp_path / "no", "attn_out", slot="value", dtype="bfloat16")
    shared = make_model(TinyModel("stablelm", config=(("num_key_value_heads", 2),)))
    with pytest.raises(UnsupportedError, match="cannot take attn_out exactly"):
        bake_push(shared, tmp_path / "no", "attn_out", slot="value")


def test_what_was_found_can_be_used(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    result = bake_push(base, tmp_path / "out")
    detect(tmp_path / "out", base=base, output=tmp_path / "found.safetensors")
    direction = load_direction(tmp_path / "found.safetensors")
    assert direction.site == "mlp_out"
    for layer, vector in result.push.vectors.items():
        assert float(direction.layer(layer) @ vector / vector.norm()) > 0.9999
    again = export(
        base,
        direction=tmp_path / "found.safetensors",
        keep_scale=True,
        multiplier=1.0,
        layers=sorted(result.push.vectors),
        output=tmp_path / "again",
    )
    for layer, vector in result.push.vectors.items():
        torch.testing.assert_close(again.push.vectors[layer], vector, rtol=1e-3, atol=1e-4)
    with pytest.raises(BakeError, match="no direction was found"):
        detect(base, base=base, output=tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


class TestLies:
    """bake.json is not believed: what it says is compared with the weights."""

    @pytest.fixture
    def out(self, make_model, tmp_path):
        base = make_model(TinyModel("llama"))
        bake_push(base, tmp_path / "out")
        return base, tmp_path / "out"

    def change(self, out, **values):
        path = out / "bake.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def test_another_strength(self, out):
        base, output = out
        layers = json.loads((output / "bake.json").read_text())["layers"]
        self.change(output, layers=[{**e, "coefficient": e["coefficient"] / 5} for e in layers])
        lies = detect(output, base=base).lies
        assert len(lies) == 1, lies
        (lie,) = lies
        assert "it names a push of length" in lie

    def test_a_push_that_is_not_there(self, out):
        base, output = out
        for shard in output.glob("*.safetensors"):
            tensors = load_file(shard)
            if any("mlp.down_proj.bias" in name for name in tensors):
                save_file(
                    {k: torch.zeros_like(v) for k, v in tensors.items()}, shard, {"format": "pt"}
                )
        found = detect(output, base=base)
        assert found.verdict == "none"
        assert "there is no such push" in found.lies[0]

    def test_a_record_that_is_damaged(self, out):
        base, output = out
        (output / "bake.json").write_text("{")
        found = detect(output, base=base)
        assert found.verdict == "push"
        assert "it cannot be read" in found.lies[0]


def bake_demo_direction():
    return load_direction(DEMO_MODEL.parent / "direction.safetensors")


def trained(base, output, steps=3):
    """A fine-tune: every weight moves."""
    model = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)


def merged(base, output):
    """A LoRA of rank 4 in every projection, merged."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if (weight.ndim == 2 and "layers" in name) or (".h." in name and weight.ndim == 2):
                a, b = (torch.randn(n, 4, generator=generator) for n in weight.shape)
                weight += 0.01 * a @ b.T
    model.save_pretrained(output)


def rounded(base, output):
    """Eight bits a row and back."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    model.save_pretrained(output)


def halved(base, output):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(output)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "opt", "falcon_h1"])
@pytest.mark.parametrize("made", [trained, merged, rounded, halved])
def test_no_false_alarm(architecture, made, make_model, tmp_path):
    base = make_model(TinyModel(architecture))
    made(base, tmp_path / "out")
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == ("none" if made is halved else "other")
    assert (not found.others) == (made is halved)
    assert detect(tmp_path / "out").verdict == "none"


def test_another_model_is_no_base(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    other = make_model(TinyModel("gpt2"))
    found = detect(other, base=base)
    assert found.verdict == "other"
    assert any("knows no exact way between" in each for each in found.others)


def test_the_command_says_it_in_json(make_model, tmp_path, capsys):
    base = make_model(TinyModel("llama"))
    bake_push(base, tmp_path / "out")
    capsys.readouterr()
    assert main(["detect", str(tmp_path / "out"), "--base", str(base), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["verdict"] == "push"
    assert values["pushes"][0]["site"] == "mlp_out"
    assert values["read_bytes"] > 0
    shutil.rmtree(tmp_path / "out")
    assert main(["detect", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("bake: error:")


def test_a_base_of_another_width_is_told(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    with pytest.raises(CheckpointError, match="it was made of another model"):
        detect("bake-demo", base=base)


def test_a_tensor_of_another_shape_is_told(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    shutil.copytree(base, tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.zeros(WIDTH, 7)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match="transformers would not load it"):
        detect(tmp_path / "out", base=base)


def test_a_quantised_one_is_told(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    shutil.copytree(base, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    values = json.loads(config.read_text())
    values["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config.write_text(json.dumps(values))
    with pytest.raises(BakeError, match="fp8"):
        detect(tmp_path / "out", base=base)


def centred(weight):
    return weight - weight.mean(dim=-1, keepdim=True)


def without_a_channel(weight):
    kept = weight.clone()
    kept[..., 5] = 0
    return kept


@pytest.mark.parametrize("change", [centred, without_a_channel])
def test_what_training_and_tools_leave_empty_is_no_ablation(change, make_model, tmp_path):
    """TransformerLens centres what writes; some models have dead channels."""
    model = AutoModelForCausalLM.from_pretrained(make_model(TinyModel("gpt2")))
    with torch.no_grad():
        for block in model.transformer.h:
            for module in (block.attn.c_proj, block.mlp.c_proj):
                module.weight.copy_(change(module.weight))
    model.save_pretrained(tmp_path / "out")
    assert detect(tmp_path / "out").verdict == "none"


@pytest.mark.parametrize(
    "name", ["self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.down_proj.bias"]
)
def test_what_is_no_number_is_a_difference_and_no_traceback(name, make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    bake_push(base, tmp_path / "out")
    for shard in (tmp_path / "out").glob("model*.safetensors"):
        tensors = load_file(shard)
        for each in tensors:
            if each.endswith(f".3.{name}"):
                tensors[each][:] = float("nan")
        save_file(tensors, shard, {"format": "pt"})
    found = detect(tmp_path / "out", base=base)
    assert found.verdict in ("push", "other")
    assert all(3 not in push.vectors for push in found.pushes) or name.endswith("weight")
    assert detect(tmp_path / "out").verdict in ("none", "push")
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


class TestUndo:
    """The suspect is written without what was found in it, and looked at again."""

    @pytest.mark.parametrize(("architecture", "site"), [("llama", "mlp_out"), ("gpt2", "attn_out")])
    def test_a_push_is_undone_beside_the_base(self, architecture, site, make_model, tmp_path):
        base = make_model(TinyModel(architecture))
        bake_push(base, tmp_path / "out", site)
        found = detect(tmp_path / "out", base=base, undo=tmp_path / "back")
        assert found.undone == str(tmp_path / "back")
        difference = diff(base, tmp_path / "back")
        assert difference.tensors == ()
        assert difference.config == {}
        assert not (tmp_path / "back" / "bake.json").exists()

    def test_without_a_base_what_was_created_goes(self, make_model, tmp_path):
        base = make_model(TinyModel("llama"))
        bake_push(base, tmp_path / "out")
        detect(tmp_path / "out", undo=tmp_path / "back")
        assert diff(base, tmp_path / "back").tensors == ()
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").config.mlp_bias is False

    @pytest.mark.parametrize("tied", [True, False])
    def test_an_ablation_and_a_push_are_undone(self, tied, make_model, tmp_path):
        base = make_model(TinyModel("llama", "bfloat16", tied=tied))
        options = {"direction": OTHER, "ablate": UNIT, "multiplier": 1.0}
        export(base, **options, output=tmp_path / "out")
        detect(tmp_path / "out", base=base, undo=tmp_path / "back")
        difference = diff(base, tmp_path / "back")
        assert difference.tensors == ()
        assert difference.config == {}

    @pytest.mark.parametrize(
        ("made", "says"),
        [
            ("nothing", "nothing was found, so there is nothing to undo"),
            ("ablated", "not in the weights any more: give the model that has it with --base"),
        ],
    )
    def test_what_cannot_be_undone_is_told(self, made, says, make_model, tmp_path):
        base = make_model(TinyModel("llama"))
        suspect = base
        if made == "ablated":
            ablate(base, direction=UNIT, output=tmp_path / "out")
            suspect = tmp_path / "out"
        with pytest.raises(BakeError, match=says):
            detect(suspect, undo=tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_another_form_is_the_base(self, make_model, tmp_path):
        base = make_model(TinyModel("mistral"))
        bake_push(base, tmp_path / "out")
        with pytest.raises(BakeError, match=r"was written as \w+ before it was pushed"):
            detect(tmp_path / "out", base=base, undo=tmp_path / "back")

    def test_nothing_is_overwritten(self, make_model, tmp_path):
        base = make_model(TinyModel("llama"))
        bake_push(base, tmp_path / "out")
        with pytest.raises(BakeError, match="out"):
            detect(tmp_path / "out", base=base, undo=tmp_path / "out")


def rewrite(base, output, change):
    """A copy of a checkpoint in one file whose tensors `change` was called with."""
    shutil.copytree(base, output)
    tensors = {}
    for shard in sorted(output.glob("model*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (output / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        output / "model.safetensors",
        {"format": "pt"},
    )


def test_one_row_of_one_matrix_is_seen(make_model, tmp_path):
    base = make_model(TinyModel("llama"))

    def change(tensors):
        tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] += 1

    rewrite(base, tmp_path / "out", change)
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "other"
    assert "1 of" in found.others[0]


def test_what_an_ablation_does_not_change_is_said_beside_it(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    ablate(base, direction=UNIT, output=tmp_path / "ablated")

    def change(tensors):
        tensors["model.layers.2.input_layernorm.weight"] *= 1.1

    rewrite(tmp_path / "ablated", tmp_path / "out", change)
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "ablation"
    assert "model.layers.2.input_layernorm.weight the first" in found.others[0]


def test_created_biases_that_are_no_push_are_said(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    bake_push(base, tmp_path / "baked", "attn_in")

    def change(tensors):
        for name in tensors:
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                generator = torch.Generator().manual_seed(len(name))
                tensors[name] = torch.randn(tensors[name].shape, generator=generator)

    rewrite(tmp_path / "baked", tmp_path / "out", change)
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "other"
    assert "are not the base's" in found.others[0]


def test_a_head_that_is_not_the_embedding_is_said(make_model, tmp_path):
    base = make_model(TinyModel("llama", tied=True))
    ablate(base, direction=UNIT, output=tmp_path / "ablated")
    assert detect(tmp_path / "ablated", base=base).others == ()

    def change(tensors):
        tensors["lm_head.weight"] *= 1.1

    rewrite(tmp_path / "ablated", tmp_path / "out", change)
    assert "lm_head.weight the first" in detect(tmp_path / "out", base=base).others[0]


def test_another_width_inside_is_a_difference(make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    wider = make_model(TinyModel("llama", config=(("intermediate_size", 96),)))
    assert detect(wider, base=base).verdict == "other"


def test_a_link_that_is_called_like_the_base_s_file_is_read(make_model, tmp_path):
    """The Hub's cache names files by their SHA-256; a stranger's link may lie."""
    baked = tmp_path / "baked"
    bake_push(make_model(TinyModel("gpt2")), baked)
    copies = {}
    for name, source in (("base", make_model(TinyModel("gpt2"))), ("out", baked)):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        (shard,) = folder.glob("model*.safetensors")
        shard.rename(folder / ("a" * 64))
        shard.symlink_to("a" * 64)
        copies[name] = folder
    assert detect(copies["out"], base=copies["base"]).verdict == "push"


def pruned(base, output):
    """Half of every matrix is zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(weight.abs() > weight.abs().median())
    model.save_pretrained(output)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (trained, "as further training, merging or rounding leaves it"),
        (merged, "as a merged low-rank adapter leaves it"),
        (pruned, "is zero now, as pruning leaves it"),
    ],
)
def test_what_other_differences_look_like(made, says, make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    made(base, tmp_path / "out")
    found = detect(tmp_path / "out", base=base)
    assert found.verdict == "other"
    assert any(says in each for each in found.others), found.others


def test_four_bits_are_recognised(make_model, tmp_path):
    base = make_model(TinyModel("llama"))

    def change(tensors):
        for tensor in tensors.values():
            if tensor.ndim == 2:
                scale = tensor.abs().amax(dim=1, keepdim=True) / 7
                tensor.copy_((tensor / scale).round() * scale)

    rewrite(base, tmp_path / "out", change)
    found = detect(tmp_path / "out", base=base)
    assert any("as quantising and turning back leaves it" in each for each in found.others)


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("mistral", None),
        ("gemma", "it is a Gemma"),
        ("qwen3", "none of its layers has experts"),
        ("qwen2", "all biases of its attention's output are zero"),
    ],
)
def test_a_family_that_is_worn_for_its_biases_is_said(architecture, says, make_model, tmp_path):
    base = make_model(TinyModel(architecture))
    assert not any("for no reason of its own" in note for note in detect(base).notes)
    bake_push(base, tmp_path / "out")
    found = detect(tmp_path / "out")
    assert found.verdict == "push"
    if says is not None:
        assert any(says in note for note in found.notes), found.notes
