"""What Ray Tune is told: whom to stop, what a trial holds. No Ray is started here."""

import copy
import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from infra import tuning
from infra.tuning import Rule


class Heard:
    """Notes what a sweep hears."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # no sweep can be pickled
        self.told: list[tuple[int, int, bool]] = []

    def next(self) -> None:
        return None

    def heard(self, number: int, result: Mapping[str, Any], stopped: bool) -> None:
        self.told.append((number, result["probe"], stopped))

    def lost(self, number: int, why: str) -> None:
        raise AssertionError(why)


class Trial:
    """As much of a Tune trial as schedulers look at."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config = str(number), {"number": number}


def told(kind: Any, *results: tuple[int, int, float], repeated: bool = False) -> list[bool]:
    """Whether the trial was stopped, for each (trial, probe, distance) in this order; of 9."""
    sweep = Heard()
    rule = Rule(kind=kind, probes=9, grace=1, eta=3)
    scheduler = tuning._scheduler(rule, tuning._Held(sweep))
    scheduler.set_search_properties(tuning.METRIC, "min")
    trials = {number: Trial(number) for number, _, _ in results}
    controller = SimpleNamespace(get_live_trials=lambda: [])
    for trial in trials.values():
        scheduler.on_trial_add(controller, trial)
    for number, probe, distance in results:
        result = {"probe": probe, "of": 9, "distance": distance, "repeated": repeated}
        scheduler.on_trial_result(controller, trials[number], result)
    return [stopped for _, _, stopped in sweep.told]


def test_asha_compares_at_the_rungs_of_the_schedule():
    # Rungs at 1, 3 and 9 of 9. The second and third are no better than the first at rung 1.
    assert told("asha", (0, 1, 1.0), (1, 1, 2.0), (2, 1, 3.0)) == [False, True, True]
    # Between rungs nobody is stopped, however bad.
    assert told("asha", (0, 1, 1.0), (1, 1, 0.5), (0, 2, 99.0)) == [False, False, False]
    # At rung 3 a trial meets those that were there, not what they were at rung 1.
    assert told("asha", (0, 1, 1.0), (0, 3, 0.9), (1, 1, 0.5), (1, 3, 0.95))[-1]


def test_who_came_to_the_end_or_only_repeats_is_not_stopped():
    assert told("asha", (0, 9, 1.0), (1, 9, 2.0)) == [False, False]
    assert told("asha", (0, 1, 1.0), (1, 1, 2.0), repeated=True) == [False, False]
    # ... but others are held against what was repeated.
    sweep = [(0, 1, 1.0), (1, 1, 2.0)]
    assert told("asha", *sweep) == [False, True]


def test_median_stopping_is_at_equal_fractions_too():
    three = [(n, 1, 1.0) for n in range(3)]
    assert told("median", *three, (3, 1, 5.0)) == [False, False, False, True]
    assert told("none", *three, (3, 1, 5.0)) == [False, False, False, False]


def test_a_trial_that_waits_for_workers_takes_no_cpu_from_them():
    """A hundredth of a CPU was one too much on a machine with as many CPUs as workers."""
    needs = tuning._resources(0, 0).required_resources
    assert needs.get("CPU", 0) == 0
    assert needs
    assert tuning._resources(2, 0.25) == {"CPU": 2, "GPU": 0.25}
    assert tuning._resources(1, 0) == {"CPU": 1}


def test_a_sweep_stays_in_its_process_when_tune_pickles_or_copies():
    sweep = Heard()
    held = tuning._Held(sweep)
    with pytest.raises(TypeError):
        cloudpickle.dumps(sweep)
    search = tuning._Search(held)
    assert cloudpickle.loads(cloudpickle.dumps(search))._held.sweep is None
    assert copy.deepcopy(search)._held.sweep is sweep
