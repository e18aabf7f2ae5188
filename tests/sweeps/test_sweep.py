"""Sweeps: the arms of a design, the window, chance, and going on after a break."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import HIDDEN, LAYERS

from bake.directions.direction import Direction
from bake.errors import OutputError
from bake.sweeps.arms import Arm
from bake.sweeps.attribution import attribute
from bake.sweeps.controls import random_direction
from bake.sweeps.design import Design, Variant, make_arms
from bake.sweeps.findings import DoseResponse, compare_laws
from bake.sweeps.measurements import Sampling, Texts
from bake.sweeps.points import Interval, Point
from bake.sweeps.store import MEASUREMENTS_FILE, Store
from bake.sweeps.sweep import measure_sites, run_sweep
from bake.sweeps.window import Bounds, find_windows
from bake.texts.pairs import ContrastPair

FLAT = Variant(law="flat")


def exactly(value):
    return Interval(value, value, value)


def point(m, shift=None, fluency=1.0, kl=0.1, *, kind="direction", variant="", seed=None):
    return Point(
        Arm(f"{variant} {kind} {seed} m={m}", kind, m, variant=variant, seed=seed),
        shift=None if shift is None else exactly(shift),
        net_shift=None if shift is None else exactly(-shift if m < 0 else shift),
        fluency_ratio=None if fluency is None else exactly(fluency),
        neutral_kl={} if kl is None else {"p95": exactly(kl)},
    )


def find(points, design=None):
    base = point(0.0, 0.0, kind="base")
    return DoseResponse((base, *points), (), {}, {}, design or Design())


class TestWindow:
    """The multipliers of a sign that stay within the bounds, from 0 outwards without a gap."""

    def windows(self, *points, **bounds):
        return {w.sign: w for w in find_windows(find(points).curve(), Bounds(**bounds))}

    def test_it_ends_before_the_first_that_costs_too_much(self):
        found = self.windows(point(1, 0.5, 1.2), point(2, 0.9, 1.4), point(3, 1.5, 1.6))
        assert set(found) == {1}
        assert (found[1].largest, found[1].best) == (2, 2)
        assert (
            found[1].reason
            == "m = +3: sampled text's perplexity is × 1.60 [1.60, 1.60] (bound 1.5)"
        )

    def test_a_strength_is_inside_only_if_its_whole_interval_is(self):
        wide = replace(point(2, 0.9, 1.4), fluency_ratio=Interval(1.4, 1.2, 1.7))
        found = self.windows(point(1, 0.5, 1.2), wide)
        assert (found[1].largest, found[1].best) == (1, 1)
        assert "is × 1.40 [1.20, 1.70] (bound 1.5)" in found[1].reason

    def test_what_lies_beyond_a_gap_is_outside(self):
        found = self.windows(point(1, 0.5), point(2, 0.9, 9.0), point(3, 1.5))
        assert (found[1].largest, found[1].best) == (1, 1)

    def test_the_best_is_the_largest_shift_not_the_largest_multiplier(self):
        found = self.windows(point(1, 0.9), point(2, 0.5))
        assert (found[1].largest, found[1].best) == (2, 1)
        assert found[1].reason == "every strength that was measured is within the bounds"

    def test_the_best_does_not_take_from_the_completions_it_is_towards(self):
        greedy = replace(point(2, 0.9), net_shift=exactly(0.4))
        assert self.windows(point(1, 0.5), greedy)[1].best == 1

    def test_negative_multipliers_are_judged_by_their_own_shift(self):
        found = self.windows(
            point(-1, -0.5), point(-2, -0.9), point(-3, -1.0, kl=2.0), point(1, 3.0)
        )
        assert (found[-1].largest, found[-1].best) == (-2, -2)
        assert (
            "95th percentile KL on neutral text is 2.00 [2.00, 2.00] nats (bound 1)"
            in found[-1].reason
        )
        assert found[1].best == 1

    def test_nothing_inside(self):
        found = self.windows(point(1, 0.5, 1.2), fluency=1.1)
        assert (found[1].largest, found[1].best) == (None, None)
        assert "bound 1.1" in found[1].reason

    def test_a_shift_that_may_be_none_is_never_the_best(self):
        unsure = replace(point(1, 0.5), net_shift=Interval(0.5, -0.1, 1.1))
        found = self.windows(unsure, point(2, -0.9), point(-1, -0.2), point(-2, 0.4))
        assert (found[1].largest, found[1].best) == (2, None)
        assert (found[-1].largest, found[-1].best) == (-2, -1)
        assert (
            found[1]
            .describe()
            .startswith(
                "positive window: up to m = +2, no shift that way is distinguishable from none"
            )
        )
        assert "best shift at m = -1" in found[-1].describe()

    def test_bounds_are_inclusive_and_a_nan_breaks_them(self):
        assert self.windows(point(1, 0.5, 1.5, 1.0))[1].largest == 1
        assert self.windows(point(1, 0.5, math.nan))[1].largest is None
        assert self.windows(point(1, 0.5, kl=math.nan))[1].largest is None

    def test_without_a_shift_the_largest_inside_is_the_best(self):
        assert self.windows(point(1), point(2), point(3, fluency=2.0))[1].best == 2


def test_specificity_says_how_many_seeds_and_a_figure_that_does_not_grow_with_them():
    randoms = [point(1.0, s, kind="random", seed=i) for i, s in enumerate((0.1, -0.2, 0.0, 0.1))]
    elsewhere = point(2.0, 9.0, kind="random", seed=0)
    found = find([point(1.0, 0.6), point(2.0, 1.0), *randoms, elsewhere]).specificity
    assert (found.multiplier, found.seeds, found.largest) == (1.0, 4, 0.2)
    assert found.ratio == pytest.approx(3)
    assert found.rms == pytest.approx(math.sqrt(0.06 / 4))
    # 4 / χ² at 97.5 and 2.5 % of four degrees of freedom, 11.143 and 0.484.
    assert found.rms_interval == pytest.approx((found.rms * 0.599, found.rms * 2.874), rel=0.02)
    assert "3.0 × the largest of 4 random directions" in found.describe()
    assert "more seeds reach further" in found.describe()
    assert find([point(1.0, 0.6)]).specificity is None


def test_laws_are_compared_at_equal_shift_and_only_where_nothing_else_differs():
    other = replace(FLAT, injection="last-token")
    design = Design((Variant(), FLAT, other), (1.0, 2.0))
    assert [design.label(v) for v in design.variants] == ["", "flat", "flat last-token"]
    points = [
        point(1.0, 1.0, 2.0),
        point(2.0, 2.0, 4.0),
        point(1.0, 0.5, 2.0, variant="flat"),
        point(2.0, 1.5, 8.0, variant="flat"),
        point(1.0, 1.0, 99.0, variant="flat last-token"),
    ]
    costs = find(points, design).laws_at_equal_shift()
    # flat reaches a shift of 1 half-way between its points: √(2·8) = 4.
    assert costs == pytest.approx({"inverse-sqrt-d": 2.0, "flat": 4.0})
    assert compare_laws(costs).endswith("inverse-sqrt-d costs the least")
    assert compare_laws({"a": 2.0, "b": 1.0}).endswith("b costs the least")


def test_a_law_that_never_reaches_the_shift_is_left_out():
    design = Design((Variant(), FLAT), (1.0,))
    found = find([point(1.0, 1.0, 2.0), point(1.0, 0.5, 2.0, variant="flat")], design)
    assert found.laws_at_equal_shift() == pytest.approx({"inverse-sqrt-d": 2.0})


def coherent(layers, seed=0):
    """Unit vectors that turn slowly over depth, as found directions do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(HIDDEN, generator=generator)
    vectors = {layer: shared + torch.randn(HIDDEN, generator=generator) for layer in layers}
    return Direction({k: v / v.norm() for k, v in vectors.items()}, "mlp_out")


