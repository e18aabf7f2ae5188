"""YAML that others wrote: what is read, and what is refused in one line within seconds."""

from __future__ import annotations

import time

import pytest

from bake.errors import BakeError, CheckpointError
from bake.io.foreign_yaml import MAX_BYTES, load_yaml, read_yaml


def test_what_people_write_means_what_it_says():
    text = "band: 40:90\nday: 2024-07-26\nrate: 1e5\nlayers: 12\nhalf: 0.5\npublic: true\nsite:\n"
    assert load_yaml(text, "recipe") == {
        **{"band": "40:90", "day": "2024-07-26", "rate": 1e5, "layers": 12, "half": 0.5},
        **{"public": True, "site": None},
    }


def test_an_alias_and_a_merge_are_read():
    text = "base: &base {law: norm, site: attn_in}\nnext:\n  <<: *base\n  site: mlp_out\n"
    assert load_yaml(text, "recipe")["next"] == {"law": "norm", "site": "mlp_out"}


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}], k{i}: 1}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("law: norm\nlaw: flat", "'law' twice", id="key-twice"),
        pytest.param("a:\n  - {b: 1, b: 2}", "'b' twice", id="key-twice-below"),
        pytest.param(LAUGHS, "aliases included", id="billion-laughs"),
        pytest.param(MERGES, "aliases included", id="billion-merges"),
        pytest.param("a: &a [*a]", "an alias inside of what it stands for", id="recursive"),
        pytest.param("x: !!python/object/apply:os.system [ls]", "the tag", id="python-object"),
        pytest.param("x: !!int ''", "not what its tag says", id="empty-integer"),
        pytest.param("x: 1" + "0" * 10_000, "not what its tag says", id="long-integer"),
        pytest.param('x: "\\ud800"', "half of a surrogate pair", id="surrogate"),
        pytest.param("[" * 100_000, "64 levels deep", id="deep-flow"),
        pytest.param("- " * 100_000 + "x", "64 levels deep", id="deep-block"),
        pytest.param("[" + "x," * 400_000 + "]", "more than 100000 values", id="many-values"),
        pytest.param("x: " + "a" * MAX_BYTES, "above the 1000000 allowed", id="long"),
        pytest.param("a: b: c", "at line 1, column 5", id="no-yaml"),
        pytest.param("\0" * 100, "special characters", id="nuls"),
        pytest.param(b"\xff\xfea\x00", "not UTF-8", id="utf-16"),
        pytest.param("a: 1\n---\nb: 2", "another document", id="two-documents"),
        pytest.param("? [a]\n: 1", "unhashable key", id="list-for-a-key"),
        pytest.param("", "not a mapping of keys but empty", id="empty"),
        pytest.param("[model]", "not a mapping of keys but a list", id="list"),
    ],
)
def test_what_is_hostile_or_wrong_is_one_line_within_seconds(text, says):
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_yaml(text, "card.md", remedy="write it again")
    assert time.process_time() - start < 20
    line = str(caught.value)
    assert line.startswith("card.md ")
    assert says in line
    assert line.endswith(": write it again")
    assert len(line) < 300


def test_a_folder_given_as_a_file_is_one_line(tmp_path):
    with pytest.raises(BakeError, match="not a regular file"):
        read_yaml(tmp_path)
