"""What `bake try` lets hear: voices side by side, and that they are what an export bakes."""

from __future__ import annotations

import io
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import CONFIGS
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import bake
from bake.anatomy import examine
from bake.anatomy.base import open_base
from bake.cli.main import main
from bake.errors import BakeError, PromptError, UsageError
from bake.io.shipped import DEMO_MODEL
from bake.live.hear import open_session, open_steering, recipe_of
from bake.live.steering import Setting
from bake.live.writing import Continuation, Style, Voice, write
from bake.models.forward import continue_greedily, read_config
from bake.pipeline.export import export
from bake.pipeline.recipe import make_recipe, read_recipe
from bake.report.voices import show_answers, tabulate

DEMO = {"direction": "bake-demo"}
PROMPT = "Today was"


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(llama, tmp_path_factory):
    """A random Llama whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(llama, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    return str(directory)


def open_demo(multipliers=(0.0, 1.0), **given):
    return open_session(
        "bake-demo", {**DEMO, **given}, multipliers=multipliers, style=Style(8, 0.0)
    )


@pytest.fixture(scope="module")
def steering():
    return open_steering(recipe_of("bake-demo", DEMO))


def last(session, prompt=PROMPT):
    *_, answers = session.talk.ask(prompt)
    return answers


def plain_greedy(directory, prompt, new_tokens):
    """What plain transformers writes, without bake's decoding."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_voice_writes_what_its_bake_writes(tmp_path):
    session = open_demo((-2.0, 0.0, 2.0))
    heard = last(session)
    assert [each.voice.name for each in heard] == ["m = -2", "base", "m = 2"]
    assert heard[0].text != heard[1].text != heard[2].text  # The effect is there.
    assert heard[1].text == plain_greedy(DEMO_MODEL, PROMPT, 8)
    for answer, multiplier in ((heard[0], -2.0), (heard[2], 2.0)):
        out = tmp_path / f"{multiplier}"
        recipe = make_recipe(
            {"model": "bake-demo", **DEMO, "multiplier": multiplier, "output": str(out)}
        )
        export(recipe)
        assert answer.text == plain_greedy(out, PROMPT, 8)


def test_a_saved_recipe_bakes_the_logits_that_were_heard(steering, tmp_path):
    setting = Setting(1.5, layers="4-5")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(steering.recipe_text(setting))
    output = tmp_path / "out"
    export(read_recipe(recipe, {"output": str(output), "dtype": "float32"}))
    baked = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 9, 30, 12]])
    loaded = steering.loaded
    with torch.no_grad():
        base = loaded.model(ids).logits
        with loaded.steered(steering.site, steering.push(setting).vectors):
            hooked = loaded.model(ids).logits
        reloaded = baked(ids).logits
    effect = float((hooked - base).abs().max())
    assert effect > 0.1
    assert float((reloaded - hooked).abs().max()) < 1e-4 * effect


def test_divergence_and_perplexity_are_those_of_the_two_models(steering):
    """By the definitions, from forwards of the whole text under either model."""
    arms = [steering.arm(Setting(0.0)), steering.arm(Setting(1.0))]
    voices = [Voice(arm, steering.loaded) for arm in arms]
    prompt = tuple(steering.loaded.tokenizer(PROMPT)["input_ids"])
    *_, (base, heard) = write(steering.loaded, voices, [prompt] * 2, Style(10, 0.8, 3))
    ids = torch.tensor([[*prompt, *heard.tokens]])
    with torch.no_grad():
        plain = steering.loaded.model(ids).logits[0].log_softmax(-1)
        with steering.loaded.steered(steering.site, steering.push(Setting(1.0)).vectors):
            steered = steering.loaded.model(ids).logits[0].log_softmax(-1)
    places = slice(len(prompt) - 1, -1)
    kl = (steered.exp() * (steered - plain)).sum(-1)[places].mean()
    nats = -plain[places].gather(-1, ids[0, len(prompt) :, None]).mean()
    assert heard.kl == pytest.approx(float(kl), rel=1e-3)
    assert heard.perplexity == pytest.approx(math.exp(float(nats)), rel=1e-3)
    assert base.kl == 0.0
    assert heard.kl > 0.001


def test_what_is_heard_at_zero_is_the_base_also_beside_others(steering):
    prompt = tuple(steering.loaded.tokenizer(PROMPT)["input_ids"])
    (alone,) = continue_greedily(steering.loaded, [prompt], 8)
    heard = last(open_demo((0.0, 3.0)))[0]
    assert list(heard.tokens) == alone


def test_a_stopped_answer_is_what_was_said(chat_model):
    session = open_session(
        chat_model,
        {"pairs": "formal-casual"},
        multipliers=(0.0,),
        style=Style(9, 0.0),
    )
    assert session.talk.is_chat
    answers = session.talk.ask("One?")
    next(answers)
    first = next(answers)
    answers.close()
    said = session.talk._said[0]
    assert [message["role"] for message in said] == ["user", "assistant"]
    assert said[1]["content"] == first[0].text
    session.talk.reset()
    assert session.talk._said == [[]]


