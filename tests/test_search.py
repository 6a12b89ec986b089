"""What is tried next: draws of the space, and what the sampler is told of the trials so far."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from pipelines.search import _Replayed, _told, at_random, propose
from pipelines.space import Space, as_text
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial
from tests.sweeps import trial

METHOD = Axis(key="x.method", choice=("a", "b"))
LR = Axis(key="x.lr", range=(1e-4, 1.0), log=True, when=("x.method=a",))
DEPTH = Axis(key="x.depth", range=(1, 8), integer=True, when=("x.method=b",))
AXES = (METHOD, LR, DEPTH)
TWICE = (
    METHOD,
    Axis(key="x.init", choice=("s", "t", "d"), when=("x.method=a",)),
    Axis(key="x.init", choice=("t", "d"), when=("x.method=b",)),
    Axis(key="x.N", range=(2, 900), integer=True, log=True),
    Axis(key="x.mean", range=(-1.8, -0.4)),
)


def sweep(axes: tuple[Axis, ...] = AXES, **changes: Any) -> SweepConfig:
    return SweepConfig(name="mine", stage="isolate", space=axes, **changes)


def values(settings: Sequence[str]) -> dict[str, str]:
    return dict(text.split("=") for text in settings)


def told(one: Trial, axes: tuple[Axis, ...] = AXES, steps: int = 2) -> Any:
    return _told(one, Space(axes), steps)


def distance(settings: Sequence[str]) -> float:
    """A bowl around lr = 0.01 of method a; any b is worse than the bowl's middle."""
    found = values(settings)
    if found["x.method"] == "b":
        return 10.0 + int(found["x.depth"])
    return 1 + (math.log10(float(found["x.lr"])) + 2) ** 2


def history(count: int, seed: int) -> list[Trial]:
    drawn = (at_random(sweep(seed=seed), n) for n in range(1, count + 1))
    return [trial(n, (distance(text),), *text) for n, text in enumerate(drawn, start=1)]


EVERY_STATE = [
    trial(0, (3.0, 2.0)),  # the recipe's own setting, of which the space has no values
    trial(1, (3.0, 2.0), "x.method=a", "x.lr=0.01"),
    trial(2, (3.0,), "x.method=b", "x.depth=3", state=STOPPED),
    trial(3, (), "x.method=b", "x.depth=8", state=RUNNING),
    trial(4, (9.0,), "x.method=a", "x.lr=1.0", state=FAILED),
    trial(5, (math.nan,), "x.method=a", "x.lr=0.1", state=STOPPED),
]


# --- what the sampler is told --------------------------------------------------------------------


def test_a_completed_trial_is_told_with_its_last_distance_and_its_looks() -> None:
    found = told(trial(1, (3.0, 5.0, 2.5), "x.method=a", "x.lr=0.01"))
    assert (found.state, found.value) == (TrialState.COMPLETE, 2.5)
    assert found.intermediate_values == {1: 3.0, 2: 5.0, 3: 2.5}
    assert found.params == {"x.method": "a", "x.lr": 0.01}
    assert found.distributions == {
        "x.method": CategoricalDistribution(("a", "b")),
        "x.lr": FloatDistribution(1e-4, 1.0, log=True),
    }


def test_the_distance_told_is_that_of_the_objectives_steps() -> None:
    one = trial(1, (3.0, 2.5), "x.method=a", "x.lr=0.01")
    assert (told(one, steps=2).value, told(one, steps=1).value) == (2.5, 3.5)
    assert told(one, steps=1).intermediate_values == {1: 4.0, 2: 3.5}


def test_a_stopped_trial_is_pruned_at_its_last_look_and_has_no_final_value() -> None:
    found = told(trial(2, (3.0, 2.0), "x.method=b", "x.depth=3", state=STOPPED))
    assert (found.state, found.value) == (TrialState.PRUNED, None)
    assert (found.last_step, found.intermediate_values) == (2, {1: 3.0, 2: 2.0})
    assert found.params == {"x.method": "b", "x.depth": 3}
    assert isinstance(found.params["x.depth"], int)
    assert found.distributions["x.depth"] == IntDistribution(1, 8)


@pytest.mark.parametrize("seen", [(), (3.0,)])
def test_a_running_trial_is_running_and_has_no_final_value(seen: tuple[float, ...]) -> None:
    found = told(trial(3, seen, "x.method=b", "x.depth=3", state=RUNNING))
    assert (found.state, found.value) == (TrialState.RUNNING, None)


def test_a_failed_trial_counts_for_nothing_however_good_it_looked() -> None:
    found = told(trial(4, (0.1, 0.01), "x.method=b", "x.depth=3", state=FAILED))
    assert (found.state, found.value, found.intermediate_values) == (TrialState.PRUNED, None, {})


