"""The drawings of a sweep: every coordinate where it belongs, nothing outside, no text on text."""

import dataclasses
import math
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import svg_parallel, svg_sweep
from pipelines.svg_parallel import CEILING, COLUMN, FLOOR, MARGIN, NO_VALUE
from pipelines.svg_sweep import BOTTOM, LEFT, RIGHT, TOP
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, SweepSummary
from tests.sweeps import AXES, EDGES, THREE, axis, ordinary, schedule, summary, trial

MIDDLE = (CEILING + FLOOR) / 2
Line = list[tuple[float, float]]


def points(element: ET.Element) -> Line:
    return [
        (float(x), float(y)) for x, y in (p.split(",") for p in element.attrib["points"].split())
    ]


def lines(drawing: str) -> dict[int, list[Line]]:
    """Each trial's polylines, in the order in which they are drawn."""
    groups = ET.fromstring(drawing).iterfind("g[@data-trial]")
    return {int(g.attrib["data-trial"]): [points(p) for p in g.iter("polyline")] for g in groups}


def classes(drawing: str) -> dict[int, set[str]]:
    groups = ET.fromstring(drawing).iterfind("g[@data-trial]")
    return {int(g.attrib["data-trial"]): set(g.attrib["class"].split()) for g in groups}


def near(*expected: tuple[float, float]) -> Any:
    return [pytest.approx(point, abs=0.06) for point in expected]


# --- parallel coordinates ------------------------------------------------------------------------

XS = [MARGIN + i * COLUMN for i in range(5)]


def test_choices_are_even_ranges_linear_or_logarithmic_and_low_distances_on_top() -> None:
    drawn = lines(svg_parallel.parallel(THREE))
    assert drawn[0] == [near(*zip(XS, (FLOOR, FLOOR, FLOOR, FLOOR), strict=False))]
    assert drawn[1] == [near(*zip(XS, (MIDDLE, MIDDLE, MIDDLE, MIDDLE), strict=False))]
    assert drawn[2] == [near(*zip(XS, (CEILING, CEILING, CEILING, CEILING), strict=False))]


def test_distances_far_apart_stand_on_a_logarithmic_axis() -> None:
    trials = tuple(trial(i, (value,)) for i, value in enumerate((1.0, 10.0, 100.0), start=1))
    drawn = lines(svg_parallel.parallel(summary((), *trials)))
    assert [drawn[i][0][-1][1] for i in (1, 2, 3)] == pytest.approx([CEILING, MIDDLE, FLOOR])


def test_the_recipe_that_names_no_values_is_a_mark_and_not_a_line_of_inactive_axes() -> None:
    plain = dataclasses.replace(THREE, trials=(trial(0, (3.0,)), *THREE.trials[1:]))
    drawing = svg_parallel.parallel(plain)
    assert lines(drawing)[0] == []
    assert lines(drawing)[1] == lines(svg_parallel.parallel(THREE))[1]
    assert f'cx="{XS[3]:.1f}" cy="{FLOOR:.1f}"' in drawing
    assert "—" not in drawing


def test_the_order_of_trials_does_not_change_the_drawing() -> None:
    for seed in range(3):
        shuffled = list(ordinary().trials)
        random.Random(seed).shuffle(shuffled)
        other = dataclasses.replace(ordinary(), trials=tuple(shuffled))
        for draw in DRAWINGS.values():
            assert draw(other) == draw(ordinary())


def test_an_axis_more_that_no_trial_uses_leaves_all_others_in_place() -> None:
    before = lines(svg_parallel.parallel(THREE))
    axes = (*AXES, axis("isolate.mu0", "0.9", "0.99"))
    drawing = svg_parallel.parallel(dataclasses.replace(THREE, axes=axes))
    for number, ((*old, last),) in before.items():
        (new,) = lines(drawing)[number]
        assert new[: len(old)] == old
        assert new[len(old) :] == near((XS[3], NO_VALUE), (XS[4], last[1]))
    assert "—" in drawing
    assert "—" not in svg_parallel.parallel(THREE)


def test_the_recipes_own_value_beyond_the_space_is_drawn_and_not_clipped() -> None:
    own = trial(0, (3.0,), "isolate.init=null", "isolate.dropout=none", "isolate.lr=10000")
    drawing = svg_parallel.parallel(dataclasses.replace(THREE, trials=(own, *THREE.trials[1:])))
    drawn = lines(drawing)
    assert drawn[0][0][:3] == near((XS[0], CEILING), (XS[1], CEILING), (XS[2], CEILING))
    assert drawn[2][0][0][1] == pytest.approx(CEILING + (FLOOR - CEILING) / 3, abs=0.06)
    assert drawn[2][0][1][1] == pytest.approx(CEILING + 18)  # numbers end below the word
    assert drawn[2][0][2][1] == pytest.approx(MIDDLE)  # the axis now ends at 10,000
    assert all(f">{label}<" in drawing for label in ("null", "none", "10k"))


