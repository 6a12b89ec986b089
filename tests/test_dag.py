"""Durable steps: run once, reused ever after, re-run when (and only when) they must be.

The executor runs steps in this process; what Ray adds is tested in test_end_to_end.py.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import Preempted, Unreachable, UserError, WorkerLost
from infra.resources import Resources
from pipelines import dag, execution
from pipelines.artifacts import Committed
from pipelines.dag import Settings, Step, StepContext
from pipelines.execution import AttemptFailed, Event, StepsFailed
from pipelines.recipe import Cluster

RAN: list[str] = []  # names of the steps whose bodies ran, in order


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Number:
    value: float
    parts: tuple[int, ...] = (1, 2)


def add(ctx: StepContext, config: Config, **inputs: Committed[Number]) -> Number:
    """The sum of the inputs and lr; each input's file is read through `fetch`."""
    RAN.append(ctx.step)
    total = config.lr
    for committed in inputs.values():
        assert float(ctx.fetch(committed, "value.txt").read_text()) == committed.value.value
        total += committed.value.value
    (ctx.out / "value.txt").write_text(repr(total))
    (ctx.out / "sub").mkdir()
    (ctx.out / "sub" / "more.bin").write_bytes(b"\0" * 100)
    return Number(value=total)


def fails(ctx: StepContext, config: Config, **inputs: Committed[Number]) -> Number:
    RAN.append(ctx.step)
    raise RuntimeError("first line\nsecond line")


def refuses(ctx: StepContext, config: Config, **inputs: Committed[Number]) -> Number:
    raise UserError("data.path: nothing there; mend it")


class InProcess:
    """Runs a step when it is waited for, the first submitted first; may lose workers."""

    def __init__(self, cpus: float = 2.0, lost: int = 0) -> None:
        self.cpus, self.lost = cpus, lost
        self.most_at_once = 0
        self.open: list[int] = []
        self.calls: dict[int, Any] = {}
        self.cancelled: list[int] = []
        self.closed = False

    def capacity(self) -> Resources:
        return Resources(self.cpus)

    def submit(self, function: Any, *args: Any, needs: Resources, name: str) -> int:
        handle = len(self.calls)
        self.calls[handle] = (function, args)
        self.open.append(handle)
        self.most_at_once = max(self.most_at_once, len(self.open))
        return handle

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles[:1])

    def result(self, handle: int) -> Any:
        self.open.remove(handle)
        if self.lost:
            self.lost -= 1
            raise WorkerLost("node died")
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles: Sequence[int]) -> None:
        self.cancelled += handles

    def close(self) -> None:
        self.closed = True


@dataclass
class Place:
    """A workspace, and what was run in it."""

    workspace: str
    cluster: Cluster = field(default_factory=Cluster)
    executor: InProcess = field(default_factory=InProcess)
    events: list[Event] = field(default_factory=list)  # of the last run

    @property
    def settings(self) -> Settings:
        return Settings(self.workspace, "sqlite:///unused.db", "test", self.cluster)

    def run(self, steps: Sequence[Step]) -> list[str]:
        """Executes; the names of the steps that ran."""
        RAN.clear()
        self.events.clear()
        for event in execution.execute(steps, self.settings, lambda: self.executor):
            self.events += [event] if event is not None else []
        return list(RAN)

    def reasons(self, steps: Sequence[Step]) -> dict[str, str]:
        return {line.step.name: line.reason for line in dag.plan(steps, self.workspace)}

    def states(self, steps: Sequence[Step]) -> dict[str, str]:
        return {line.step.name: line.state for line in dag.plan(steps, self.workspace)}

    def home(self, step: Step) -> Path:
        return Path(dag.home_of(self.workspace, step))

    def record(self, step: Step) -> dict[str, Any]:
        return dag.read_record(dag.home_of(self.workspace, step))

    def output(self, step: Step, name: str = "value.txt") -> Path:
        return self.home(step) / "attempts" / self.record(step)["attempt"] / name


@pytest.fixture
def place(tmp_path):
    return Place(str(tmp_path / "work"))


