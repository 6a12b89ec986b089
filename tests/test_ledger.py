"""What a sweep has tried, kept so that neither a kill nor a second writer loses or doubles it."""

import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from infra import storage
from infra.errors import UserError
from pipelines.ledger import Ledger
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial
from tests.sweeps import trial


@pytest.fixture(params=["local", "memory"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "sweeps" / "0123")
    url = f"memory://{tmp_path.name}/sweeps/0123"
    storage.remove_tree(url)
    return url


def begun(number: int, *settings: str, origin: str = "tpe") -> Trial:
    """As the search writes it down: before it starts."""
    return trial(number, (), *(settings or (f"x.n={number}",)), state=RUNNING, origin=origin)


def test_what_was_never_written_is_no_trial_and_no_time(home: str) -> None:
    assert Ledger(home).trials() == []
    assert Ledger(home).seconds() == 0.0


def test_trials_come_back_by_number_in_another_process_object(home: str) -> None:
    ledger = Ledger(home)
    trials = [begun(number) for number in (10, 2, 0, 1, 999, 1000)]
    for one in trials:
        assert ledger.begin(one) == one
    assert Ledger(home).trials() == sorted(trials, key=lambda one: one.number)


def test_a_number_may_have_more_than_four_digits(home: str) -> None:
    ledger = Ledger(home)
    ledger.begin(begun(0))
    ledger.begin(begun(12345))
    over = replace(trial(12345, (3.0,), "x.n=12345"), state=STOPPED)
    ledger.update(over)
    assert ledger.trials() == [begun(0), over]


def test_the_first_to_write_a_number_down_has_it_and_the_second_is_told(home: str) -> None:
    mine, theirs = begun(3, "x.a=mine"), begun(3, "x.a=theirs", origin="random")
    assert Ledger(home).begin(mine) == mine
    assert Ledger(home).begin(theirs) == mine
    assert Ledger(home).trials() == [mine]


def test_of_writers_in_the_same_instant_one_wins_and_all_see_it(tmp_path: Path) -> None:
    for number in range(10):
        start, seen = threading.Barrier(6), []

        def write(who: int, number: int = number, start: threading.Barrier = start) -> None:
            start.wait()
            seen.append(Ledger(str(tmp_path)).begin(begun(number, f"x.who={who}")))  # noqa: B023

        threads = [threading.Thread(target=write, args=(who,)) for who in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 6
        assert set(seen) == {Ledger(str(tmp_path)).trials()[number]}


def test_the_state_last_heard_of_is_what_a_trial_is(home: str) -> None:
    ledger = Ledger(home)
    for number in range(3):
        ledger.begin(begun(number))
    ledger.update(replace(trial(1, (3.0,), "x.n=1"), state=RUNNING))
    ledger.update(replace(trial(1, (3.0, 2.0), "x.n=1"), state=STOPPED))
    ledger.update(replace(trial(2, (), "x.n=2"), state=FAILED, reason='it said "no"\nß'))
    found = Ledger(home).trials()
    assert [one.state for one in found] == [RUNNING, STOPPED, FAILED]
    assert found[1] == replace(trial(1, (3.0, 2.0), "x.n=1"), state=STOPPED)
    assert found[2].reason == 'it said "no"\nß'


def test_a_trial_that_has_a_state_is_not_begun_anew(home: str) -> None:
    """A killed sweep asks for its number again; what became of it is not forgotten."""
    ledger = Ledger(home)
    ledger.begin(begun(0))
    over = replace(trial(0, (3.0, 2.0), "x.n=0"), state=COMPLETED)
    ledger.update(over)
    ledger.begin(begun(0, "x.a=another"))
    assert ledger.trials() == [over]


def test_readings_come_back_to_the_last_bit_also_those_that_are_not_finite(home: str) -> None:
    ledger = Ledger(home)
    values = (math.inf, -math.inf, math.nan, 0.1 + 0.2, 5e-324, 1e300)
    told = trial(0, values, "x.lr=0.30000000000000004")
    ledger.begin(begun(0))
    ledger.update(told)
    (found,) = ledger.trials()
    assert repr(found) == repr(told)  # NaN is no NaN's equal
    read = [probe.readings[0].value for probe in found.probes]
    assert read[:2] == [math.inf, -math.inf]
    assert math.isnan(read[2])
    assert read[3:] == list(values[3:])


@pytest.mark.parametrize(
    "name",
    [
        "clock.json",
        "readme.txt",
        "0001.state.json",  # of a trial that nobody wrote down
        "001.json",
        "0001.json.bak",
        "x0001.json",
        ".tmp-12-ab0001.json",  # half written when its writer was killed
    ],
)
def test_other_files_are_no_trials(home: str, name: str) -> None:
    Ledger(home).begin(begun(0))
    storage.write_bytes(storage.join(home, name), b'{"number": ')
    assert Ledger(home).trials() == [begun(0)]


@pytest.mark.parametrize("name", ["0001.json", "0001.state.json"])
@pytest.mark.parametrize(
    "text", ['{"number": 1, "sett', "", "{}", '{"number": 1, "colour": "red"}', "\udcff"]
)
def test_a_torn_or_foreign_trial_is_not_taken_for_one(home: str, name: str, text: str) -> None:
    ledger = Ledger(home)
    ledger.begin(begun(0))
    if name != "0001.json":
        ledger.begin(begun(1))
    storage.write_bytes(storage.join(home, name), text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="is no record of a trial"):
        ledger.trials()


def test_a_trial_is_a_file_that_a_person_can_read(tmp_path: Path) -> None:
    Ledger(str(tmp_path)).begin(begun(7, "x.lr=0.1"))
    assert [path.name for path in tmp_path.iterdir()] == ["0007.json"]
    found = json.loads((tmp_path / "0007.json").read_text())
    assert found["settings"] == ["x.lr=0.1"]
    assert (found["number"], found["state"], found["probes"]) == (7, "running", [])


def test_the_clock_is_what_was_last_spent_and_no_trial(home: str) -> None:
    ledger = Ledger(home)
    ledger.spend(12.5)
    ledger.spend(61.25)
    assert Ledger(home).seconds() == 61.25
    assert ledger.trials() == []
    ledger.spend(12.3456789)
    assert ledger.seconds() == pytest.approx(12.3456789, abs=1e-3)


def test_ledgers_of_two_searches_do_not_meet(home: str) -> None:
    ledger, other = Ledger(home), Ledger(storage.join(home, "more"))
    ledger.begin(begun(0, "x.a=1"))
    other.begin(begun(0, "x.a=2"))
    other.spend(5.0)
    assert [one.settings for one in ledger.trials()] == [("x.a=1",)]
    assert [one.settings for one in other.trials()] == [("x.a=2",)]
    assert ledger.seconds() == 0.0


def test_ten_thousand_trials_are_in_order(tmp_path) -> None:
    ledger = Ledger(str(tmp_path))
    for number in (9_999, 10_000, 2):
        ledger.begin(trial(number, ()))
    assert [one.number for one in ledger.trials()] == [2, 9_999, 10_000]


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"number": 0, "colour": 1}'])
def test_a_file_that_is_no_record_is_named(tmp_path, text) -> None:
    ledger = Ledger(str(tmp_path))
    storage.write_bytes(storage.join(ledger.home, "0000.json"), text.encode())
    with pytest.raises(UserError, match=r"0000\.json: is no record of a trial .*remove"):
        ledger.trials()