def test_values_no_number_can_be_made_of_get_places_of_their_own() -> None:
    odd = ("nan", "inf", "-1", "0", "[1, 2]")
    trials = tuple(trial(i, (1.0,), f"isolate.lr={value}") for i, value in enumerate(odd))
    only = summary((axis("isolate.lr", low=1.0, high=100.0, log=True),), *trials)
    drawn = lines(svg_parallel.parallel(only))
    assert len({drawn[i][0][0] for i in range(5)}) == 5


def test_a_trial_without_a_finite_distance_ends_below_the_axis() -> None:
    lost = dataclasses.replace(THREE, trials=(*THREE.trials[:2], trial(2, (math.nan,))), winner=1)
    drawing = svg_parallel.parallel(lost)
    assert lines(drawing)[2][0][-1] == near((XS[3], NO_VALUE))[0]
    assert ">none<" in drawing
    assert ">none<" not in svg_parallel.parallel(THREE)


def test_better_trials_are_never_fainter_and_the_winner_lies_on_top() -> None:
    trials = tuple(trial(i, (1.0 + i / 4,), f"isolate.init={'ab'[i % 2]}") for i in range(12))
    drawing = svg_parallel.parallel(summary((axis("isolate.init", "a", "b"),), *trials, winner=5))
    found = classes(drawing)
    shades = [int(re.search(r"q(\d)", " ".join(found[i]))[1]) for i in range(12)]  # type: ignore[index]
    assert shades == sorted(shades)
    assert (shades[0], shades[-1]) == (0, 4)
    assert list(found)[-2:] == [0, 5]
    assert [i for i in found if "winner" in found[i]] == [5]
    assert [i for i in found if "recipe" in found[i]] == [0]


def test_states_are_classes_and_marks() -> None:
    states = (COMPLETED, STOPPED, FAILED, RUNNING)
    trials = [trial(i, (1.0 + i,), state=state) for i, state in enumerate(states)]
    for draw in (svg_parallel.parallel, svg_sweep.learning, svg_sweep.cost):
        drawing = draw(summary((), *trials))
        assert all(states[i] in found for i, found in classes(drawing).items())
        assert drawing.count("<circle") == 2
        assert drawing.count('<path class="mark"') == 2


def test_keys_are_shortened_to_what_tells_them_apart() -> None:
    assert svg_sweep.short_keys(["a.b.s1", "a.c.s1", "a.mu0"]) == {
        "a.b.s1": "b.s1",
        "a.c.s1": "c.s1",
        "a.mu0": "mu0",
    }
    assert svg_sweep.short_keys(["s1", "a.s1"]) == {"s1": "s1", "a.s1": "a.s1"}


# --- importance ----------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_shares_and_start_at_zero() -> None:
    axes = (axis("a.x", importance=0.2), axis("a.y", importance=0.8), axis("a.z", importance=0.0))
    drawing = svg_parallel.importance(summary(axes))
    bars = list(ET.fromstring(drawing).iter("rect"))
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([368, 92, 0])
    assert {bar.attrib["x"] for bar in bars} == {"0"}
    assert re.findall(r">(\d+ %)<", drawing) == ["80 %", "20 %", "0 %"]


def test_without_any_importance_there_is_no_drawing() -> None:
    axes = (axis("a.x"), axis("a.y", importance=math.nan))
    assert svg_parallel.importance(summary(axes)) == ""
    assert svg_parallel.importance(summary((*axes, axis("a.z", importance=1.0)))).count("rect") == 1


# --- schedules -----------------------------------------------------------------------------------


def test_schedules_are_stairs_over_the_fraction() -> None:
    found = summary(
        (),
        trial(0, (1.0,)),
        schedules=(schedule(0, N=(10, 10, 20, 30), mu=(0.9,) * 4),),
    )
    y = {10: BOTTOM, 20: (TOP + BOTTOM) / 2, 30: TOP}
    x = {f: LEFT + f * (RIGHT - LEFT) for f in (0, 0.25, 0.5, 1)}
    assert lines(svg_sweep.schedules(found, "N"))[0] == [
        near(
            (x[0], y[10]),
            (x[0.25], y[10]),
            (x[0.25], y[10]),
            (x[0.5], y[10]),
            (x[0.5], y[20]),
            (x[1], y[20]),
            (x[1], y[30]),
        )
    ]
    assert "linear axis" in svg_sweep.schedules(found, "N")
    assert len({y for _, y in lines(svg_sweep.schedules(found, "mu"))[0][0]}) == 1  # flat
    assert svg_sweep.schedules(found, "gap") == ""


