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
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from infra import storage
from pipelines import checkpoints, drift
from pipelines.artifacts import Committed, content_of, from_json
from pipelines.fingerprint import canonical, diff, fingerprint_of
from pipelines.recipe import Cluster

FORMAT = 1
LONGEST_CHANGE = 80  # characters of a plan's reason that one changed key may take
# What readers of a record rely on.
RECORD_KEYS = frozenset(
    {"fingerprint", "identity", "attempt", "inputs", "value", "files", "ended", "seconds", "code"}
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
    # Launches these beside itself: all of the training workers, the trials of a sweep, or at least
    # one evaluator.
    gang: Literal["workers", "trials", "evaluators"] | None = None
    # Prefix of a config path -> prefix of the recipe key a person wrote, for reasons.
    written: tuple[str, str] = ("", "")
    # For effects outside the workspace: what of a committed value is no longer there, or None.
    lost: Callable[[Any], str | None] | None = None

    def as_written(self, path: str) -> str:
        """`training.lr: ...` of a config, as the recipe's `teacher.lr: ...`."""
        own, recipe = self.written
        return recipe + path[len(own) :] if path.startswith(own) else path

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that name the result."""
        return fingerprint_of(self.identity())[:16]

    def identity(self) -> "Identity":
        """What the fingerprint hashes."""
        inputs = tuple(Input(alias, step.fingerprint) for alias, step in self.inputs.items())
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
    stop: str | None = None  # asks training to save what it has and leave, once it exists

    def fetch(self, committed: Committed[Any], name: str) -> Path:
        """Local path of a file of an input, checked against the input's record."""
        home = home_at(self.workspace, committed.step, committed.fingerprint)
        record = next(r for r in read_record(home)["files"] if r["path"] == name)
        url = storage.join(committed.url, name)
        storage.verify(committed.url, [storage.FileRecord(**record)])
        if storage.is_local(url):
            return Path(storage.absolute(url))
        local = self.out.parent / "inputs" / committed.step / name  # all files of one side by side
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(storage.read_bytes(url))
        return local


@dataclass(frozen=True)
class Settings:
    """Where a graph runs; no part of any fingerprint."""

    workspace: str
    tracking_uri: str
    experiment: str
    cluster: Cluster
    stop: str | None = None  # as in StepContext


@dataclass(frozen=True)
class Planned:
    """One line of a plan."""

    step: Step
    fingerprint: str
    state: str  # "cached" | "to run"
    reason: str
    committed: Committed[Any] | None
    drifted: tuple[str, ...] = ()  # files whose code changed since the commit


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
    return home_at(workspace, step.name, step.fingerprint)


def home_at(workspace: str, step: str, fingerprint: str) -> str:
    """Where a result of that name and fingerprint lies, whoever made it."""
    return storage.join(workspace, "steps", step, fingerprint)


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


def plan(targets: Sequence[Step], workspace: str) -> list[Planned]:
    """What a run would reuse and what it would do, with the reason; touches nothing."""
    planned: dict[str, Planned] = {}
    for step in topological(targets):
        planned[step.name] = _plan_one(step, workspace, planned)
    return list(planned.values())


def _plan_one(step: Step, workspace: str, planned: Mapping[str, Planned]) -> Planned:
    home = home_of(workspace, step)
    name = step.fingerprint
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
    if checkpoints.last_in(storage.join(home, "work")) is not None:
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
