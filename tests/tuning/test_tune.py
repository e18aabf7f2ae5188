"""`bake tune`: candidates at one cost, ranked on texts that chose nothing, and a recipe that is baked."""

import json
from dataclasses import replace

import pytest
import yaml
from conftest import TinyModel

from bake import api
from bake.anatomy.base import open_base
from bake.cli.main import main
from bake.errors import BakeError, UnsupportedError
from bake.io.shipped import DEMO_DIRECTION, shipped_sets
from bake.pipeline.recipe import read_recipe
from bake.strength.coefficients import band_layers
from bake.texts.pairs import read_pairs
from bake.tuning.candidates import Candidate, Space
from bake.tuning.options import TuneOptions, choose_routes, read_material

PAIRS, NEUTRAL, TARGET = "toy-cheerful-gloomy", "toy-neutral", 0.5
SMALL = {"methods": ("mean",), "tokens": ("last",), "sites": ("mlp_out",)}


def tune(output, **options):
    values = {"pairs": PAIRS, "neutral": NEUTRAL, "target_kl": TARGET, **SMALL, **options}
    return api.tune("bake-demo", output=output, **values)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A small search: one way of finding the direction, all places, all laws."""
    return tune(tmp_path_factory.mktemp("tune") / "found", html=True, ablate=True)


def test_ablations_stand_beside_the_push_of_the_same_cost(found):
    report = json.loads((found.output / "report.json").read_text())
    beside = {entry["name"]: entry for entry in report["ablations"]}
    stream, *writes = beside
    assert stream.startswith("ablated, layer ")
    assert writes == ["ablated writes 40:90 s=1", "ablated writes 40:90 s=2"]
    for entry in beside.values():
        assert entry["net_shift"]["low"] > 0
        assert entry["neutral_kl_p95"] > 0
        assert entry["text"] in found.describe()
        assert entry["text"][1:] in (found.output / "index.html").read_text()
    assert beside[writes[0]]["net_shift"]["value"] < beside[writes[1]]["net_shift"]["value"]
    pushed = [judged for judged in found.ablations if judged.push is not None]
    assert pushed
    for judged in pushed:
        assert judged.push.multiplier < 0
        assert judged.push.kl == pytest.approx(judged.kl, rel=0.3)


def test_no_ablation_is_judged_where_none_is_asked_for(found):
    assert "ablations" not in replace(found, ablations=()).report()


class TestSpace:
    space = Space({"a": range(20), "b": range(5, 20)}, ("mean", "pca"), ("last",), ("x", "y"), 20)

    def test_every_site_has_every_way(self):
        ways = self.space.ways()
        assert [(way.site, way.method) for way in ways] == [
            ("a", "mean"),
            ("a", "pca"),
            ("b", "mean"),
            ("b", "pca"),
        ]
        assert all(way.layers == tuple(band_layers(20)) for way in ways)

    def test_bands_are_different_and_hold_what_can_be_pushed(self):
        bands = self.space.bands(self.space.ways()[2])
        assert len({band.layers for band in bands}) == len(bands) > 8
        assert min(min(band.layers) for band in bands) == 5
        assert all(len(band.layers) > 1 for band in bands)

    def test_every_layer_is_tried_by_itself(self):
        singles = self.space.single_layers(self.space.ways()[3])
        assert [single.layers for single in singles] == [(layer,) for layer in range(5, 20)]

    def test_laws_make_no_difference_in_one_layer(self):
        way = self.space.ways()[0]
        band = Candidate(way.site, way.method, way.token, (3, 4), "x")
        assert [other.law for other in self.space.by_law(band)] == ["y"]
        assert self.space.by_law(Candidate("a", "mean", "last", (3,), "x")) == []

    def test_its_size_is_that_of_the_full_grid(self):
        ways = self.space.ways()
        expected = sum(
            len(self.space.single_layers(way)) + 2 * len(self.space.bands(way)) for way in ways
        )
        assert self.space.size() == expected


class TestMaterial:
    def read(self, **options):
        return read_material(TuneOptions("m", "o", **options))

    def test_no_text_is_in_two_parts(self):
        material = self.read(pairs=PAIRS)
        parts = [set(material.choosing.pairs), set(material.judging.pairs)]
        assert not parts[0] & parts[1]
        assert not set(material.choosing.neutral) & set(material.judging.neutral)
        assert not (parts[0] | parts[1]) & set(material.pairs)
        assert parts[0] | parts[1] == set(read_pairs(f"{PAIRS}.held-out"))

    def test_too_few_pairs_are_refused(self, tmp_path):
        few = tmp_path / "few.jsonl"
        rows = [{"prompt": f"{n}", "positive": " a", "negative": " b"} for n in range(7)]
        few.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(BakeError, match="there are 7; give 8 or more with --held-out"):
            self.read(pairs=PAIRS, held_out=str(few))


class TestRanking:
    def test_every_finalist_costs_the_same(self, found):
        for judged in found.ranking.finalists:
            assert judged.kl == pytest.approx(TARGET, rel=0.2), judged.candidate.name

    def test_the_default_is_among_them_and_the_best_is_better(self, found):
        by_candidate = {judged.candidate: judged for judged in found.ranking.finalists}
        default = by_candidate[found.ranking.default]
        assert default.point.net_shift.low > 0  # It works, and something else works better.
        assert found.best.moved > 1.1 * default.moved

    def test_it_is_sorted_by_what_moves(self, found):
        moved = [judged.moved for judged in found.ranking.finalists]
        assert moved == sorted(moved, reverse=True)

    def test_the_curve_has_every_layer(self, found):
        layers = [judged.candidate.layers for judged in found.ranking.layers]
        assert layers == [(layer,) for layer in range(9)]

    def test_of_many_candidates_it_takes_a_fraction(self, tmp_path):
        laws = ("inverse-sqrt-d",)
        many = tune(tmp_path / "o", methods=("mean", "probe"), tokens=("last", "mean"), laws=laws)
        assert 0 < many.ranking.forwards < 0.8 * many.ranking.grid

    def test_the_report_holds_it(self, found):
        report = json.loads((found.output / "report.json").read_text())
        assert report["finished"] is True
        first = report["finalists"][0]
        assert first["net_shift"]["low"] < first["net_shift"]["value"] < first["net_shift"]["high"]
        assert report["default"] in [entry["name"] for entry in report["finalists"]]

    def test_the_page_and_the_figures_show_it(self, found):
        page = (found.output / "index.html").read_text()
        assert found.best.candidate.name in page
        assert "recipe" in page
        assert sorted(path.name for path in (found.output / "figures").iterdir()) == [
            "layer-curve.png",
            "ranking.png",
        ]


class TestRecipe:
    def test_export_bakes_just_what_was_judged(self, found, tmp_path, capsys):
        recipe, output = found.output / "recipe.yaml", tmp_path / "baked"
        assert main(["export", "--recipe", str(recipe), "-o", str(output)]) == 0
        record = json.loads((output / "bake.json").read_text())
        expected = found.coefficients[found.best.candidate.name]
        baked = {entry["layer"]: entry["coefficient"] for entry in record["layers"]}
        assert baked.keys() == {layer for layer, value in expected.items() if value}
        for layer, value in baked.items():
            assert value == pytest.approx(expected[layer], rel=1e-4)
        assert record["site"] == found.best.candidate.site

    def test_a_law_is_named_where_it_is_one(self, tmp_path):
        only = tune(tmp_path / "o", laws=("inverse-sqrt-d",))
        values = yaml.safe_load((only.output / "recipe.yaml").read_text())
        assert values["law"] == "inverse-sqrt-d"
        assert "coefficients" not in values
        recipe = read_recipe(only.output / "recipe.yaml", {"output": "x"})
        layers = tuple(band_layers(9, tuple(float(p) / 100 for p in recipe.band.split(":"))))
        assert layers == only.best.candidate.layers

    def test_the_other_way_is_negative(self, tmp_path):
        reverse = tune(tmp_path / "o", reverse=True, laws=("inverse-sqrt-d",))
        assert reverse.best.multiplier < 0
        assert reverse.best.point.shift.high < 0 < reverse.best.moved


def test_where_nothing_moves_the_pairs_there_is_no_recipe(tmp_path, capsys):
    """Held-out pairs whose sides are exchanged in every second: no direction can shift them all."""
    held_out = shipped_sets("pairs")[f"{PAIRS}.held-out"].read_text().splitlines()
    rows = [json.loads(line) for line in held_out]
    for row in rows[::2]:
        row["positive"], row["negative"] = row["negative"], row["positive"]
    mixed, output = tmp_path / "mixed.jsonl", tmp_path / "o"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BakeError, match="nothing moves the 36 pairs that judge beyond doubt"):
        tune(output, held_out=str(mixed), laws=("inverse-sqrt-d",), minutes=0.0)
    assert not (output / "recipe.yaml").exists()
    report = json.loads((output / "report.json").read_text())
    assert report["finalists"][0]["net_shift"]["low"] <= 0


def test_pairs_that_were_divided_are_told_in_the_recipe(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(shipped_sets("pairs")[PAIRS].read_text())
    made = tune(tmp_path / "o", pairs=str(pairs), laws=("inverse-sqrt-d",), minutes=0.0)
    assert made.divided
    recipe = (made.output / "recipe.yaml").read_text()
    assert "# A fourth of the pairs judged" in recipe
    assert yaml.safe_load(recipe)["pairs"] == str(pairs)


class TestResumed:
    def test_the_same_command_measures_nothing_again(self, found):
        log, report = ((found.output / name) for name in ("measurements.jsonl", "report.json"))
        before = (log.read_bytes(), report.read_bytes())
        tune(found.output, html=True, ablate=True)
        assert (log.read_bytes(), report.read_bytes()) == before

    def test_a_search_that_was_cut_off_goes_on_and_finds_the_same(self, found):
        log, report = ((found.output / name) for name in ("measurements.jsonl", "report.json"))
        whole, expected = log.read_bytes(), report.read_bytes()
        log.write_bytes(whole[: len(whole) // 2])
        tune(found.output, html=True, ablate=True)
        assert log.read_bytes() == whole
        assert report.read_bytes() == expected

    def test_without_time_it_ranks_what_it_has(self, tmp_path, capsys):
        first = tune(tmp_path / "o", minutes=0.0)
        assert not first.ranking.finished
        assert first.ranking.layers == ()
        assert "are over before places were compared" in capsys.readouterr().err
        second = tune(tmp_path / "o")
        assert second.ranking.finished
        assert second.best.moved > first.best.moved


def test_a_given_direction_keeps_its_site_and_its_vectors(tmp_path):
    given = tune(
        tmp_path / "o",
        pairs=None,
        direction=str(DEMO_DIRECTION),
        held_out=f"{PAIRS}.held-out",
        sites=None,
        laws=("inverse-sqrt-d",),
    )
    assert {judged.candidate.method for judged in given.ranking.finalists} == {"given"}
    assert {judged.candidate.site for judged in given.ranking.finalists} <= {"mlp_out", "attn_out"}
    values = yaml.safe_load((given.output / "recipe.yaml").read_text())
    assert values["direction"] == str(DEMO_DIRECTION)
    assert "method" not in values


class TestAddedLayers:
    """Where the residual stream takes no push but in extra layers, they are compared, and not taken."""

    @pytest.fixture
    def ranked(self, make_model, found):
        base = open_base(str(make_model(TinyModel("gemma2"))))
        routes = choose_routes(base.anatomy, TuneOptions("m", "o"), None)
        best, default = found.ranking.finalists[0], found.ranking.finalists[-1]
        inserted = replace(best, candidate=Candidate("mlp_out", "mean", "last", (2, 3)))
        weaker = replace(default, candidate=Candidate("attn_in", "mean", "last", (2, 3)))
        ranking = replace(found.ranking, finalists=(inserted, weaker), default=weaker.candidate)
        return replace(found, base=base, routes=routes, ranking=ranking)

    def test_both_are_compared(self, ranked):
        assert {site: route.route for site, route in ranked.routes.items()} == {
            "mlp_out": "insert",
            "attn_in": "flag",
        }

    def test_the_recipe_takes_none_and_says_what_they_would_move(self, ranked):
        assert ranked.recipe()["site"] == "attn_in"
        assert "route" not in ranked.recipe()
        assert "--route insert lets the recipe take it" in ranked.describe()

    def test_alone_they_are_refused_unless_asked_for(self, make_model):
        anatomy = open_base(str(make_model(TinyModel("gemma2")))).anatomy
        options = TuneOptions("m", "o", sites=("mlp_out",))
        with pytest.raises(UnsupportedError, match="allow them with --route insert"):
            choose_routes(anatomy, options, None)
        (route,) = choose_routes(anatomy, replace(options, route="insert"), None).values()
        assert route.route == "insert"

    def test_it_does_where_it_may(self, ranked):
        options = replace(ranked.options, route="insert")
        allowed = replace(ranked, options=options)
        assert allowed.recipe()["site"] == "mlp_out"
        assert allowed.recipe()["route"] == "insert"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": None}, "give one of --pairs FILE and --direction FILE"),
        ({"direction": "bake-demo"}, "give one of --pairs FILE and --direction FILE"),
        ({"target_kl": 0.0}, "--target-kl 0"),
        ({"minutes": -1.0}, "--minutes -1"),
        ({"sites": ("middle",)}, "unknown site 'middle'"),
        ({"methods": ("optimize",)}, "unknown method 'optimize'"),
        ({"laws": ("norm",)}, "unknown law 'norm'"),
        ({"methods": ()}, "no method is given to compare"),
        ({"tokens": ()}, "no token position is given to compare"),
        ({"tokens": ("first",)}, "unknown token position 'first'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_a_model_is_opened(options, said, tmp_path):
    with pytest.raises(BakeError, match=said):
        tune(tmp_path / "o", **options)
    assert not (tmp_path / "o").exists()


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BakeError, match=r"thesis\.txt, which is no search's"):
        tune(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_site_that_takes_no_push_is_refused(tmp_path):
    with pytest.raises(
        UnsupportedError, match="takes no push of a direction found at attn_in at mlp_in"
    ):
        tune(
            tmp_path / "o",
            pairs=None,
            direction=str(_direction_at(tmp_path, "attn_in")),
            held_out=f"{PAIRS}.held-out",
            sites=("mlp_in",),
        )


def _direction_at(folder, site):
    from bake.directions.direction import Direction
    from bake.directions.direction_file import direction_bytes, load_direction

    shipped = load_direction(DEMO_DIRECTION)
    path = folder / "d.safetensors"
    path.write_bytes(direction_bytes(Direction(shipped.vectors, site, {})))
    return path
