"""What the page of `bake play` does, without a page."""

from __future__ import annotations

import threading

import pytest

from bake.errors import BakeError
from bake.live.hear import open_session
from bake.live.steering import Setting
from bake.live.writing import Style
from bake.models import forward
from bake.pipeline.recipe import read_recipe
from bake.play.run import open_stage
from bake.play.stage import find_curve, make_setting

DEMO = {"direction": "bake-demo"}


@pytest.fixture(scope="module")
def stage():
    return open_stage("bake-demo", DEMO, multipliers=(2.0,), style=Style(6, 0.0))


def answer(stage, text="Today was", setting=None, before=((), ()), style=None):
    *_, last = stage.answer(text, before, setting, style or Style(6, 0.0))
    return last


def test_two_columns_are_answered_in_one_batch(stage, monkeypatch):
    rows = []
    run = forward.last_logits

    def counted(loaded, tokens, keep, **options):
        rows.append(tokens.shape)
        return run(loaded, tokens, keep, **options)

    monkeypatch.setattr(forward, "last_logits", counted)
    left, right, over = answer(stage)
    assert {len(shape) for shape in rows} == {2}
    assert len(rows) == 6  # One forward a token for base, steered, and the base beside the steered.
    assert rows[0][0] == 3
    assert left[0] == right[0] == {"role": "user", "content": "Today was"}
    assert left[1]["content"] != right[1]["content"]
    assert over.base.startswith("base · perplexity")
    assert over.other.startswith("m = 2 · KL")


def test_the_columns_are_those_of_the_settings(stage):
    for setting in (Setting(-2.0), Setting(3.0, layers="4"), Setting(0.0)):
        left, right, over = answer(stage, setting=setting)
        session = open_session(
            "bake-demo",
            {**DEMO, **({"layers": setting.layers} if setting.layers else {})},
            multipliers=(0.0, setting.multiplier) if setting.multiplier else (0.0,),
            style=Style(6, 0.0),
        )
        *_, heard = session.talk.ask("Today was")
        assert left[1]["content"] == heard[0].text
        assert right[1]["content"] == heard[-1].text
        assert over.other.startswith(f"m = {setting.multiplier:g}")


def test_what_was_said_stays_and_a_stopped_answer_frees_the_model(stage):
    before = ([{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}])
    running = stage.answer("Today was", before, None, Style(50, 0.0))
    left, right, _ = next(running)
    assert (left[0]["content"], right[0]["content"]) == ("a", "b")
    assert not stage._lock.locked()
    running.close()
    assert not stage._lock.locked()
    assert not any(module._forward_hooks for module in stage.steering.loaded.model.modules())
    assert answer(stage)


def test_answers_at_the_same_time_do_not_meet(stage):
    """Two pages ask at once, at other strengths: each hears what it hears alone."""
    settings = [Setting(-3.0), Setting(3.0)]
    alone = [answer(stage, setting=setting)[1] for setting in settings]
    found = {}

    def ask(index):
        found[index] = answer(stage, setting=settings[index])[1]

    threads = [threading.Thread(target=ask, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == alone
    assert alone[0] != alone[1]


def test_costs_commands_and_recipes_are_of_the_knobs(stage, tmp_path):
    weak, strong = stage.cost(Setting(0.2)), stage.cost(Setting(4.0))
    assert "gentle" in weak
    assert "strong" in strong
    assert stage.cost(Setting(0.0)) == "m = 0 is the base."
    setting = make_setting(1.5, (40.0, 70.0), " ", ())
    assert setting == Setting(1.5, band="40:70")
    command = stage.command(setting)
    assert command == ("bake export bake-demo --direction bake-demo --multiplier 1.5 --band 40:70")
    path = tmp_path / "recipe.yaml"
    path.write_text(stage.recipe(setting))
    recipe = read_recipe(path, {}, without_output=True)
    assert (recipe.multiplier, recipe.band) == (1.5, "40:70")
    assert make_setting(1, (40, 70), "3-5", (0.5, 1)) == Setting(1.0, None, "3-5", (0.5, 1.0))
    with pytest.raises(BakeError, match="layer 80"):
        stage.cost(Setting(1.0, layers="80"))
    with pytest.raises(BakeError, match="nothing was typed"):
        answer(stage, text="  ")


def test_a_layer_curve_beside_a_recipe_is_found(tmp_path):
    (tmp_path / "figures").mkdir()
    recipe = tmp_path / "recipe.yaml"
    assert find_curve(None) is None
    assert find_curve(str(recipe)) is None
    curve = tmp_path / "figures" / "layer-curve.png"
    curve.write_bytes(b"png")
    assert find_curve(str(recipe)) == curve
