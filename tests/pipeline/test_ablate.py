"""Ablations: what is reloaded equals hooks written by hand here, and nothing of the direction is left."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TinyModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bake.anatomy import erasure
from bake.api import ablate, diff, publish, reproduce, rescale, undo, verify
from bake.cli.main import main
from bake.errors import (
    BakeError,
    CheckpointError,
    DirectionError,
    EquivalenceError,
    UnsupportedError,
)

WIDTH, LAYERS = 32, 6
# Every module that reads the residual stream in a layer, by hand: what is before it does not matter.
READERS = {
    "llama": ("model.layers", ("post_attention_layernorm",)),
    "qwen3": ("model.layers", ("post_attention_layernorm",)),
    "mistral": ("model.layers", ("post_attention_layernorm",)),
    "mixtral": ("model.layers", ("post_attention_layernorm",)),
    "granite": ("model.layers", ("post_attention_layernorm",)),
    "falcon_h1": ("model.layers", ("pre_ff_layernorm",)),
    "gpt2": ("transformer.h", ("ln_2",)),
    "opt": ("model.decoder.layers", ("final_layer_norm",)),
}
BLOCKS = {
    "llama": ("self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "falcon_h1": ("mamba", "self_attn", "feed_forward"),
}
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(2))
UNIT = torch.nn.functional.normalize(
    torch.randn(WIDTH, generator=torch.Generator().manual_seed(9)), dim=0
)
OTHER = torch.nn.functional.normalize(
    torch.randn(WIDTH, generator=torch.Generator().manual_seed(10)), dim=0
)


def load(directory) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@contextmanager
def hooked(model, architecture, units, *, scope="stream", strength=1.0, layers=range(LAYERS)):
    """The hooks of the literature, without bake."""
    basis = torch.linalg.qr(torch.stack(units).double().T).Q.T.float()

    def erase(x):
        return x - strength * (x @ basis.T) @ basis

    def before(_module, arguments, keywords):
        if arguments:
            return (erase(arguments[0]), *arguments[1:]), keywords
        return arguments, {**keywords, "hidden_states": erase(keywords["hidden_states"])}

    def after(_module, _arguments, output):
        if isinstance(output, tuple):
            return (erase(output[0]), *output[1:])
        return erase(output)

    path, readers = READERS[architecture]
    with ExitStack() as stack:
        for layer in layers:
            module = model.get_submodule(f"{path}.{layer}")
            if scope == "writes":
                for name in BLOCKS[architecture]:
                    handle = module.get_submodule(name).register_forward_hook(after)
                    stack.callback(handle.remove)
                continue
            for each in (module, *(module.get_submodule(name) for name in readers)):
                handle = each.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def error_of(base, output, architecture, units, **options) -> float:
    """max|ablated − hooked| / max|hooked − base|, after showing that the hooks do something."""
    model = load(base)
    plain = logits(model)
    with hooked(model, architecture, units, **options):
        wanted = logits(model)
    effect = (wanted - plain).abs().max()
    assert effect > 0.05 * plain.std()
    return float((logits(load(output)) - wanted).abs().max() / effect)


CELLS = [
    TinyModel("llama", sharded=True),
    TinyModel("llama", tied=True),
    TinyModel("qwen3", tied=True, sharded=True),
    TinyModel("mistral"),
    TinyModel("mixtral", sharded=True),
    TinyModel("gpt2", tied=True),
    TinyModel("opt", tied=True),
    TinyModel("granite", tied=True),
    TinyModel("falcon_h1", sharded=True),
]
HALVES = [
    TinyModel("llama", "bfloat16", tied=True),
    TinyModel("llama", "float16", sharded=True),
    TinyModel("mixtral", "bfloat16"),
    TinyModel("gpt2", "float16", tied=True),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name.rsplit("-", 1)[0])
def test_the_reloaded_model_is_the_hooked_one(cell, make_model, tmp_path):
    base = make_model(cell)
    result = ablate(base, direction=UNIT, output=tmp_path / "out")
    assert error_of(base, tmp_path / "out", cell.architecture, [UNIT]) <= 1e-4
    remainder = result.equivalence.remainder
    assert remainder is not None
    assert remainder.base > 0.05
    assert remainder.baked < 1e-5
    assert remainder.plain < 1e-5
    assert (cell.tied and "tie_word_embeddings" in result.plan.config_changes) or not cell.tied


@pytest.mark.parametrize("cell", HALVES, ids=lambda cell: cell.name.rsplit("-", 1)[0])
def test_half_precision_is_within_its_bound_and_says_what_is_left(cell, make_model, tmp_path):
    base = make_model(cell)
    result = ablate(base, direction=UNIT, output=tmp_path / "out", allow_rounding=True)
    found = result.equivalence
    assert found.mechanism_error <= 1e-4
    assert found.slots_exact
    assert found.remainder is not None
    assert 0 < found.remainder.baked < 0.02 < found.remainder.base
    if cell.architecture != "mixtral":  # Rounding flips experts of a random router.
        assert found.relative_error <= found.tolerance


def test_every_tensor_is_what_the_common_recipe_gives_and_the_rest_keeps_its_bytes(
    make_model, tmp_path
):
    """W ← W − û(ûᵀW) for what writes, as abliteration scripts compute it."""
    base = make_model(TinyModel("llama", tied=True))
    result = ablate(base, direction=UNIT, output=tmp_path / "out")
    before = load_file(base / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("model*.safetensors"):
        after |= load_file(file)
    assert set(after) - set(before) == {"lm_head.weight"}
    assert torch.equal(after["lm_head.weight"], before["model.embed_tokens.weight"])
    for name, old in before.items():
        if name in result.plan.edited:
            rows = old.T if name == "model.embed_tokens.weight" else old
            wanted = rows - torch.outer(UNIT, UNIT @ rows)
            found = after[name].T if name == "model.embed_tokens.weight" else after[name]
            assert not torch.equal(after[name], old)
            torch.testing.assert_close(found, wanted, atol=2e-7, rtol=1e-5)
        else:
            assert torch.equal(after[name], old)
    assert len(result.plan.edited) == 2 * LAYERS + 1


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "falcon_h1"])
def test_writes_of_some_layers_lose_any_share(architecture, strength, make_model, tmp_path):
    base = make_model(TinyModel(architecture))
    ablate(
        *(base,),
        direction=UNIT,
        output=tmp_path / "out",
        scope="writes",
        strength=strength,
        layers="2-4",
    )
    options = {"scope": "writes", "strength": strength, "layers": (2, 3, 4)}
    assert error_of(base, tmp_path / "out", architecture, [UNIT], **options) <= 1e-4


def save_direction(path: Path, vectors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(vectors, path, {"site": "mlp_out", **metadata})
    return path


def test_several_directions_are_a_subspace(llama, tmp_path):
    files = [
        save_direction(tmp_path / f"{name}.safetensors", {"direction": vector})
        for name, vector in (("one", UNIT), ("two", OTHER))
    ]
    ablate(llama, direction=[str(file) for file in files], output=tmp_path / "out")
    assert error_of(llama, tmp_path / "out", "llama", [UNIT, OTHER]) <= 1e-4
    assert (tmp_path / "out" / "direction-2.safetensors").is_file()
    assert verify(tmp_path / "out", base=str(llama)).equivalence.passed
    again = [*files, save_direction(tmp_path / "sum.safetensors", {"direction": UNIT + OTHER})]
    with pytest.raises(DirectionError, match="direction 3 lies in what the ones before it span"):
        ablate(llama, direction=[str(file) for file in again], output=tmp_path / "more")


def test_one_layers_direction_is_taken_for_the_stream_and_each_for_writes(llama, tmp_path):
    own = {f"direction.{layer}": torch.roll(UNIT, layer) for layer in range(LAYERS)}
    file = save_direction(tmp_path / "layers.safetensors", own)
    with pytest.raises(DirectionError, match="--from-layer"):
        ablate(llama, direction=file, output=tmp_path / "out")
    ablate(llama, direction=file, from_layer=4, output=tmp_path / "out")
    assert error_of(llama, tmp_path / "out", "llama", [torch.roll(UNIT, 4)]) <= 1e-4
    ablate(llama, direction=file, scope="writes", layers="3", output=tmp_path / "writes")
    options = {"scope": "writes", "layers": (3,)}
    assert error_of(llama, tmp_path / "writes", "llama", [torch.roll(UNIT, 3)], **options) <= 1e-4


@pytest.fixture(scope="module")
def ablated(llama, tmp_path_factory) -> Path:
    """A good ablation of the float32 Llama."""
    output = tmp_path_factory.mktemp("ablated") / "out"
    ablate(llama, direction=UNIT, output=output)
    return output


def test_an_ablation_verifies_and_a_changed_one_does_not(ablated, llama, tmp_path):
    assert verify(ablated, base=str(llama)).equivalence.passed
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in ablated.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    name = "model.layers.3.mlp.down_proj.weight"
    target = next(
        file
        for file in changed.glob("model*.safetensors")
        if name in safe_open(file, "pt").keys()  # noqa: SIM118  It is no mapping.
    )
    tensors = load_file(target)
    tensors[name][0, 0] += 0.5
    save_file(tensors, target, {"format": "pt"})
    failures = verify(changed, base=str(llama)).equivalence.failures
    assert any("bit for bit" in failure for failure in failures)
    assert any("mechanism" in failure or "representation" in failure for failure in failures)


def test_record_and_card_say_what_was_taken_out(ablated):
    record = json.loads((ablated / "bake.json").read_text())
    assert record["ablation"] == {
        "scope": "stream",
        "strength": 1.0,
        "rank": 1,
        "layers": list(range(LAYERS)),
    }
    assert str(ablated) not in json.dumps(record)
    card = (ablated / "README.md").read_text()
    for words in (
        "model.layers.\\*.mlp.down_proj.weight",
        "Remainder",
        "- ablation",
        "leave embed",
    ):
        assert words.replace("\\", "") in card.replace("\\", "")


def test_an_ablation_is_built_again_byte_for_byte(ablated, llama):
    found = reproduce(str(ablated), base=str(llama))
    assert found.differing == ()
    assert len(found.same) > 5
    with pytest.raises(BakeError, match="leave --calibrate out"):
        reproduce(str(ablated), base=str(llama), calibrate=True)


def test_a_diff_shows_the_rank_of_what_was_taken_out(ablated, llama, tmp_path):
    found = diff(str(llama), str(ablated))
    changed = [change for change in found.tensors if change.kind == "changed"]
    assert len(changed) == 2 * LAYERS + 1
    assert {change.rank for change in changed} == {1}
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    for file in llama.iterdir():
        (noisy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(noisy / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    tensors[name] += torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, noisy / "model.safetensors", {"format": "pt"})
    (change,) = diff(str(llama), str(noisy)).tensors
    assert change.rank is None  # Of a fine-tune, as of noise, many.


def test_a_streamed_model_is_proven_alike(ablated, make_model, tmp_path):
    base = make_model(TinyModel("llama"))
    result = ablate(base, direction=UNIT, output=tmp_path / "out", max_memory="cpu=60KB")
    whole = json.loads((ablated / "bake.json").read_text())["equivalence"]
    assert result.equivalence.mechanism_error == pytest.approx(whole["mechanism_error"], abs=1e-6)
    for file in ablated.glob("model*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
def test_a_published_ablation_says_what_it_is(ablated, hub):
    publish(ablated, "ada/without")
    files = hub.files("ada/without")
    card = files["README.md"].decode()
    assert 'from_pretrained("ada/without")' in card
    assert "- ablation" in card
    assert json.loads(files["bake.json"])["repo_id"] == "ada/without"
    assert files["direction.safetensors"] == (ablated / "direction.safetensors").read_bytes()


def test_what_needs_the_base_says_so(ablated, tmp_path):
    with pytest.raises(UnsupportedError, match=r"is an ablation.*only its base"):
        undo(str(ablated), output=tmp_path / "base")
    with pytest.raises(UnsupportedError, match="is an ablation"):
        rescale(ablated, multiplier=2.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--strength", "0.5"], "strength 0.5 with --scope stream.*--scope writes"),
        (["--band", "40:60"], "--band with --scope stream.*--scope writes"),
        (["--layers", "3"], "--layers with --scope stream"),
        (["--scope", "writes", "--strength", "0"], "finite and not zero"),
        (["--scope", "writes", "--strength", "nan"], "finite and not zero"),
        (["--from-layer", "3"], "--from-layer 3: the direction has one vector for all layers"),
        (["--direction-site", "attn_in"], "found at attn_in.*bake direction --site mlp_out"),
        (["--scope", "writes", "--layers", "99"], "layer 99 is named; the model has layers 0 to 5"),
    ],
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(options, words, llama, tmp_path, capsys):
    import re

    file = save_direction(tmp_path / "one.safetensors", {"direction": UNIT})
    output = tmp_path / "out"
    words_given = ["ablate", str(llama), "--direction", str(file), "-o", str(output), *options]
    assert main(words_given) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert re.search(words, said[0])
    assert not output.exists()


def test_a_post_norm_is_refused_with_its_reason(make_model, tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"gemma2 cannot be ablated exactly.*a norm or a gate"
    ):
        ablate(make_model(TinyModel("gemma2")), direction=UNIT, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("strength", 0.5, "a stream is ablated in all layers"),
        ("layers", [2, 3], "a stream is ablated in all layers"),
        ("scope", "all", "ablation.scope is 'all'"),
        ("layers", [], "ablation.layers has 0 entries"),
        ("layers", [99], "names layer 99, which there is not"),
    ],
)
def test_a_record_that_lies_is_one_line(key, value, words, ablated, llama, tmp_path):
    lying = tmp_path / "lying"
    lying.mkdir()
    for file in ablated.iterdir():
        (lying / file.name).write_bytes(file.read_bytes())
    record = json.loads((lying / "bake.json").read_text())
    record["ablation"][key] = value
    (lying / "bake.json").write_text(json.dumps(record))
    with pytest.raises(BakeError, match=words):
        verify(lying, base=str(llama))


@pytest.mark.parametrize(
    ("option", "value"), [("strength", "0.5"), ("from_layer", "3"), ("heads", 2.1), ("scope", True)]
)
def test_python_values_of_another_kind_are_told(option, value, llama, tmp_path):
    with pytest.raises(BakeError, match=f"{option} is "):
        ablate(llama, direction=UNIT, output=tmp_path / "out", **{option: value})


def test_neither_direction_nor_pairs_is_a_usage_error(llama, tmp_path):
    with pytest.raises(BakeError, match="give one of --direction FILE and --pairs FILE"):
        ablate(llama, output=tmp_path / "out")


PROJECTIONS = {
    "llama": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"),
    "qwen3": ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"),
    "opt": ("model.decoder.layers.{}.self_attn.out_proj", "model.decoder.layers.{}.fc2"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", sorted(PROJECTIONS))
def test_heads_and_neurons_write_nothing(architecture, dtype, make_model, tmp_path):
    """Heads of 8 numbers; grouped queries in Llama and Qwen 3, a transposed matrix in GPT-2."""
    base = make_model(TinyModel(architecture, dtype))
    result = ablate(base, heads="2.1,2.3,4.0", neurons="3:17", output=tmp_path / "out")
    model = load(base)
    plain = logits(model)
    attention, mlp = PROJECTIONS[architecture]
    silent = [(attention, 2, 8, 16), (attention, 2, 24, 32), (attention, 4, 0, 8), (mlp, 3, 17, 18)]

    def silence(start, stop):
        def hook(_module, arguments):
            kept = arguments[0].clone()
            kept[..., start:stop] = 0
            return (kept, *arguments[1:])

        return hook

    for pattern, layer, start, stop in silent:
        module = model.get_submodule(pattern.format(layer))
        module.register_forward_pre_hook(silence(start, stop))
    wanted = logits(model)
    effect = (wanted - plain).abs().max()
    assert effect > 0.05 * plain.std()
    assert (logits(load(tmp_path / "out")) - wanted).abs().max() <= 1e-4 * effect
    assert result.equivalence.remainder is None
    assert result.equivalence.representation_error == 0  # Every dtype holds zero.
    assert len(result.plan.edited) == 3
    assert verify(tmp_path / "out", base=str(base)).equivalence.passed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "heads 2.1, 2.3, 4.0 and neuron 3:17" in card.replace("\\", "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("llama", {"heads": "2.1,2.3,4.0"}),
        ("llama", {"neurons": "3:17,3:20"}),
        ("gpt2", {"heads": "2.1,2.3,4.0"}),  # whose bias is there already
        ("gpt2", {"neurons": "3:17"}),
    ],
)
def test_heads_and_neurons_write_their_mean(
    architecture, options, dtype, make_model, prompts_file, tmp_path
):
    base, output = make_model(TinyModel(architecture, dtype)), tmp_path / "out"
    result = ablate(base, **options, mean=True, prompts=prompts_file, output=output)
    attention, mlp = PROJECTIONS[architecture]
    means = load_file(output / "means.safetensors")
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    plain = logits(model)
    texts = [json.loads(line)["text"] for line in prompts_file.read_text().splitlines()]
    for name, mean in means.items():
        layer, number = map(int, re.split("[.:]", name))
        pattern, width = (attention, 8) if "." in name else (mlp, 1)
        columns = slice(number * width, (number + 1) * width)
        module, seen = model.get_submodule(pattern.format(layer)), []
        reading = module.register_forward_pre_hook(lambda _m, a, to=seen: to.append(a[0]))
        special = set(tokenizer.all_special_ids)
        kept = []
        for text in texts:
            ids = tokenizer(text).input_ids
            with torch.no_grad():
                model(torch.tensor([ids]))
            places = [p for p, token in enumerate(ids) if p and token not in special]
            kept.append(seen.pop()[0, places, columns])
        reading.remove()
        expected = torch.cat(kept).double().mean(dim=0)
        torch.testing.assert_close(
            mean, expected, rtol=0, atol=1e-5 * float(expected.abs().max()) + 1e-7
        )

    def give(columns, mean):
        def hook(_module, arguments):
            kept = arguments[0].clone()
            kept[..., columns] = mean.float()
            return (kept, *arguments[1:])

        return hook

    for name, mean in means.items():
        layer, number = map(int, re.split("[.:]", name))
        pattern, width = (attention, 8) if "." in name else (mlp, 1)
        columns = slice(number * width, (number + 1) * width)
        model.get_submodule(pattern.format(layer)).register_forward_pre_hook(give(columns, mean))
    wanted = logits(model)
    effect = (wanted - plain).abs().max()
    assert effect > 0.01 * plain.std()
    bound = 1e-4 if dtype == "float32" else 0.1
    assert (logits(load(output)) - wanted).abs().max() <= bound * effect
    assert result.equivalence.passed
    assert verify(output, base=str(base)).equivalence.passed
    assert reproduce(str(output), base=str(base)).identical
    card = (output / "README.md").read_text()
    assert "is their mean over the calibration prompts" in card


def test_means_are_of_the_heads_that_are_named(llama, prompts_file, tmp_path):
    output = tmp_path / "out"
    ablate(llama, heads="2.1", mean=True, prompts=prompts_file, output=output)
    save_file({"2.2": torch.zeros(8)}, output / "means.safetensors")
    with pytest.raises(CheckpointError, match=r"has no mean of 8 numbers for 2\.1"):
        verify(output, base=str(llama))
    (output / "means.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks means\.safetensors"):
        verify(output, base=str(llama))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": "2.1", "neurons": "3:17", "mean": True}, "--mean takes heads or neurons"),
        ({"direction": UNIT, "mean": True}, "--mean is for --heads or --neurons"),
        ({"heads": "2.1", "prompts": "code"}, "--prompts is what --mean is measured on"),
        ({"direction": UNIT, "prompts": "code"}, "--prompts is what --mean is measured on"),
    ],
)
def test_a_mean_without_its_heads_is_told(llama, tmp_path, options, says):
    with pytest.raises(BakeError, match=says):
        ablate(llama, output=tmp_path / "out", **options)


def test_a_mean_needs_a_bias(make_model, tmp_path):
    base = make_model(TinyModel("mistral"))
    with pytest.raises(UnsupportedError, match="mistral has no bias at attn_out"):
        ablate(base, heads="2.1", mean=True, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--heads", ""], "'' is not written as LAYER.HEAD"),
        (["--neurons", ""], "'' is not written as LAYER:NEURON"),
        (["--heads", "2"], "'2' is not written as LAYER.HEAD, such as 10.5"),
        (["--neurons", "2.5"], "'2.5' is not written as LAYER:NEURON"),
        (["--heads", "9.1"], "layer 9 is named; the model has layers 0 to 5"),
        (["--heads", "2.4"], "head 2.4 is named; that layer has 0 to 3"),
        (["--neurons", "2:88"], "neuron 2:88 is named; that layer has 0 to 87"),
        (["--heads", "2.1", "--scope", "writes"], "--scope has no effect with --heads"),
        (["--heads", "2.1", "--pairs", "formal-casual"], "--pairs has no effect with --heads"),
    ],
)
def test_heads_that_there_are_not(options, words, llama, tmp_path, capsys):
    assert main(["ablate", str(llama), "-o", str(tmp_path / "out"), *options]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(said) == 1
    assert words in said[0]
    assert not (tmp_path / "out").exists()


def test_experts_are_no_neurons(make_model, tmp_path):
    with pytest.raises(UnsupportedError, match="does not write through one matrix"):
        ablate(make_model(TinyModel("mixtral")), neurons="2:5", output=tmp_path / "out")


def _without_embeddings(monkeypatch):
    real = erasure.WriteMap.of
    monkeypatch.setattr(
        erasure.WriteMap,
        "of",
        lambda self, ablation: tuple(e for e in real(self, ablation) if e[1] is not None),
    )


def _without_one_expert(monkeypatch):
    real = erasure._sources
    monkeypatch.setattr(
        erasure,
        "_sources",
        lambda *given: real(*given)[:-1] if len(real(*given)) > 1 else real(*given),
    )


@pytest.mark.parametrize(
    ("architecture", "mistake", "words"),
    [
        ("llama", _without_embeddings, "mechanism: hooked and ablated differ"),
        ("mixtral", _without_one_expert, "bit for bit"),
    ],
)
def test_a_wrong_edit_of_the_real_checkpoint_is_caught(
    architecture, mistake, words, make_model, tmp_path, monkeypatch
):
    """The twin was examined before the mistake, so only the proof of what was written can catch it."""
    base = make_model(TinyModel(architecture))
    ablate(base, direction=UNIT, output=tmp_path / "right")
    mistake(monkeypatch)
    with pytest.raises(EquivalenceError, match=words):
        ablate(base, direction=UNIT, output=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