def test_what_is_not_finite_is_no_value() -> None:
    ends = told(trial(5, (3.0, math.nan), "x.method=b", "x.depth=3"))
    assert (ends.state, ends.value) == (TrialState.PRUNED, None)
    assert ends.intermediate_values == {1: 3.0}
    between = told(trial(5, (math.inf, 3.0), "x.method=b", "x.depth=3"))
    assert (between.state, between.value) == (TrialState.COMPLETE, 3.0)
    assert between.intermediate_values == {2: 3.0}


def test_two_axes_of_one_key_are_told_apart() -> None:
    a = told(trial(1, (1.0,), "x.method=a", "x.init=s", "x.N=9", "x.mean=-1.0"), TWICE)
    b = told(trial(1, (1.0,), "x.method=b", "x.init=d", "x.N=9", "x.mean=-1.0"), TWICE)
    assert a.params == {"x.method": "a", "x.init": "s", "x.N": 9, "x.mean": -1.0}
    assert b.params == {"x.method": "b", "x.init#2": "d", "x.N": 9, "x.mean": -1.0}
    assert b.distributions["x.init#2"] == CategoricalDistribution(("t", "d"))
    assert b.distributions["x.N"] == IntDistribution(2, 900, log=True)


@pytest.mark.parametrize(
    "foreign",
    [
        ("x.method=c",),
        ("x.method=a",),  # lr is missing
        ("x.method=a", "x.lr=2.0"),  # above the range
        ("x.method=a", "x.lr=fast"),
        ("x.method=b", "x.depth=0"),
        ("x.method=b", "x.depth=2.5"),
        ("y.method=a", "x.lr=0.1"),
    ],
)
def test_a_trial_of_another_space_is_refused(foreign: tuple[str, ...]) -> None:
    with pytest.raises((AssertionError, ValueError)):
        propose(sweep(), [trial(1, (1.0,), *foreign)], 2)


# --- numbers -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(data=st.data(), integer=st.booleans(), log=st.booleans())
def test_a_number_goes_through_its_text_and_comes_back(
    data: st.DataObject, integer: bool, log: bool
) -> None:
    some: Any = st.integers(-(10**6), 10**6) if integer else st.floats(-1e12, 1e12)
    if log:
        some = st.integers(1, 10**6) if integer else st.floats(1e-12, 1e12)
    low, value, high = sorted(data.draw(st.tuples(some, some, some)))
    if not low < high:
        return
    axis = Axis(key="x.n", range=(low, high), integer=integer, log=log)
    text = f"x.n={as_text(axis, value)}"
    replayed = _Replayed(trial(1, (1.0,), text))
    assert Space((axis,)).settings(replayed) == (text,)
    assert replayed.params == {"x.n": value}
    assert type(replayed.params["x.n"]) is (int if integer else float)
    assert told(trial(1, (1.0,), text), (axis,)).params == {"x.n": value}  # Optuna takes it


# --- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_every_draw_is_a_setting_of_the_space_and_can_be_told(search: str) -> None:
    config = sweep(TWICE, startup=4)
    done: list[Trial] = []
    for number in range(1, 25):
        drawn = propose(config, done, number) if search == "tpe" else at_random(config, number)
        found = values(drawn)
        assert list(found) == ["x.method", "x.init", "x.N", "x.mean"]
        assert found["x.init"] in {"a": ("s", "t", "d"), "b": ("t", "d")}[found["x.method"]]
        assert 2 <= int(found["x.N"]) <= 900
        assert -1.8 <= float(found["x.mean"]) <= -0.4
        assert Space(TWICE).settings(_Replayed(trial(number, (1.0,), *drawn))) == drawn
        state = (COMPLETED, STOPPED, RUNNING, FAILED)[number % 4]
        done.append(trial(number, (float(found["x.mean"]),), *drawn, state=state))


def test_a_logarithmic_range_is_drawn_evenly_in_the_logarithm() -> None:
    plain = Axis(key="x.n", range=(1e-4, 1.0))
    low: dict[bool, int] = {}
    for log in (False, True):
        config = sweep((replace(plain, log=log),))
        drawn = [float(values(at_random(config, n))["x.n"]) for n in range(60)]
        low[log] = sum(number < 1e-2 for number in drawn)
    assert low[False] <= 3  # 1 % expected
    assert 20 <= low[True] <= 40  # half expected


# --- random --------------------------------------------------------------------------------------


def test_random_settings_depend_on_seed_number_and_attempt_and_on_nothing_else() -> None:
    config = sweep(TWICE)
    first = {(n, a): at_random(config, n, a) for n in range(8) for a in range(3)}
    assert len(set(first.values())) == len(first)
    assert {(n, a): at_random(config, n, a) for n, a in reversed(first)} == first
    longer = replace(config, name="other", trials=99, scheduler="none", steps=1, startup=1)
    assert at_random(longer, 5, 2) == first[5, 2]
    other = replace(config, seed=1)
    assert not set(first.values()) & {at_random(other, n, a) for n, a in first}