def no_executor():
    raise AssertionError("an executor was made although nothing had to run")


def diamond(**changes: Any) -> list[Step]:
    """a -> {b, c} -> d; `b=...` amends a step's fields, `b_config=...` its config."""

    def step(name: str, *inputs: Step) -> Step:
        config = changes.get(f"{name}_config", Config())
        made = Step(
            name=name, run=add, config=config, returns=Number, inputs={i.name: i for i in inputs}
        )
        return replace(made, **changes.get(name, {}))

    a = step("a")
    b, c = step("b", a), step("c", a)
    return [a, b, c, step("d", b, c)]


def snapshot(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(Path(folder).rglob("*"))
    }


# --- what runs, and what does not ----------------------------------------------------------------


def test_each_step_runs_once_after_its_inputs_and_values_flow_along_the_edges(place):
    steps = diamond()
    ran = place.run(steps)
    assert sorted(ran) == ["a", "b", "c", "d"]
    assert ran[0] == "a"
    assert ran[-1] == "d"
    assert place.executor.closed
    committed = {line.step.name: line.committed for line in dag.plan(steps, place.workspace)}
    assert committed["d"].value == Number(value=0.1 + (0.1 + 0.1) + (0.1 + 0.1), parts=(1, 2))
    assert Path(committed["d"].url, "value.txt").is_file()


def test_a_second_run_runs_nothing_and_makes_no_executor(place):
    steps = diamond()
    place.run(steps)
    before = snapshot(place.workspace)
    events = list(execution.execute(steps, place.settings, no_executor))
    assert [(event.step, event.kind) for event in events] == [(s.name, "cached") for s in steps]
    assert snapshot(place.workspace) == before


@pytest.mark.parametrize(
    ("changed", "rerun"),
    [("a", {"a", "b", "c", "d"}), ("b", {"b", "d"}), ("c", {"c", "d"}), ("d", {"d"})],
)
def test_a_changed_key_runs_exactly_that_step_and_what_depends_on_it(place, changed, rerun):
    place.run(diamond())
    steps = diamond(**{f"{changed}_config": Config(lr=0.2)})
    planned = {name for name, state in place.states(steps).items() if state == "to run"}
    assert planned == rerun
    ran = place.run(steps)
    assert len(ran) == len(rerun)
    assert set(ran) == rerun


def test_going_back_to_an_earlier_config_finds_its_results_again(place):
    place.run(diamond())
    place.run(diamond(a_config=Config(lr=0.2)))
    assert place.run(diamond()) == []


def test_a_raised_version_runs_the_step_again(place):
    place.run(diamond())
    steps = diamond(b={"version": "2"})
    assert place.reasons(steps)["b"] == "version: 1 -> 2"
    assert set(place.run(steps)) == {"b", "d"}


def test_two_graphs_in_one_workspace_share_equal_steps(place):
    place.run(diamond()[:2])
    assert place.run(diamond()) == ["c", "d"]


def test_targets_may_be_the_last_step_alone(place):
    assert sorted(place.run(diamond()[-1:])) == ["a", "b", "c", "d"]


def test_closing_the_iterator_cancels_what_runs_and_closes_the_executor(place):
    events = execution.execute(diamond(), place.settings, lambda: place.executor)
    assert next(event for event in events if event is not None).kind == "started"
    events.close()
    assert place.executor.cancelled == [0]
    assert place.executor.closed


# --- reasons -------------------------------------------------------------------------------------


def test_the_plan_names_the_key_and_the_input_that_changed(place):
    assert place.reasons(diamond()) == dict.fromkeys("abcd", "never run")
    place.run(diamond())
    reasons = place.reasons(diamond(a_config=Config(lr=0.2)))
    assert reasons["a"] == "lr: 0.1 -> 0.2"
    assert reasons["b"] == "input a changed"
    assert reasons["d"] == "input b changed; input c changed"
    assert place.reasons(diamond())["a"].startswith("committed 20")


