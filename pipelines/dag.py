"""Durable steps: what is committed is never run again, what is not is run as if for the first time.

A step is a function from a typed config and typed inputs to files and a typed value. Its
fingerprint hashes what a person wrote (step, version, config, inputs' fingerprints), never paths,
machines or code. Layout, in any fsspec store:

    {workspace}/steps/{step}/{fingerprint}/work/            survives attempts: training checkpoints
                                           attempts/{id}/   files of one attempt
                                           COMMIT.json      put last, if absent: the only truth

Readers trust COMMIT.json alone. Two attempts may race; one wins, and both wrote the same content.
"""

import json
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from infra import storage
from infra.errors import UserError, WorkerLost
from infra.resources import Resources
from pipelines import drift
from pipelines.artifacts import Committed, content_of, from_json, to_json
from pipelines.fingerprint import canonical, diff, fingerprint_of
from pipelines.recipe import Cluster

FORMAT = 1
LONGEST_CHANGE = 80  # characters of a plan's reason that one changed key may take
# What readers of a record rely on.
RECORD_KEYS = frozenset(
    {"fingerprint", "identity", "attempt", "value", "files", "ended", "seconds", "code"}
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of the graph."""

    name: str
    run: Callable[..., Any]  # run(ctx, config, **inputs) -> value of type `returns`
    config: Any  # frozen dataclass: the identity
    returns: type
    inputs: Mapping[str, "Step"] = field(default_factory=dict)  # argument name -> step
    version: str = "1"  # raise it when a code change must not reuse old results
    cpus: float = 1  # held by the step's own process
    on_gpu: bool = False  # takes a GPU for itself where the cluster's workers have them
    trains: bool = False  # launches cluster.workers training workers beside itself
    # Prefix of a config path -> prefix of the recipe key a person wrote, for reasons.
    written: tuple[str, str] = ("", "")
    # For effects outside the workspace: what of a committed value is no longer there, or None.
    lost: Callable[[Any], str | None] | None = None

    def as_written(self, path: str) -> str:
        """`training.lr: ...` of a config, as the recipe's `teacher.lr: ...`."""
        own, recipe = self.written
        return recipe + path[len(own) :] if path.startswith(own) else path

    def identity(self) -> "Identity":
        """What the fingerprint hashes."""
        inputs = tuple(Input(alias, fingerprint(step)) for alias, step in self.inputs.items())
        return Identity(self.name, self.version, self.config, inputs)


@dataclass(frozen=True)
class Input:
    """One input of a step, by the name of its argument."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class Identity:
    """What a person wrote, and what the inputs' persons wrote."""

    step: str
    version: str
    config: Any
    inputs: tuple[Input, ...]


@dataclass(frozen=True)
class StepHistory:
    """How an input of a step came to be, for reports."""

    step: str
    state: str  # "cached" | "ran"
    seconds: float
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step may know beside its config: where to write, and where it runs."""

    step: str
    fingerprint: str
    out: Path  # local folder for the files of this attempt
    work: str  # URL that stays the same over attempts
    workspace: str
    tracking_uri: str
    experiment: str
    cluster: Cluster
    history: tuple[StepHistory, ...] = ()

    def fetch(self, committed: Committed[Any], name: str) -> Path:
        """Local path of a file of an input, checked against the input's record."""
        home = storage.join(self.workspace, "steps", committed.step, committed.fingerprint)
        record = next(r for r in read_record(home)["files"] if r["path"] == name)
        url = storage.join(committed.url, name)
        storage.verify(committed.url, [storage.FileRecord(**record)])
        if storage.is_local(url):
            return Path(storage.absolute(url))
        local = self.out.parent / "inputs" / committed.step / name  # all files of one side by side
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(storage.read_bytes(url))
        return local


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
class Settings:
    """Where a graph runs; no part of any fingerprint."""

    workspace: str
    tracking_uri: str
    experiment: str
    cluster: Cluster


@dataclass(frozen=True)
class Planned:
    """One line of a plan."""

    step: Step
    fingerprint: str
    state: str  # "cached" | "to run"
    reason: str
    committed: Committed[Any] | None
    drifted: tuple[str, ...] = ()  # files whose code changed since the commit


@dataclass(frozen=True)
class Event:
    """What happened to a step: "cached", "started", "retry", "done", "failed", "skipped"."""

    step: str
    kind: str
    detail: str = ""
    seconds: float = 0.0


class StepsFailed(Exception):
    """Some steps failed; everything that did not depend on them has finished."""

    def __init__(self, failures: Mapping[str, BaseException], logs: Mapping[str, str]) -> None:
        super().__init__(", ".join(failures))
        self.failures, self.logs = dict(failures), dict(logs)


class AttemptFailed(Exception):
    """A step raised: its exception as text, with the file that holds the traceback."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message, log)
        self.message, self.log = message, log

    def __str__(self) -> str:
        return self.message


# --- identity and records ------------------------------------------------------------------------


def fingerprint(step: Step) -> str:
    """16 hex digits that name the result of a step."""
    return fingerprint_of(step.identity())[:16]


def topological(targets: Sequence[Step]) -> list[Step]:
    """Every step the targets need, each after its inputs, in the order first met."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        for needed in step.inputs.values():
            visit(needed)
        known = ordered.setdefault(step.name, step)
        assert known is step or known == step, f"two different steps named {step.name}"

    for target in targets:
        visit(target)
    return list(ordered.values())


def home_of(workspace: str, step: Step) -> str:
    return storage.join(workspace, "steps", step.name, fingerprint(step))


def read_record(home: str) -> dict[str, Any]:
    """COMMIT.json, parsed. FileNotFoundError when absent, ValueError when it is no record."""
    record = json.loads(storage.read_bytes(storage.join(home, "COMMIT.json")))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"not a record of format {FORMAT}")
    if missing := RECORD_KEYS - record.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    return record


