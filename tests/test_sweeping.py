"""A search as Ray Tune drives it, through kills: nothing is trained, and Tune is stood in for."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import storage, tuning
from infra.errors import UserError
from pipelines import probes, sweeping
from pipelines.artifacts import Committed
from pipelines.ledger import Ledger
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial
from pipelines.sweeping import Sweep
from pipelines.trial import TrialJob
from tests.tiny_trials import EMAS, MARKS, Bench, Runs, choice, stand_in, sweep_of

# Of it trial 0 is the point dropout=0.1, lr=3e-3, in another spelling of the latter.
WIDE = (
    choice("isolate.dropout", "0.0", "0.1", "0.2", "0.3"),
    Axis(key="isolate.lr", range=(1e-4, 1e-1), log=True),
)


class Killed(BaseException):
    """The driver is gone."""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


# --- what stands in ------------------------------------------------------------------------------


def chance(*of: Any) -> float:
    """In [0, 1), the same whenever it is asked for."""
    return int(hashlib.sha256(repr(of).encode()).hexdigest()[:8], 16) / 2**32


class World:
    """What the processes of trials leave behind, which no kill of the driver takes."""

    def __init__(self, stops: float = 0.25, fails: float = 0.0, dies: float = 0.0) -> None:
        self.stops, self.fails, self.dies = stops, fails, dies
        self.known: dict[str, int] = {}  # probes of a trial
        self.trained: list[tuple[str, int]] = []

    def process(self, job: TrialJob) -> Iterator[dict[str, Any]]:
        """What a trial reports, as `pipelines.trial.run` would."""
        name, marks = job.fingerprint, job.config.marks()
        for number in range(1, self.known.get(name, 0) + 1):
            live = number == self.known[name] and not job.over
            yield {**self.result(name, marks, number), "repeated": not live}
        if job.over:
            return
        for number in range(self.known.get(name, 0) + 1, len(marks) + 1):
            if chance(name, number, "fails") < self.fails:
                yield {"failed": f"loss is nan before probe {number}"}
                return
            if chance(name, number, "dies") < self.dies:
                raise ConnectionError
            self.known[name] = number
            self.trained.append((name, number))
            yield self.result(name, marks, number)

    def result(self, name: str, marks: tuple[int, ...], number: int) -> dict[str, Any]:
        lines = [
            {
                "images": images,
                "ema": ema,
                "steps": steps,
                "value": 10 * chance(name, images, ema, steps),
                "seconds": 0.5,
            }
            for images in marks[:number]
            for ema in EMAS
            for steps in (1, 2)
        ]
        return probes.report(lines, marks, 2)

    def tune(self, concurrent: int = 1, seed: int = 0) -> Callable[..., None]:
        """Instead of `tuning.run_trials`: so many side by side, heard in any order."""
        order = random.Random(seed)

        def run_trials(trial: Any, sweep: Any, **_: Any) -> None:
            running: list[tuple[int, Iterator[dict[str, Any]]]] = []
            more = True
            while more or running:
                while more and len(running) < concurrent:
                    found = sweep.next()
                    more = found is not None
                    if found is not None:
                        number, payload = found
                        running.append((number, self.process(payload["job"])))
                if not running:
                    return
                at = order.randrange(len(running))
                if self.hear(sweep, *running[at]):
                    running.pop(at)

        return run_trials

    def hear(self, sweep: Any, number: int, process: Iterator[dict[str, Any]]) -> bool:
        """One more report of a trial; whether that was its end."""
        try:
            result = next(process)
        except StopIteration:
            return True
        except ConnectionError:
            sweep.lost(number, "the node died")
            return True
        stopped = False
        if "probe" in result and not result.get("repeated") and result["probe"] < result["of"]:
            stopped = chance(sweep.trials[number].fingerprint, result["probe"]) < self.stops
        sweep.heard(number, result, stopped)
        return stopped or "failed" in result


def search(workspace: Path, sweep: SweepConfig, *overrides: str, **changed: str) -> Sweep:
    """A search in a workspace; its inputs are names only. changed: fingerprint of an input."""
    bench = Bench(workspace, *overrides)
    inputs = {
        name: Committed(
            step=name,
            fingerprint=changed.get(name, name),
            url=str(workspace / name),
            seconds=0.0,
            value=None,
        )
        for name in ("shard", "reference", "teacher", "distilled")
    }
    return Sweep(bench.context("tune"), bench.tune_stage(sweep), inputs)


def run(it: Sweep, run_trials: Callable[..., None]) -> Sweep:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "run_trials", run_trials)
        it.run()
    return it


def killed(it: Callable[[], Sweep], run_trials: Callable[..., None], at: int) -> bool:
    """Run it and kill it before its write number `at`; whether it came so far."""
    count = 0

    def killing(real: Any) -> Any:
        def write(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count >= at:  # the dead write nothing more
                raise Killed
            return real(*arguments)

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_bytes", "put_if_absent"):
            patch.setattr(storage, name, killing(getattr(storage, name)))
        try:
            run(it(), run_trials)
        except Killed:
            return True
    return False


def ledger(it: Sweep) -> list[Trial]:
    """As another process reads it."""
    return Ledger(it.ledger.home).trials()


def begun(trials: list[Trial]) -> list[tuple[int, tuple[str, ...], str, str]]:
    return [(t.number, t.settings, t.origin, t.fingerprint) for t in trials]


# --- one that nothing happens to -----------------------------------------------------------------


def test_the_trials_are_begun_in_order_the_first_is_the_recipes_own(tmp_path):
    it = run(search(tmp_path, sweep_of(*WIDE, trials=5)), World().tune(concurrent=2, seed=1))
    trials = ledger(it)
    assert trials == it.all()
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert [trial.origin for trial in trials] == ["recipe"] + ["random"] * 4
    assert len({trial.fingerprint for trial in trials}) == 5
    own = Bench(tmp_path).stage()
    assert it.job_of(trials[0].settings).config.stage == own
    for trial in trials:
        assert it.job_of(trial.settings).fingerprint == trial.fingerprint
        assert (it.job_of(trial.settings).config.stage == own) == (trial.number == 0)
        assert it.job_of(trial.settings).config.marks() == MARKS


def test_a_trial_is_known_before_it_starts(tmp_path):
    it = search(tmp_path, sweep_of(*WIDE, trials=3))
    for number in range(3):
        found = it.next()
        assert found is not None
        assert found[0] == number
        job = found[1]["job"]
        assert (ledger(it)[number].fingerprint, job.over) == (job.fingerprint, False)
        assert ledger(it)[number].state == RUNNING
    assert it.next() is None


def test_a_trial_is_told_as_it_goes_and_as_it_ended(tmp_path):
    it = search(tmp_path, sweep_of(*WIDE, trials=3))
    world = World()
    names = [it.next()[1]["job"].fingerprint for _ in range(3)]  # type: ignore[index]
    told = [[world.result(name, MARKS, number) for number in (1, 2, 3)] for name in names]
    it.heard(0, told[0][0], False)
    it.heard(1, told[1][0], False)
    states = [(t.state, len(t.probes)) for t in ledger(it)]
    assert states == [(RUNNING, 1), (RUNNING, 1), (RUNNING, 0)]
    it.heard(1, told[1][1], True)
    it.heard(0, told[0][1], False)
    it.heard(0, told[0][2], False)
    states = [(t.state, len(t.probes)) for t in ledger(it)]
    assert states == [(COMPLETED, 3), (STOPPED, 2), (RUNNING, 0)]
    probe = ledger(it)[0].probes[1]
    assert (probe.number, probe.of, probe.images, probe.steps) == (2, 3, 48, 3)
    lowest = min(r.value for r in probe.readings if r.steps == 2)
    assert lowest == told[0][1]["distance"]
    assert Runs.last.shown[-1] == ledger(it)[0]


def test_distances_that_are_not_finite_come_back_from_the_ledger_as_they_are(tmp_path):
    it = search(tmp_path, sweep_of(*WIDE, trials=1))
    it.next()
    lines = World().result("x", MARKS, 3)["lines"]
    for line, value in zip(lines, (float("nan"), float("inf")), strict=False):
        line["value"] = value
    it.heard(0, probes.report(lines, MARKS, 2), False)
    (trial,) = ledger(it)
    values = [reading.value for reading in trial.probes[0].readings]
    assert repr(values[:2]) == "[nan, inf]"
    assert trial.probes[0].lowest(1) is not None
    assert trial.state == COMPLETED


def test_failed_and_lost_trials_are_over_and_give_their_reasons(tmp_path):
    world = World(stops=0.2, fails=0.15, dies=0.15)
    it = run(search(tmp_path, sweep_of(*WIDE, trials=12)), world.tune(concurrent=3))
    trials = ledger(it)
    states = [trial.state for trial in trials]
    assert {FAILED, COMPLETED, STOPPED} == set(states)
    reasons = {trial.reason for trial in trials if trial.state == FAILED}
    assert any(reason.startswith("loss is nan before probe") for reason in reasons)
    assert "its process died 3 times: the node died" in reasons
    assert all(trial.reason == "" for trial in trials if trial.state != FAILED)
    again = run(search(tmp_path, sweep_of(*WIDE, trials=12)), World().tune())  # has no files left
    assert ledger(again) == trials
    assert Runs.last.closed == 1


# --- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "concurrent"), [("tpe", 1), ("random", 3)])
def test_killed_at_any_write_it_comes_to_the_same_trials(tmp_path, kind, concurrent):
    """None lost, none doubled, none trained twice; one at a time TPE proposes the same ones too."""
    sweep = sweep_of(*WIDE, trials=3, search=kind, startup=1, probes=2)
    whole = World(fails=0.2, dies=0.1)
    expected = run(search(tmp_path / "whole", sweep), whole.tune(concurrent)).all()
    assert len({trial.state for trial in expected}) > 1
    at = 0
    reached = True
    while reached:
        at += 1
        home, world = tmp_path / str(at), World(fails=0.2, dies=0.1)
        reached = killed(lambda home=home: search(home, sweep), world.tune(concurrent, at), at)
        before = begun(ledger(search(home, sweep)))
        it = run(search(home, sweep), world.tune(concurrent, at + 1))
        assert begun(ledger(it))[: len(before)] == before
        assert ledger(it) == expected, f"killed before write {at}"
        assert len(set(world.trained)) == len(world.trained)
        assert set(world.trained) == set(whole.trained)
    assert at > 20


@settings(deadline=None, max_examples=8)
@given(
    cuts=st.lists(st.integers(1, 40), max_size=5),
    seeds=st.lists(st.integers(0, 99), min_size=6, max_size=6),
    concurrent=st.integers(1, 5),
    kind=st.sampled_from(["tpe", "random"]),
)
def test_killed_again_and_again_no_trial_is_lost_or_doubled(
    tmp_path_factory, cuts, seeds, concurrent, kind
):
    home = tmp_path_factory.mktemp("often")
    sweep = sweep_of(*WIDE, trials=5, search=kind, startup=2)
    world = World(fails=0.1, dies=0.1)
    seen: list[tuple[int, tuple[str, ...], str, str]] = []
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        for cut, seed in zip(cuts, seeds, strict=False):
            killed(lambda: search(home, sweep), world.tune(concurrent, seed), cut)
            now = begun(ledger(search(home, sweep)))
            assert now[: len(seen)] == seen
            seen = now
        it = run(search(home, sweep), world.tune(concurrent, seeds[-1]))
    trials = ledger(it)
    assert begun(trials)[: len(seen)] == seen
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert len({trial.fingerprint for trial in trials}) == 5
    assert RUNNING not in {trial.state for trial in trials}
    assert len(set(world.trained)) == len(world.trained)
    for trial in trials:
        assert len(trial.probes) == world.known.get(trial.fingerprint, 0)


def test_on_a_rerun_ended_trials_only_repeat_and_open_ones_go_on(tmp_path):
    sweep = sweep_of(*WIDE, trials=3)
    it, world = search(tmp_path, sweep), World()
    names = [it.next()[1]["job"].fingerprint for _ in range(3)]  # type: ignore[index]
    it.heard(1, world.result(names[1], MARKS, 1), True)
    it.heard(0, {"failed": "loss is nan"}, False)
    again = search(tmp_path, sweep)
    given = [again.next() for _ in range(3)]
    assert [(n, p["job"].over) for n, p in given if n >= 0] == [  # type: ignore[misc]
        (0, True),
        (1, True),
        (2, False),
    ]
    assert again.next() is None


def test_what_an_ended_trial_repeats_changes_nothing(tmp_path):
    sweep = sweep_of(*WIDE, trials=6)
    world = World(stops=0.4)
    trials = run(search(tmp_path, sweep), world.tune()).all()
    assert {trial.state for trial in trials} == {COMPLETED, STOPPED}
    count = len(world.trained)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweeps").rglob("*.state.json")}
    assert len(files) == 6
    assert run(search(tmp_path, sweep), world.tune(3)).all() == trials
    assert len(world.trained) == count
    assert {p: p.stat().st_mtime_ns for p in files} == files


# --- which trials there are ----------------------------------------------------------------------


def test_a_setting_is_never_begun_twice_and_a_space_may_be_used_up(tmp_path):
    """Two spellings of one value are one setting, here the recipe's own."""
    axes = (choice("isolate.dropout", "0.1", "0.10", "0.2", "0.3"),)
    sweep = sweep_of(*axes, trials=9)
    for _ in range(2):  # the second time nothing is left to do
        it = run(search(tmp_path, sweep), World().tune(concurrent=2))
        found = [trial.settings for trial in ledger(it)]
        assert it.recipe(found[0], whole=True).isolate.dropout == 0.1
        assert set(found[1:]) == {("isolate.dropout=0.2",), ("isolate.dropout=0.3",)}
        assert len(found) == 3


