"""Arms: every row of a batch is steered by its own push, as if it had run alone with its own hooks."""

from dataclasses import replace

import pytest
import torch
from conftest import HIDDEN
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from bake.anatomy import examine
from bake.hooks import ablated
from bake.models.forward import LanguageModel, continue_greedily, decode
from bake.models.generation import sample_continuations
from bake.sites import SITES
from bake.sweeps.arms import Arm, compare_arms, rows_per_forward, steered_rows
from bake.sweeps.measurements import Sampling, measure_rollouts
from bake.writes import Ablation, MappedAblation, orthonormalize

IDS = (1, 40, 50, 60, 70, 80)
BOTH = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def make_arms(site="mlp_out", multipliers=(-1.0, 0.5, 1.0, 2.0)):
    """The base and four strengths; the last arm is pushed in another layer too."""
    generator = torch.Generator().manual_seed(0)
    unit = {layer: torch.randn(HIDDEN, generator=generator) for layer in (2, 4)}
    arms = [Arm("base", "base")]
    for m in multipliers:
        layers = (2, 4) if m == multipliers[-1] else (2,)
        push = {layer: m * unit[layer] for layer in layers}
        arms.append(Arm(f"m={m:+g}", "direction", m, site, push=push))
    return arms


def alone(tiny, arm):
    """The context in which an arm runs by itself, through the hooks that define a push."""
    return tiny.loaded.steered(arm.site, arm.push)


@BOTH
@pytest.mark.parametrize("site", SITES)
def test_rows_equal_separate_hooked_runs(open_tiny, architecture, site):
    tiny = open_tiny(architecture)
    arms = make_arms(site)
    compared = compare_arms(tiny.loaded, arms, IDS)
    found = {arm.name: logs for arm, logs in compared}
    base = found["base"]
    for arm in arms:
        with torch.no_grad(), alone(tiny, arm):
            expected = tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits[0]
        expected = expected.log_softmax(-1)
        if arm.kind == "direction":
            assert (expected - base).abs().max() > 0.05
        torch.testing.assert_close(found[arm.name], expected, rtol=0, atol=1e-5)


@BOTH
def test_rows_lose_what_their_own_arm_takes_out(open_tiny, architecture):
    """Of the stream or of writes, one direction or two: as if each row had run alone with its hooks."""
    tiny = open_tiny(architecture)
    anatomy = examine(tiny.loaded.config)
    writes = anatomy.ablation.choose("stream", anatomy.model_type)
    drawn = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    one, two = orthonormalize(drawn[:1]), orthonormalize(drawn[1:])
    every = range(len(writes.by_layer))
    ablations = [
        Ablation(dict.fromkeys(every, one)),
        Ablation(dict.fromkeys(every, two)),
        Ablation(dict.fromkeys((2, 3), one), "writes", 2.0),
        Ablation({1: two, 4: one}, "writes", -0.5),
    ]
    arms = [Arm("base", "base"), *make_arms(multipliers=(1.0,))[1:]]
    arms += [
        Arm(f"{place}", "ablation", -1.0, removal=MappedAblation(writes, ablation))
        for place, ablation in enumerate(ablations)
    ]
    found = {arm.name: logs for arm, logs in compare_arms(tiny.loaded, arms, IDS)}
    for arm in arms[2:]:
        with torch.no_grad(), ablated(tiny.loaded.model, writes, arm.removal.ablation):
            expected = tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits[0]
        expected = expected.log_softmax(-1)
        assert (expected - found["base"]).abs().max() > 0.02
        torch.testing.assert_close(found[arm.name], expected, rtol=0, atol=1e-5)
    with torch.no_grad(), alone(tiny, arms[1]):
        pushed = tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits[0]
    torch.testing.assert_close(found["m=+1"], pushed.log_softmax(-1), rtol=0, atol=1e-5)


