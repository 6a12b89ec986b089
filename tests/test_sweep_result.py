"""How much each axis matters, and the axes as plots need them."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_result import FEWEST, axes_of, importance
from pipelines.sweep_summary import FAILED, RUNNING, STOPPED, AxisSummary, Trial
from tests.sweeps import trial

KIND = Axis(key="x.kind", choice=("p", "q", "r"))
LR = Axis(key="x.lr", range=(1e-4, 1.0), log=True)
DEPTH = Axis(key="x.depth", range=(1, 8), integer=True)
NOISE = Axis(key="x.noise", choice=("0", "1", "2", "3"))
AXES = (KIND, LR, DEPTH, NOISE)


def sweep(*axes: Axis, steps: Any = 2) -> SweepConfig:
    return SweepConfig(name="mine", stage="isolate", space=axes or AXES, steps=steps)


def rolled(count: int, distance: Callable[[dict[str, str]], float], seed: int = 0) -> list[Trial]:
    """Settings drawn evenly, with a distance that is some function of them."""
    dice = random.Random(seed)
    made = []
    for number in range(1, count + 1):
        found = {
            "x.kind": dice.choice("pqr"),
            "x.lr": repr(10 ** dice.uniform(-4, 0)),
            "x.depth": str(dice.randint(1, 8)),
            "x.noise": dice.choice("0123"),
        }
        texts = (f"{key}={value}" for key, value in found.items())
        made.append(trial(number, (distance(found),), *texts))
    return made


# --- importance ----------------------------------------------------------------------------------

ONLY: dict[str, Callable[[dict[str, str]], float]] = {
    "x.kind": lambda found: {"p": 1.0, "q": 4.0, "r": 30.0}[found["x.kind"]],
    "x.lr": lambda found: 1 + (math.log10(float(found["x.lr"])) + 2) ** 2,
    "x.depth": lambda found: float(found["x.depth"]),
    "x.noise": lambda found: 1 + abs(float(found["x.noise"]) - 1),
}


@pytest.mark.parametrize("key", list(ONLY))
def test_the_one_axis_that_decides_has_nearly_all_of_the_effect(key: str) -> None:
    shares = importance(sweep(), rolled(40, ONLY[key]))
    assert list(shares) == ["x.kind", "x.lr", "x.depth", "x.noise"]
    assert shares[key] > 0.8
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) >= 0


def test_two_axes_that_decide_share_the_effect_by_their_sizes() -> None:
    def both(found: dict[str, str]) -> float:
        return math.exp(0.2 * int(found["x.depth"])) * (5 if found["x.kind"] == "p" else 1)

    shares = importance(sweep(), rolled(60, both))
    # Variances of the logarithm: ln(5)^2 6/25 and 0.2^2 21/4 (of these draws 0.62 and 0.21).
    assert shares["x.kind"] == pytest.approx(0.75, abs=0.1)
    assert shares["x.depth"] == pytest.approx(0.25, abs=0.1)
    steeper = rolled(60, lambda found: 1e3 * both(found) ** 2)  # the same, on a logarithmic scale
    assert importance(sweep(), steeper) == pytest.approx(shares, abs=1e-3)


def test_importance_is_of_the_first_probe() -> None:
    trials = rolled(30, ONLY["x.depth"])
    shares = importance(sweep(), trials)
    later = [
        replace(one, probes=(*one.probes, *trial(0, (0.0, 1.0 + n % 7)).probes[1:]))
        for n, one in enumerate(trials)
    ]
    assert importance(sweep(), later) == shares  # also: the forest has a seed


def test_importance_is_of_the_objectives_number_of_steps() -> None:
    def one_step(number: int, value: float, text: str) -> Trial:
        made = trial(number, (1.0,), text)
        two, two_more, one = made.probes[0].readings
        readings = (two, two_more, replace(one, value=value))
        return replace(made, probes=(replace(made.probes[0], readings=readings),))

    trials = [one_step(n, 1.0 + n % 2, f"x.kind={'pq'[n % 2]}") for n in range(12)]
    assert importance(sweep(KIND, steps=1), trials) == {"x.kind": 1.0}
    assert importance(sweep(KIND, steps=2), trials) == {}  # all the same in two steps


def test_too_few_trials_say_nothing() -> None:
    trials = rolled(FEWEST, ONLY["x.depth"])
    assert importance(sweep(), trials) != {}
    assert importance(sweep(), trials[:-1]) == {}
    assert importance(sweep(), []) == {}
    assert [axis.importance for axis in axes_of(sweep(), trials[:-1])] == [None] * 4


def test_trials_without_a_finite_look_or_without_settings_do_not_count() -> None:
    trials = rolled(FEWEST - 1, ONLY["x.depth"])
    for empty in (
        trial(90, (3.0,)),  # the recipe's own setting names no values
        trial(91, (), "x.kind=p", "x.lr=0.1", "x.depth=1", "x.noise=0", state=RUNNING),
        trial(92, (math.nan,), "x.kind=p", "x.lr=0.1", "x.depth=1", "x.noise=0", state=FAILED),
    ):
        assert importance(sweep(), [*trials, empty]) == {}
    early = trial(93, (9.0,), "x.kind=p", "x.lr=0.1", "x.depth=1", "x.noise=0", state=STOPPED)
    assert importance(sweep(), [*trials, early]) != {}


def test_a_distance_of_zero_is_a_distance() -> None:
    shares = importance(
        sweep(KIND), [trial(n, (0.0 if n % 2 else 1.0,), f"x.kind={'pq'[n % 2]}") for n in range(8)]
    )
    assert shares == {"x.kind": 1.0}


def test_whether_an_axis_is_active_is_a_value_of_it() -> None:
    """lr is drawn of kind p alone, and it is bad to have one: lr explains that as well as kind."""
    axes = (KIND, replace(LR, when=("x.kind=p",)))
    trials = [
        trial(n, (9.0,), "x.kind=p", f"x.lr={10.0 ** -(n % 4)!r}")
        if n % 3 == 0
        else trial(n, (1.0,), f"x.kind={'pqr'[n % 3]}")
        for n in range(30)
    ]
    shares = importance(sweep(*axes), trials)
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert shares["x.lr"] > 0.2
    alone = importance(sweep(replace(LR, when=("x.kind=p",))), trials)
    assert alone == {"x.lr": 1.0}


def test_an_inactive_axis_is_not_the_lowest_value_of_a_range_nor_the_first_choice() -> None:
    choice = Axis(key="x.c", choice=("s", "t"), when=("x.kind=p",))
    trials = [trial(n, (1.0,), "x.kind=p", "x.c=s") for n in range(6)]
    trials += [trial(n, (8.0,), "x.kind=q") for n in range(6, 12)]
    assert importance(sweep(choice), trials) == {"x.c": 1.0}


def test_two_axes_of_one_key_have_one_share() -> None:
    inits = (
        Axis(key="x.init", choice=("s", "t", "d"), when=("x.kind=p",)),
        Axis(key="x.init", choice=("t", "d"), when=("x.kind=q|r",)),
    )
    dice = random.Random(0)
    trials = []
    for n in range(40):
        kind = dice.choice("pqr")
        init = dice.choice("std" if kind == "p" else "td")
        trials.append(trial(n, (9.0 if init == "d" else 1.0,), f"x.kind={kind}", f"x.init={init}"))
    shares = importance(sweep(KIND, *inits), trials)
    assert list(shares) == ["x.kind", "x.init"]
    assert shares["x.init"] > 0.95


# --- axes ----------------------------------------------------------------------------------------


def test_axes_are_described_in_their_order_with_their_shares() -> None:
    found = axes_of(sweep(), rolled(30, ONLY["x.depth"]))
    shares = [axis.importance or 0.0 for axis in found]
    assert math.fsum(shares) == pytest.approx(1)
    assert shares[2] > 0.8
    assert [replace(axis, importance=None) for axis in found] == [
        summed("x.kind", "p", "q", "r"),
        summed("x.lr", low=1e-4, high=1.0, log=True),
        summed("x.depth", low=1, high=8),
        summed("x.noise", "0", "1", "2", "3"),
    ]


def test_axes_of_one_key_are_one_with_the_choices_of_all_each_once() -> None:
    inits = (
        Axis(key="x.init", choice=("s", "t"), when=("x.kind=p",)),
        KIND,
        Axis(key="x.init", choice=("t", "d", "s", "e"), when=("x.kind=q",)),
    )
    assert axes_of(sweep(*inits), []) == (
        summed("x.init", "s", "t", "d", "e"),
        summed("x.kind", "p", "q", "r"),
    )


def test_merged_choices_that_are_numbers_stand_by_size() -> None:
    stages = (
        Axis(key="x.stages", choice=("4", "6", "8"), when=("x.q=2",)),
        Axis(key="x.stages", choice=("2", "3", "4"), when=("x.q=4",)),
        Axis(key="x.stages", choice=("1_000", "1e-3"), when=("x.q=16",)),
    )
    expected = ("1e-3", "2", "3", "4", "6", "8", "1_000")
    assert axes_of(sweep(*stages), []) == (summed("x.stages", *expected),)


def summed(key: str, *choices: str, **changes: Any) -> AxisSummary:
    fields = {"low": None, "high": None, "log": False, "importance": None, **changes}
    return AxisSummary(key=key, choices=choices, **fields)


def test_ranges_of_one_key_are_merged_and_a_choice_beside_them_takes_none_away() -> None:
    method = Axis(key="x.m", choice=("a", "b"))
    low = Axis(key="x.lr", range=(1e-5, 1e-3), log=True, when=("x.m=a",))
    high = Axis(key="x.lr", range=(1e-2, 1e-1), log=True, when=("x.m=b",))
    one = Axis(key="x.lr", choice=("0.1",), when=("x.m=b",))
    both = axes_of(sweep(method, low, high), [])[1]
    assert (both.low, both.high, both.log) == (1e-5, 1e-1, True)
    kept = axes_of(sweep(method, low, one), [])[1]
    assert (kept.low, kept.high, kept.log, kept.choices) == (1e-5, 1e-3, True, ("0.1",))


@pytest.mark.parametrize("value", [5.0, 3.7, 0.0, 1000.0])
def test_nothing_decides_where_all_came_out_the_same(value: float) -> None:
    space = Axis(key="x.a", choice=("p", "q", "r")), Axis(key="x.b", choice=("s", "t", "u", "v"))
    trials = [
        trial(n, (value,), f"x.a={'pqr'[n % 3]}", f"x.b={'stuv'[n * 7 % 4]}") for n in range(1, 14)
    ]
    assert importance(sweep(*space), trials) == {}