def test_combinations_that_no_recipe_can_have_are_left_out(tmp_path):
    axes = (
        choice("isolate.pairs.levels.s0", "2", "10"),
        choice("isolate.pairs.levels.s1", "5", "8", "20"),
    )
    it = run(search(tmp_path, sweep_of(*axes, trials=20)), World().tune())
    found = [trial.settings for trial in ledger(it)]
    s0, s1 = "isolate.pairs.levels.s0", "isolate.pairs.levels.s1"
    valid = [(2, 5), (2, 8), (2, 20), (10, 20)]
    assert sorted(found) == sorted((f"{s0}={a}", f"{s1}={b}") for a, b in valid)
    assert found[0] == (f"{s0}=2", f"{s1}=8")  # the recipe's own


def test_a_recipe_that_is_none_is_said_at_once(tmp_path):
    sweep = sweep_of(*WIDE, fixed=("isolate.huber_c=-1",))
    with pytest.raises(UserError, match=r"isolate\.huber_c"):
        run(search(tmp_path, sweep), World().tune())
    with pytest.raises(UserError, match=r"sweep\.probes: 5 looks at 4 steps; lower it, or raise"):
        run(search(tmp_path, sweep_of(*WIDE, probes=5)), World().tune())
    with pytest.raises(UserError, match=r"sweep\.probes: 3 looks at 2 steps"):
        run(search(tmp_path, sweep_of(*WIDE, budget=0.5)), World().tune())


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_more_trials_later_begin_only_the_new_ones(tmp_path, kind):
    few = sweep_of(*WIDE, trials=3, search=kind, startup=1)
    many = replace(few, trials=6, name="longer", finalists=1, minutes=60.0)
    world = World()
    before = run(search(tmp_path, few), world.tune()).all()
    trained = list(world.trained)
    it = run(search(tmp_path, many), world.tune())
    assert it.all()[:3] == before
    assert [trial.number for trial in ledger(it)] == [0, 1, 2, 3, 4, 5]
    assert world.trained[: len(trained)] == trained
    assert {name for name, _ in world.trained[len(trained) :]} == {
        trial.fingerprint for trial in it.all()[3:]
    }
    at_once = run(search(tmp_path / "other", many), World().tune()).all()
    assert at_once == it.all()  # as if so many had been asked for at first
    fewer = run(search(tmp_path, few), world.tune())
    assert fewer.all() == before  # the others are there, and not of this sweep
    assert len(ledger(fewer)) == 6


