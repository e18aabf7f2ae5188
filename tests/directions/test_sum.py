"""Several directions at once: the sum, what it does along each, and that it is baked and hooked alike."""

import json
import re

import pytest
import torch
from conftest import HIDDEN, TinyModel, build_model
from safetensors.torch import save_file

from bake import export, rescale
from bake.cli.main import main
from bake.directions.direction import Direction
from bake.directions.sum import combine, parse_reference
from bake.errors import DirectionError


def unit(*values):
    vector = torch.tensor(values, dtype=torch.float32)
    return vector / vector.norm()


def direction(*values, site="mlp_out", **more):
    return Direction({None: unit(*values)}, site, **more)


def test_effective_strength_counts_what_the_others_add():
    found = combine([("a", 1.0, direction(1, 0)), ("b", 0.5, direction(1, 1))])
    a, b = (part.effective[None] for part in found.parts)
    cosine = 0.5**0.5
    assert a == pytest.approx(1 + 0.5 * cosine)
    assert b == pytest.approx(0.5 + cosine)
    expected = torch.tensor([1 + 0.5 * cosine, 0.5 * cosine])
    assert found.lengths[None] == pytest.approx(float(expected.norm()))
    assert torch.allclose(found.vectors[None], expected / expected.norm())


def test_orthogonalised_what_is_left_of_each_gets_what_was_asked_for():
    parts = [
        ("a", 1.0, direction(1, 0, 0)),
        ("b", -2.0, direction(1, 1, 0)),
        ("c", 0.5, direction(0, 1, 1)),
    ]
    plain, straight = combine(parts), combine(parts, orthogonalize=True)
    assert plain.parts[1].effective[None] != pytest.approx(-2.0, abs=0.1)
    total = straight.vectors[None] * straight.lengths[None]
    assert total.tolist() == pytest.approx([1.0, -2.0, 0.5])
    cosine = 0.5**0.5
    assert [part.kept[None] for part in straight.parts] == pytest.approx([1.0, cosine, cosine])
    # Along the directions as they were given, where the others count again.
    along = [1.0, (1 - 2) * cosine, (-2 + 0.5) * cosine]
    assert [part.effective[None] for part in straight.parts] == pytest.approx(along)


def test_own_lengths_weigh_the_parts():
    short = direction(1, 0, lengths={None: 0.5})
    long = direction(0, 1, lengths={None: 4.0})
    found = combine([("s", 1.0, short), ("l", 1.0, long)], keep_scale=True)
    assert found.lengths[None] == pytest.approx((0.25 + 16) ** 0.5)
    assert torch.allclose(found.vectors[None], unit(0.5, 4.0))


def test_layers_that_one_lacks_are_left_out():
    some = Direction({1: unit(1, 0), 2: unit(0, 1)}, "mlp_out")
    more = Direction({2: unit(1, 0), 3: unit(1, 0)}, "attn_out")
    assert list(combine([("a", 1, some), ("b", 1, more)]).vectors) == [2]
    assert list(combine([("a", 1, some), ("b", 1, direction(1, 1))]).vectors) == [1, 2]


@pytest.mark.parametrize(
    ("parts", "options", "line"),
    [
        ([(1, direction(1, 0)), (-1, direction(1, 0))], {}, "cancel each other; change"),
        ([(1, direction(1, 0)), (1, direction(1, 0, site="attn_in"))], {}, "different spaces"),
        ([(1, direction(1, 0)), (1, direction(1, 0, 0))], {}, "2 wide and b is 3"),
        (
            [(1, direction(1, 0)), (1, direction(2, 0))],
            {"orthogonalize": True},
            "nothing is left of b when it is orthogonalised",
        ),
        (
            [
                (1, Direction({1: unit(1, 0)}, "mlp_out")),
                (1, Direction({2: unit(1, 0)}, "mlp_out")),
            ],
            {},
            "no layer in common",
        ),
    ],
)
def test_sums_that_mean_nothing_are_refused(parts, options, line):
    named = [(name, strength, d) for name, (strength, d) in zip("ab", parts, strict=True)]
    with pytest.raises(DirectionError, match=line):
        combine(named, **options)


