"""Which steps start side by side: what a sweep, a training stage and evaluation ask for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import UserError
from infra.resources import Resources
from pipelines import execution
from pipelines.artifacts import Committed
from pipelines.dag import Settings, Step, StepContext
from pipelines.execution import _demand, _fits
from pipelines.recipe import Cluster

NONE: Mapping[Any, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Config:
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Done:
    ran: str


def work(ctx: StepContext, config: Config, **inputs: Committed[Done]) -> Done:
    return Done(ran=ctx.step)


def step(name: str, *inputs: Step, gang: Any = None, cpus: float = 0) -> Step:
    return Step(
        name=name,
        run=work,
        config=Config(),
        returns=Done,
        inputs={one.name: one for one in inputs},
        gang=gang,
        cpus=cpus,
    )


SWEEP, TRAIN = step("tune", gang="trials"), step("train", gang="workers")
SCORE, PLAIN = step("score", gang="evaluators"), step("plain", cpus=1)


@dataclass
class Machine:
    """Runs steps here, the first submitted first, and notes who was open together."""

    room: Resources
    open: dict[int, tuple[str, Any]] = field(default_factory=dict)
    together: set[frozenset[str]] = field(default_factory=set)
    needs: dict[str, Resources] = field(default_factory=dict)
    closed: bool = False
    count: int = 0

    def capacity(self) -> Resources:
        return self.room

    def submit(self, function: Any, *args: Any, needs: Resources, name: str) -> int:
        self.count += 1
        self.open[self.count] = name, lambda: function(*args)
        self.needs[name] = needs
        self.together.add(frozenset(name for name, _ in self.open.values()))
        return self.count

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles[:1])

    def result(self, handle: int) -> Any:
        return self.open.pop(handle)[1]()

    def cancel(self, handles: Sequence[int]) -> None:
        assert not handles, "nothing is cancelled"

    def close(self) -> None:
        self.closed = True


def machine(cpus: float, gpus: float = 0.0) -> Machine:
    return Machine(Resources(cpus, gpus))


def running(*steps: Step) -> dict[Any, tuple[Step, int]]:
    return {number: (one, 0) for number, one in enumerate(steps)}


def run(
    tmp_path: Path, steps: Sequence[Step], cluster: Cluster, on: Machine
) -> set[frozenset[str]]:
    """Who was open together."""
    settings = Settings(str(tmp_path), "sqlite:///unused.db", "test", cluster)
    started = [
        event.step
        for event in execution.execute(steps, settings, lambda: on)
        if event is not None and event.kind == "started"
    ]
    assert sorted(started) == sorted(one.name for one in steps)
    assert on.closed
    return on.together


# --- resources -----------------------------------------------------------------------------------


def test_resources_add_up_and_fit_only_where_there_is_enough_of_both() -> None:
    assert Resources(1, 0.5) + Resources(2, 0.25) == Resources(3, 0.75)
    assert Resources(4) == Resources(4, 0.0)
    room = Resources(4, 1)
    assert room.within(room)
    assert Resources(0).within(room)
    assert not Resources(5, 0).within(room)
    assert not Resources(1, 1.5).within(room)


# --- what a step asks for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (Cluster(), Resources(2)),
        (Cluster(trials=1), Resources(1)),
        (Cluster(trials=3, cpus_per_worker=2), Resources(6)),
        (Cluster(trials=3, workers=2, cpus_per_worker=2), Resources(12)),
        (Cluster(trials=4, gpus_per_worker=0.5), Resources(4, 2.0)),
        (Cluster(trials=2, workers=2, gpus_per_worker=1), Resources(4, 4.0)),
    ],
)
def test_a_sweep_asks_for_all_its_trials(cluster: Cluster, expected: Resources) -> None:
    assert _demand(SWEEP, cluster, Resources(16, 8)) == expected


def test_a_sweep_asks_for_no_more_than_there_is_of_each() -> None:
    cluster = Cluster(trials=8, cpus_per_worker=2, gpus_per_worker=1)
    assert _demand(SWEEP, cluster, Resources(10, 8)) == Resources(10, 8)
    assert _demand(SWEEP, cluster, Resources(64, 4)) == Resources(16, 4)
    assert _demand(SWEEP, cluster, Resources(64, 64)) == Resources(16, 8)


def test_a_sweeps_own_process_comes_on_top() -> None:
    assert _demand(replace(SWEEP, cpus=1), Cluster(trials=2), Resources(8)) == Resources(3)


@pytest.mark.parametrize("capacity", [Resources(2), Resources(64, 8)])
def test_training_asks_for_all_workers_and_evaluation_for_one_evaluator(capacity: Any) -> None:
    cluster = Cluster(workers=4, cpus_per_worker=2, gpus_per_worker=1, trials=9)
    cluster = replace(cluster, evaluators=5, cpus_per_evaluator=3, gpus_per_evaluator=0.5)
    assert _demand(TRAIN, cluster, capacity) == Resources(8, 4)
    assert _demand(SCORE, cluster, capacity) == Resources(3, 0.5)
    assert _demand(PLAIN, cluster, capacity) == Resources(1)


# --- who fits beside whom ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "trials", "beside", "fits"),
    [
        (2, 2, TRAIN, False),  # the sweep has filled it
        (3, 2, TRAIN, True),
        (2, 1, TRAIN, True),
        (2, 9, TRAIN, False),
        (2, 9, step("free"), True),  # asks for nothing
        (3, 2, SCORE, True),
        (3, 3, SCORE, False),
        (4, 2, SWEEP, True),
        (3, 2, SWEEP, False),
    ],
)
def test_a_sweep_leaves_the_others_what_its_trials_do_not_fill(
    cpus: float, trials: int, beside: Step, fits: bool
) -> None:
    cluster, on = Cluster(trials=trials), machine(cpus)
    assert _fits(beside, running(SWEEP), on, cluster) is fits
    assert _fits(SWEEP, running(beside), on, cluster) is fits  # whoever came first


def test_a_sweep_is_bound_by_gpus_as_by_cpus() -> None:
    cluster = Cluster(trials=2, gpus_per_worker=1, gpus_per_evaluator=0.5)
    assert not _fits(SCORE, running(SWEEP), machine(64, 2), cluster)
    assert _fits(SCORE, running(SWEEP), machine(64, 2.5), cluster)
    assert _fits(PLAIN, running(SWEEP), machine(64, 2), cluster)  # takes none
    assert not _fits(PLAIN, running(SWEEP), machine(2, 64), cluster)


def test_alone_everything_starts_however_large() -> None:
    cluster = Cluster(trials=50, workers=9, address="auto")
    for one in (SWEEP, TRAIN, SCORE, replace(PLAIN, cpus=100)):
        assert _fits(one, NONE, machine(1), cluster)


@given(
    cpus=st.integers(0, 12),
    gpus=st.integers(0, 4),
    trials=st.integers(1, 6),
    workers=st.integers(1, 3),
    per_worker=st.sampled_from([0.0, 0.5, 1.0]),
    steps=st.lists(st.sampled_from([SWEEP, TRAIN, SCORE, PLAIN]), min_size=2, max_size=4),
)
def test_more_room_and_fewer_others_never_keep_a_step_back(
    cpus: int, gpus: int, trials: int, workers: int, per_worker: float, steps: list[Step]
) -> None:
    cpus, gpus = cpus + workers, gpus + workers  # one trial fits, or it is refused
    cluster = Cluster(trials=trials, workers=workers, gpus_per_worker=per_worker)
    one, *others = steps
    fits = _fits(one, running(*others), machine(cpus, gpus), cluster)
    assert _fits(one, running(*others[::-1]), machine(cpus, gpus), cluster) == fits
    if fits:
        assert _fits(one, running(*others), machine(cpus + 1, gpus), cluster)
        assert _fits(one, running(*others), machine(cpus, gpus + 1), cluster)
        assert _fits(one, running(*others[1:]), machine(cpus, gpus), cluster)
    else:
        more = replace(cluster, trials=trials + 1, workers=workers + 1)
        assert not _fits(one, running(*others), machine(cpus, gpus), more)


# --- a graph -------------------------------------------------------------------------------------


def pair(first: Step, second: Step) -> list[Step]:
    """a -> {first, second} -> z"""
    a = step("a", cpus=1)
    first, second = (replace(one, inputs={"a": a}) for one in (first, second))
    return [a, first, second, step("z", first, second, cpus=1)]


@pytest.mark.parametrize(
    ("cpus", "trials", "beside"), [(2, 2, False), (3, 2, True), (2, 1, True), (3, 64, False)]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_sweep_and_a_training_stage_run_side_by_side_where_both_fit(
    tmp_path: Path, cpus: int, trials: int, beside: bool, first: bool
) -> None:
    steps = pair(SWEEP, TRAIN) if first else pair(TRAIN, SWEEP)
    together = run(tmp_path, steps, Cluster(trials=trials), machine(cpus))
    assert (frozenset({"tune", "train"}) in together) is beside
    assert max(map(len, together)) == 1 + beside


def test_two_sweeps_on_a_full_machine_take_turns(tmp_path: Path) -> None:
    steps = pair(SWEEP, replace(SWEEP, name="tune-2"))
    assert max(map(len, run(tmp_path, steps, Cluster(trials=4), machine(4)))) == 1


def test_a_sweeps_own_process_holds_no_cpu_that_its_trials_need(tmp_path: Path) -> None:
    on = machine(2)
    run(tmp_path, [SWEEP], Cluster(trials=2), on)
    assert on.needs == {"tune": Resources(0)}


def test_more_trials_than_this_machine_holds_are_no_mistake(tmp_path: Path) -> None:
    assert run(tmp_path, [SWEEP], Cluster(trials=64), machine(1)) == {frozenset({"tune"})}


@pytest.mark.parametrize(
    ("cluster", "room", "message"),
    [
        (
            Cluster(workers=3, trials=1),
            Resources(2),
            r"cluster\.workers: 3 of cpus_per_worker 1 need 3 CPUs, this machine has 2; ",
        ),
        (
            Cluster(cpus_per_worker=4, trials=1),
            Resources(2),
            r"cluster\.workers: 1 of cpus_per_worker 4 need 4 CPUs, this machine has 2; ",
        ),
        (
            Cluster(gpus_per_worker=1, trials=1),
            Resources(2),
            r"cluster\.gpus_per_worker: 1 workers need 1 GPUs, this machine has 0; ",
        ),
    ],
)
def test_a_single_trial_that_this_machine_cannot_hold_is_refused_before_anything_runs(
    tmp_path: Path, cluster: Cluster, room: Resources, message: str
) -> None:
    on = Machine(room)
    with pytest.raises(UserError, match=f"^{message}") as error:
        run(tmp_path, [PLAIN, SWEEP], cluster, on)
    assert "\n" not in str(error.value)
    assert on.count == 0
    assert on.closed


def test_a_cluster_that_may_grow_is_not_refused(tmp_path: Path) -> None:
    cluster = Cluster(address="auto", workers=3, gpus_per_worker=1)
    assert run(tmp_path, [SWEEP], cluster, machine(1)) == {frozenset({"tune"})}