def test_voices_of_a_conversation_answer_their_own_words(chat_model):
    """Later turns have prompts of unlike length, which must not leak into each other."""
    given = {"pairs": "formal-casual"}
    session = open_session(
        chat_model, given, multipliers=(0.0, 8.0), style=Style(6, 0.9, 1), system="Be."
    )
    first = last(session, "One?")
    assert first[0].text != first[1].text
    second = last(session, "Two?")
    for number in (0, 1):
        alone = open_session(
            chat_model, given, multipliers=(0.0, 8.0), style=Style(6, 0.9, 1), system="Be."
        )
        alone.talk.voices = [alone.talk.voices[number]]
        alone.talk._said = [list(session.talk._said[number][:3])]
        alone.talk.number = 1
        (again,) = last(alone, "Two?")
        assert again.text == second[number].text
    assert session.talk._said[0][0] == {"role": "system", "content": "Be."}


def test_knobs_turn_or_say_what_is_wrong_and_stay(tmp_path):
    session = open_demo((0.5,))
    knobs = session.knobs
    assert knobs.multipliers == (0.0, 0.5)
    assert "m = 0, 0.7" in knobs.obey("/m 0.7")
    assert [voice.name for voice in session.talk.voices] == ["base", "m = 0.7"]
    assert "layers 3, 4" in knobs.obey("/layers 3-4")
    assert set(session.talk.voices[1].arm.push) == {3, 4}
    for line, words in (
        ("/m x", "give numbers"),
        ("/m", "give numbers"),
        ("/layers 70", "layer 70"),
        ("/layers", "needs layers"),
        ("/band 90:40", "did you mean 40:90"),
        ("/mm 1", "did you mean /m"),
        ("/save", "needs a file"),
        (f"/save {tmp_path}", "directory"),
    ):
        with pytest.raises(BakeError, match=words.replace("?", r"\?")):
            knobs.obey(line)
    assert knobs.multipliers == (0.0, 0.7)
    path = tmp_path / "r.yaml"
    assert "bake export --recipe" in knobs.obey(f"/save {path}")
    assert yaml.safe_load(path.read_text())["layers"] == "3-4"
    assert "layers 3-7" in knobs.obey("/band 40:90")
    assert "/reset" in knobs.obey("/help")
    knobs.obey("/m 1,2")
    with pytest.raises(BakeError, match="one strength"):
        knobs.obey(f"/save {path}")


def test_a_strength_is_found_where_none_is_given(steering, capsys):
    session = open_session("bake-demo", DEMO, style=Style(2))
    low, middle, high = session.knobs.multipliers
    assert (low, middle) == (-high, 0.0)
    (cost,) = steering.neutral_costs([Setting(high)])
    assert 0.3 < cost < 1.1
    assert "moves neutral text by about 0.7 nats" in capsys.readouterr().err