# --- the ledger's name ---------------------------------------------------------------------------

SAME = [
    {"trials": 9},
    {"minutes": 3.0},
    {"finalists": 5},
    {"name": "another"},
    {"finalist_samples": 99, "finalist_blocks": 4, "finalist_seed": 9},
]
OTHER = [
    {"samples": 41},
    {"space": WIDE[:1]},
    {"space": WIDE[::-1]},
    {"seed": 1},
    {"noise_seed": 1},
    {"probes": 2},
    {"steps": 1},
    {"budget": 0.75},
    {"search": "tpe"},
    {"scheduler": "none"},
    {"eta": 2},
    {"fixed": ("isolate.ema=[{kind: power}]",)},
]


@pytest.mark.parametrize("changes", SAME)
def test_how_far_a_search_goes_is_no_part_of_its_name(tmp_path, changes):
    sweep = sweep_of(*WIDE)
    one, other = search(tmp_path, sweep), search(tmp_path, replace(sweep, **changes))
    assert one.ledger.home == other.ledger.home


@pytest.mark.parametrize("changes", OTHER)
def test_what_decides_its_trials_is(tmp_path, changes):
    sweep = sweep_of(*WIDE)
    one, other = search(tmp_path, sweep), search(tmp_path, replace(sweep, **changes))
    assert one.ledger.home != other.ledger.home


