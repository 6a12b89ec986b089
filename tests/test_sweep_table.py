"""A sweep's trials as text: the table, the lines of a log, and what is new."""

import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from infra import storage
from infra.errors import UserError
from pipelines import sweep_table
from pipelines.ledger import Ledger
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial
from pipelines.sweep_table import SweepView, lines, one_line
from tests.sweeps import trial


def sweep(steps: Any = 2, stage: Any = "isolate") -> SweepConfig:
    space = (Axis(key=f"{stage}.lr", choice=("1", "2")),)
    return SweepConfig(name="mine", stage=stage, space=space, steps=steps)


TRIALS = (
    trial(0, (3.0, 2.0, 1.5, 1.25)),
    trial(1, (123456.0,), "isolate.lr=0.1", "isolate.pairs.levels.N=18", state=STOPPED),
    trial(12, (), "isolate.lr=2", state=RUNNING),
    trial(13, (math.nan,), "isolate.lr=3", state=FAILED, reason="the loss is nan"),
    trial(14, (), "isolate.lr=4", state=FAILED, reason="its process died 3 times: gone"),
)


# --- text ----------------------------------------------------------------------------------------


def test_the_table_of_known_trials() -> None:
    assert lines(TRIALS, sweep()) == [
        "trial  state      k/K   1 step     2 steps    EMA        settings",
        "0      completed  1.00  2.25       1.25       power-0.1  as the recipe has it",
        "1      stopped    0.25  1.235e+05  1.235e+05  power-0.1  lr=0.1 pairs.levels.N=18",
        "12     running    0.00  -          -          -          lr=2",
        "13     failed     0.25  -          -          -          lr=3",
        "14     failed     0.00  -          -          -          lr=4",
    ]


def test_the_ema_named_is_the_best_in_the_objectives_steps() -> None:
    one = trial(1, (4.0,), "isolate.lr=1")
    a, b, c = one.probes[0].readings
    readings = (a, replace(b, value=1.0), c)  # power-0.05 in two steps
    one = replace(one, probes=(replace(one.probes[0], readings=readings),))
    in_two, in_one = (lines([one], sweep(steps))[1].split() for steps in (2, 1))
    assert in_two == ["1", "completed", "0.25", "5", "1", "power-0.05", "lr=1"]
    assert in_one == ["1", "completed", "0.25", "5", "1", "power-0.1", "lr=1"]


def test_the_stages_name_is_left_out_at_the_front_alone() -> None:
    one = trial(1, (1.0,), "distill.lr=1", "distill.note=distill.x")
    assert lines([one], sweep(stage="distill"))[1].endswith("  lr=1 note=distill.x")
    assert lines([one], sweep())[1].endswith("  distill.lr=1 distill.note=distill.x")


def test_a_table_without_trials_is_its_head() -> None:
    assert lines([], sweep()) == ["trial  state  k/K  1 step  2 steps  EMA  settings"]


def test_a_trial_that_ended_is_one_line() -> None:
    assert [one_line(one, sweep()) for one in TRIALS if one.state != RUNNING] == [
        "trial 0 completed at k/K 1.00: 2.25 in one step, 1.25 in two  as the recipe has it",
        "trial 1 stopped at k/K 0.25: 1.235e+05 in one step, 1.235e+05 in two  "
        "lr=0.1 pairs.levels.N=18",
        "trial 13 failed at k/K 0.25: the loss is nan  lr=3",
        "trial 14 failed at k/K 0.00: its process died 3 times: gone  lr=4",
    ]


# --- what is new ---------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(sweep_table, "time", made)
    return made


@pytest.fixture
def ledger(tmp_path: Any) -> Ledger:
    return Ledger(str(tmp_path))


def begin(ledger: Ledger, number: int) -> Trial:
    return ledger.begin(trial(number, (), f"isolate.lr={number}", state=RUNNING))


def end(ledger: Ledger, number: int, state: str, value: float = 2.0) -> str:
    """Returns the line that tells of it."""
    one = trial(number, (3.0, value), f"isolate.lr={number}", state=state)
    ledger.update(one)
    return one_line(one, sweep())


