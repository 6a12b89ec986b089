"""The drawings of the report: the DAG and line charts."""

import dataclasses
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import svg

DONE = ("shard", "reference", "teacher", "distill", "isolate", "evaluate", "register")
NEEDS = {
    "reference": ("shard",),
    "teacher": ("shard",),
    "distill": ("teacher",),
    "isolate": ("teacher",),
    "evaluate": ("reference", "distill", "isolate"),
    "register": ("evaluate",),
}
STAGES = tuple(
    svg.Stage(
        name=name,
        lane={"reference": -1, "isolate": 1}.get(name, 0),
        inputs=NEEDS.get(name, ()),
        dashed=("teacher",) if name == "isolate" else (),
        state="cached" if i < 3 else "ran",
        seconds=10.0 + i,
        fingerprint=f"{i}" * 64,
    )
    for i, name in enumerate(DONE)
)


def boxes(drawing: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"translate\(([\d.]+),([\d.]+)\)", drawing)]


@pytest.mark.parametrize("vertical", [False, True])
def test_dag_boxes_do_not_touch_and_lie_inside_the_drawing(vertical: bool) -> None:
    drawing = svg.dag(STAGES, vertical=vertical)
    places = boxes(drawing)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    assert box is not None
    width, height = float(box[1]), float(box[2])
    assert len(places) == 7
    for i, (x, y) in enumerate(places):
        assert 0 <= x <= width - 140
        assert 0 <= y <= height - 72
        for u, v in places[:i]:
            assert abs(x - u) > 140 or abs(y - v) > 72
    flow = [y if vertical else x for x, y in places]
    names = [s.name for s in STAGES]
    for s in STAGES:  # every edge points forward
        for name in s.inputs:
            assert flow[names.index(name)] < flow[names.index(s.name)]


def test_only_the_edge_that_lends_weights_is_dashed() -> None:
    assert svg.dag(STAGES).count('class="edge dashed"') == 1
    assert svg.dag(STAGES).count('class="edge') == 8
    plain = tuple(dataclasses.replace(s, dashed=()) for s in STAGES)
    assert "dashed" not in svg.dag(plain)


def stage(name: str, lane: int, *inputs: str) -> svg.Stage:
    return svg.Stage(
        name=name, lane=lane, inputs=inputs, state="ran", seconds=1.0, fingerprint="f" * 16
    )


WHOLE = (  # truncate and a selection for each candidate
    stage("shard", 0),
    stage("reference", -1, "shard"),
    stage("teacher", 0, "shard"),
    stage("distill", 0, "teacher"),
    stage("isolate", 1, "shard"),
    stage("truncate", 2, "isolate"),
    stage("select_ema-distill", 0, "reference", "distill"),
    stage("select_ema-isolate", 1, "reference", "isolate"),
    stage("select_ema-truncate", 2, "reference", "truncate"),
    stage("evaluate", 0, "select_ema-distill", "select_ema-isolate", "select_ema-truncate"),
)


REFINED = (  # a search of levels behind each selection
    *WHOLE[:-1],
    *(
        stage(f"search_sigmas-{name}", lane, f"select_ema-{name}")
        for lane, name in enumerate(("distill", "isolate", "truncate"))
    ),
    stage("evaluate", 0, *(f"search_sigmas-{name}" for name in ("distill", "isolate", "truncate"))),
)


EARLY = (  # from a to f: lane 0 is taken behind a, so the edge has to leave it at once
    stage("a", 0),
    stage("b", 0, "a"),
    stage("c", 0, "b"),
    stage("d", 1, "a"),
    stage("e", 0, "c", "d"),
    stage("f", 2, "a", "e"),
)