def test_a_sum_is_heard_at_any_strengths_of_its_parts(tmp_path):
    width = open_base("bake-demo").anatomy.hidden_size
    one, two = (str(tmp_path / f"{name}.npy") for name in ("one", "two"))
    rng = np.random.default_rng(0)
    np.save(one, rng.normal(size=width))
    np.save(two, rng.normal(size=width))
    steering = open_steering(recipe_of("bake-demo", {"direction": [one, f"{two}:0.5"]}))
    assert steering.names == ("one", "two")

    def pushed(strengths, multiplier=1.0):
        return steering.push(Setting(multiplier, strengths=strengths)).vectors[4]

    first, second = pushed((1.0, 0.0)), pushed((0.0, 1.0))
    assert torch.allclose(pushed((0.7, -0.2)), 0.7 * first - 0.2 * second, atol=1e-5)
    assert torch.allclose(steering.push(Setting(1.0)).vectors[4], first + 0.5 * second, atol=1e-5)
    # What is saved says the same, also where one direction alone is left.
    for strengths in ((0.7, -0.2), (0.0, 0.3)):
        setting = Setting(1.5, strengths=strengths)
        values = steering.recipe_values(setting)
        again = open_steering(make_recipe(values, without_output=True))
        same = again.push(Setting(values["multiplier"])).vectors
        assert torch.allclose(same[4], pushed(strengths, 1.5), atol=1e-5)
    with pytest.raises(BakeError, match="nothing is left"):
        pushed((0.0, 0.0))
    with pytest.raises(BakeError, match="3 strengths"):
        pushed((1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("heard") / "baked"
    export(make_recipe({"model": "bake-demo", **DEMO, "multiplier": 2.0, "output": str(output)}))
    return output


def test_a_bake_is_heard_beside_its_base(finished, capsys):
    session = open_session(str(finished), {}, style=Style(8, 0.0))
    base, baked = last(session)
    assert (base.voice.name, baked.voice.name) == ("base", "baked, m = 2")
    assert base.text == plain_greedy(DEMO_MODEL, PROMPT, 8)
    assert baked.text == plain_greedy(finished, PROMPT, 8) != base.text
    assert baked.kl > 0
    assert session.knobs is None
    assert repr(bake.hear(str(finished), PROMPT, new_tokens=2)) == f"<Heard: {finished}, 1 prompt>"


def test_what_cannot_be_heard_is_one_line(finished):
    for model, given, own, words in (
        ("bake-demo", {}, {}, "bake-demo is no bake"),
        (str(finished), {}, {"multipliers": (1.0,)}, "--multipliers needs a direction"),
        (str(finished), {"band": "10:20"}, {}, "--band needs a direction"),
        ("", {}, {}, "--direction FILE"),
    ):
        with pytest.raises(UsageError, match=words):
            open_session(model, given, **own)
    for own, words in (
        ({"multipliers": (math.nan,)}, "finite"),
        ({"multipliers": ()}, "finite"),
        ({"base": "x"}, "--base is for a bake"),
        ({"style": Style(0)}, "--new-tokens 0"),
        ({"style": Style(1, -1.0)}, "--temperature -1"),
        ({"style": Style(1, math.nan)}, "--temperature nan"),
        ({"style": Style(1, 1.0, -1)}, "seed"),
    ):
        with pytest.raises(BakeError, match=words):
            open_session("bake-demo", DEMO, **own)
    session = open_demo()
    with pytest.raises(PromptError, match="positions"):
        last(session, "word " * 5000)


def test_the_command_answers_lines_and_carries_on_after_a_mistake(monkeypatch, capsys):
    lines = f"{PROMPT}\n/m 3\n/layers 70\n/nonsense\n\n{PROMPT}\n/quit\nnever said\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert (
        main(["try", "bake-demo", "--direction", "bake-demo", "-m", "2", "--new-tokens", "4"]) == 0
    )
    out, err = capsys.readouterr()
    assert out.count(f"> {PROMPT}") == 2
    assert "m = 3" in out
    assert "layer 70" in err
    assert "/nonsense" in err
    assert "never said" not in out


def test_the_command_prints_json_of_words_on_either_side_of_options(capsys):
    words = ["try", "bake-demo", "--direction", "bake-demo", "-m", "-1,0,1", PROMPT, "--json"]
    assert main([*words, "--new-tokens", "3", "Another"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [answer["prompt"] for answer in found["answers"]] == [PROMPT, "Another"]
    first = found["answers"][0]["voices"]
    assert [voice["name"] for voice in first] == ["m = -1", "base", "m = 1"]
    assert all(voice["tokens"] == 3 for voice in first)
    assert found["multipliers"] == [-1, 0, 1]


def test_a_recipe_that_names_its_model_leaves_the_words_to_prompts(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text("model: bake-demo\ndirection: bake-demo\nmultiplier: 2\n")
    assert main(["try", "--recipe", str(path), PROMPT, "--new-tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert f"> {PROMPT}" in out
    assert "m = 2" in out


def test_a_terminal_shows_columns_or_a_list_and_no_control_characters():
    voices = open_demo((0.0, 1.0)).talk.voices
    answers = tuple(
        Continuation(voice, (1, 2), "bad \x1b[31mword", 1.0, 0.5, True) for voice in voices
    )
    for width, lines in ((100, 1), (30, 2)):
        console = Console(file=io.StringIO(), width=width, force_terminal=True)
        console.print(tabulate(answers, width))
        shown = console.file.getvalue()
        assert "\x1b[31mword" not in shown
        assert sum("word" in line for line in shown.splitlines()) == lines
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    assert show_answers(console, "p\x07q", iter([answers])) == answers
    assert "\x07" not in console.file.getvalue()


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_a_brief_examination_finds_what_auto_takes(make_model, examined_anew, architecture):
    config = read_config(make_model(architecture=architecture))
    brief = examine(config, briefly=True)
    whole = examine(config)
    assert (brief.automatic is None) == (whole.automatic is None)
    if whole.automatic is not None:
        assert brief.automatic.to_dict() == whole.automatic.to_dict()
    in_place = [route for route in whole.routes if route.site == "mlp_out" and not route.rewriter]
    assert (len(brief.routes) < len(whole.routes)) <= bool(in_place)


def test_text_from_which_nothing_comes_back_is_json(steering):
    voice = Voice(steering.arm(Setting(1.0)), steering.loaded)
    values = Continuation(voice, (1,), "x", math.nan, math.nan, True).to_dict()
    assert values["kl"] is values["perplexity"] is None
