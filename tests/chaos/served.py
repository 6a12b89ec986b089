"""Faults of the servers a run talks to: S3 behind a proxy, and MLflow. Steps run as in `forked`."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chaos.forked import Bench, Skip, Story, to_the_end
from tests.chaos.invariants import Watch, tail
from tests.chaos.place import Place, seeded, wait_for

PATIENCE = 240.0  # seconds a run may take beside a fault


def line(bench: Bench, seed: int, faults: int) -> Story:
    """The line to the store breaks at one byte or another, for a while."""
    from tests.faults.proxy import FaultProxy

    story, draw = Story("S3 line", seed), seeded("line", seed)
    with FaultProxy(bench.s3().port) as proxy, remote(bench, "s3-line", seed, proxy.port) as place:

        def strike() -> tuple[str, float]:
            mode: Any = draw.choice(
                (
                    ("cut", draw.randrange(0, 20_000)),
                    ("cut", draw.randrange(0, 400)),
                    ("cut_up", draw.randrange(0, 20_000)),
                    ("cut_up", draw.randrange(0, 400)),
                    ("cut_reply", draw.randrange(1, 3)),
                    "refuse",
                    "stall",
                )
            )
            seconds = draw.uniform(0.2, 4.0)
            proxy.mode = mode
            return f"{mode} for {seconds:.1f} s", seconds

        def heal() -> None:
            proxy.mode = "pass"

        _struck(bench, place, story, draw, faults, strike, heal)
    return story


def killed(bench: Bench, seed: int, faults: int) -> Story:
    """The driver dies between two requests to the store, its lease still written there."""
    story, draw = Story("S3, driver killed", seed), seeded("s3-killed", seed)
    with remote(bench, "s3-killed", seed, bench.s3().port) as place:
        watch = Watch(place)
        for _ in range(faults):
            at = draw.randrange(1, len(bench.ticks) // 2)
            code = place.run({"at": at, "do": "kill"})
            if code != -signal.SIGKILL:
                if code != 0:
                    story.wrong.append(f"exit code {code}: {tail(place.log)}")
                break
            story.faults.append(f"tick {at}: {place.ticks()[-1]}")
            watch.look()
        to_the_end(place, watch, story, bench.expected)
    return story


def server(bench: Bench, seed: int, faults: int) -> Story:
    """The store itself dies, and comes back with what it had."""
    one = bench.s3()
    if not one.durable:
        raise Skip(f"{one.kind} keeps everything in memory; CMFORGE_CEPH names a radosgw")
    story, draw = Story("S3 server killed", seed), seeded("server", seed)
    with remote(bench, "s3-server", seed, one.port) as place:

        def strike() -> tuple[str, float]:
            one.kill()
            seconds = draw.uniform(0.0, 3.0)
            return f"killed, back after {seconds:.1f} s", seconds

        _struck(bench, place, story, draw, faults, strike, one.start)
    return story


def mlflow(bench: Bench, seed: int, faults: int) -> Story:
    """The registry's server dies, in the middle of a registration more often than not."""
    story, draw = Story("MLflow server killed", seed), seeded("mlflow", seed)
    folder = bench.root / f"mlflow-{seed}"
    with (
        Registry(folder / "server") as registry,
        bench.place("mlflow", seed, tracking_uri=registry.uri, database=registry.database) as place,
    ):

        def strike() -> tuple[str, float]:
            registry.kill()
            seconds = draw.uniform(0.0, 3.0)
            return f"killed, back after {seconds:.1f} s", seconds

        _struck(bench, place, story, draw, faults, strike, registry.start, match=r"^http ")
    return story


@contextmanager
def remote(bench: Bench, kind: str, seed: int, port: int) -> Iterator[Place]:
    """A workspace in the bucket, reached by that port; its registry is a local file."""
    from tests.faults import s3

    database = bench.root / f"{kind}-{seed}" / "mlflow.db"
    with bench.place(
        kind,
        seed,
        workspace=f"s3://{bench.s3().bucket}/{kind}-{seed}",
        tracking_uri=f"sqlite:///{database}",
        database=database,
        environment=s3.environment(port),
        reading=s3.environment(bench.s3().port),
    ) as place:
        bench.with_registry(place)
        yield place


def _struck(
    bench: Bench,
    place: Place,
    story: Story,
    draw: random.Random,
    faults: int,
    strike: Callable[[], tuple[str, float]],
    heal: Callable[[], None],
    match: str | None = None,
) -> None:
    """Runs that are held at drawn moments while `strike` breaks something; `heal` mends it after a
    while. Each run may survive, or say what it could not reach."""
    watch, flag = Watch(place), place.folder / "now"
    for _ in range(2 * faults):
        fault: dict[str, Any] = {"do": "wait", "flag": str(flag)}
        if match is None:
            ticks = range(1, len(bench.ticks) // 2)
            fault["at"] = sorted(draw.sample(ticks, faults - len(story.faults)))
        else:
            fault |= {"match": match, "nth": draw.randrange(1, 60)}
        process = place.begin(fault)
        while wait_for(flag.exists, seconds=PATIENCE, unless=lambda p=process: over(p)):
            tick = place.ticks()[-1]
            said, seconds = strike()
            story.faults.append(f"{said}: {tick}")
            flag.unlink()
            time.sleep(seconds)
            heal()
        heal()
        code = place.end(PATIENCE)
        if code not in (0, 1, 2):
            story.wrong.append(f"exit code {code}: {tail(place.log)}")
        watch.look()
        if len(story.faults) >= faults or code == 0:
            break
    to_the_end(place, watch, story, bench.expected)


def over(pid: int) -> bool:
    """Whether a process has ended; the zygote reads its exit code later."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


class Registry:
    """An MLflow server with its database and files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.database = folder, folder / "mlflow.db"
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Registry":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        if not wait_for(self._answers, seconds=120, poll=0.2):
            raise RuntimeError(f"no answer from MLflow: {tail(self.folder / 'log.txt')}")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(re.search(b"OK", answer.read()))
        except OSError:
            return False

    def kill(self) -> None:
        """The server and its workers at once."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