def test_random_directions_keep_the_coherence_and_lose_the_meaning():
    layers = range(2, 5)
    like = coherent(layers)
    drawn = random_direction(like, layers, HIDDEN, seed=1)
    own = torch.stack([like.layer(layer) for layer in layers])
    turned = torch.stack([drawn.layer(layer) for layer in layers])
    assert (own @ own.T)[0, 1] > 0.2
    torch.testing.assert_close(turned @ turned.T, own @ own.T, rtol=0, atol=1e-5)
    assert (own @ turned.T).abs().max() < 1e-5
    again = random_direction(like, layers, HIDDEN, seed=1)
    other = random_direction(like, layers, HIDDEN, seed=2)
    assert torch.equal(drawn.layer(2), again.layer(2))
    assert (drawn.layer(2) - other.layer(2)).abs().max() > 0.1


def test_one_vector_for_all_layers_stays_one():
    vector = torch.nn.functional.normalize(torch.randn(HIDDEN), dim=0)
    drawn = random_direction(Direction({None: vector}, "mlp_out"), range(2, 5), HIDDEN, seed=0)
    torch.testing.assert_close(drawn.layer(2), drawn.layer(4))
    assert abs(float(vector @ drawn.layer(2))) < 1e-5


def test_arms_of_a_design():
    norms = {"mlp_out": {layer: 1.0 + layer for layer in range(LAYERS)}}
    design = Design((Variant(), FLAT), (-2.0, 1.0), control_seeds=2, instruction="Be kind.")
    arms = make_arms(coherent(range(LAYERS)), design, norms, LAYERS, HIDDEN)
    assert [arm.name for arm in arms] == [
        "base", "m=-2", "m=+1", "flat m=-2", "flat m=+1", "random 0 m=1", "random 0 m=2",
        "random 1 m=1", "random 1 m=2", "instruction",
    ]  # fmt: skip
    by_name = {arm.name: arm for arm in arms}
    assert by_name["m=+1"].band == (2, 5)
    for layer in range(2, 5):
        own, chance = (by_name[name].push[layer].norm() for name in ("m=-2", "random 1 m=2"))
        expected = 2 * (1.0 + layer) / math.sqrt(HIDDEN)
        assert own == pytest.approx(expected, rel=1e-5)
        assert chance == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(by_name["m=-2"].push[3], -2 * by_name["m=+1"].push[3])