# --- TPE -----------------------------------------------------------------------------------------


def test_tpe_says_the_same_of_the_same_history_and_other_things_at_other_attempts() -> None:
    done = history(12, seed=0)
    config = sweep(startup=4)
    drawn = [propose(config, done, 13, attempt) for attempt in (0, 1, 2, 3)]
    assert [propose(config, done, 13, attempt) for attempt in (0, 1, 2, 3)] == drawn
    assert len(set(drawn)) == 4


def test_tpe_begins_when_as_many_trials_as_startup_have_been_told() -> None:
    """Before, it draws the same whatever came of them; the recipe's own setting does not count."""
    done = [trial(0, (2.0,)), *history(6, seed=0)]
    worse = [replace(one, probes=trial(0, (20.0 - i,)).probes) for i, one in enumerate(done)]

    def drawn(known: list[Trial], startup: int) -> list[tuple[str, ...]]:
        return [propose(sweep(startup=startup), known, n) for n in range(7, 12)]

    assert drawn(done, 7) == drawn(worse, 7)
    assert drawn(done, 6) != drawn(worse, 6)
    assert drawn(done, 7) == [at_random(sweep(), n) for n in range(7, 12)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_goes_where_it_was_good_and_random_search_does_not(seed: int) -> None:
    done, config, asked = history(24, seed), sweep(seed=seed), range(25, 45)
    drawn = {
        "tpe": [values(propose(config, done, n)) for n in asked],
        "random": [values(at_random(config, n)) for n in asked],
    }
    lrs = {
        who: [float(one["x.lr"]) for one in found if one["x.method"] == "a"]
        for who, found in drawn.items()
    }
    assert len(lrs["tpe"]) >= 15  # all b are bad
    # An eighth of the space: half of it is of method a, a quarter of that as near.
    near = {who: sum(10**-2.5 < lr < 10**-1.5 for lr in found) for who, found in lrs.items()}
    assert near["tpe"] >= 15
    assert near["random"] <= 7


def test_tpe_takes_a_trial_that_went_further_before_one_that_was_stopped() -> None:
    """Early distances of pruned trials do not compare with final ones, however low they are."""
    whole = [trial(n, (9.0,) * 4, "x.method=a", f"x.lr={10**-n}") for n in (1, 2, 3)]
    cut = [
        trial(n, (0.1,), "x.method=b", f"x.depth={n}", state=STOPPED) for n in (1, 2, 3, 4, 5, 6)
    ]
    drawn = [values(propose(sweep(startup=2), whole + cut, n)) for n in range(10, 30)]
    assert sum(found["x.method"] == "a" for found in drawn) >= 15


def test_tpe_keeps_away_from_what_runs_already() -> None:
    done = history(24, seed=3)
    best = min(done, key=lambda one: distance(one.settings))
    runs = [trial(25 + i, (), *best.settings, state=RUNNING) for i in range(6)]
    lr = float(values(best.settings)["x.lr"])

    def near(known: list[Trial]) -> int:
        drawn = [values(propose(sweep(seed=3), known, n)) for n in range(31, 61)]
        lrs = [float(found["x.lr"]) for found in drawn if found["x.method"] == "a"]
        return sum(abs(math.log10(one / lr)) < 0.1 for one in lrs)

    assert near(done) >= 4
    assert near(done + runs) == 0


@pytest.mark.parametrize(
    "known",
    [
        EVERY_STATE,
        [replace(one, state=FAILED) for one in EVERY_STATE],
        [replace(one, state=RUNNING) for one in EVERY_STATE],
        [trial(1, (math.nan, math.inf), "x.method=b", "x.depth=3")] * 9,
    ],
    ids=["every state", "all failed", "all running", "none finite"],
)
def test_tpe_proposes_whatever_became_of_the_trials(known: list[Trial]) -> None:
    for number in range(6, 10):
        drawn = propose(sweep(startup=1), known, number)
        assert Space(AXES).settings(_Replayed(trial(number, (), *drawn))) == drawn


def test_a_search_says_nothing_on_the_terminal() -> None:
    spoken: list[logging.LogRecord] = []
    ear = logging.Handler()
    ear.emit = spoken.append  # type: ignore[method-assign]
    logging.getLogger("optuna").addHandler(ear)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        at_random(sweep(), 1)
        propose(sweep(startup=1), EVERY_STATE, 6)
    logging.getLogger("optuna").removeHandler(ear)
    assert [str(one.message) for one in warned] == []
    assert [one.getMessage() for one in spoken] == []


def test_settings_that_are_no_axis_of_the_space_are_refused_too() -> None:
    foreign = trial(1, (1.0,), "x.method=a", "x.lr=0.1", "x.other=3")
    with pytest.raises(AssertionError, match="another space"):
        propose(sweep(), [foreign], 2)