def test_an_input_that_is_no_longer_there_is_a_reason(place):
    place.run(diamond())
    a, b, c, d = diamond()
    fewer = replace(d, inputs={"b": b})
    assert place.reasons([a, b, c, fewer])["d"] == "input c changed"


@pytest.mark.parametrize("text", ["one\ntwo\n", "x" * 500, "a\u2028b", "colour \x1b[31m"])
def test_a_reason_is_one_short_line_whatever_changed(place, text):
    place.run(diamond())
    reason = place.reasons(diamond(a_config=Config(note=text)))["a"]
    assert reason == "note changed"
    reason = place.reasons(diamond(a_config=Config(note=text, lr=3.0)))["a"]
    assert reason == "lr: 0.1 -> 3.0; note changed"


@dataclass(frozen=True, kw_only=True)
class Wide:
    p: int = 0
    q: int = 0
    r: int = 0
    s: int = 0
    t: int = 0


def test_only_the_first_three_changes_are_spelled_out(place):
    def steps(config: Wide) -> list[Step]:
        return [Step(name="wide", run=add_wide, config=config, returns=Number)]

    place.run(steps(Wide()))
    reason = place.reasons(steps(Wide(p=1, q=1, r=1, s=1, t=1)))["wide"]
    assert reason == "p: 0 -> 1; q: 0 -> 1; r: 0 -> 1 (+2 more)"


def add_wide(ctx: StepContext, config: Wide) -> Number:
    return Number(value=1.0)


def test_the_reason_compares_with_the_newest_result(place, monkeypatch):
    for lr in (0.3, 0.1, 0.2):
        monkeypatch.setattr(
            execution.time, "time", lambda lr=lr: 1e9 + {0.3: 0, 0.1: 50, 0.2: 20}[lr]
        )
        place.run(diamond(a_config=Config(lr=lr)))
    assert place.reasons(diamond(a_config=Config(lr=7.0)))["a"] == "lr: 0.1 -> 7.0"


def test_files_that_are_not_ours_beside_the_results_do_no_harm(place):
    place.run(diamond())
    (Path(place.workspace) / "steps" / "a" / ".DS_Store").write_bytes(b"\0")
    (Path(place.workspace) / "steps" / "a" / "notes").mkdir()
    assert place.reasons(diamond(a_config=Config(lr=0.2)))["a"] == "lr: 0.1 -> 0.2"


def test_a_plan_touches_nothing(place, tmp_path):
    dag.plan(diamond(), place.workspace)
    assert list(tmp_path.iterdir()) == []
    place.run(diamond())
    place.output(diamond()[1]).unlink()
    (place.home(diamond()[2]) / "COMMIT.json").write_text("{")
    before = snapshot(tmp_path)
    dag.plan(diamond(), place.workspace)
    dag.plan(diamond(a_config=Config(lr=0.2)), place.workspace)
    assert snapshot(tmp_path) == before


# --- damage --------------------------------------------------------------------------------------


def bad_records(place: Place, step: Step) -> list[str]:
    return [name for name in os.listdir(place.home(step)) if name.startswith("COMMIT.bad-")]


@pytest.mark.parametrize("kind", ["missing", "longer", "shorter", "nested missing", "no folder"])
def test_a_damaged_result_is_set_aside_and_made_again(place, kind):
    steps = diamond()
    place.run(steps)
    b = steps[1]
    file = place.output(b)
    if kind == "missing":
        file.unlink()
    elif kind == "longer":
        file.write_text(file.read_text() + "0")
    elif kind == "shorter":
        file.write_text("")
    elif kind == "nested missing":
        place.output(b, "sub/more.bin").unlink()
    else:
        shutil.rmtree(file.parent)
    reason = place.reasons(steps)["b"]
    name = "sub/more.bin" if kind in ("nested missing", "no folder") else "value.txt"
    assert reason == f"damaged: {name} is missing or has another size"
    assert place.run(steps) == ["b"]
    assert len(bad_records(place, b)) == 1
    assert place.run(steps) == []