TEXTS = Texts(
    (ContrastPair("The day ", "was kind", "was cold"), ContrastPair("", "Good day!", "Bad day.")),
    ("Water boils at one hundred degrees.",),
    ("The market ", "A day"),
)
DESIGN = Design((Variant(),), (-1.0, 1.0), control_seeds=1, sampling=Sampling(1, 4))
# One log line each: the norms, pairs, neutral texts, openings.
LINES = 1 + 1 + len(TEXTS.pairs) + len(TEXTS.neutral) + len(TEXTS.openings)


@pytest.fixture
def sweep(open_tiny):
    """Return a function: folder, fingerprint → what a sweep finds, kept in a folder where one is given."""
    tiny = open_tiny("llama")
    prompts = ["Water boils at one hundred degrees."]

    def run(folder=None, fingerprint="one"):
        with Store(folder, fingerprint) if folder else nullcontext() as store:
            keep = {"keep": store.keep} if store else {}
            norms = measure_sites(tiny.loaded, {"mlp_out": range(LAYERS)}, prompts, **keep)
            kept = {"each": store.each} if store else {}
            found = run_sweep(
                tiny.loaded, coherent(range(LAYERS)), DESIGN, TEXTS, norms, LAYERS, **kept
            )
            return list(found)[-1].to_dict()

    return run


@pytest.fixture
def forwards(open_tiny, monkeypatch):
    """How many forwards the model made."""
    model, count = open_tiny("llama").loaded.model, [0]
    handle = model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield lambda: count[0]
    handle.remove()


def test_a_sweep_that_is_killed_at_any_byte_goes_on_and_ends_alike(sweep, tmp_path):
    whole = sweep()
    assert abs(whole["points"][1]["shift"]["value"]) > 1e-4
    assert sweep(tmp_path) == whole
    log = tmp_path / MEASUREMENTS_FILE
    written = log.read_bytes()
    assert written.count(b"\n") == LINES
    ends = [place + 1 for place, byte in enumerate(written) if byte == ord("\n")]
    for cut in (0, 7, ends[0], ends[0] + 9, ends[2], ends[3] - 1, ends[-2] + 30, ends[-1] - 1):
        log.write_bytes(written[:cut])
        assert sweep(tmp_path) == whole
        assert log.read_bytes() == written