def test_layers_of_several_kinds_are_pushed_each_in_its_own_place():
    """In a hybrid attention is `self_attn` in some layers and `linear_attn` in the others."""
    sizes = {
        "vocab_size": 100, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    config = CONFIG_MAPPING["qwen3_next"](**sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    structure = examine(config).structure
    loaded = LanguageModel(model, {}, torch.device("cpu"), structure=structure, tokenizer=None)
    push = {layer: torch.ones(HIDDEN) for layer in (2, 3)}
    arms = [Arm("base", "base"), Arm("m=+1", "direction", 1.0, "attn_out", push=push)]
    (_, base), (_, found) = compare_arms(loaded, arms, IDS)
    with torch.no_grad(), loaded.steered("attn_out", push):
        expected = loaded.model(torch.tensor([IDS]), use_cache=False).logits[0].log_softmax(-1)
    assert (expected - base).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_arms_of_several_sites_share_a_batch(open_tiny):
    tiny = open_tiny("llama")
    arms = [arm for site in SITES for arm in make_arms(site)[1:3]]
    for arm, logs in compare_arms(tiny.loaded, arms, IDS):
        with torch.no_grad(), alone(tiny, arm):
            expected = tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits[0]
        torch.testing.assert_close(logs, expected.log_softmax(-1), rtol=0, atol=1e-5)


def test_results_do_not_depend_on_how_arms_are_batched(open_tiny, monkeypatch):
    tiny = open_tiny("llama")
    arms = make_arms()
    together = [logs for _, logs in compare_arms(tiny.loaded, arms, IDS)]
    monkeypatch.setattr("bake.sweeps.arms.ROW_BYTES", 1)
    assert rows_per_forward(tiny.loaded, len(IDS)) == 1
    apart = [logs for _, logs in compare_arms(tiny.loaded, arms, IDS)]
    assert (together[0] - together[-1]).abs().max() > 0.05
    for left, right in zip(together, apart, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_a_cache_counts_for_how_many_rows_fit(open_tiny):
    tiny = open_tiny("llama")
    assert rows_per_forward(tiny.loaded, 100, cached=True) < rows_per_forward(tiny.loaded, 100)
    assert rows_per_forward(tiny.loaded, 10**12) == 1


def continue_rows(loaded, arms, choose, prompt=IDS):
    tokens = torch.tensor([list(prompt)] * len(arms))
    with steered_rows(loaded, arms, len(prompt)):
        return decode(loaded, tokens, 12, choose).tolist()


@BOTH
def test_greedy_rows_with_a_cache_equal_separate_runs_exactly(open_tiny, architecture):
    tiny = open_tiny(architecture)
    arms = make_arms()
    rows = continue_rows(tiny.loaded, arms, lambda logits, _: logits.argmax(-1))
    expected = []
    for arm in arms:
        with alone(tiny, arm):
            expected += continue_greedily(tiny.loaded, [IDS], 12)
    assert len({tuple(row) for row in expected}) > 2  # The arms do differ.
    assert rows == expected


class WithoutCache(torch.nn.Module):
    """A model that returns no key-value cache, as several architectures do."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config

    def get_submodule(self, name):
        return self.inner.get_submodule(name)

    def forward(self, tokens, use_cache=False):
        assert tokens.shape[1] >= len(IDS)
        return self.inner(tokens, use_cache=False)


@pytest.mark.parametrize("injection", ["broadcast", "last-token"])
def test_a_model_without_a_cache_continues_alike(open_tiny, injection):
    tiny = open_tiny("llama")
    arms = [
        arm if arm.kind == "base" else Arm(**{**vars(arm), "injection": injection})
        for arm in make_arms()
    ]
    plain = replace(tiny.loaded, model=WithoutCache(tiny.loaded.model))
    greedy = lambda logits, _step: logits.argmax(-1)  # noqa: E731
    with_cache = continue_rows(tiny.loaded, arms, greedy)
    assert len({tuple(row) for row in with_cache}) > 2
    assert continue_rows(plain, arms, greedy) == with_cache


def test_last_token_arms_are_pushed_at_the_prompts_last_token_alone(open_tiny):
    tiny = open_tiny("llama")
    everywhere = make_arms()[-1]
    last = Arm(**{**vars(everywhere), "name": "last", "injection": "last-token"})
    arms = [Arm("base", "base"), everywhere, last]
    found = {arm.name: logs for arm, logs in compare_arms(tiny.loaded, arms, IDS, prompt_length=4)}
    assert torch.equal(found["last"][:3], found["base"][:3])
    assert (found["last"][3] - found["base"][3]).abs().max() > 0.05
    assert (found["last"][4:] - found["base"][4:]).abs().max() > 0.01  # through attention
    assert (found["last"] - found[everywhere.name]).abs().max() > 0.05


def test_nothing_stays_behind(open_tiny):
    tiny = open_tiny("llama")
    before = tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits
    arms = [Arm(**{**vars(arm), "injection": "last-token"}) for arm in make_arms()]
    list(compare_arms(tiny.loaded, arms, IDS))
    assert torch.equal(tiny.loaded.model(torch.tensor([IDS]), use_cache=False).logits, before)
    assert not tiny.loaded.model._forward_pre_hooks


def test_an_arm_in_plain_values_has_no_vectors():
    arm = make_arms()[1]
    assert arm.to_dict()["name"] == "m=-1"
    assert "push" not in arm.to_dict()


@BOTH
def test_sampled_rows_equal_single_hooked_runs_with_the_same_noise(open_tiny, architecture):
    """The noise belongs to prompt, sample and step, so an arm samples alike in company and alone."""
    tiny = open_tiny(architecture)
    arms = make_arms()
    openings = ["The market ", "A short one"]
    sampling = Sampling(samples=2, new_tokens=8, seed=3)
    together = measure_rollouts(tiny.loaded, arms, openings, sampling)
    assert len({str(together[arm.name]["ids"]) for arm in arms}) == len(arms)
    prompts = [tuple(tiny.tokenizer(opening)["input_ids"]) for opening in openings]
    for arm in arms:
        with alone(tiny, arm):
            expected = sample_continuations(
                tiny.loaded, prompts, new_tokens=8, samples=2, seed=3, stop_token=2
            )
        assert together[arm.name]["ids"] == [list(ids) for ids in expected]