def test_references_have_strengths(tmp_path):
    assert parse_reference("d.safetensors") == ("d.safetensors", 1.0)
    assert parse_reference("d.safetensors:-0.5") == ("d.safetensors", -0.5)
    assert parse_reference("sae.npz:W_dec[3]") == ("sae.npz:W_dec[3]", 1.0)
    assert parse_reference("sae.npz:W_dec[3]:2") == ("sae.npz:W_dec[3]", 2.0)
    odd = tmp_path / "d:2"
    odd.touch()
    assert parse_reference(str(odd)) == (str(odd), 1.0)
    with pytest.raises(DirectionError, match="a strength of 0 adds nothing"):
        parse_reference("d.safetensors:0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("sum") / "base", TinyModel("llama"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("directions")
    generator = torch.Generator().manual_seed(8)
    first = torch.randn(HIDDEN, generator=generator)
    second = first + torch.randn(HIDDEN, generator=generator)
    for name, vector in (("warm", first), ("formal", second)):
        save_file({"direction": vector}, folder / f"{name}.safetensors", {"site": "mlp_out"})
    return folder / "warm.safetensors", folder / "formal.safetensors"


def stored(output):
    result = json.loads((output / "bake.json").read_text())
    return result, {entry["layer"]: entry["coefficient"] for entry in result["layers"]}


def test_a_sum_is_proven_recorded_and_rescaled(base, files, tmp_path, capsys):
    warm, formal = files
    arguments = ["export", str(base), "--direction", str(warm), "--direction", f"{formal}:-0.5"]
    assert main([*arguments, "-o", str(tmp_path / "sum")]) == 0
    assert "effective" in capsys.readouterr().out
    result, coefficients = stored(tmp_path / "sum")
    assert result["equivalence"]["passed"]
    names = [(part["name"], part["strength"]) for part in result["directions"]]
    assert names == [("warm", 1.0), ("formal", -0.5)]
    effective = [part["effective_strength"] for part in result["directions"]]
    assert effective[0] < 0.9  # They are alike, so taking one away takes from the other.
    card = (tmp_path / "sum/README.md").read_text()
    assert "It is a sum." in card
    assert "| formal | -0.5 |" in card

    assert "| range | kept |" not in card
    straight = [*arguments, "--orthogonalize", "-o", str(tmp_path / "straight")]
    assert main(straight) == 0
    (row,) = re.findall(r"\| formal .*", (tmp_path / "straight/README.md").read_text())
    kept = stored(tmp_path / "straight")[0]["directions"][1]["kept"]
    assert 0.3 < kept < 0.95
    assert row.endswith(f"| {100 * kept:.1f} % |")

    export(str(base), direction=str(warm), output=tmp_path / "one")
    _, alone = stored(tmp_path / "one")
    assert coefficients.keys() == alone.keys()
    ratios = {round(coefficients[layer] / alone[layer], 6) for layer in alone}
    assert len(ratios) == 1
    assert ratios != {1.0}

    both = [str(warm), f"{formal}:-0.5"]
    export(str(base), direction=both, multiplier=2.0, output=tmp_path / "twice")
    rescale(tmp_path / "sum", multiplier=2.0)
    for path in (tmp_path / "twice").glob("model*"):
        assert path.read_bytes() == (tmp_path / "sum" / path.name).read_bytes()


def test_bad_combinations_are_one_line(base, files, tmp_path, capsys):
    warm, _ = files
    output = ["-o", str(tmp_path / "out")]
    for arguments, line in (
        (["--direction", str(warm), "--orthogonalize"], "repeat --direction"),
        (["--direction", str(warm), "--direction", f"{warm}:-1"], "cancel each other"),
        (["--direction", str(warm), "--direction", "nowhere.npy:2"], "nowhere.npy"),
    ):
        assert main(["export", str(base), *arguments, *output]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert line in error
        assert not (tmp_path / "out").exists()
