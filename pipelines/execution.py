"""Running a graph: what is not committed, side by side where inputs and CPUs allow.

The driver's half is `execute`, the worker's half `run_attempt`. Records and reuse are in `dag`.
"""

import contextlib
import json
import platform
import random
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from infra import storage, temporary
from infra.errors import Preempted, TrainingFailed, Unreachable, UserError, WorkerLost
from infra.resources import Resources
from infra.tracking import without_secrets
from pipelines import drift
from pipelines.artifacts import Committed, content_of, to_json
from pipelines.dag import (
    FORMAT,
    Identity,
    Planned,
    Settings,
    Step,
    StepContext,
    StepHistory,
    committed_of,
    home_at,
    home_of,
    plan,
    read_record,
    set_aside,
)
from pipelines.fingerprint import canonical, fingerprint_of
from pipelines.recipe import Cluster

FIRST_PAUSE_SECONDS = 2.0  # before a step is tried again


class Executor(Protocol):
    """Where steps run. The product uses Ray (infra.cluster); tests may run them in-process."""

    def capacity(self) -> Resources:
        """What there is in all."""
        ...

    def submit(
        self, function: Callable[..., Any], *args: Any, needs: Resources, name: str
    ) -> Any: ...

    def wait(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        """Those that are finished."""
        ...

    def result(self, handle: Any) -> Any:
        """The value; raises what the function raised, or WorkerLost."""
        ...

    def cancel(self, handles: Sequence[Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Event:
    """What happened to a step: "cached", "started", "retry", "done", "failed", "skipped",
    "stopped"."""

    step: str
    kind: str
    detail: str = ""
    seconds: float = 0.0


class StepsFailed(Exception):
    """Some steps failed; everything that did not depend on them has finished."""

    def __init__(self, failures: Mapping[str, BaseException]) -> None:
        super().__init__(", ".join(failures))
        self.failures = dict(failures)


class AttemptFailed(Exception):
    """A step raised: its exception as text, the file that holds the traceback, and the node."""

    def __init__(self, message: str, log: str, node: str) -> None:
        super().__init__(message, log, node)
        self.message, self.log, self.node = message, log, node

    def __str__(self) -> str:
        return self.message


def execute(
    targets: Sequence[Step],
    settings: Settings,
    make_executor: Callable[[], Executor],
    asked_to_stop: Callable[[], str | None] = lambda: None,
) -> Generator[Event | None, None, None]:
    """Run what is not committed, side by side where inputs and CPUs allow.

    Yields events as they happen, and None about twice a second in between. The executor is made
    only when something must run. Closing the iterator (or an exception thrown into it) cancels
    what runs. Once `asked_to_stop` gives a reason, nothing new starts, training saves what it has,
    the rest is cancelled, and Preempted is raised. Raises StepsFailed at the end when a step
    failed; independent branches finish first.
    """
    lines = plan(targets, settings.workspace)
    done = {line.step.name: line.committed for line in lines if line.committed is not None}
    history: dict[str, StepHistory] = {}
    for line in lines:
        if line.committed is not None:
            seconds = line.committed.seconds
            history[line.step.name] = StepHistory(
                line.step.name, "cached", seconds, line.fingerprint
            )
            yield Event(line.step.name, "cached", seconds=seconds)
        elif storage.exists(storage.join(home_of(settings.workspace, line.step), "COMMIT.json")):
            set_aside(settings.workspace, line.step)
    waiting = [line.step for line in lines if line.step.name not in done]
    if not waiting:
        return

    executor = make_executor()
    running: dict[Any, tuple[Step, int]] = {}
    again: list[tuple[float, Step, int]] = []  # when, what and which retry
    stopping: _Stopping | None = None
    failures: dict[str, BaseException] = {}
    try:
        _refuse_what_never_fits(waiting, executor, settings.cluster)
        while waiting or running or again:
            if stopping is None and (reason := asked_to_stop()) is not None:
                stopping = _Stopping.begin(reason, settings)
            if stopping is not None and stopping.over(step for step, _ in running.values()):
                raise Preempted(stopping.reason)
            for one in [one for one in again if one[0] <= time.monotonic() and not stopping]:
                again.remove(one)
                running[_submit(one[1], executor, settings, done, history)] = one[1:]
            for step in [] if stopping else list(waiting):
                if any(needed.name in failures for needed in step.inputs.values()):
                    waiting.remove(step)
                    failures.setdefault(step.name, StepsFailed({}))
                    yield Event(step.name, "skipped", "an input failed")
                elif all(name in done for name in _ancestors(step)) and _fits(
                    step, running, executor, settings.cluster
                ):
                    waiting.remove(step)
                    handle = _submit(step, executor, settings, done, history)
                    running[handle] = (step, 0)
                    yield Event(step.name, "started")
            finished = executor.wait(list(running), timeout=0.5) if running else []
            if not running:
                time.sleep(0.1 if waiting or again else 0)
            for handle in finished:
                step, retries = running.pop(handle)
                try:
                    record = executor.result(handle)
                except Preempted as error:
                    yield Event(step.name, "stopped", str(error))
                except (WorkerLost, Unreachable) as error:
                    if retries < settings.cluster.retries:
                        pause = _pause(retries)
                        again.append((time.monotonic() + pause, step, retries + 1))
                        yield Event(step.name, "retry", str(error))
                        continue
                    failures[step.name] = error
                    yield Event(step.name, "failed", str(error))
                except Exception as error:  # its own affair: other branches go on
                    failures[step.name] = error
                    yield Event(step.name, "failed", str(error))
                else:
                    home = home_of(settings.workspace, step)
                    done[step.name] = committed_of(step, home, record)
                    seconds = record["seconds"]
                    history[step.name] = StepHistory(
                        step.name, "ran", seconds, record["fingerprint"]
                    )
                    yield Event(step.name, "done", seconds=seconds)
                    # A cached result stands only while its inputs are what it was made from.
                    for line in [line for line in lines if line.committed is not None]:
                        if line.step.name in done and _outdated(line, done, settings.workspace):
                            del done[line.step.name]
                            set_aside(settings.workspace, line.step)
                            waiting.append(line.step)
            yield None
    except BaseException:
        executor.cancel(list(running))
        raise
    finally:
        executor.close()
        if stopping is not None and settings.stop is not None:
            with contextlib.suppress(UserError):
                storage.remove_tree(settings.stop)
    real = {name: e for name, e in failures.items() if not isinstance(e, StepsFailed)}
    if real:
        raise StepsFailed(real)


@dataclass(frozen=True)
class _Stopping:
    """A run that was asked to stop: training is given time to save what it has."""

    reason: str
    until: float

    @classmethod
    def begin(cls, reason: str, settings: Settings) -> "_Stopping":
        if settings.stop is not None:
            with contextlib.suppress(UserError):  # an older checkpoint serves then
                storage.write_bytes(settings.stop, reason.encode())
        return cls(reason, time.monotonic() + settings.cluster.grace_seconds)

    def over(self, running: Iterable[Step]) -> bool:
        """Whether nobody is left who has anything to save, or the time is over."""
        saving = any(step.gang in ("workers", "trials") for step in running)
        return not saving or time.monotonic() >= self.until


def _pause(retries: int) -> float:
    """Seconds before the next try: doubling, and never the same for two drivers."""
    return float(FIRST_PAUSE_SECONDS * 2**retries * random.uniform(0.5, 1.0))


def _ancestors(step: Step) -> set[str]:
    """Names of everything a step is made from."""
    names = {needed.name for needed in step.inputs.values()}
    return names.union(*(_ancestors(needed) for needed in step.inputs.values()))


def _outdated(line: Planned, done: Mapping[str, Committed[Any]], workspace: str) -> bool:
    """Whether an input was made anew and came out different from the one recorded."""
    recorded = read_record(home_of(workspace, line.step))["inputs"]
    given = {alias: done.get(needed.name) for alias, needed in line.step.inputs.items()}
    return any(
        committed is not None and content_of(committed.value) != recorded[alias]
        for alias, committed in given.items()
    )


def _fits(
    step: Step, running: Mapping[Any, tuple[Step, int]], executor: Executor, cluster: Cluster
) -> bool:
    """Gang admission: a stage starts when what it and its workers need is free."""
    capacity = executor.capacity()
    total = _demand(step, cluster, capacity)
    for other, _ in running.values():
        total += _demand(other, cluster, capacity)
    return not running or total.within(capacity)


def _gang(step: Step, cluster: Cluster) -> Resources:
    """What the step's actors hold at least: training starts with all of them, a sweep with one
    trial, evaluation with one."""
    if step.gang in ("workers", "trials"):
        workers = cluster.min_workers or cluster.workers
        return Resources(workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker)
    if step.gang == "evaluators":
        return Resources(cluster.cpus_per_evaluator, cluster.gpus_per_evaluator)
    return Resources(0)


def _demand(step: Step, cluster: Cluster, capacity: Resources) -> Resources:
    """What a step will take: a sweep fills the room for its trials, were it all there is."""
    gang = _gang(step, cluster)
    if step.gang == "trials":
        every = Resources(gang.cpus * cluster.trials, gang.gpus * cluster.trials)
        room = Resources(min(every.cpus, capacity.cpus), min(every.gpus, capacity.gpus))
        # A cluster that grows may have no room for one yet.
        gang = Resources(max(gang.cpus, room.cpus), max(gang.gpus, room.gpus))
    return Resources(step.cpus) + gang


def _refuse_what_never_fits(steps: Sequence[Step], executor: Executor, cluster: Cluster) -> None:
    """Actors that one machine cannot hold would wait for ever; other clusters may grow."""
    if cluster.address != "local":
        return
    capacity = executor.capacity()
    for gang, count in (("workers", cluster.min_workers or cluster.workers), ("evaluators", 1)):
        asking = ("workers", "trials") if gang == "workers" else (gang,)
        step = next((step for step in steps if step.gang in asking), None)
        if step is None:
            continue
        need, one = _gang(step, cluster), gang.removesuffix("s")
        if need.cpus > capacity.cpus:
            raise UserError(
                f"cluster.{gang}: {count} of cpus_per_{one} "
                f"{getattr(cluster, f'cpus_per_{one}')} need {need.cpus:g} CPUs, this machine has "
                f"{capacity.cpus:g}; lower them in the cluster file, or with cluster.{gang}=1 "
                f"cluster.cpus_per_{one}=1"
            )
        if need.gpus > capacity.gpus:
            raise UserError(
                f"cluster.gpus_per_{one}: {count} {gang} need {need.gpus:g} GPUs, this machine has "
                f"{capacity.gpus:g}; use --cluster laptop, or cluster.gpus_per_{one}=0"
            )


def _submit(
    step: Step,
    executor: Executor,
    settings: Settings,
    done: Mapping[str, Committed[Any]],
    history: Mapping[str, StepHistory],
) -> Any:
    inputs = {alias: done[needed.name] for alias, needed in step.inputs.items()}
    past = tuple(history.values())
    needs = Resources(min(step.cpus, executor.capacity().cpus))
    code = drift.closure(step.run.__module__)  # parsed here once, not by every step's process
    return executor.submit(
        run_attempt, step, settings, inputs, past, code, needs=needs, name=step.name
    )


def run_attempt(
    step: Step,
    settings: Settings,
    inputs: Mapping[str, Committed[Any]],
    history: tuple[StepHistory, ...],
    code: Mapping[str, str],
) -> dict[str, Any]:
    """One attempt at a step of the graph, in the process the executor chose; returns the record."""
    return produce(step.identity(), step.run, step.returns, settings, inputs, code, history)


def produce(
    identity: Identity,
    run: Callable[..., Any],
    returns: type,
    settings: Settings,
    inputs: Mapping[str, Committed[Any]],
    code: Mapping[str, str],
    history: tuple[StepHistory, ...] = (),
) -> dict[str, Any]:
    """Run, publish, commit; returns the record.

    Raises UserError, TrainingFailed and Preempted as they are, and AttemptFailed (with the
    traceback in a file) for all else.
    """
    name = fingerprint_of(identity)[:16]
    home = home_at(settings.workspace, identity.step, name)
    attempt = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    published = storage.join(home, "attempts", attempt)
    local = storage.is_local(published)
    scratch = None if local else Path(tempfile.mkdtemp(dir=temporary.root()))
    out = Path(storage.absolute(published)) if scratch is None else scratch / "out"
    started = time.time()
    try:
        out.mkdir(parents=True, exist_ok=True)
        context = StepContext(
            step=identity.step,
            fingerprint=name,
            out=out,
            work=storage.join(home, "work"),
            workspace=settings.workspace,
            tracking_uri=settings.tracking_uri,
            experiment=settings.experiment,
            cluster=settings.cluster,
            history=history,
            stop=settings.stop,
        )
        value = run(context, identity.config, **inputs)
        assert isinstance(value, returns), f"{identity.step} returned {type(value).__name__}"
        files = storage.describe_dir(str(out)) if local else storage.upload_dir(str(out), published)
        ended = time.time()
        record = {
            "format": FORMAT,
            "step": identity.step,
            "fingerprint": name,
            "identity": canonical(identity),
            "attempt": attempt,
            "inputs": {alias: content_of(given.value) for alias, given in inputs.items()},
            "value": to_json(value),
            "files": [vars(file) for file in files],
            "started": _iso(started),
            "ended": _iso(ended),
            "seconds": round(ended - started, 3),
            "code": dict(code),
            "provenance": {"host": platform.node(), "python": platform.python_version()},
        }
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        storage.put_if_absent(storage.join(home, "COMMIT.json"), data)
        storage.remove_tree(storage.join(home, "work"))  # checkpoints have served
        return read_record(home)  # another attempt may have been first; its result is the result
    except (UserError, TrainingFailed, Preempted):
        raise
    except Exception as error:
        if isinstance(error, OSError):  # a full disk, a missing permission
            known = storage.user_error_from(error, str(error.filename or out))
            if known is not None:
                raise known from error
        log = storage.join(home, "failures", f"{attempt}.txt")
        # MLflow's errors repeat the whole URL. Beside the log only the first line is told.
        storage.write_bytes(log, without_secrets(traceback.format_exc()).encode())
        said = without_secrets(f"{type(error).__name__}: {error}".splitlines()[0])
        notes = getattr(error, "__notes__", [])  # a training worker's rank and node
        raise AttemptFailed(" ".join([said, *notes]), log, platform.node()) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
