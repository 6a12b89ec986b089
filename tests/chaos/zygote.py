"""A process that has imported everything, and forks the command at once: a fault a second.

What it runs is the product's command line with the product's graph, storage, training and
registry. Three things are stood in for: Ray's tasks (steps run in this process, one by one), Ray
Train (the one worker is this process) and Ray's evaluators. `ray_kinds` has the faults of those.

Reads one request per line on stdin, {"argv", "environment", "log", "folder", "fault"}, and answers
with two lines: {"pid": n} and, when that process has ended, {"code": n, "ticks": [...]}.
"""

import contextlib
import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}  # audit events


class InProcess:
    """Runs a step when it is waited for, the first submitted first."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def capacity(self) -> Any:
        from infra.resources import Resources

        return Resources(2.0)

    def submit(self, function: Callable[..., Any], *args: Any, needs: Any, name: str) -> int:
        self.calls[len(self.calls)] = (function, args)
        return len(self.calls) - 1

    def wait(self, handles: Sequence[int], timeout: float) -> list[int]:
        return list(handles[:1])

    def result(self, handle: int) -> Any:
        function, args = self.calls[handle]
        return function(*args)

    def cancel(self, handles: Sequence[int]) -> None:
        """Nothing runs beside this."""

    def close(self) -> None:
        """Nothing is open."""


class Moments:
    """Counts what a run does to its workspace and registry, and strikes at one of them.

    A tick: a change of the file system below `folder`, the beginning or the end of a call of
    `infra.storage`, a statement to the registry's database. `fault`: {"do": what} and either
    {"at": tick or ticks} or {"match": regular expression of a tick, "nth": from 1}.
    """

    def __init__(self, folder: str, fault: dict[str, Any] | None, ticks: Path) -> None:
        self.folder, self.fault = folder, fault or {}
        self.count = self.matched = 0
        self.file = open(ticks, "w")  # noqa: SIM115 (until the process dies)
        self.inside = threading.local()
        self.lock = threading.Lock()

    def tick(self, what: str) -> None:
        if getattr(self.inside, "busy", False):
            return
        self.inside.busy = True
        try:
            with self.lock:
                self.count += 1
                print(what, file=self.file, flush=True)
                strike = self.due(what)
            if strike:
                self.strike()
        finally:
            self.inside.busy = False

    def due(self, what: str) -> bool:
        if "match" in self.fault and re.search(self.fault["match"], what):
            self.matched += 1
            return bool(self.matched == self.fault.get("nth", 1))
        at = self.fault.get("at")
        return self.count in at if isinstance(at, list) else self.count == at

    def strike(self) -> None:
        match self.fault["do"]:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            case "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            case "fill":
                fill(Path(self.fault["ballast"]), self.fault["leave"])
            case "wait":  # for the harness to do something, which it tells by removing the file
                flag = Path(self.fault["flag"])
                flag.write_text("now")
                while flag.exists():
                    threading.Event().wait(0.005)
            case other:
                raise AssertionError(other)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        changed = event in CHANGES
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
            changed = bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changed and isinstance(args[0], str) and args[0].startswith(self.folder):
            self.tick(f"{event} {args[0][len(self.folder) :]}")

    def watch(self) -> None:
        import requests
        import sqlalchemy

        from infra import storage

        sys.addaudithook(self.audit)
        for name, function in inspect.getmembers(storage, inspect.isfunction):
            if function.__module__ == "infra.storage" and not name.startswith("_"):
                setattr(storage, name, self.counted(name, function))

        def statement(*args: Any) -> None:
            self.tick(f"sql {args[2].split(maxsplit=1)[0]}")

        def send(session: Any, request: Any, **options: Any) -> Any:
            self.tick(f"http {request.method} {request.path_url}")
            return plain(session, request, **options)

        plain = requests.Session.send
        requests.Session.send = send  # type: ignore[method-assign]
        engine = sqlalchemy.engine.Engine
        sqlalchemy.event.listen(engine, "before_cursor_execute", statement)
        sqlalchemy.event.listen(engine, "commit", lambda connection: self.tick("sql COMMIT"))

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(inspect.unwrap(function)) or name in PURE:
            return function

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            subject = str(args[0]).split("/steps/")[-1] if args else ""
            self.tick(f"{name} {subject}")
            result = function(*args, **kwargs)
            self.tick(f"{name} {subject} done")
            return result

        return call


PURE = {"join", "absolute", "is_local", "user_error_from", "mendable"}


def fill(ballast: Path, leave: int) -> None:
    """Take all the room there is but `leave` bytes."""
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    with open(ballast, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 512)
    os.truncate(ballast, max(0, ballast.stat().st_size - leave))


class OnlyWorker:
    """Ray Train's only worker."""

    def __init__(self) -> None:
        import torch

        self.rank, self.world_size, self.device = 0, 1, torch.device("cpu")

    def tell(self, report: Any) -> None:
        raise AssertionError("only trials are told about")


def stand_in() -> None:
    from pipelines import cadence, commands, scoring, train_worker, training
    from pipelines.steps import reference

    commands._ray = lambda address: InProcess()
    training.on_workers = lambda ctx, job: train_worker.run(job, OnlyWorker())
    scoring.on_actors = lambda cluster: scoring.in_process
    reference.on_actors = scoring.on_actors  # imported by name
    cadence.LOG_EVERY_SECONDS = 0.0  # a point of the curve per step shows where a run went on from


def child(request: dict[str, Any]) -> int:
    """The command, in the forked process."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stand_in()
    moments = Moments(request["folder"], request.get("fault"), Path(request["ticks"]))
    moments.watch()
    from pipelines import cli

    sys.argv = ["cmforge", *request["argv"]]
    return cli.main(request["argv"])


def requests() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    preload()
    assert threading.active_count() == 1, "a fork would lose these threads"
    print(json.dumps({"ready": True}), flush=True)
    for request in requests():
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request)
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else 2
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def preload() -> None:
    """What the command would import on its way, but nothing that starts a thread."""
    import mlflow
    import mlflow.pyfunc
    import mlflow.store.tracking.sqlalchemy_store
    import numpy
    import optuna
    import s3fs
    import sklearn.datasets
    import sqlalchemy
    import torch
    import webdataset.tariterators

    from infra import registry, shards, sources, tracking
    from pipelines import cli, execution, graph, train_worker, training

    torch.set_num_threads(1)
    del mlflow, numpy, optuna, s3fs, sklearn, sqlalchemy, webdataset
    del registry, shards, sources, tracking, cli, execution, graph, train_worker, training


if __name__ == "__main__":
    main()
