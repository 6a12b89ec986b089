"""A trial's looks at itself: where they are, what is told of them, how they are read back."""

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consistency.config import TeacherConfig
from pipelines import probes
from pipelines.probes import WORST, by_probe, marks, read, report
from pipelines.sweep_summary import Probe, Reading

PLACES = (300, 600, 900, 1200)
INF, NAN = math.inf, math.nan


def training(images: int, batch: int) -> TeacherConfig:
    return TeacherConfig(images=images, batch=batch)


def line(images: int, value: float, *, steps: int = 2, ema: str = "a", seconds: float = 0.0) -> Any:
    """Of a watch log."""
    return {
        "images": images,
        "ema": ema,
        "steps": steps,
        "name": "fd_domain_500",
        "value": value,
        "digest": "aa",
        "seconds": seconds,
    }


def look(images: int, two: float, one: float, other: float, seconds: float = 0.0) -> list[Any]:
    """Both numbers of steps of the EMA `a`, and `b` in two steps."""
    return [
        line(images, one, steps=1, seconds=seconds),
        line(images, two, steps=2, seconds=seconds),
        line(images, other, steps=2, ema="b", seconds=seconds),
    ]


# --- marks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch", "count", "expected"),
    [
        (1200, 100, 4, (300, 600, 900, 1200)),
        (1200, 100, 1, (1200,)),
        (900 * 64, 64, 9, tuple(6400 * n for n in range(1, 10))),
        (1000, 300, 2, (600, 1200)),  # 4 steps: the last batch goes beyond the budget
        (1000, 300, 4, (300, 600, 900, 1200)),  # a look after every step
        (1000, 300, 3, (300, 900, 1200)),  # 4/3 and 8/3 of a step
        (700, 100, 7, (100, 200, 300, 400, 500, 600, 700)),
        (409_600_000, 512, 8, tuple(100_000 * 512 * n for n in range(1, 9))),
    ],
)
def test_marks_are_the_ends_of_equal_parts_in_whole_steps(
    images: int, batch: int, count: int, expected: tuple[int, ...]
) -> None:
    assert marks(training(images, batch), count) == expected


@given(batch=st.integers(1, 600), steps=st.integers(1, 5_000), data=st.data())
def test_marks_are_different_steps_at_the_nearest_fractions_and_the_last_is_the_end(
    batch: int, steps: int, data: st.DataObject
) -> None:
    images = batch * steps - data.draw(st.integers(0, batch - 1 if steps > 1 else 0))
    count = data.draw(st.integers(1, min(steps, 60)))
    found = marks(training(images, batch), count)
    assert len(set(found)) == len(found) == count
    assert list(found) == sorted(found)
    assert found[0] >= batch
    assert found[-1] == batch * steps
    for n, images_seen in enumerate(found, start=1):
        assert images_seen % batch == 0
        assert abs(Fraction(images_seen, batch) - Fraction(n * steps, count)) <= Fraction(1, 2)


def test_the_same_fractions_at_any_batch_and_any_multiple_of_the_length() -> None:
    few = marks(training(900 * 64, 64), 9)
    assert [m / 64 for m in few] == [m / 8 for m in marks(training(900 * 8, 8), 9)]
    assert [7 * m for m in few] == list(marks(training(7 * 900 * 64, 64), 9))
    assert marks(training(900 * 64, 64), 3) == few[2::3]


# --- report --------------------------------------------------------------------------------------


def test_a_report_is_of_the_last_probe_and_holds_all_lines() -> None:
    lines = [*look(300, 5.0, 7.0, 6.0), *look(600, 4.0, 3.0, 3.5)]
    told = report(lines, PLACES, 2)
    assert told == {"probe": 2, "of": 4, "distance": 3.5, "lines": lines}
    assert report(lines, PLACES, 1)["distance"] == 3.0
    assert report(lines[:3], PLACES, 2) == {
        "probe": 1,
        "of": 4,
        "distance": 5.0,
        "lines": lines[:3],
    }


def test_a_report_is_a_copy_of_plain_json() -> None:
    lines = look(300, 5.0, 7.0, 6.0)
    told = report(lines, PLACES, 2)
    assert json.loads(json.dumps(told)) == told
    told["lines"][0]["value"] = -1.0
    assert lines[0]["value"] == 7.0