def garbage(record: dict[str, Any]) -> dict[str, bytes]:
    whole = json.dumps(record).encode()
    return {
        "empty": b"",
        "torn": whole[: len(whole) // 2],
        "binary": b"\xff\xfe\0" * 50,
        "a list": b"[]",
        "null": b"null",
        "no keys": b"{}",
        "of another format": json.dumps({**record, "format": 99}).encode(),
        "without its value": json.dumps({k: v for k, v in record.items() if k != "value"}).encode(),
        "of another shape": json.dumps({**record, "value": {"old_field": 1}}).encode(),
        "value a list": json.dumps({**record, "value": [1]}).encode(),
        "files a number": json.dumps({**record, "files": 3}).encode(),
        "code a list": json.dumps({**record, "code": ["x"]}).encode(),
    }


@pytest.mark.parametrize("kind", list(garbage({})))
def test_an_unreadable_record_is_set_aside_and_the_step_runs_again(place, kind):
    steps = diamond()
    place.run(steps)
    b = steps[1]
    data = garbage(place.record(b))[kind]
    (place.home(b) / "COMMIT.json").write_bytes(data)
    assert place.reasons(steps)["b"].startswith("its record is unreadable: ")
    other = diamond(b_config=Config(lr=9.0))
    dag.plan(other, place.workspace)  # garbage beside it is no reason to fail either
    assert place.run(steps) == ["b"]
    (aside,) = bad_records(place, b)
    assert (place.home(b) / aside).read_bytes() == data
    assert place.run(steps) == []


def test_set_aside_forgets_the_result_and_the_checkpoints(place):
    steps = diamond()
    place.run(steps)
    (place.home(steps[1]) / "work").mkdir()
    (place.home(steps[1]) / "work" / "checkpoint").write_text("half")
    dag.set_aside(place.workspace, steps[1])
    assert place.reasons(steps)["b"] == "an earlier result was set aside"
    assert not (place.home(steps[1]) / "work").exists()
    assert place.run(steps) == ["b"]
    dag.set_aside(place.workspace, diamond(a_config=Config(lr=5.0))[0])  # never ran: nothing to do


def test_fetch_refuses_an_input_that_was_altered_and_names_it(place):
    steps = diamond()
    place.run(steps[:1])
    file = place.output(steps[0])
    file.write_text(file.read_text().replace("1", "2"))  # the same size
    with pytest.raises(StepsFailed) as caught:
        place.run(steps)
    assert set(caught.value.failures) == {"b", "c"}
    assert isinstance(caught.value.failures["b"], UserError)
    assert f"{file} is altered" in str(caught.value.failures["b"])


# --- crashes -------------------------------------------------------------------------------------

CRASHES = ["before run", "mid-write", "before publishing", "before commit", "in commit"]


class Killed(BaseException):
    """The process is gone: no handler of Exception sees it."""


def die_in_body(ctx: StepContext, config: Config, **inputs: Committed[Number]) -> Number:
    (ctx.out / "value.txt").write_text("0.")
    raise Killed


def arm(stage: str, step: Step, monkeypatch: pytest.MonkeyPatch, die: Any) -> Step:
    """Let the attempt die at a stage."""
    if stage == "before run":
        monkeypatch.setattr(execution, "StepContext", die)
    elif stage == "mid-write":
        return replace(step, run=die_in_body)
    elif stage == "before publishing":
        monkeypatch.setattr(execution.storage, "describe_dir", die)
    elif stage == "before commit":
        monkeypatch.setattr(execution.storage, "put_if_absent", die)
    else:  # the record is written beside its place, but has not got its name
        monkeypatch.setattr(storage.os, "link", die)
    return step


@pytest.mark.parametrize("stage", CRASHES)
def test_what_a_crash_left_is_never_taken_for_a_result(place, stage, monkeypatch):
    steps = diamond()

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        first = arm(stage, steps[0], patch, die)
        with pytest.raises(Killed):
            execution.run_attempt(first, place.settings, {}, (), {})
    assert os.listdir(place.home(steps[0]) / "attempts")
    assert not (place.home(steps[0]) / "COMMIT.json").exists()
    assert place.reasons(steps)["a"] == "interrupted: runs again"
    assert sorted(place.run(steps)) == ["a", "b", "c", "d"]
    assert float(place.output(steps[0]).read_text()) == 0.1


def test_a_killed_process_leaves_nothing_that_counts(place, tmp_path):
    """The same with a process that really ends, at every system call that names a file."""
    script = tmp_path / "crash.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, os, sys
            spec = importlib.util.spec_from_file_location("test_dag", {__file__!r})
            module = importlib.util.module_from_spec(spec)
            sys.modules["test_dag"] = module
            spec.loader.exec_module(module)
            deadly = int(sys.argv[1])
            seen = 0
            watching = False

            def audit(event, args):
                global seen
                if not watching or event not in ("open", "os.mkdir", "os.link", "os.rename"):
                    return
                if not str(args[0]).startswith({place.workspace!r}):
                    return
                if seen == deadly:
                    os._exit(9)
                seen += 1

            sys.addaudithook(audit)
            place = module.Place({place.workspace!r})
            watching = True
            place.run(module.diamond()[:1])
            """
        )
    )
    steps = diamond()[:1]
    environment = {**os.environ, "PYTHONPATH": str(Path(dag.__file__).parent.parent)}
    deaths = 0
    while True:
        done = subprocess.run(
            [sys.executable, str(script), str(deaths)], env=environment, capture_output=True
        )
        assert done.returncode in (0, 9), done.stderr.decode()
        (line,) = dag.plan(steps, place.workspace)
        if line.committed is not None:
            assert Path(line.committed.url, "value.txt").read_text() == "0.1"
            break
        assert done.returncode == 9
        deaths += 1
    assert deaths >= 8
    assert place.run(steps) == []


def test_a_half_trained_step_says_that_it_goes_on(place):
    steps = diamond()
    whole = place.home(steps[0]) / "work" / "checkpoints" / "000000000128-abc"
    whole.mkdir(parents=True)
    (whole / "state.json").write_text("{}")
    assert place.reasons(steps)["a"] == "never run"
    (whole / "record.json").write_text("{}")
    assert place.reasons(steps)["a"] == "interrupted: goes on from its last checkpoint"


def test_of_two_attempts_at_once_one_wins_and_both_return_its_record(place):
    records = []

    def outer(ctx: StepContext, config: Config) -> Number:
        inner = replace(step, run=add)  # starts later, and is finished first
        records.append(execution.run_attempt(inner, place.settings, {}, (), {}))
        return add(ctx, config)

    step = Step(name="a", run=outer, config=Config(), returns=Number)
    records.append(execution.run_attempt(step, place.settings, {}, (), {}))
    assert records[0] == records[1] == place.record(step)
    assert len(os.listdir(place.home(step) / "attempts")) == 2
    assert place.states([step]) == {"a": "cached"}


# --- failures ------------------------------------------------------------------------------------


def test_a_failed_step_stops_its_dependants_only_and_its_traceback_is_kept(place):
    steps = diamond(b={"run": fails})
    with pytest.raises(StepsFailed) as caught:
        place.run(steps)
    assert set(RAN) == {"a", "b", "c"}
    told = [(event.step, event.kind, event.detail) for event in place.events]
    assert ("b", "failed", "RuntimeError: first line") in told
    assert ("d", "skipped", "an input failed") in told
    assert place.states(steps)["c"] == "cached"
    assert list(caught.value.failures) == ["b"]
    error = caught.value.failures["b"]
    assert isinstance(error, AttemptFailed)
    assert str(error) == "RuntimeError: first line"
    log = Path(caught.value.failures["b"].log).read_text()
    assert "Traceback" in log
    assert "second line" in log
    assert "in fails" in log
    assert set(place.run(diamond())) == {"b", "d"}  # mended


def test_a_users_mistake_passes_as_it_is_and_leaves_no_traceback(place):
    with pytest.raises(StepsFailed) as caught:
        place.run(diamond(b={"run": refuses}))
    assert str(caught.value.failures["b"]) == "data.path: nothing there; mend it"
    assert not (place.home(diamond()[1]) / "failures").exists()


def test_a_step_that_returns_something_else_fails(place):
    with pytest.raises(StepsFailed) as caught:
        place.run(diamond(a={"returns": Config}))
    assert "a returned Number" in str(caught.value.failures["a"])


def test_an_executor_that_cannot_say_what_happened_fails_that_step_alone(place):
    class Garbled(InProcess):
        def result(self, handle: int) -> Any:
            value = super().result(handle)
            if value["step"] == "b":
                raise EOFError("cannot unpickle the result")
            return value

    place.executor = Garbled()
    with pytest.raises(StepsFailed) as caught:
        place.run(diamond())
    assert list(caught.value.failures) == ["b"]
    assert place.states(diamond())["c"] == "cached"


@pytest.mark.parametrize(
    ("lost", "retries", "survives"), [(1, 1, True), (2, 1, False), (2, 2, True)]
)
def test_a_lost_worker_is_tried_again_so_often_and_no_oftener(
    tmp_path, monkeypatch, lost, retries, survives
):
    monkeypatch.setattr(execution, "FIRST_PAUSE_SECONDS", 0)
    place = Place(str(tmp_path), Cluster(retries=retries), InProcess(lost=lost))
    step = diamond()[:1]
    if survives:
        assert place.run(step) == ["a"]
        kinds = [event.kind for event in place.events]
        assert kinds == ["started", *["retry"] * lost, "done"]
        assert place.events[1].detail == "node died"
    else:
        with pytest.raises(StepsFailed) as caught:
            place.run(step)
        assert isinstance(caught.value.failures["a"], WorkerLost)
        assert len(place.executor.calls) == retries + 1


@pytest.mark.parametrize(("times", "retries", "survives"), [(2, 2, True), (2, 1, False)])
def test_a_store_that_did_not_answer_is_asked_again(
    tmp_path, monkeypatch, times, retries, survives
):
    monkeypatch.setattr(execution, "FIRST_PAUSE_SECONDS", 0)
    left = [Unreachable("s3://b/x: no answer in 4 attempts, 60 s")] * times

    def away(ctx: StepContext, config: Config) -> Number:
        if left:
            raise left.pop()
        return add(ctx, config)

    place = Place(str(tmp_path), Cluster(retries=retries))
    step = diamond(a={"run": away})[:1]
    if survives:
        assert place.run(step) == ["a"]
        assert [event.kind for event in place.events] == ["started", "retry", "retry", "done"]
    else:
        with pytest.raises(StepsFailed) as caught:
            place.run(step)
        assert isinstance(caught.value.failures["a"], Unreachable)


def test_the_pause_before_a_retry_doubles():
    pauses = [[execution._pause(n) for _ in range(50)] for n in range(4)]
    for n, drawn in enumerate(pauses):
        whole = execution.FIRST_PAUSE_SECONDS * 2**n
        assert whole / 2 <= min(drawn) < max(drawn) <= whole


# --- asked to stop -------------------------------------------------------------------------------


class Alongside(InProcess):
    """A step under way ends only once it has been waited for so often."""

    def __init__(self, waits: int, asked: list[str]) -> None:
        super().__init__()
        self.waits, self.asked = waits, asked

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        self.waits -= 1
        if not self.asked:
            self.asked.append("asked to stop by SIGTERM")
            return []
        return list(handles[:1]) if self.waits <= 0 else []


def stop_run(place: Place, steps: Sequence[Step], asked: list[str]) -> list[tuple[str, str]]:
    """(step, kind) of the events of a run that is asked to stop, which it must obey."""
    stop = storage.join(place.workspace, "stops", "run")
    events = execution.execute(
        steps,
        replace(place.settings, stop=stop),
        lambda: place.executor,
        lambda: asked[0] if asked else None,
    )
    told = []

    def follow() -> None:
        told.extend((event.step, event.kind) for event in events if event is not None)

    with pytest.raises(Preempted, match="asked to stop by SIGTERM"):
        follow()
    assert place.executor.closed
    assert not storage.exists(stop)
    return told


def test_asked_to_stop_training_has_time_to_save_and_nothing_new_starts(tmp_path):
    def trains(ctx: StepContext, config: Config) -> Number:
        assert ctx.stop is not None
        assert storage.read_bytes(ctx.stop) == b"asked to stop by SIGTERM"
        raise Preempted("a stopped at 128 images")

    asked: list[str] = []
    place = Place(str(tmp_path), executor=Alongside(3, asked))
    steps = diamond(a={"run": trains, "gang": "workers"})
    assert stop_run(place, steps, asked) == [("a", "started"), ("a", "stopped")]
    assert place.executor.cancelled == []
    assert place.states(steps) == dict.fromkeys("abcd", "to run")


def test_training_that_saves_nothing_in_time_is_cancelled(tmp_path):
    asked: list[str] = []
    place = Place(str(tmp_path), Cluster(grace_seconds=0), Alongside(99, asked))
    steps = diamond(a={"gang": "workers"})
    assert stop_run(place, steps, asked) == [("a", "started")]
    assert place.executor.cancelled == [0]


def test_what_has_nothing_to_save_is_cancelled_at_once(tmp_path):
    asked: list[str] = []
    place = Place(str(tmp_path), Cluster(grace_seconds=1e9), Alongside(99, asked))
    assert stop_run(place, diamond(), asked) == [("a", "started")]
    assert place.executor.cancelled == [0]


# --- admission -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "workers", "at_once"), [(1.0, 1, 1), (2.0, 1, 2), (3.0, 2, 1), (4.0, 2, 2)]
)
def test_stages_that_train_run_side_by_side_only_if_all_their_workers_fit(
    tmp_path, cpus, workers, at_once
):
    place = Place(str(tmp_path), Cluster(workers=workers, address="auto"), InProcess(cpus=cpus))
    trains = {"cpus": 0, "gang": "workers"}
    assert sorted(place.run(diamond(b=trains, c=trains))) == ["a", "b", "c", "d"]
    assert place.executor.most_at_once == at_once


def test_a_step_larger_than_the_cluster_still_runs_when_it_is_alone(tmp_path):
    place = Place(str(tmp_path), executor=InProcess(cpus=1.0))
    assert place.run(diamond(a={"cpus": 8})[:1]) == ["a"]


def test_workers_that_this_machine_cannot_hold_are_refused_before_anything_runs(tmp_path):
    cluster = Cluster(workers=3, cpus_per_worker=2)
    place = Place(str(tmp_path), cluster, InProcess(cpus=4.0))
    with pytest.raises(UserError, match=r"^cluster\.workers: 3 .* need 6 CPUs, .* has 4; "):
        place.run(diamond(d={"gang": "workers"}))
    assert RAN == []
    assert place.executor.closed
    one = Cluster(cpus_per_evaluator=5)
    with pytest.raises(UserError, match=r"^cluster\.evaluators: 1 .* need 5 CPUs, .* has 4; "):
        Place(str(tmp_path), one, InProcess(cpus=4.0)).run(diamond(d={"gang": "evaluators"}))
    place = Place(str(tmp_path), cluster, InProcess(cpus=4.0))
    assert place.run(diamond()) != []  # nothing trains: nothing to refuse


def test_evaluation_starts_with_room_for_one_evaluator(tmp_path):
    """The others join when there is room, so they are not waited for."""
    cluster = Cluster(evaluators=8, address="auto")
    place = Place(str(tmp_path), cluster, InProcess(cpus=2.0))
    scores = {"cpus": 0, "gang": "evaluators"}
    assert sorted(place.run(diamond(b=scores, c=scores))) == ["a", "b", "c", "d"]
    assert place.executor.most_at_once == 2


# --- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with spaces", "Zürich-画像", "100% #1 ?x=[y]"])
def test_a_workspace_may_have_any_name(tmp_path, name):
    place = Place(str(tmp_path / name))
    place.run(diamond())
    assert place.run(diamond()) == []
    assert set(place.states(diamond(a_config=Config(lr=2.0))).values()) == {"to run"}


def test_a_moved_workspace_is_still_all_there(tmp_path):
    before = Place(str(tmp_path / "before"))
    before.run(diamond())
    os.rename(before.workspace, tmp_path / "after")
    after = Place(str(tmp_path / "after"))
    assert list(after.states(diamond()).values()) == ["cached"] * 4
    for record in (tmp_path / "after").rglob("COMMIT.json"):
        assert str(tmp_path) not in record.read_text()
    assert after.run(diamond(d_config=Config(lr=1.0))) == ["d"]  # its inputs are found


def test_the_protocol_holds_in_an_object_store(tmp_path, monkeypatch):
    monkeypatch.setattr(execution.tempfile, "tempdir", str(tmp_path))
    place = Place("memory://dag-test")
    try:
        assert sorted(place.run(diamond())) == ["a", "b", "c", "d"]
        assert place.run(diamond()) == []
        step = diamond()[1]
        home = dag.home_of(place.workspace, step)
        folder = storage.join(home, "attempts", dag.read_record(home)["attempt"])
        assert [name for name, _ in storage.list_files(folder)] == ["sub/more.bin", "value.txt"]
        storage.remove_tree(storage.join(folder, "value.txt"))
        assert place.reasons(diamond())["b"].startswith("damaged: value.txt")
        assert place.run(diamond()) == ["b"]
        storage.write_bytes(storage.join(home, "COMMIT.json"), b'{"format"')
        assert place.run(diamond()) == ["b"]
        assert list(tmp_path.iterdir()) == []  # no scratch is left behind
    finally:
        storage.remove_tree(place.workspace)


def reads_two(ctx: StepContext, config: Config, a: Committed[Number]) -> Number:
    one, two = ctx.fetch(a, "value.txt"), ctx.fetch(a, "sub/more.bin")
    assert two == one.parent / "sub" / "more.bin"
    return Number(value=0.0)


@pytest.mark.parametrize("remote", [False, True])
def test_fetched_files_of_one_input_lie_side_by_side_as_they_were_written(tmp_path, remote):
    place = Place("memory://dag-fetch" if remote else str(tmp_path))
    try:
        a, b, *_ = diamond(b={"run": reads_two})
        place.run([a, b])
        assert place.states([b])["b"] == "cached"
    finally:
        storage.remove_tree(place.workspace)


# --- lock, disks ---------------------------------------------------------------------------------


FULL = OSError(errno.ENOSPC, "No space left on device")


def full_disk_body(ctx: StepContext, config: Config) -> Number:
    raise FULL


def refusing(path_part: str, code: int) -> Any:
    """`open` for writing fails below a path; reading works."""
    real = open

    def guarded(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path_part in str(file) and set(mode) & set("wax+"):
            raise OSError(code, os.strerror(code), str(file))
        return real(file, mode, *args, **kwargs)

    return guarded


def test_a_full_disk_in_the_middle_of_a_step_is_one_line(place):
    with pytest.raises(StepsFailed) as caught:
        place.run(diamond(a={"run": full_disk_body})[:1])
    error = caught.value.failures["a"]
    assert isinstance(error, UserError)
    assert str(error).startswith(f"disk full: {place.workspace}/steps/a/")
    assert str(error).endswith("free space or choose another --workspace")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "disk full"), (errno.EROFS, "read-only file system")],
)
def test_a_disk_that_refuses_the_record_is_one_line_and_nothing_is_committed(
    place, monkeypatch, code, words
):
    steps = diamond()[:1]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", refusing(".tmp-", code), raising=False)
        with pytest.raises(StepsFailed) as caught:
            place.run(steps)
    error = caught.value.failures["a"]
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{words}: ")
    assert "COMMIT.json" in str(error)
    assert "\n" not in str(error)
    assert place.states(steps) == {"a": "to run"}
    assert place.run(steps) == ["a"]