def committed_of(step: Step, home: str, record: Mapping[str, Any]) -> Committed[Any]:
    return Committed(
        step=step.name,
        fingerprint=record["fingerprint"],
        url=storage.join(home, "attempts", record["attempt"]),
        seconds=record["seconds"],
        value=from_json(step.returns, record["value"]),
    )


def damage(home: str, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a committed step's files (presence and size), or None."""
    folder = storage.join(home, "attempts", record["attempt"])
    present = dict(storage.list_files(folder))
    for file in record["files"]:
        if present.get(file["path"]) != file["bytes"]:
            return f"{file['path']} is missing or has another size"
    return None


# --- planning ------------------------------------------------------------------------------------


def plan(targets: Sequence[Step], workspace: str) -> list[Planned]:
    """What a run would reuse and what it would do, with the reason; touches nothing."""
    planned: dict[str, Planned] = {}
    for step in topological(targets):
        planned[step.name] = _plan_one(step, workspace, planned)
    return list(planned.values())


def _plan_one(step: Step, workspace: str, planned: Mapping[str, Planned]) -> Planned:
    home = home_of(workspace, step)
    name = fingerprint(step)
    try:
        record = read_record(home)
        committed = committed_of(step, home, record)
        wrong = damage(home, record)
        drifted = drift.changed(record["code"])
    except FileNotFoundError:
        return Planned(step, name, "to run", _reason(step, workspace, home), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of another shape
        return Planned(step, name, "to run", f"its record is unreadable: {error}", None)
    if wrong is None and step.lost is not None:
        wrong = step.lost(committed.value)
    if wrong is not None:
        return Planned(step, name, "to run", f"damaged: {wrong}", None)
    for alias, needed in step.inputs.items():
        source = planned[needed.name].committed
        if source is not None and content_of(source.value) != record["inputs"][alias]:
            return Planned(step, name, "to run", f"input {alias} was made anew and differs", None)
    return Planned(step, name, "cached", f"committed {record['ended'][:19]}", committed, drifted)


def _reason(step: Step, workspace: str, home: str) -> str:
    """Why there is no commit, in one line: interrupted, never run, or what changed."""
    if any(name.startswith("images-") for name in storage.list_dir(f"{home}/work/train")):
        return "interrupted: goes on from its last checkpoint"
    if any(name.startswith("COMMIT.bad-") for name in storage.list_dir(home)):
        return "an earlier result was set aside"
    if storage.list_dir(storage.join(home, "attempts")):
        return "interrupted: runs again"
    latest = latest_record(step.name, workspace)
    if latest is None:
        return "never run"
    new: Any = canonical(step.identity())
    old = latest["identity"]
    changes = [_short(step.as_written(line)) for line in diff(old["config"], new["config"])]
    if old["version"] != new["version"]:
        changes.insert(0, f"version: {old['version']} -> {new['version']}")
    before = {i["name"]: i["fingerprint"] for i in old["inputs"]}
    after = {i["name"]: i["fingerprint"] for i in new["inputs"]}
    names = [*after, *(name for name in before if name not in after)]
    changes += [f"input {name} changed" for name in names if before.get(name) != after.get(name)]
    more = f" (+{len(changes) - 3} more)" if len(changes) > 3 else ""
    return "; ".join(changes[:3]) + more


def _short(change: str) -> str:
    """`lr: 0.1 -> 0.2` as it is, but a text of many lines or a digest only as `key changed`."""
    if len(change) <= LONGEST_CHANGE and change.isprintable():
        return change
    return f"{change.split(': ', 1)[0]} changed"


def latest_record(name: str, workspace: str) -> dict[str, Any] | None:
    """The newest result of a step, whatever its config. None when there is none."""
    folder = storage.join(workspace, "steps", name)
    records = []
    for other in storage.list_dir(folder):
        if re.fullmatch(r"[0-9a-f]{16}", other) is None:
            continue  # not ours: file managers leave things behind
        try:
            records.append(read_record(storage.join(folder, other)))
        except (FileNotFoundError, ValueError):
            continue
    return max(records, key=lambda record: str(record["ended"]), default=None)


# --- execution -----------------------------------------------------------------------------------


def execute(
    targets: Sequence[Step], settings: Settings, make_executor: Callable[[], Executor]
) -> Generator[Event | None, None, None]:
    """Run what is not committed, side by side where inputs and CPUs allow.

    Yields events as they happen, and None about twice a second in between. The executor is made
    only when something must run. Closing the iterator (or an exception thrown into it) cancels
    what runs. Raises StepsFailed at the end when a step failed; independent branches finish first.
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
    failures: dict[str, BaseException] = {}
    logs: dict[str, str] = {}
    try:
        _refuse_what_never_fits(waiting, executor, settings.cluster)
        while waiting or running:
            for step in list(waiting):
                if any(needed.name in failures for needed in step.inputs.values()):
                    waiting.remove(step)
                    failures.setdefault(step.name, StepsFailed({}, {}))
                    yield Event(step.name, "skipped", "an input failed")
                elif all(name in done for name in _ancestors(step)) and _fits(
                    step, running, executor, settings.cluster
                ):
                    waiting.remove(step)
                    handle = _submit(step, executor, settings, done, history)
                    running[handle] = (step, 0)
                    yield Event(step.name, "started")
            finished = executor.wait(list(running), timeout=0.5) if running else []
            for handle in finished:
                step, retries = running.pop(handle)
                try:
                    record = executor.result(handle)
                except WorkerLost as error:
                    if retries < settings.cluster.retries:
                        again = _submit(step, executor, settings, done, history)
                        running[again] = (step, retries + 1)
                        yield Event(step.name, "retry", str(error))
                        continue
                    failures[step.name] = error
                    yield Event(step.name, "failed", str(error))
                except Exception as error:  # its own affair: other branches go on
                    failures[step.name] = error
                    if isinstance(error, AttemptFailed):
                        logs[step.name] = error.log
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
                    for line in lines:
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
    real = {name: e for name, e in failures.items() if not isinstance(e, StepsFailed)}
    if real:
        raise StepsFailed(real, logs)


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
    total = _demand(step, cluster)
    for other, _ in running.values():
        total += _demand(other, cluster)
    return not running or total.within(executor.capacity())


def _own(step: Step, cluster: Cluster) -> Resources:
    """What the step's own process holds."""
    return Resources(step.cpus, 1.0 if step.on_gpu and cluster.gpus_per_worker > 0 else 0.0)


def _workers(cluster: Cluster) -> Resources:
    """What the workers of one training stage hold."""
    workers = cluster.workers
    return Resources(workers * cluster.cpus_per_worker, workers * cluster.gpus_per_worker)


def _demand(step: Step, cluster: Cluster) -> Resources:
    own = _own(step, cluster)
    return own + _workers(cluster) if step.trains else own


def _refuse_what_never_fits(steps: Sequence[Step], executor: Executor, cluster: Cluster) -> None:
    """Workers that one machine cannot hold would wait for ever; other clusters may grow."""
    if cluster.address != "local" or not any(step.trains for step in steps):
        return
    need, capacity = _workers(cluster), executor.capacity()
    if need.cpus > capacity.cpus:
        raise UserError(
            f"cluster.workers: {cluster.workers} of cpus_per_worker {cluster.cpus_per_worker} need "
            f"{need.cpus:g} CPUs, this machine has {capacity.cpus:g}; lower them in the cluster "
            f"file, or with cluster.workers=1 cluster.cpus_per_worker=1"
        )
    if need.gpus > capacity.gpus:
        raise UserError(
            f"cluster.gpus_per_worker: {cluster.workers} workers need {need.gpus:g} GPUs, this "
            f"machine has {capacity.gpus:g}; use --cluster laptop, or cluster.gpus_per_worker=0"
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
    needs = _own(step, settings.cluster)
    needs = replace(needs, cpus=min(needs.cpus, executor.capacity().cpus))
    return executor.submit(run_attempt, step, settings, inputs, past, needs=needs, name=step.name)


def set_aside(workspace: str, step: Step) -> None:
    """Forget a step's result and checkpoints, so that it runs from the start (`--force`)."""
    home = home_of(workspace, step)
    if storage.exists(storage.join(home, "COMMIT.json")):
        _quarantine(home)
    storage.remove_tree(storage.join(home, "work"))


def _quarantine(home: str) -> None:
    """Set a record aside, so that the step can be committed anew."""
    commit = storage.join(home, "COMMIT.json")
    aside = storage.join(home, f"COMMIT.bad-{time.time_ns()}.json")
    storage.write_bytes(aside, storage.read_bytes(commit))
    storage.remove_tree(commit)


def run_attempt(
    step: Step,
    settings: Settings,
    inputs: Mapping[str, Committed[Any]],
    history: tuple[StepHistory, ...],
) -> dict[str, Any]:
    """One attempt, in the process the executor chose: run, publish, commit; returns the record.

    Raises UserError as it is, and AttemptFailed (with the traceback in a file) for all else.
    """
    name = fingerprint(step)
    home = home_of(settings.workspace, step)
    attempt = f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"
    published = storage.join(home, "attempts", attempt)
    local = storage.is_local(published)
    scratch = None if local else Path(tempfile.mkdtemp(prefix="cmforge-"))
    out = Path(storage.absolute(published)) if scratch is None else scratch / "out"
    started = time.time()
    try:
        out.mkdir(parents=True, exist_ok=True)
        context = StepContext(
            step=step.name,
            fingerprint=name,
            out=out,
            work=storage.join(home, "work"),
            workspace=settings.workspace,
            tracking_uri=settings.tracking_uri,
            experiment=settings.experiment,
            cluster=settings.cluster,
            history=history,
        )
        value = step.run(context, step.config, **inputs)
        assert isinstance(value, step.returns), f"{step.name} returned {type(value).__name__}"
        files = storage.describe_dir(str(out)) if local else storage.upload_dir(str(out), published)
        ended = time.time()
        record = {
            "format": FORMAT,
            "step": step.name,
            "fingerprint": name,
            "identity": canonical(step.identity()),
            "attempt": attempt,
            "inputs": {alias: content_of(given.value) for alias, given in inputs.items()},
            "value": to_json(value),
            "files": [vars(file) for file in files],
            "started": _iso(started),
            "ended": _iso(ended),
            "seconds": round(ended - started, 3),
            "code": drift.closure(step.run.__module__),
            "provenance": {"host": platform.node(), "python": platform.python_version()},
        }
        data = json.dumps(record, indent=1, sort_keys=True).encode()
        storage.put_if_absent(storage.join(home, "COMMIT.json"), data)
        storage.remove_tree(storage.join(home, "work"))  # checkpoints have served
        return read_record(home)  # another attempt may have been first; its result is the result
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError):  # a full disk, a missing permission
            known = storage.user_error_from(error, str(error.filename or out))
            if known is not None:
                raise known from error
        log = storage.join(home, "failures", f"{attempt}.txt")
        storage.write_bytes(log, traceback.format_exc().encode())
        message = f"{type(error).__name__}: {error}".splitlines()[0]  # the rest is in the log
        raise AttemptFailed(message, log) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def lock_workspace(workspace: str) -> Any:
    """Keep a second driver out of a local workspace while the returned file is open.

    Only a courtesy (commits decide, not locks): the kernel drops it when this process dies.
    Raises UserError naming the holder.
    """
    if not storage.is_local(workspace):
        return None
    import fcntl

    path = Path(storage.absolute(workspace)) / ".lock"
    with storage.mendable(workspace):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (held open for the life of the run)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"workspace {workspace} is in use by {holder}; wait for it, or choose another "
                f"--workspace"
            ) from None
        except OSError:  # a file system without locks
            return file
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()
    return file