def test_a_trial_that_ends_is_told_once(ledger: Ledger, clock: Clock) -> None:
    view = SweepView(ledger, sweep())
    begin(ledger, 0)
    begin(ledger, 1)
    assert view.news() == []
    clock.now += 3
    second = end(ledger, 1, STOPPED)
    assert view.news() == [second]
    clock.now += 3
    assert view.news() == []
    first = end(ledger, 0, COMPLETED)
    clock.now += 3
    assert view.news() == [first]
    end(ledger, 1, COMPLETED, 1.0)  # it only says again what is known
    clock.now += 3
    assert view.news() == []


def test_what_had_ended_before_is_no_news(ledger: Ledger, clock: Clock) -> None:
    begin(ledger, 0)
    begin(ledger, 1)
    end(ledger, 0, FAILED)
    view = SweepView(ledger, sweep())
    assert view.news() == []
    line = end(ledger, 1, FAILED)
    clock.now += 3
    assert view.news() == [line]


def test_several_ends_are_told_in_the_order_of_their_numbers(ledger: Ledger, clock: Clock) -> None:
    view = SweepView(ledger, sweep())
    for number in (0, 1, 2):
        begin(ledger, number)
    told = {number: end(ledger, number, COMPLETED) for number in (2, 0, 1)}
    assert view.news() == [told[0], told[1], told[2]]


def test_the_ledger_is_read_no_more_often_than_every_two_seconds(
    ledger: Ledger, clock: Clock
) -> None:
    view = SweepView(ledger, sweep())
    begin(ledger, 0)
    assert view.news() == []
    line = end(ledger, 0, COMPLETED)
    clock.now += 1.9
    assert view.news() == []
    clock.now += 0.2
    assert view.news() == [line]


@pytest.mark.parametrize(
    "error", [OSError("gone"), ValueError("torn"), UserError("no credentials"), FileNotFoundError()]
)
def test_a_ledger_that_cannot_be_read_keeps_what_it_said_last(
    ledger: Ledger, clock: Clock, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    view = SweepView(ledger, sweep())
    begin(ledger, 0)
    begin(ledger, 1)
    first = end(ledger, 0, COMPLETED)
    assert view.news() == [first]
    before = shown(view)

    def fails() -> list[Trial]:
        raise error

    second = end(ledger, 1, COMPLETED)
    with monkeypatch.context() as broken:
        broken.setattr(ledger, "trials", fails)
        clock.now += 3
        assert shown(view) == before
        clock.now += 3
        assert view.news() == []
    clock.now += 3
    assert view.news() == [second]
    assert shown(view) != before


def test_a_torn_file_is_waited_for(ledger: Ledger, clock: Clock) -> None:
    view = SweepView(ledger, sweep())
    begin(ledger, 0)
    url = storage.join(ledger.home, "0000.state.json")
    storage.write_bytes(url, b'{"number": 0, "se')
    assert view.news() == []
    line = end(ledger, 0, COMPLETED)
    clock.now += 3
    assert view.news() == [line]


def test_the_live_table_says_what_the_plain_one_says(ledger: Ledger, clock: Clock) -> None:
    for one in TRIALS:
        ledger.begin(one)
    live = [line.split() for line in shown(SweepView(ledger, sweep()))]
    assert live == [line.split() for line in lines(TRIALS, sweep())]


def shown(view: SweepView) -> list[str]:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        console.print(view.table())
    return [line.rstrip() for line in capture.get().splitlines()]


@pytest.mark.parametrize("text", ['{"number": 0, "colour": 1}', "{}", "[]", "{"])
def test_a_ledger_that_is_none_does_not_stop_a_run(tmp_path, text, monkeypatch) -> None:
    monkeypatch.setattr(sweep_table, "POLL_SECONDS", 0)
    ledger = Ledger(str(tmp_path))
    before = SweepView(ledger, sweep())
    storage.write_bytes(storage.join(ledger.home, "0000.json"), text.encode())
    assert before.news() == []
    assert SweepView(ledger, sweep()).news() == []
