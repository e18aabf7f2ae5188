"""Bakes in other engines for real, held against the record: `make test-engines`. Never skipped.

Each engine has an environment of its own below build/engines, which is made where it is not there yet.
llama.cpp's families are run by `benchmarks/engines.py` alone, because each file costs ten seconds.
"""

from __future__ import annotations

import pytest
from harness.cases import write_cases
from harness.record import PACKAGES, RECORD, environment, run
from harness.table import read_rows

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engines") / "cases"
    write_cases(directory)
    return directory


@pytest.mark.parametrize("engine", PACKAGES)
def test_an_engine_does_what_is_recorded(engine, cases, tmp_path):
    recorded = {_place(row): row.verdict for row in read_rows(RECORD) if row.engine == engine}
    found = list(run(engine, environment(engine), cases, tmp_path / "out", "today"))
    assert {_place(row): row.verdict for row in found} == recorded
    kept = [row for row in found if row.verdict == "kept"]
    assert len(kept) > 50
    assert all(float(row.error) < 1e-2 for row in kept)


def _place(row):
    return row.family, row.spelling, row.site, row.kind, row.host
