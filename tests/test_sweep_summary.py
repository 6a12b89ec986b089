"""What a sweep found: who is best, what it cost, and its way through JSON."""

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.artifacts import from_json, to_json
from pipelines.sweep_summary import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    Finalist,
    Probe,
    Reading,
    Schedule,
    SweepSummary,
    Trial,
)
from tests.sweeps import EDGES, THREE, finalist, ordinary, schedule, summary, trial

INF, NAN = math.inf, math.nan


def probe(*readings: tuple[str, int, float]) -> Probe:
    made = tuple(Reading(ema=ema, steps=steps, value=value) for ema, steps, value in readings)
    return Probe(number=3, of=4, images=300, steps=30, seconds=1.0, readings=made)


# --- a look --------------------------------------------------------------------------------------


def test_the_lowest_reading_is_that_of_the_best_ema_in_so_many_steps() -> None:
    one = probe(("a", 2, 5.0), ("b", 2, 4.0), ("a", 1, 1.0), ("c", 2, 6.0))
    assert one.lowest(2) == Reading(ema="b", steps=2, value=4.0)
    assert one.lowest(1) == Reading(ema="a", steps=1, value=1.0)
    assert one.lowest(3) is None
    assert one.fraction == 0.75


def test_what_is_not_finite_is_never_the_lowest() -> None:
    one = probe(("a", 2, NAN), ("b", 2, -INF), ("c", 2, 4.0), ("d", 2, INF), ("a", 1, NAN))
    assert one.lowest(2) == Reading(ema="c", steps=2, value=4.0)
    assert one.lowest(1) is None
    assert probe().lowest(2) is None


def test_of_equals_the_first_is_the_lowest() -> None:
    assert probe(("b", 2, 4.0), ("a", 2, 4.0)).lowest(2) == Reading(ema="b", steps=2, value=4.0)


# --- a trial -------------------------------------------------------------------------------------


def test_a_trial_is_what_its_last_look_saw() -> None:
    one = trial(1, (1.0, 5.0, 3.0), "x.a=1")
    assert (one.objective(2), one.objective(1)) == (3.0, 4.0)
    assert (one.images, one.fraction) == (3_000, 0.75)


def test_before_the_first_look_there_is_no_distance_and_at_a_broken_one_it_is_infinite() -> None:
    assert trial(1, ()).objective(2) is None
    assert (trial(1, ()).images, trial(1, ()).fraction) == (0, 0.0)
    assert trial(1, (1.0, NAN)).objective(2) == INF
    assert trial(1, (NAN, 1.0)).objective(2) == 1.0


def test_a_setting_is_found_by_its_whole_key_and_keeps_what_stands_behind_the_first_sign() -> None:
    one = trial(1, (), "x.a.b=1", "x.a=[{kind: power, s=2}]", "x.c=")
    assert one.setting("x.a") == "[{kind: power, s=2}]"
    assert one.setting("x.a.b") == "1"
    assert one.setting("x.c") == ""
    assert one.setting("x") is None
    assert one.setting("x.d") is None


# --- ranking -------------------------------------------------------------------------------------


def numbers(made: SweepSummary) -> list[int]:
    return [one.number for one in made.ranked()]


def test_who_got_further_is_before_who_had_the_lower_distance() -> None:
    trials = (
        trial(0, (1.0, 1.0, 1.0, 9.0)),
        trial(1, (0.1,), state=STOPPED),
        trial(2, (5.0, 4.0, 3.0, 2.0)),
        trial(3, (0.5, 0.2), state=STOPPED),
        trial(4, (0.05,), state=STOPPED),
        trial(5, (), state=RUNNING),
        trial(6, (5.0, 4.0, 0.1, NAN), state=FAILED),
        trial(7, (), state=FAILED),
    )
    assert numbers(summary((), *trials)) == [2, 0, 6, 3, 4, 1, 5, 7]


def test_trials_are_ranked_in_the_objectives_steps() -> None:
    def two(number: int, one: float, two: float) -> Trial:
        found = replace(probe(("a", 1, one), ("a", 2, two)), number=4)
        return replace(trial(number, ()), probes=(found,))

    made = summary((), two(0, 1.0, 9.0), two(1, 5.0, 5.0), two(2, 9.0, 1.0))
    assert numbers(made) == [2, 1, 0]
    assert numbers(replace(made, steps=1)) == [0, 1, 2]


