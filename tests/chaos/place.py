"""A workspace to harm: how the command is run there, and what lies in it."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]  # of the product: the snapshot, when `run.py` made one
RECIPE = Path(__file__).with_name("recipe.yaml")
MARK = "CMFORGE_CHAOS"  # in the environment of every process that a place starts
DROPPED = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_PROFILE"}
SLOW = 600.0  # seconds; a command that takes longer hangs


@dataclass
class Place:
    """A workspace of one's own and everything that belongs to it.

    `workspace` may be any URL; `folder` is local and holds the registry and the caches.
    """

    folder: Path
    zygote: "Zygote | None"
    workspace: str = ""
    tracking_uri: str = ""
    settings: tuple[str, ...] = ("cluster.checkpoint_every_seconds=0",)
    environment: dict[str, str] = field(default_factory=dict)
    database: Path | None = None  # of the registry, where it is not in the workspace
    reading: dict[str, str] = field(default_factory=dict)  # how the harness itself gets there

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.workspace = self.workspace or str(self.folder / "w")
        self.mark = f"{self.folder.name}-{os.getpid()}"
        self.environment = {
            "CMFORGE_CACHE": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": "/tmp",  # sockets have short names only
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            MARK: self.mark,
            **self.environment,
        }
        (self.folder / "tmp").mkdir(exist_ok=True)
        self.ran = 0
        self.met: dict[int, psutil.Process] = {}

    def argv(self, verb: str = "run", *more: str) -> list[str]:
        where = ["--workspace", self.workspace, "--cluster", "laptop", *self.settings]
        if self.tracking_uri:
            where.append(f"cluster.tracking_uri={self.tracking_uri}")
        return [verb, str(RECIPE), *where, *more]

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    # --- with all steps in one forked process -----------------------------------------------------

    def begin(self, fault: Mapping[str, Any] | None = None, verb: str = "run") -> int:
        """Start the command, forked; its pid. `end` waits for it."""
        assert self.zygote is not None
        self.ran += 1
        self.ticks_file = self.folder / f"ticks-{self.ran}.txt"
        request = {
            "argv": self.argv(verb),
            "environment": self.environment,
            "log": str(self.log),
            "folder": str(self.folder),
            "ticks": str(self.ticks_file),
            "fault": fault,
        }
        return self.zygote.start(request)

    def end(self, timeout: float = SLOW) -> int:
        """Exit code, negative for a signal."""
        assert self.zygote is not None
        return self.zygote.end(timeout)

    def run(self, fault: Mapping[str, Any] | None = None, verb: str = "run") -> int:
        self.begin(fault, verb)
        return self.end()

    def ticks(self) -> list[str]:
        """What the last run did, until it ended."""
        return self.ticks_file.read_text().splitlines()

    # --- as a user does, with Ray ----------------------------------------------------------------

    def spawn(self, *more: str, verb: str = "run") -> "subprocess.Popen[bytes]":
        """The command as a process group of its own."""
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "pipelines", *self.argv(verb, *more)],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={k: v for k, v in os.environ.items() if k not in DROPPED} | self.environment,
                start_new_session=True,
            )

    def call(self, *more: str, verb: str = "run", timeout: float = SLOW) -> int:
        process = self.spawn(*more, verb=verb)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return -999

    # --- what is there ---------------------------------------------------------------------------

    def storage(self) -> Any:
        """`infra.storage`, as this workspace's URL needs it."""
        wanted = self.reading or {k: v for k, v in self.environment.items() if "AWS_" in k}
        if wanted and os.environ.get("AWS_ENDPOINT_URL") != wanted["AWS_ENDPOINT_URL"]:
            import s3fs

            os.environ.update(wanted)
            s3fs.S3FileSystem.clear_instance_cache()
        from infra import storage

        return storage

    def files(self, below: str = "steps") -> dict[str, int]:
        """Path below the workspace -> bytes."""
        storage = self.storage()
        found = storage.list_files(storage.join(self.workspace, below))
        return {f"{below}/{path}": size for path, size in found}

    def read(self, path: str) -> bytes:
        storage = self.storage()
        return bytes(storage.read_bytes(storage.join(self.workspace, path)))

    def write(self, path: str, data: bytes) -> None:
        """As a bad disk does: in place, past every protocol."""
        storage = self.storage()
        if storage.is_local(self.workspace):
            target = Path(self.workspace) / path
            copy = target.with_name(".flipped")  # hard links share their bytes: cut them loose
            shutil.copyfile(target, copy)
            copy.write_bytes(data)
            os.replace(copy, target)
        else:
            storage.write_bytes(storage.join(self.workspace, path), data)

    def commits(self) -> dict[str, bytes]:
        """Path of every COMMIT.json -> its bytes."""
        return {p: self.read(p) for p in self.files() if p.endswith("/COMMIT.json")}

    def records(self) -> dict[str, dict[str, Any]]:
        """Step -> its record; the harness allows one fingerprint per step."""
        found: dict[str, dict[str, Any]] = {}
        for path, data in self.commits().items():
            record = json.loads(data)
            assert record["step"] not in found, f"{path}: committed under two fingerprints"
            found[record["step"]] = record
        return found

    def checkpoints(self) -> dict[str, int]:
        """Training step -> images of its newest finished checkpoint."""
        found: dict[str, int] = {}
        for path in self.files():
            parts = path.split("/")
            if parts[3:5] == ["work", "checkpoints"] and parts[-1] == "record.json":
                images = int(parts[5].split("-")[0])
                found[parts[1]] = max(found.get(parts[1], 0), images)
        return found

    def curves(self) -> dict[str, list[str]]:
        """Training step -> the curve in its newest finished checkpoint: lines with the clock in
        them, which nobody could write a second time."""
        newest: dict[str, str] = {}
        files = self.files()
        for path in sorted(files):
            parts = path.split("/")
            if parts[3:5] == ["work", "checkpoints"] and parts[-1] == "record.json":
                newest[parts[1]] = path.replace("record.json", "curve.jsonl")
        return {
            step: self.read(path).decode().splitlines()
            for step, path in newest.items()
            if path in files
        }

    def registry(self) -> Path:
        return self.database or Path(self.workspace) / "mlflow.db"

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.registry())) as database:
            return database.execute(query).fetchall()

    # --- who is there ----------------------------------------------------------------------------

    def meet(self, pid: int) -> list[psutil.Process]:
        """All that descend from a process, remembered: Ray's workers overwrite their environment,
        and orphans have another parent."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(pid).children(recursive=True):
                self.met[process.pid] = process
        return [process for process in self.met.values() if alive(process)]

    def processes(self) -> list[psutil.Process]:
        """Those this place started, and theirs."""
        marked = {
            p.pid: p for p in psutil.process_iter() if environment_of(p).get(MARK) == self.mark
        }
        return list((marked | {p.pid: p for p in self.met.values() if alive(p)}).values())

    def kill_all(self) -> None:
        """What a failed check left behind must not disturb the next."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def title(process: psutil.Process) -> str:
    """What a process calls itself: `ray::teacher`."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def wait_for(
    condition: Any, *, seconds: float, poll: float = 0.02, unless: Any = lambda: False
) -> bool:
    """Whether it came true in time; given up on once `unless()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if unless():
            return bool(condition())
        time.sleep(poll)
    return False


class Zygote:
    """The forking process, from outside."""

    def __init__(self, folder: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in DROPPED}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        self.log = open(folder / "zygote.log", "ab")  # noqa: SIM115 (for its life)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            cwd=ROOT,
            env=environment,
        )
        assert self._answer(120).get("ready"), (folder / "zygote.log").read_text()

    def start(self, request: Mapping[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        self.pid = int(self._answer(60)["pid"])
        return self.pid

    def end(self, timeout: float) -> int:
        answer = self._answer(timeout)
        if not answer:  # it hangs
            os.kill(self.pid, signal.SIGKILL)
            self._answer(60)
            return -999
        return int(answer["code"])

    def _answer(self, timeout: float) -> dict[str, Any]:
        import select

        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], timeout)
        return json.loads(self.process.stdout.readline() or b"{}") if ready else {}

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


def seeded(kind: str, seed: int) -> random.Random:
    """The same numbers for a kind and a seed, whatever ran before."""
    return random.Random(f"{kind}:{seed}")


def some(random: random.Random, items: Sequence[Any], count: int) -> Iterator[Any]:
    yield from random.sample(list(items), min(count, len(items)))