@pytest.mark.parametrize(
    ("two", "other", "distance"),
    [(NAN, 6.0, 6.0), (5.0, INF, 5.0), (-INF, 6.0, 6.0), (NAN, INF, WORST), (NAN, NAN, WORST)],
)
def test_what_is_not_finite_never_wins_and_is_the_worst_where_there_is_nothing_else(
    two: float, other: float, distance: float
) -> None:
    told = report(look(300, two, 0.1, other), PLACES, 2)
    assert told["distance"] == distance
    assert math.isfinite(told["distance"])


def test_the_worst_is_worse_than_a_distance_and_can_be_averaged() -> None:
    bad = report(look(300, NAN, NAN, INF), PLACES, 2)["distance"]
    good = report(look(300, 1e6, 1.0, INF), PLACES, 2)["distance"]
    assert bad > good
    assert good < (bad + good) / 2 < bad


# --- reading back --------------------------------------------------------------------------------


def test_a_log_is_read_as_its_probes() -> None:
    lines = [*look(300, 5.0, 7.0, 6.0, seconds=1.5), *look(600, 4.0, 3.0, 3.5, seconds=2.75)]
    assert read(lines, PLACES, 100) == (
        Probe(
            number=1,
            of=4,
            images=300,
            steps=3,
            seconds=1.5,
            readings=(
                Reading(ema="a", steps=1, value=7.0),
                Reading(ema="a", steps=2, value=5.0),
                Reading(ema="b", steps=2, value=6.0),
            ),
        ),
        Probe(
            number=2,
            of=4,
            images=600,
            steps=6,
            seconds=2.75,
            readings=(
                Reading(ema="a", steps=1, value=3.0),
                Reading(ema="a", steps=2, value=4.0),
                Reading(ema="b", steps=2, value=3.5),
            ),
        ),
    )
    assert read([], PLACES, 100) == ()


def test_a_probe_has_its_number_by_its_mark_even_when_others_are_missing() -> None:
    """A look may come a little late: a mark is passed, not met."""
    found = read([line(images, 1.0) for images in (640, 900, 1280)], PLACES, 64)
    assert [(probe.number, probe.fraction) for probe in found] == [(2, 0.5), (3, 0.75), (4, 1.0)]
    assert [probe.steps for probe in found] == [10, 14, 20]
    assert report([line(1280, 1.0)], PLACES, 2)["probe"] == 4
    assert report([line(899, 1.0)], PLACES, 2)["probe"] == 2


def test_lines_are_put_together_by_their_images_and_in_order() -> None:
    late, early = look(600, 4.0, 3.0, 3.5), look(300, 5.0, 7.0, 6.0)
    assert by_probe([*late, *early]) == [early, late]
    assert by_probe(iter([late[0], early[0], late[1]])) == [[early[0]], late[:2]]
    assert report([*late, *early], PLACES, 2)["probe"] == 2
    assert read([*late, *early], PLACES, 100) == read([*early, *late], PLACES, 100)


@given(
    st.lists(
        st.tuples(*[st.floats(allow_nan=False) | st.just(NAN)] * 3),
        min_size=1,
        max_size=len(PLACES),
    ),
    st.sampled_from([1, 2]),
)
def test_what_is_reported_is_what_is_read_back(values: list[Any], objective: int) -> None:
    lines = [one for place, row in zip(PLACES, values, strict=False) for one in look(place, *row)]
    told = json.loads(json.dumps(report(lines, PLACES, objective)))
    seen = read(told["lines"], PLACES, 100)
    assert repr(seen) == repr(read(lines, PLACES, 100))
    assert [probe.number for probe in seen] == list(range(1, len(values) + 1))
    assert seen[-1].number == told["probe"]
    lowest = seen[-1].lowest(objective)
    assert told["distance"] == (WORST if lowest is None else lowest.value)


def test_every_mark_of_a_schedule_is_a_probe_of_its_number() -> None:
    for images, batch, count in [(1000, 300, 3), (1000, 300, 4), (57_600, 64, 9)]:
        places = marks(training(images, batch), count)
        found = read([line(place, 1.0) for place in places], places, batch)
        assert [probe.number for probe in found] == list(range(1, count + 1))
        assert found[-1].fraction == 1.0
        assert probes.report([line(places[-1], 1.0)], places, 2)["probe"] == count