@pytest.mark.parametrize(
    "stages", [STAGES, WHOLE, REFINED, EARLY], ids=["spine", "whole", "refined", "early"]
)
def test_no_edge_runs_through_a_box(stages: tuple[svg.Stage, ...]) -> None:
    drawing = svg.dag(stages)
    places = boxes(drawing)
    lines = re.findall(r'class="edge[^"]*" d="(.*?)"', drawing)
    assert len(lines) == sum(len(s.inputs) for s in stages)
    for line in lines:
        straight = [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+),([\d.]+)", line)]
        bend = re.search(r"C(\S+) (\S+) (\S+)", line)
        pairs = [(straight[0], straight[1])]
        if bend is not None:  # it leaves the first straight part and meets the last
            end = tuple(map(float, bend[3].split(",")))
            pairs.append((end, straight[2]))
        for (x0, y0), (x1, _) in pairs:
            for x, y in places:
                inside = y < y0 < y + 72 and min(x1, x + 140) - max(x0, x) > 0.1
                assert not inside, f"{line} runs through the box at {x}, {y}"


def test_a_long_name_is_set_smaller_so_that_it_fits_its_box() -> None:
    drawing = svg.dag(WHOLE)
    assert drawing.count('class="name long"') == 3
    assert '<text class="name long" x="12" y="22">select_ema-truncate</text>' in drawing
    assert "long" not in svg.dag(STAGES)
    assert svg.dag(REFINED).count('class="name long longer"') == 3  # search_sigmas-truncate


def drawn(chart: str) -> list[tuple[float, float]]:
    points = re.findall(r'class="line" points="(.*?)"', chart)[-1].split()
    return [(float(x), float(y)) for x, y in (p.split(",") for p in points)]


finite = st.floats(-1e8, 1e8, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(ys=st.lists(finite, min_size=1, max_size=30), from_zero=st.booleans(), steps=st.booleans())
def test_any_series_stays_inside_its_chart(ys: list[float], from_zero: bool, steps: bool) -> None:
    points = [(64.0 * i, y) for i, y in enumerate(ys)]
    chart = svg.line_chart(points, label="y", from_zero=from_zero, steps=steps)
    for x, y in drawn(chart):
        assert 43.9 <= x <= 410.1
        assert 9.9 <= y <= 164.1


@pytest.mark.parametrize("value", [0.0, -3.0, 5e-324, 1e8])
def test_a_flat_series_has_a_chart(value: float) -> None:
    line = drawn(svg.line_chart([(0, value), (64, value)], label="y"))
    assert line[0][1] == line[1][1]


def test_a_line_in_log_space_is_drawn_straight_and_a_narrow_one_is_linear() -> None:
    wide = drawn(svg.line_chart([(x, 10.0 ** (-x)) for x in range(5)], label="loss"))
    falls = [b[1] - a[1] for a, b in pairwise(wide)]
    assert max(falls) - min(falls) < 0.3
    narrow = drawn(svg.line_chart([(x, 1.0 + x) for x in range(5)], label="loss"))
    falls = [b[1] - a[1] for a, b in pairwise(narrow)]
    assert max(falls) - min(falls) < 0.3
    assert svg.needs_log([1, 101])
    assert not svg.needs_log([1, 99])
    assert not svg.needs_log([0, 1000])


def test_a_schedule_is_drawn_in_steps() -> None:
    line = drawn(svg.line_chart([(0, 11), (100, 11), (200, 21)], label="N", steps=True))
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(line))


def test_points_that_are_not_finite_are_left_out_and_none_is_no_crash() -> None:
    chart = svg.line_chart([(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)], label="l")
    assert "nan" not in chart
    assert "inf" not in chart.replace("infinite", "")
    assert len(drawn(chart)) == 2
    assert "no points" in svg.line_chart([], label="l")


def test_a_long_series_is_thinned_but_keeps_its_end() -> None:
    points = [(float(i), 1.0 + 1 / (i + 1)) for i in range(200_000)]
    chart = svg.line_chart(points, label="loss")
    assert len(chart) < 60_000
    assert drawn(chart)[-1][0] == pytest.approx(410, abs=0.2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31, "0.310"),
        (12.54, "12.5"),
        (276.4, "276"),
        (99.96, "100"),
        (1204, "1,204"),
        (0, "0.00"),
    ],
)
def test_figures_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert svg.figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.24, "8.2 s"), (59.96, "1 min 00 s"), (119.7, "2 min 00 s"), (11_100, "3 h 05 min")],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert svg.duration(seconds) == text
