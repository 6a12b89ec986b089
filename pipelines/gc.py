"""What a workspace no longer needs: found, shown, and removed only when asked to.

Readers trust COMMIT.json alone, so what no record names is left over from something that was killed
or came second. It may also be in the making: so nothing goes that changed lately, and nothing at
all while a driver holds the workspace.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infra import ages, leftovers, storage
from infra.errors import UserError
from pipelines import dag, lease

# By kind, in the order of the list: what they are.
KINDS = {
    "attempts": "attempts that no record names",
    "work": "checkpoints of committed steps",
    "trials": "checkpoints of trials that are over",
    "set-aside": "results that were set aside",
    "unfinished": "files that were never finished",
    "uploads": "uploads that were never finished",
    "stops": "requests to stop",
}
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BAD = "COMMIT.bad-"


@dataclass(frozen=True)
class Candidate:
    """Something to remove; `path` is relative to the workspace."""

    kind: str
    path: str
    bytes: int
    temp: leftovers.Leftover | None = None  # of something unfinished


def seconds_of(text: str) -> float:
    """`30m`, `24h`, `7d`, or plain seconds. UserError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if match is None:
        raise UserError(f"--older-than: {text!r} is no time; give one like 30m, 24h, 7d or 0")
    return float(match[1]) * _UNITS[match[2]]


def show(workspace: str, older_than: str, *, delete: bool) -> int:
    """Print what is left over, and remove it with `delete`. UserError while a driver is at work."""
    before = time.time() - seconds_of(older_than)
    if not storage.exists(workspace):
        raise UserError(f"workspace {workspace} does not exist; name another with --workspace")
    with lease.hold(workspace) as held:
        found, notes = find(workspace, before)
        gone: list[Candidate] = []
        for one in found if delete else []:
            if held.lost is not None:
                raise UserError(f"workspace {workspace} was taken over by {held.lost}; run again")
            if (reason := _kept_after_all(workspace, one, before)) is not None:
                notes.append(f"{one.path}: {reason}")
                continue
            _remove(workspace, one)
            gone.append(one)
    _print(gone if delete else found, notes)
    total = _size(sum(one.bytes for one in (gone if delete else found)))
    if delete:
        print(f"removed from {workspace}: {total}")
    elif found:
        print(f"to remove from {workspace}: {total}; nothing was, add --delete")
    else:
        print(f"nothing older than {older_than} to remove from {workspace}")
    return 0


def find(workspace: str, before: float) -> tuple[list[Candidate], list[str]]:
    """(what is left over and was last written at `before` or earlier, what could not be judged)."""
    found: list[Candidate] = []
    notes: list[str] = []
    try:
        over = _trials_over(workspace)
    except UserError as error:
        over = set()
        notes.append(f"trials are all kept: {error}")
    for step, fingerprint in _homes(workspace):
        path = f"steps/{step}/{fingerprint}"
        home = dag.home_at(workspace, step, fingerprint)
        try:
            record = _record(home)
        except ValueError as error:
            notes.append(f"{path}: left alone, its record is unreadable ({error})")
            continue
        found += _attempts(home, path, record, before)
        if record is not None:
            found += _old(home, path, "work", "work", before)
        elif step == "trial" and fingerprint in over:
            found += _of_trial(home, path, before)
    found += [
        one
        for name in storage.list_dir(storage.join(workspace, "stops"))
        for one in _old(workspace, "", "stops", f"stops/{name}", before)
    ]
    root, within = storage.join(workspace, ""), tuple(f"{one.path}/" for one in found)
    for temp in leftovers.stale_temps(workspace, time.time() - before):
        path = temp.url.removeprefix(root)
        if temp.upload or not path.startswith(within):
            kind = "uploads" if temp.upload else "unfinished"
            found.append(Candidate(kind, path, temp.bytes or 0, temp))
    order = list(KINDS)
    return sorted(found, key=lambda one: (order.index(one.kind), one.path)), notes


def _homes(workspace: str) -> Iterator[tuple[str, str]]:
    """(step, fingerprint) of every result, begun or done."""
    steps = storage.join(workspace, "steps")
    for step in storage.list_dir(steps):
        for name in storage.list_dir(storage.join(steps, step)):
            if re.fullmatch(r"[0-9a-f]{16}", name):
                yield step, name


def _record(home: str) -> dict[str, Any] | None:
    """None where there is none; ValueError where it cannot be read."""
    try:
        record = dag.read_record(home)
        names = [record["attempt"], *(file["path"] for file in record["files"])]
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise ValueError(repr(error)) from error
    if not all(isinstance(name, str) for name in names):
        raise ValueError("its attempt or files have no names")
    return record


def _files(record: Mapping[str, Any]) -> list[str]:
    """Paths of a result's files, relative to its home."""
    return [f"attempts/{record['attempt']}/{file['path']}" for file in record["files"]]


