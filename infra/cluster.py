"""Ray, and nothing but Ray: tasks for steps, Train for training workers. Tune is in `tuning`.

The surface is kept small on purpose (init, remote, wait, get, cancel, TorchTrainer): Ray removes
more than it keeps. Import this module only when something must run; it costs a second.
"""

import functools
import heapq
import logging
import math
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions

from infra import guardian, ray_environment, storage
from infra.errors import HeadLost, Preempted, UserError, WorkerLost
from infra.resources import Resources

if TYPE_CHECKING:
    import torch


HEAD_PATIENCE = 40.0  # seconds; after 60 Ray ends the process, wherever it stands


class RayExecutor:
    """Steps as Ray tasks on a local Ray of our own, or on a running cluster."""

    def __init__(self, address: str) -> None:
        """Raises UserError when no cluster answers at `address`."""
        settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            # The dashboard is not for looking: Train frees leaked resources through its API.
            settings["include_dashboard"] = True
            # Ray hands the interpreter's path to a shell as it is; a space in it would hang us.
            quoted = shlex.quote(sys.executable)
            if quoted != sys.executable:
                settings["runtime_env"] = {"py_executable": quoted}
        self._guardian = guardian.start(os.getpid()) if address == "local" else None
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, **settings)
        except SystemExit as left:  # by Ray's own handler of SIGTERM, which it sets first of all
            if left.code != signal.SIGTERM:
                raise
            raise Preempted("asked to stop by SIGTERM while Ray started") from None
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"no Ray cluster at address {address!r} ({error}); start one, set RAY_ADDRESS, "
                f"or use --cluster laptop"
            ) from error
        finally:
            signal.signal(signal.SIGTERM, handler)
        # Steps call Ray Train, which asks the State API of *this* cluster.
        self.head: str = ray.get_runtime_context().gcs_address
        self.environment = {**ray_environment.TASKS, "RAY_ADDRESS": self.head}
        # One process per step: an idle one would keep what it imported, half a gigabyte, until the
        # end of the run. Cached: Ray would send the same function once more for each step.
        self.remote = functools.cache(ray.remote(max_calls=1))
        self._capacity, self._looked = Resources(0), -math.inf
        self._heard = time.monotonic()  # from the head

    def capacity(self) -> Resources:
        """What there is in all, as of a second ago. Raises HeadLost."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            if self._head_answers():
                found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
                self._capacity = Resources(found.get("CPU", 0.0), found.get("GPU", 0.0))
        return self._capacity

    def _head_answers(self) -> bool:
        """Asked before Ray is, which would wait. Raises HeadLost after HEAD_PATIENCE."""
        host, _, port = self.head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            if time.monotonic() - self._heard < HEAD_PATIENCE:
                return False
            raise HeadLost(
                f"the head of the Ray cluster at {self.head} has not answered for "
                f"{HEAD_PATIENCE:.0f} s; the same command goes on once there is a head again"
            ) from None
        self._heard = time.monotonic()
        return True

    def submit(self, function: Callable[..., Any], *args: Any, needs: Resources, name: str) -> Any:
        task = self.remote(function).options(
            num_cpus=needs.cpus,
            num_gpus=needs.gpus,
            max_retries=0,
            name=name,
            runtime_env={"env_vars": self.environment},
        )
        return task.remote(*args)

    def wait(self, handles: Sequence[Any], timeout: float) -> list[Any]:
        """Those that are finished. Raises HeadLost."""
        self.capacity()  # asks the head
        ready, _ = ray.wait(list(handles), num_returns=1, timeout=timeout)
        return list(ready)

    def result(self, handle: Any) -> Any:
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error

    def cancel(self, handles: Sequence[Any]) -> None:
        """Interrupt the steps (Train aborts its workers), then force what does not listen."""
        if not handles:
            return
        for handle in handles:
            # recursive=True would leak the placement groups of trainers inside the step.
            ray.cancel(handle, force=False, recursive=False)
        _, left = ray.wait(list(handles), num_returns=len(handles), timeout=10)
        for handle in left:
            ray.cancel(handle, force=True, recursive=False)

    def close(self) -> None:
        ray.shutdown()
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.communicate()


MOST_RESTARTS = 100  # of training workers; those that get no further end themselves before


def train_workers(
    worker: Callable[[dict[str, Any]], Any],
    payload: dict[str, Any],
    *,
    name: str,
    storage_url: str,
    workers: int,
    min_workers: int | None,
    cpus_per_worker: int,
    gpus_per_worker: float,
    reports_to_tune: bool = False,
) -> Any:
    """Run `worker(payload)` on Ray Train workers; returns what rank 0 returned.

    Checkpoints are the worker's own affair. Lost workers are started again, as often as they
    are lost; with `min_workers`, as few as that while there is no room for all. Inside a Tune trial
    `reports_to_tune` passes on what rank 0 tells.
    """
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ.update(ray_environment.TASKS)
    per_worker: dict[str, float] = {"CPU": cpus_per_worker}
    if gpus_per_worker > 0:
        per_worker["GPU"] = gpus_per_worker
    run: dict[str, Any] = {"storage_path": storage_url}
    if not storage.is_local(storage_url):
        import fsspec
        import pyarrow.fs

        filesystem, path = fsspec.core.url_to_fs(storage_url)
        handler = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
        run = {"storage_path": path, "storage_filesystem": handler}
    if reports_to_tune:
        from ray.tune.integration.ray_train import TuneReportCallback

        run["callbacks"] = [TuneReportCallback()]  # type: ignore[no-untyped-call]
    size: Any = workers if min_workers is None else (min_workers, workers)  # elastic
    trainer = TorchTrainer(
        worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=gpus_per_worker > 0,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            name=name,
            failure_config=FailureConfig(max_failures=MOST_RESTARTS, controller_failure_limit=3),  # type: ignore[call-arg]
            **run,
        ),
    )
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]
    except ray.train.TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {})
        for cause in causes.values():
            raise _original(cause) from error
        raise


def map_on_actors(
    make: Callable[[], Callable[[Any], Any]],
    items: Sequence[Any],
    *,
    actors: int,
    cpus: float,
    gpus: float,
) -> Iterator[tuple[int, Any]]:
    """(index, `make()(item)`) of each item, as they come, each once; `make` runs once per actor.

    At most `actors` of them, fewer while the cluster has no room. An actor that is lost is replaced
    and its items are given out again; one item that takes MAX_LOSSES actors with it ends the map
    with WorkerLost. What the function raises is raised here. Results run ahead of the lowest open
    item by a few per actor only, so a caller who merges in order holds no more than that.
    """
    queue = _Items(len(items), ahead=AHEAD * actors)
    remote: Any = ray.remote(_Actor).options(num_cpus=cpus, num_gpus=gpus)
    starting: dict[Any, Any] = {}  # ref of readiness -> actor
    running: dict[Any, tuple[Any, int]] = {}  # ref of a result -> actor, item
    idle: list[Any] = []
    living: list[Any] = []

    def start() -> None:
        actor = remote.remote(make)
        living.append(actor)
        starting[actor.ready.remote()] = actor

    try:
        for _ in range(min(actors, len(items))):
            start()
        while queue.open():
            while idle and (index := queue.take()) is not None:
                actor = idle.pop()
                running[actor.run.remote(items[index])] = (actor, index)
            done, _ = ray.wait([*starting, *running], num_returns=1)
            for ref in done:
                if ref in starting:
                    actor, lost = starting.pop(ref), None
                else:
                    actor, lost = running.pop(ref)
                try:
                    result = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise _original(error) from None
                except ray.exceptions.RayError as error:
                    living.remove(actor)
                    queue.lost(lost, f"{type(error).__name__}: {str(error).splitlines()[0]}")
                    start()
                else:
                    idle.append(actor)
                    if lost is not None and queue.finish(lost):
                        yield lost, result
    finally:
        for actor in living:
            ray.kill(actor)


AHEAD = 4  # items per actor that may be done before the lowest open one
MAX_LOSSES = 3


class _Actor:
    """One process of `map_on_actors`."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self.make = make
        self.work: Callable[[Any], Any] | None = None

    def ready(self) -> None:
        """Answers when the actor runs."""

    def run(self, item: Any) -> Any:
        if self.work is None:  # here and not at the start, where Ray would wrap what it raises
            self.work = self.make()
        return self.work(item)