def test_equals_are_ranked_by_their_numbers() -> None:
    made = summary((), *(trial(n, (2.0, 1.0)) for n in (3, 0, 2, 1)))
    assert numbers(made) == [0, 1, 2, 3]


@given(
    st.lists(st.lists(st.sampled_from([0.5, 1.0, 2.0, NAN, INF]), max_size=4), max_size=8),
    st.randoms(use_true_random=False),
)
def test_ranking_is_an_order_that_does_not_depend_on_the_trials_order(
    values: list[list[float]], dice: random.Random
) -> None:
    trials = [trial(n, tuple(seen)) for n, seen in enumerate(values)]
    ranked = summary((), *trials).ranked()
    assert sorted(one.number for one in ranked) == list(range(len(trials)))
    for better, worse in pairwise(ranked):
        assert better.fraction >= worse.fraction
        if better.fraction == worse.fraction and better.probes:
            assert (better.objective(2) or 0) <= (worse.objective(2) or 0)
    mixed = trials[:]
    dice.shuffle(mixed)
    assert [one.number for one in summary((), *mixed).ranked()] == [one.number for one in ranked]


# --- sums ----------------------------------------------------------------------------------------


def test_what_was_spent_is_counted_against_all_trials_in_full() -> None:
    made = summary((), trial(0, (1.0,) * 4), trial(1, (1.0,)), trial(2, ()), images=4_000)
    assert (made.spent_images, made.full_images) == (5_000, 12_000)
    assert made.trial(1).images == 1_000
    with pytest.raises(StopIteration):
        made.trial(3)


def test_a_finalists_value_is_the_mean_over_its_seed_blocks() -> None:
    assert finalist(1, 1.0, 2.0, 6.0).value == 3.0
    assert finalist(1, *([0.1] * 10)).value == 0.1  # summed exactly
    assert math.isnan(finalist(1, 1.0, NAN).value)


# --- JSON ----------------------------------------------------------------------------------------


def through_json(value: Any) -> Any:
    return from_json(type(value), json.loads(json.dumps(to_json(value))))


@pytest.mark.parametrize("name", list(EDGES))
def test_a_summary_comes_back_from_json_as_it_was(name: str) -> None:
    found = through_json(EDGES[name])
    assert repr(found) == repr(EDGES[name])  # NaN is no NaN's equal
    assert [one.number for one in found.ranked()] == numbers(EDGES[name])


def test_every_part_comes_back_with_its_types() -> None:
    made = replace(
        ordinary(),
        finalists=(finalist(1, 1.0, 2.0),),
        schedules=(
            schedule(1, N=(10, 20, 40, 80), mu=(0.9, 0.95, 0.99, 0.999), gap=(0.9, 0.5, 0.1, 0.01)),
            schedule(2),
        ),
    )
    found = through_json(made)
    assert found == made
    assert hash(found) == hash(made)  # tuples all the way down
    (best,) = found.finalists
    assert isinstance(best, Finalist)
    assert best.protocol.digest == made.finalists[0].protocol.digest
    assert isinstance(found.schedules[0], Schedule)
    assert found.schedules[0].N == (10, 20, 40, 80)
    assert (found.schedules[1].N, found.schedules[1].mu, found.schedules[1].gap) == (None,) * 3
    assert isinstance(found.trials[0].probes[0].readings[0], Reading)


@given(
    st.lists(st.tuples(st.text(), st.integers(1, 2), st.floats()), max_size=4),
    st.lists(st.text(), max_size=3),
    st.sampled_from([RUNNING, COMPLETED, STOPPED, FAILED]),
)
def test_any_trial_comes_back_from_json_as_it_was(
    readings: list[tuple[str, int, float]], settings: list[str], state: str
) -> None:
    made = replace(trial(1, (), *settings, state=state), probes=(probe(*readings),), reason="ä\n")
    assert repr(through_json(made)) == repr(made)


@pytest.mark.parametrize(
    "change", [{"colour": 1}, {"winner": None, "trials": [{}]}, {"trials": [{"number": 1}]}]
)
def test_json_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    raw = to_json(THREE) | change
    with pytest.raises((TypeError, KeyError)):
        from_json(SweepSummary, raw)
    with pytest.raises(TypeError):
        from_json(SweepSummary, {key: raw[key] for key in ("name", "stage")})
