"""Faults of Ray: the command as a user runs it, and its processes killed one after the other."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.forked import Bench, Story, to_the_end
from tests.chaos.invariants import TRAINING, Watch, orphans, tail
from tests.chaos.place import ROOT, Place, alive, seeded, title, wait_for

LONG = 240.0  # seconds until a stage must have begun
SETTINGS = ("cluster.checkpoint_every_seconds=0",)
STAGES = ("shard", "reference", "teacher", "isolate", "distill", "evaluate", "register")


def begun(place: Place, stage: str) -> bool:
    """Whether a stage is at work: an attempt is open, and training has a checkpoint."""
    paths = place.files(f"steps/{stage}")
    if any(path.endswith("/COMMIT.json") for path in paths):
        return True
    if stage in TRAINING:
        return any("/checkpoints/" in p and p.endswith("/record.json") for p in paths)
    return any(Path(place.workspace, "steps", stage).glob("*/attempts/*"))


def driver(bench: Bench, seed: int, faults: int) -> Story:
    """The driver dies, alone or with its process group; its Ray must not outlive it."""
    story, draw = Story("Ray driver killed", seed), seeded("ray-driver", seed)
    with bench.place("ray-driver", seed, settings=SETTINGS) as place:
        bench.with_registry(place)
        watch = Watch(place)
        for stage in sorted(draw.sample(STAGES, min(faults, len(STAGES))), key=STAGES.index):
            whole = draw.random() < 0.5
            pause = draw.uniform(0, 1.0)
            process = place.spawn()
            if not _until(place, process, lambda stage=stage: begun(place, stage)):
                process.wait(LONG)  # it ended before, or is slow
                break
            time.sleep(pause)
            place.meet(process.pid)
            if whole:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            which = "driver and group" if whole else "driver"
            story.faults.append(f"{which} {pause:.1f} s into {stage}")
            story.wrong += orphans(place)
            watch.look()
        to_the_end(place, watch, story, bench.expected, run=place.call)
    return story


def worker(bench: Bench, seed: int, faults: int) -> Story:
    """Training workers die under a driver that lives: Train starts them again by itself."""
    stages = ("teacher", "isolate", "distill")
    wanted = [("RayTrainWorker", stages[n % 3]) for n in range(faults)]
    return _processes(bench, seed, "ray-worker", "Ray worker killed", wanted)


def step(bench: Bench, seed: int, faults: int) -> Story:
    """The process of a step, or an evaluator, dies under a driver that lives."""
    draw = seeded("ray-step-of", seed)
    stages = ("shard", "reference", "teacher", "distill", "evaluate", "register")
    chosen = sorted(draw.sample(stages, min(faults, 6)), key=stages.index)
    wanted = []
    for stage in chosen:
        actor = stage in ("reference", "evaluate") and draw.random() < 0.5
        wanted.append(("_Actor" if actor else f"ray::{stage}", stage))
    return _processes(bench, seed, "ray-step", "Ray step killed", wanted)


def _processes(
    bench: Bench, seed: int, kind: str, name: str, wanted: list[tuple[str, str]]
) -> Story:
    story, draw = Story(name, seed), seeded(kind, seed)
    with bench.place(kind, seed, settings=(*SETTINGS, "cluster.retries=4")) as place:
        bench.with_registry(place)
        watch = Watch(place)
        process = place.spawn()
        for called, stage in wanted:
            found: list[psutil.Process] = []

            def there(called: str = called, stage: str = stage, found: Any = found) -> bool:
                if not begun(place, stage):
                    return False
                found[:] = [p for p in place.meet(process.pid) if called in title(p)]
                return bool(found) or committed(place, stage)

            _until(place, process, there)
            if not found:
                continue
            victim = draw.choice(found)
            watch.look()
            if alive(victim):
                victim.kill()
                story.faults.append(f"{called} of {stage}")
        code = process.wait(LONG * 2)
        if code not in (0, 1):
            story.wrong.append(f"exit code {code}: {tail(place.log)}")
        story.wrong += orphans(place)
        watch.look()
        to_the_end(place, watch, story, bench.expected, run=place.call)
    return story


def stop(bench: Bench, seed: int, faults: int) -> Story:
    """A preemption notice: training saves what it has, and the exit code is 3."""
    story, draw = Story("Ray driver asked to stop", seed), seeded("ray-stop", seed)
    with bench.place("ray-stop", seed, settings=SETTINGS) as place:
        bench.with_registry(place)
        watch = Watch(place)
        stages = draw.sample(("reference", "teacher", "isolate", "distill", "evaluate"), faults)
        for stage in sorted(stages, key=STAGES.index):
            said = place.log.stat().st_size if place.log.exists() else 0
            process = place.spawn()

            def ready(stage: str = stage, said: int = said) -> bool:
                """Not before it listens: what an earlier run began is there at once."""
                return begun(place, stage) and place.log.stat().st_size > said

            if not _until(place, process, ready):
                process.wait(LONG)
                break
            place.meet(process.pid)
            process.send_signal(signal.SIGTERM)
            code = process.wait(LONG)
            story.faults.append(f"SIGTERM in {stage}: exit code {code}")
            if code not in (0, 3):
                story.wrong.append(f"exit code {code}: {tail(place.log)}")
            story.wrong += orphans(place)
            watch.look()
        to_the_end(place, watch, story, bench.expected, run=place.call)
    return story


def node(bench: Bench, seed: int, faults: int) -> Story:
    """A node of a cluster is lost under a driver that lives; another one comes."""
    story, draw = Story("Ray node lost", seed), seeded("ray-node", seed)
    with Nodes(bench, f"ray-node-{seed}") as nodes, _on(bench, "ray-node", seed, nodes) as place:
        watch = Watch(place)
        process = place.spawn()
        for _ in range(faults):
            stage = draw.choice(("reference", "teacher", "isolate", "distill"))
            _until(place, process, lambda stage=stage: begun(place, stage))
            if process.poll() is not None:
                break
            watch.look()
            # Not the head's: that is another fault.
            os.kill(victim := draw.choice(nodes.said["raylets"][1:]), signal.SIGKILL)
            story.faults.append(f"raylet {nodes.said['raylets'].index(victim)} in {stage}")
            nodes.add()
        code = process.wait(LONG * 2)
        if code not in (0, 1):
            story.wrong.append(f"exit code {code}: {tail(place.log)}")
        watch.look()
        to_the_end(place, watch, story, bench.expected, run=place.call)
    return story


def head(bench: Bench, seed: int, faults: int) -> Story:
    """The head dies with all its cluster, as its pod does; another cluster, the same command."""
    story, draw = Story("Ray head lost", seed), seeded("ray-head", seed)
    with Nodes(bench, f"ray-head-{seed}") as nodes, _on(bench, "ray-head", seed, nodes) as place:
        watch = Watch(place)
        for _ in range(faults):
            stage = draw.choice(("reference", "teacher", "isolate", "distill"))
            process = place.spawn()
            _until(place, process, lambda stage=stage: begun(place, stage))
            if process.poll() is not None:
                break
            os.kill(nodes.said["gcs"], signal.SIGKILL)
            story.faults.append(f"GCS in {stage}")
            time.sleep(draw.uniform(0, 2))
            nodes.close()
            try:
                code = process.wait(LONG)
                story.faults[-1] += f": exit code {code}"
            except subprocess.TimeoutExpired:
                story.wrong.append(f"the driver of a dead cluster hangs: {tail(place.log)}")
                process.kill()
                process.wait()
            story.wrong += orphans(place)
            watch.look()
            nodes.open()
        to_the_end(place, watch, story, bench.expected, run=place.call)
    return story


def committed(place: Place, stage: str) -> bool:
    return any(path.endswith("/COMMIT.json") for path in place.files(f"steps/{stage}"))


def _until(place: Place, process: "subprocess.Popen[bytes]", condition: Callable[[], bool]) -> bool:
    """False when the run ended before."""
    return wait_for(condition, seconds=LONG, poll=0.05, unless=lambda: process.poll() is not None)


@contextmanager
def _on(bench: Bench, kind: str, seed: int, nodes: "Nodes") -> Iterator[Place]:
    """A place whose command runs on those nodes."""
    settings = (*SETTINGS, f"cluster.address={nodes.said['address']}", "cluster.retries=4")
    with bench.place(kind, seed, settings=settings, environment=nodes.token) as place:
        bench.with_registry(place)
        yield place


class Nodes:
    """The cluster of `ray_cluster`, from outside."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.log = bench.root / f"{name}.cluster.log"
        self.cache = bench.root / name / "cache"
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.ports = [_free_port(), _free_port()]  # of the head, of the dashboard
        self.said: dict[str, Any] = {}

    def __enter__(self) -> "Nodes":
        self.open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self) -> None:
        environment = {**os.environ, **self.token, "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "CMFORGE_CACHE": str(self.cache)}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("RAY_ADDRESS", None)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.ray_cluster", *map(str, self.ports)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        self._hear()

    def add(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"add\n")
        self.process.stdin.flush()
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:  # Ray may say something in between
            if line.startswith(b'{"address"'):
                self.said = json.loads(line)
                return
        raise RuntimeError(f"no cluster: {tail(self.log)}")

    def close(self) -> None:
        """SIGKILL for every process of it."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        for process in (self.process, *family):
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait()
        psutil.wait_procs(family, timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port
