"""What is kept of examinations is forgotten around each module: some change what examines."""

from __future__ import annotations

import pytest

from bake.anatomy.examination import forget_examinations


@pytest.fixture(scope="module", autouse=True)
def fresh_examinations():
    forget_examinations()
    yield
    forget_examinations()
