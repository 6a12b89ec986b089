"""What must hold after every fault, and the watch that is kept while they happen."""

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.place import Place, wait_for

STEPS = {"shard", "reference", "teacher", "distill", "isolate", "evaluate", "register", "report"}
TRAINING = ("teacher", "distill", "isolate")
# What holds measured times, or paths: it may differ, everything else may not.
CLOCKED_VALUES = {"train_seconds", "final_loss", "bytes"}  # bytes: of the report
CLOCKED_FILES = {"curve.jsonl", "report.html"}


@dataclass(frozen=True)
class Expected:
    """What the undisturbed run made: values and files of every step."""

    values: dict[str, Any]
    files: dict[str, dict[str, str]]

    @classmethod
    def of(cls, place: Place) -> "Expected":
        records = place.records()
        assert set(records) == STEPS, sorted(records)
        return cls(
            {step: _timeless(record["value"]) for step, record in records.items()},
            {step: _files(record) for step, record in records.items()},
        )


def _timeless(value: dict[str, Any]) -> dict[str, Any]:
    return {key: given for key, given in value.items() if key not in CLOCKED_VALUES}


def _files(record: dict[str, Any]) -> dict[str, str]:
    listed = {file["path"]: file["sha256"] for file in record["files"]}
    return {path: digest for path, digest in listed.items() if path not in CLOCKED_FILES}


@dataclass
class Watch:
    """What was there after each fault, so that none of it is lost later."""

    place: Place
    commits: dict[str, bytes] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # training step -> of its checkpoint
    curves: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def look(self, replaced: frozenset[str] = frozenset()) -> None:
        """Between two runs. `replaced`: steps whose results or checkpoints were damaged."""
        now = self.place.commits()
        for path, data in self.commits.items():
            if path.split("/")[1] in replaced:
                continue
            if path not in now:
                self.wrong.append(f"lost commit: {path}")
            elif now[path] != data:
                self.wrong.append(f"changed commit: {path}")
        self.commits = now
        for step in replaced:
            self.images.pop(step, None)
            self.curves.pop(step, None)
        done = {path.split("/")[1] for path in now}
        for step, images in self.place.checkpoints().items():
            before = self.images.get(step, 0)
            if step not in done and images < before:
                self.wrong.append(f"{step} began again: {images} images after {before}")
            self.images[step] = max(images, before)
        for step, lines in self.place.curves().items():
            if len(lines) >= len(self.curves.get(step, [])):
                self.curves[step] = lines

    def forget(self, step: str) -> None:
        """Its newest checkpoint was damaged: an older one may be gone on from."""
        self.images.pop(step, None)
        self.curves.pop(step, None)

    def close(self, expected: Expected) -> list[str]:
        """After the run that ended well: everything that is wrong, nothing if all is as it was."""
        self.look()
        place, wrong = self.place, self.wrong
        records = place.records()
        if missing := STEPS - set(records):
            return [*wrong, f"not committed: {', '.join(sorted(missing))}"]
        for step, record in records.items():
            if _timeless(record["value"]) != expected.values[step]:
                wrong.append(f"{step}: another {_difference(record, expected, step)}")
            if _files(record) != expected.files[step]:
                wrong.append(f"{step}: other files than undisturbed")
            wrong += _damaged(place, record)
        for step, lines in self.curves.items():
            record = records[step]
            curve = place.read(f"{_folder(record)}/curve.jsonl").decode().splitlines()
            if curve[: len(lines)] != lines:
                wrong.append(f"{step} began again: its curve is not the one before the fault")
        wrong += _registry(place)
        return wrong


def _difference(record: dict[str, Any], expected: Expected, step: str) -> str:
    value = expected.values[step]
    keys = [k for k, v in record["value"].items() if k in value and v != value[k]]
    return ", ".join(f"{k} ({str(record['value'][k])[:120]})" for k in keys)


def _folder(record: dict[str, Any]) -> str:
    return f"steps/{record['step']}/{record['fingerprint']}/attempts/{record['attempt']}"


def _damaged(place: Place, record: dict[str, Any]) -> list[str]:
    """Files of a committed step that are not what its record says."""
    wrong = []
    for file in record["files"]:
        if any(part.startswith(".tmp-") for part in file["path"].split("/")):
            wrong.append(f"{record['step']}: half-written {file['path']} in a record")
        try:
            data = place.read(f"{_folder(record)}/{file['path']}")
        except FileNotFoundError:
            wrong.append(f"{record['step']}: {file['path']} is missing")
            continue
        if hashlib.sha256(data).hexdigest() != file["sha256"]:
            wrong.append(f"{record['step']}: {file['path']} is not what its record says")
    return wrong


def _registry(place: Place) -> list[str]:
    """One version, one READY model with its files, and the alias on it."""
    wrong = []
    versions = place.rows(
        "SELECT version, storage_location FROM model_versions"
        " WHERE current_stage != 'Deleted_Internal'"
    )
    if len(versions) != 1:
        wrong.append(f"the registry has {len(versions)} versions")
    aliases = place.rows("SELECT alias, version FROM registered_model_aliases")
    if aliases != [("champion", version) for version, _ in versions[:1]]:
        wrong.append(f"the registry's aliases are {aliases}")
    storage = place.storage()
    for _, location in versions:
        if location.startswith("mlflow-artifacts:"):
            continue  # the server's own
        if not storage.exists(storage.join(location, "MLmodel")):
            wrong.append(f"the registered model has no files: {location}")
    return wrong


def all_cached(place: Place) -> list[str]:
    """The plan of a finished workspace."""
    code = place.run(verb="plan")
    last = place.log.read_text().splitlines()[-1]
    if code != 0 or not last.endswith("cached, 0 to run"):
        return [f"the plan says: {last} (exit code {code})"]
    return []


def orphans(place: Place, seconds: float = 60.0) -> list[str]:
    """Processes of this place that outlive its command."""
    if wait_for(lambda: not place.processes(), seconds=seconds, poll=0.2):
        return []
    names = []
    for process in place.processes():
        with contextlib.suppress(Exception):
            names.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    place.kill_all()
    return [f"left behind: {'; '.join(names)}"] if names else []


def tail(log: Path, lines: int = 5) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-lines:])


def as_json(found: Any) -> str:
    return json.dumps(found, indent=1, sort_keys=True)