def test_what_was_measured_is_not_measured_again(sweep, forwards, tmp_path):
    sweep(tmp_path)
    first = forwards()
    assert first > LINES
    sweep(tmp_path)
    assert forwards() == first
    log = tmp_path / MEASUREMENTS_FILE
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))
    sweep(tmp_path)  # The last opening: so many tokens with a cache, and scored by arm and base.
    assert forwards() == first + DESIGN.sampling.new_tokens + 2


def test_another_sweep_is_measured_anew(sweep, forwards, tmp_path):
    sweep(tmp_path)
    first = forwards()
    sweep(tmp_path, "another")
    assert forwards() == 2 * first


def test_a_file_that_is_no_log_is_begun_anew(sweep, tmp_path):
    (tmp_path / MEASUREMENTS_FILE).write_text("[1, 2]\nnonsense\n")
    assert sweep(tmp_path) == sweep()


def test_one_sweep_at_a_time_writes_a_log(sweep, tmp_path):
    with (
        Store(tmp_path, "one"),
        pytest.raises(OutputError, match="another run is writing into"),
    ):
        sweep(tmp_path)
    assert sweep(tmp_path) == sweep()


def repeated(lines):
    return [*lines, lines[-1]]


def skipped(lines):
    return [*lines[:-2], lines[-1]]


def without_a_number(lines):
    return [*lines[:-1], lines[-1].replace(b'"index"', b'"place"')]


def no_json(lines):
    return [*lines[:2], b"{\n", *lines[2:]]


def nested(lines):
    return [*lines, b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("spoil", [repeated, skipped, without_a_number, no_json, nested])
def test_measurements_that_do_not_follow_each_other_are_refused(sweep, tmp_path, spoil):
    sweep(tmp_path)
    log = tmp_path / MEASUREMENTS_FILE
    spoilt = b"".join(spoil(log.read_bytes().splitlines(keepends=True)))
    log.write_bytes(spoilt)
    with pytest.raises(OutputError, match=r"measurements\.jsonl:\d+ is not the measurement that"):
        sweep(tmp_path)
    assert log.read_bytes() == spoilt


def test_more_measurements_than_texts_are_refused(sweep, tmp_path):
    sweep(tmp_path)
    log = tmp_path / MEASUREMENTS_FILE
    last = json.loads(log.read_bytes().splitlines()[-1])
    with log.open("a") as file:
        file.write(json.dumps({**last, "index": last["index"] + 1}) + "\n")
    with pytest.raises(OutputError, match="remove the file, and it begins anew"):
        sweep(tmp_path)


def test_a_log_that_is_a_link_is_not_written_through(sweep, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / MEASUREMENTS_FILE).symlink_to(victim)
    with pytest.raises(OutputError, match="cannot be written"):
        sweep(tmp_path / "sweep")
    assert victim.read_text() == "mine\n"


def test_what_is_found_grows_with_the_measurements(open_tiny):
    tiny = open_tiny("llama")
    norms = {"mlp_out": dict.fromkeys(range(LAYERS), 1.0)}
    found = list(run_sweep(tiny.loaded, coherent(range(LAYERS)), DESIGN, TEXTS, norms, LAYERS))
    assert [bool(entry.points[1].shift) for entry in found] == [True] * 3
    assert [bool(entry.points[1].neutral_kl) for entry in found] == [False, True, True]
    assert [bool(entry.points[1].fluency) for entry in found] == [False, False, True]
    assert [len(entry.samples) for entry in found] == [0, 0, 2]


def test_only_layers_that_can_be_pushed_are(open_tiny):
    norms = {"mlp_out": {1: 1.0, 3: 3.0, 4: 4.0}}
    arms = make_arms(coherent(range(LAYERS)), DESIGN, norms, LAYERS, HIDDEN)
    assert [sorted(arm.push) for arm in arms] == [[], [3, 4], [3, 4], [3, 4]]
    tiny = open_tiny("llama")
    found = attribute(
        tiny.loaded, coherent(range(LAYERS)), Variant(band=(0, 1)),
        TEXTS, norms, LAYERS,
    )  # fmt: skip
    assert [entry.layer for entry in found.layers] == [1, 3, 4]