def test_the_recipe_and_the_inputs_are_part_of_its_name_but_not_what_stands_elsewhere(tmp_path):
    sweep = sweep_of(*WIDE)
    changed = [
        search(tmp_path, sweep),
        *(search(tmp_path, sweep, o) for o in ("isolate.lr=1e-3", "seed=4", "noise.rho=6")),
        search(tmp_path, sweep, "evaluate.mid_sigma=0.7"),
        *(search(tmp_path, sweep, **{n: "x"}) for n in ("shard", "reference", "distilled")),
    ]
    assert len({it.ledger.home for it in changed}) == len(changed)
    same = search(tmp_path, sweep, "distill.lr=1e-3", "evaluate.samples=70", "register.model=other")
    assert same.ledger.home == changed[0].ledger.home
    assert Path(same.ledger.home).parent == tmp_path / "sweeps"


# --- what ends it --------------------------------------------------------------------------------


def test_a_users_mistake_ends_the_sweep_with_its_line(tmp_path):
    sweep = sweep_of(*WIDE, trials=5)

    def run_trials(trial: Any, it: Any, **_: Any) -> None:
        for _number in range(2):
            assert it.next() is not None
        it.heard(1, {"mistake": "shards are altered: delete them and run again"}, False)
        assert it.next() is None  # no more are begun

    with pytest.raises(UserError, match=r"^shards are altered: delete them and run again$"):
        run(search(tmp_path, sweep), run_trials)
    assert [trial.state for trial in ledger(search(tmp_path, sweep))] == [RUNNING, RUNNING]
    it = run(search(tmp_path, sweep), World().tune())  # mended
    assert len(it.all()) == 5
    assert RUNNING not in {trial.state for trial in it.all()}


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_search_that_ends_early_does_not_pass_for_done(tmp_path, after):
    """Tune returns as if all were well when it is told to stop."""
    sweep = sweep_of(*WIDE, trials=3)

    def run_trials(trial: Any, it: Any, **_: Any) -> None:
        for _ in range(after):
            it.next()

    with pytest.raises(RuntimeError, match=r"the sweep was interrupted at trials .*; run it again"):
        run(search(tmp_path, sweep), run_trials)
    run(search(tmp_path, sweep), World().tune())