def test_grids_that_grow_a_hundredfold_stand_on_a_logarithmic_axis() -> None:
    grown = summary((), trial(0, (1.0,)), schedules=(schedule(0, N=(1, 10, 100, 1000)),))
    drawing = svg_sweep.schedules(grown, "N")
    assert "logarithmic axis" in drawing
    corners = lines(drawing)[0][0][::2]
    steps = [a[1] - b[1] for a, b in pairwise(corners)]
    assert steps == pytest.approx([steps[0]] * 3, abs=0.2)


def test_ratio_pairs_have_a_gap_and_no_grid() -> None:
    found = summary(
        (),
        trial(0, (2.0,)),
        trial(1, (1.0,)),
        schedules=(
            schedule(0, N=(10, 20, 40, 80), gap=(0.5, 0.3, 0.2, 0.1)),
            schedule(1, gap=(0.5, 0.25, 0.25, 0.125)),
        ),
        winner=1,
    )
    assert set(lines(svg_sweep.schedules(found, "N"))) == {0}
    drawing = svg_sweep.schedules(found, "gap")
    assert set(lines(drawing)) == {0, 1}
    assert "better" in classes(drawing)[1]
    assert "worse" in classes(drawing)[0]
    assert re.findall(r"#\d", drawing) == ["#1", "#0"]


# --- distances -----------------------------------------------------------------------------------


def test_a_learning_curve_ends_where_its_trial_was_stopped() -> None:
    found = summary(
        (), trial(0, (40.0, 30.0, 20.0, 10.0)), trial(1, (30.0, 20.0), state=STOPPED), winner=0
    )
    x = [LEFT + f * (RIGHT - LEFT) for f in (0.25, 0.5, 0.75, 1)]
    y = {10 * i: BOTTOM - (i - 1) / 3 * (BOTTOM - TOP) for i in range(1, 5)}
    drawn = lines(svg_sweep.learning(found))
    assert drawn[0] == [near((x[0], y[40]), (x[1], y[30]), (x[2], y[20]), (x[3], y[10]))]
    assert drawn[1] == [near((x[0], y[30]), (x[1], y[20]))]
    assert list(drawn) == [1, 0]


def test_the_objective_decides_which_column_is_drawn() -> None:
    found = summary((), trial(0, (10.0, 20.0)))
    one = dataclasses.replace(found, steps=1)
    assert ">10<" in svg_sweep.learning(found)
    assert svg_sweep.learning(one) != svg_sweep.learning(found)


def test_a_probe_that_is_not_finite_interrupts_its_curve() -> None:
    found = summary((), trial(0, (4.0, math.nan, math.inf, 2.0)), trial(1, (3.0, 2.0, math.nan)))
    drawing = svg_sweep.learning(found)
    assert [len(run) for run in lines(drawing)[0]] == [1, 1]
    assert [len(run) for run in lines(drawing)[1]] == [2]
    assert not re.search(r"nan|inf[^i]", drawing)


def test_the_front_is_hand_made() -> None:
    values = ((5.0,), (3.0, 3.0), (9.0, 9.0), (4.0, 4.0, 4.0), (2.0,) * 4, (math.nan,))
    found = summary((), *(trial(i, v) for i, v in enumerate(values)))
    assert svg_sweep.front(found) == [(1_000, 5.0), (2_000, 3.0), (4_000, 2.0)]
    drawing = svg_sweep.cost(found)
    stairs = next(p for p in ET.fromstring(drawing).iter("polyline"))
    corners = points(stairs)
    assert len(corners) == 5
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))
    assert len(classes(drawing)) == 5  # who has no distance has no mark


distance = st.floats(-1e3, 1e6).map(lambda value: round(value, 6))
measured = st.lists(st.tuples(st.integers(1, 4), distance), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(measured)
def test_no_trial_beats_the_front_and_no_drawing_leaves_its_frame(
    found: list[tuple[int, float]],
) -> None:
    trials = [trial(i, (value,) * count) for i, (count, value) in enumerate(found)]
    sweep = summary((axis("a.b", low=0.0, high=1.0),), *trials)
    front = svg_sweep.front(sweep)
    for count, value in found:
        assert any(images <= 1_000 * count and best <= value for images, best in front)
    for draw in (svg_parallel.parallel, svg_sweep.learning, svg_sweep.cost):
        assert_inside(draw(sweep))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-12, 1e30), min_size=4, max_size=4))