def _old(home: str, path: str, kind: str, name: str, before: float) -> list[Candidate]:
    """`name` of a home as something left over, if it is there and old."""
    extent = ages.extent(storage.join(home, name))
    if extent is None or extent.newest > before:
        return []
    return [Candidate(kind, f"{path}/{name}".lstrip("/"), extent.bytes)]


def _attempts(
    home: str, path: str, record: Mapping[str, Any] | None, before: float
) -> list[Candidate]:
    """Those that no record names, and the records that were set aside, with theirs."""
    found: list[Candidate] = []
    kept = set() if record is None else {record["attempt"]}
    kind = {}
    for name in storage.list_dir(home):
        if not name.startswith(_BAD):
            continue
        named = _named(storage.join(home, name))
        old = _old(home, path, "set-aside", name, before)
        found += old
        if old and named is not None:
            kind[named] = "set-aside"
        elif named is not None:
            kept.add(named)
        elif not old:
            return found  # it may name any of them
    if record is None:
        # Training writes to work/ for days before there is anything in its attempt.
        extent = ages.extent(home)
        if extent is None or extent.newest > before:
            return found
    for name in storage.list_dir(storage.join(home, "attempts")):
        if name not in kept:
            found += _old(home, path, kind.get(name, "attempts"), f"attempts/{name}", before)
    return found


def _named(url: str) -> str | None:
    """The attempt that a record set aside names; None where it is unreadable."""
    try:
        return str(json.loads(storage.read_bytes(url))["attempt"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _of_trial(home: str, path: str, before: float) -> list[Candidate]:
    """Everything but its readings: a sweep that is extended reads them again."""
    from pipelines.watch import LOG

    work = storage.join(home, "work")
    extent = ages.extent(work)
    if extent is None or extent.newest > before:
        return []
    return [
        one
        for name in storage.list_dir(work)
        if name != LOG
        for one in _old(home, path, "trials", f"work/{name}", before)
    ]


def _trials_over(workspace: str) -> set[str]:
    """Fingerprints of the trials of committed sweeps that no sweep would go on with."""
    from pipelines.ledger import Ledger
    from pipelines.steps.tune import SUMMARY
    from pipelines.sweep_summary import RUNNING

    over: set[str] = set()
    for step, fingerprint in _homes(workspace):
        if step.startswith("tune-"):
            over |= _trials_of(dag.home_at(workspace, step, fingerprint), SUMMARY)
    if not over:
        return over
    sweeps = storage.join(workspace, "sweeps")
    for key in storage.list_dir(sweeps):
        trials = Ledger(storage.join(sweeps, key)).trials()
        over -= {trial.fingerprint for trial in trials if trial.state == RUNNING}
    return over


def _trials_of(home: str, summary: str) -> set[str]:
    """Those that a committed sweep tried; none where it is not committed, or not to be read."""
    try:
        attempt = dag.read_record(home)["attempt"]
        found = json.loads(storage.read_bytes(storage.join(home, "attempts", attempt, summary)))
        return {str(trial["fingerprint"]) for trial in found["trials"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


# --- removing -------------------------------------------------------------------------------------


def _kept_after_all(workspace: str, one: Candidate, before: float) -> str | None:
    """Why something found a moment ago stays; None where it may go."""
    if one.temp is not None and one.temp.upload:
        return None  # of no folder
    newest = ages.newest(storage.join(workspace, one.path))
    if newest is not None and newest > before:
        return "kept, it was written meanwhile"
    match = re.fullmatch(r"(steps/[^/]+/[0-9a-f]{16})/(.+)", one.path)
    if match is None:
        return None
    try:
        record = _record(storage.join(workspace, match[1]))
    except ValueError as error:
        return f"kept, the record beside it is unreadable ({error})"
    assert match[2] != "COMMIT.json", one
    if record is None:
        return None
    # A result without any file is named by its folder alone.
    named = [f"attempts/{record['attempt']}", *_files(record)]
    if any(f"{name}/".startswith(f"{match[2]}/") for name in named):
        return "kept, it was committed meanwhile"
    return None


def _remove(workspace: str, one: Candidate) -> None:
    if one.temp is not None:
        leftovers.remove_temp(one.temp)
    else:
        storage.remove_tree(storage.join(workspace, one.path))


def _print(found: list[Candidate], notes: list[str]) -> None:
    for kind, text in KINDS.items():
        own = [one for one in found if one.kind == kind]
        if own:
            print(f"{text}: {len(own)}, {_size(sum(one.bytes for one in own))}")
        for one in own:
            print(f"  {one.path}  {_size(one.bytes)}")
    for note in notes:
        print(note)


def _size(count: int) -> str:
    size, units = float(count), iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    for larger in units:
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