def test_between_two_trials_an_early_end_is_seen_too(tmp_path):
    sweep = sweep_of(*WIDE, trials=3)
    world = World(stops=0.0)

    def run_trials(trial: Any, it: Any, **_: Any) -> None:
        number, payload = it.next()
        for result in world.process(payload["job"]):
            it.heard(number, result, False)

    with pytest.raises(RuntimeError, match=r"interrupted at trials \[\]"):
        run(search(tmp_path, sweep), run_trials)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(sweeping, "time", SimpleNamespace(monotonic=lambda: self.now))


def test_the_time_is_counted_over_all_attempts(tmp_path, monkeypatch):
    clock, asked = Clock(monkeypatch), []
    sweep = sweep_of(*WIDE, trials=3, minutes=2.0)
    world = World(stops=0.0)

    def working(seconds: float, killed: bool = False) -> Callable[..., None]:
        def run_trials(trial: Any, it: Any, **options: Any) -> None:
            asked.append(options["seconds"])
            number, payload = it.next()
            clock.now += seconds
            it.heard(number, next(world.process(payload["job"])), False)
            if killed:
                clock.now += 7  # of which nobody was told
                monkeypatch.setattr(it, "_spend", lambda: None)
                raise Killed

        return run_trials

    with pytest.raises(Killed):
        run(search(tmp_path, sweep), working(50, killed=True))
    clock.now += 10_000  # while nobody runs it
    with pytest.raises(RuntimeError, match="interrupted"):
        run(search(tmp_path, sweep), working(60))
    it = run(search(tmp_path, sweep), working(30))  # over: what runs is left where it is
    assert asked == [120.0, 70.0, 10.0]
    assert it.ledger.seconds() == 140.0
    assert [trial.state for trial in it.all()] == [RUNNING]
    run(search(tmp_path, sweep), working(1))  # no time is left to start anything
    assert len(asked) == 3
    more = run(search(tmp_path, replace(sweep, minutes=None)), world.tune())
    assert [trial.state for trial in more.all()] == [COMPLETED] * 3
    assert len(set(world.trained)) == len(world.trained) == 9


