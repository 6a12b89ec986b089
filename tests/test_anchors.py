"""Distances between real image sets are those that independent code measured."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from docs import anchors

DATA = Path(os.environ.get("CMFORGE_TEST_DATA", Path(__file__).parents[1] / "../shared/data"))

pytestmark = pytest.mark.skipif(
    not (DATA / "weights").is_dir(), reason=f"needs images and networks in {DATA}"
)


@pytest.fixture(scope="module")
def measure() -> Callable[[anchors.Row], float]:
    return anchors.measurer(DATA)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if row.quick else pytest.mark.slow) for row in anchors.ROWS],
    ids=lambda row: f"{row.network}: {anchors.described(row.one)} {anchors.described(row.other)}",
)
def test_the_anchor_holds(row: anchors.Row, measure: Callable[[anchors.Row], float]) -> None:
    assert measure(row) == pytest.approx(row.anchor, rel=anchors.TOLERANCE)