def test_any_schedule_stays_in_its_frame(values: list[float]) -> None:
    sweep = summary((), trial(0, (1.0,)), schedules=(schedule(0, gap=tuple(values)),))
    assert_inside(svg_sweep.schedules(sweep, "gap"))


def test_the_winner_and_the_recipe_are_named_beside_their_marks() -> None:
    for low, high in ((0, 1), (1, 0)):
        sweep = summary((), trial(low, (1.0,)), trial(high, (1.001,)), winner=1)
        drawing = svg_sweep.cost(sweep)
        assert "winner #1" in drawing
        assert "recipe #0" in drawing
        assert_apart(drawing)


# --- anything ------------------------------------------------------------------------------------

DRAWINGS: dict[str, Callable[[SweepSummary], str]] = {
    "parallel": svg_parallel.parallel,
    "importance": svg_parallel.importance,
    "N": lambda sweep: svg_sweep.schedules(sweep, "N"),
    "mu": lambda sweep: svg_sweep.schedules(sweep, "mu"),
    "gap": lambda sweep: svg_sweep.schedules(sweep, "gap"),
    "learning": svg_sweep.learning,
    "cost": svg_sweep.cost,
}


SIZES = {"name": 12.0, "label": 11.5, "number": 11.5, "value": 10.5, "tick": 11.0}


def boxes(drawing: str) -> list[tuple[str, float, float, float, float]]:
    """Every text with the box it fills, at 0.6 of its size per letter (0.66 when bold)."""
    root, found = ET.fromstring(drawing), []
    for element in root.iter("text"):
        kinds = element.attrib["class"].split()
        size = next(SIZES[kind] for kind in SIZES if kind in kinds)
        bold = {"name", "number"} & set(kinds)
        written = element.text or ""
        width = size * (0.66 if bold else 0.6) * len(written)
        middle = {"name", "before", "x"} & set(kinds)
        anchor = element.get("text-anchor", "middle" if middle else "end" if "y" in kinds else "")
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        left = x - {"middle": width / 2, "end": width}.get(anchor, 0.0)
        found.append((written, left, left + width, y - 0.78 * size, y + 0.1 * size))
    return found


def assert_apart(drawing: str) -> None:
    for (a, l0, r0, t0, b0), (b, l1, r1, t1, b1) in combinations(boxes(drawing), 2):
        assert min(r0, r1) <= max(l0, l1) or min(b0, b1) <= max(t0, t1), f"{a!r} lies on {b!r}"


def assert_inside(drawing: str) -> None:
    if not drawing:
        return
    root = ET.fromstring(drawing)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    places = [p for line in root.iter("polyline") for p in points(line)]
    places += [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in root.iter("circle")]
    for rect in root.iter("rect"):
        x, y = float(rect.attrib["x"]), float(rect.attrib["y"])
        places += [(x, y), (x + float(rect.attrib["width"]), y + float(rect.attrib["height"]))]
    moves = re.findall(r"translate\((\S+),(\S+)\)", drawing)
    places += [(float(x), float(y)) for x, y in moves]
    places += [corner for _, x0, x1, y0, y1 in boxes(drawing) for corner in ((x0, y0), (x1, y1))]
    for x, y in places:
        assert -0.1 <= x <= width + 0.1, f"{x} is outside of 0..{width}"
        assert -0.1 <= y <= height + 0.1, f"{y} is outside of 0..{height}"


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
@pytest.mark.parametrize("sweep", EDGES.values(), ids=EDGES)
def test_nothing_leaves_the_drawing_and_no_text_lies_on_text(
    sweep: SweepSummary, draw: Callable[[SweepSummary], str]
) -> None:
    drawing = draw(sweep)
    if drawing:
        assert_inside(drawing)
        assert_apart(drawing)
        root = ET.fromstring(drawing)
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert drawing == draw(sweep)
        told = re.sub(r"<title>.*?</title>", "", drawing)
        assert not re.search(r"\bnan\b|\binf\b", told)


def test_every_trial_has_a_line_over_all_axes() -> None:
    for name in ("ordinary", "large", "none finite", "many choices"):
        sweep = EDGES[name]
        drawn = lines(svg_parallel.parallel(sweep))
        assert set(drawn) == {t.number for t in sweep.trials}
        for number, runs in drawn.items():
            named = number > 0 or sweep.trial(number).settings
            assert [len(run) for run in runs] == ([len(sweep.axes) + 1] if named else [])