def test_without_a_limit_tune_is_given_none(tmp_path):
    asked: list[Mapping[str, Any]] = []

    def run_trials(trial: Any, it: Any, **options: Any) -> None:
        asked.append(options)
        World().tune()(trial, it)

    sweep = sweep_of(*WIDE, trials=1, scheduler="median", grace=2, eta=4)
    run(search(tmp_path, sweep), run_trials)
    rule = tuning.Rule(kind="median", probes=3, grace=2, eta=4)
    assert asked == [
        {
            "rule": rule,
            "cpus": 1,
            "gpus": 0.0,
            "concurrent": 2,
            "max_failures": 2,
            "seconds": None,
        }
    ]


def test_a_trial_has_the_inputs_that_its_training_needs_and_no_others(tmp_path):
    """So that a trial is the same one whichever sweep tries it."""
    it = search(tmp_path, sweep_of(*WIDE))
    given = {"ict": {"shard", "reference"}, "ect": {"shard", "reference", "teacher"}}
    for method, names in given.items():
        assert set(it.job_of((f"isolate.method={method}",)).inputs) == names
    distilled = it.job_of(("isolate.init=distilled",)).inputs["teacher"]
    assert distilled.step == "distilled"
    shorter = search(tmp_path, sweep_of(*WIDE, budget=0.8))
    job = shorter.job_of(())
    assert job.config.stage.training.images == 51
    assert shorter.recipe((), whole=True).isolate.images == 64


def test_an_ended_trial_whose_repetition_dies_keeps_what_it_said(tmp_path):
    sweep = sweep_of(*WIDE, trials=2)
    before = run(search(tmp_path, sweep), World(stops=0).tune()).all()

    def dying(_: Any, it: Sweep, **__: Any) -> None:
        while (found := it.next()) is not None:
            it.lost(found[0], "the node died")

    assert run(search(tmp_path, sweep), dying).all() == before


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sampler_that_proposes_the_same_again_does_not_use_a_space_up(tmp_path, seed):
    axes = (
        choice("isolate.dropout", "0.0", "0.1", "0.2", "0.3"),
        choice("isolate.pairs.levels.s1", "4", "8", "16"),
    )
    sweep = sweep_of(*axes, trials=12, search="tpe", startup=6, seed=seed)
    trials = run(search(tmp_path, sweep), World().tune()).all()
    assert len({trial.fingerprint for trial in trials}) == 12