class _Items:
    """Which items are open, given out, or done; lost ones are given out again, lowest first."""

    def __init__(self, count: int, ahead: int) -> None:
        self._waiting = list(range(count))  # a heap
        self._open = set(range(count))
        self._lowest, self._ahead = 0, ahead
        self._losses: dict[int | None, int] = {}

    def open(self) -> bool:
        return bool(self._open)

    def take(self) -> int | None:
        """The next item, unless results would run too far ahead."""
        if not self._waiting or self._waiting[0] >= self._lowest + self._ahead:
            return None
        return heapq.heappop(self._waiting)

    def finish(self, index: int) -> bool:
        """Whether this is the first result of that item."""
        if index not in self._open:
            return False
        self._open.remove(index)
        self._lowest = min(self._open, default=index)
        return True

    def lost(self, index: int | None, why: str) -> None:
        """An actor died with that item, or (None) before it had one."""
        self._losses[index] = self._losses.get(index, 0) + 1
        if self._losses[index] >= MAX_LOSSES:
            what = "before their first item" if index is None else f"at item {index}"
            raise WorkerLost(f"{MAX_LOSSES} evaluators died {what}; the last one: {why}")
        if index in self._open:
            heapq.heappush(self._waiting, index)


def _original(error: BaseException) -> BaseException:
    """The exception a worker raised, without Ray's wrappers."""
    while isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    return error


class TrainWorker:
    """This training worker, as Ray Train sees it."""

    def __init__(self) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()

    def tell(self, report: Mapping[str, Any]) -> None:
        """Pass a trial's report on. A barrier: every rank calls it."""
        from ray import train

        train.report(dict(report))
