"""What durability costs, each figure against its bare counterpart in the same run.

python docs/bench_durability.py [--rounds 15] [--workspace FINISHED --recipe NAME]

1. A chain of six steps that do nothing, through the DAG on a local disk, against six bare Ray tasks
   one after the other, in turns on the same warm processes. (The product gives each step a process
   of its own, so that what it imported ends with it: a matter of the executor, not of the DAG, and
   the same for bare tasks. Here both use theirs again.)
2. Checkpoints: CPU seconds to save and send one of the quickstart's networks, and to commit its
   stage, as a share of the CPU seconds it is trained for at the default cadence.
3. With a finished workspace: `cmforge run` again, the whole process, against a Python that imports
   nothing. Ray must not start.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """Config and value of a step that does nothing."""

    number: int = 0


def nothing(ctx: Any, config: Nothing, **inputs: Any) -> Nothing:
    return config


def bare() -> None:
    """What a bare task does."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workspace", help="a finished one")
    parser.add_argument("--recipe", default="quickstart", help="what it was made with")
    args = parser.parse_args()
    if args.workspace:
        cached(args.workspace, args.recipe, args.rounds)
    checkpoints()
    chain(args.rounds)


def chain(rounds: int) -> None:
    """Per-step cost of the DAG over a bare task."""
    from infra import ray_environment

    ray_environment.prepare("local")
    import ray  # noqa: TID251 (the counterpart)

    from infra.cluster import RayExecutor
    from pipelines import dag, execution
    from pipelines.recipe import Cluster

    class Warm(RayExecutor):
        """The product's, but for processes that are used again."""

        def __init__(self) -> None:
            super().__init__("local")
            self.remote = functools.cache(ray.remote)

        def close(self) -> None:
            """Used again by the next round."""

    executor = Warm()
    task = ray.remote(bare).options(
        num_cpus=1, max_retries=0, runtime_env={"env_vars": executor.environment}
    )
    durable, plain = [], []
    with tempfile.TemporaryDirectory(prefix="cmforge-bench-") as folder:
        for number in range(rounds + 3):  # the first ones warm processes and caches
            steps: list[dag.Step] = []
            for index in range(STEPS):
                before = {"before": steps[-1]} if steps else {}
                config = Nothing(number=number)
                steps.append(
                    dag.Step(
                        name=f"s{index}", run=nothing, config=config, returns=Nothing, inputs=before
                    )
                )
            workspace = f"{folder}/{number}"
            settings = dag.Settings(workspace, "", "bench", Cluster(workspace=workspace))
            started = time.perf_counter()
            for _ in execution.execute(steps, settings, lambda: executor):
                pass
            durable.append((time.perf_counter() - started) / STEPS)
            started = time.perf_counter()
            for _ in range(STEPS):
                ray.get(task.remote())
            plain.append((time.perf_counter() - started) / STEPS)
    ray.shutdown()
    over = statistics.median(1000 * (d - p) for d, p in list(zip(durable, plain, strict=True))[3:])
    ratio = statistics.median(d / p for d, p in list(zip(durable, plain, strict=True))[3:])
    print(
        f"a step of the DAG: {1000 * statistics.median(durable[3:]):.2f} ms, a bare task "
        f"{1000 * statistics.median(plain[3:]):.2f} ms; {over:.2f} ms over it, {ratio:.1f} times "
        f"(medians of {rounds} rounds)"
    )


def checkpoints(times: int = 7) -> None:
    """CPU seconds of a checkpoint and of a commit, as a share of training."""
    import torch

    from consistency.data import ImageStream
    from consistency.loop import Workers, train
    from consistency.stage import begin, describe
    from infra import storage
    from pipelines import config, drift
    from pipelines.checkpoints import Checkpoints
    from pipelines.recipe import Cluster

    torch.set_num_threads(1)
    recipe = config.read_source("quickstart", []).recipe()
    training = recipe.teacher
    about = describe(
        training,
        network=recipe.network,
        noise=recipe.noise,
        size=8,
        channels=1,
        class_names=tuple("0123456789"),
    )
    images = torch.randint(0, 256, (1000, 8, 8, 1), dtype=torch.uint8).numpy()
    labels = torch.randint(0, 10, (1000,)).numpy() if about.num_classes else None
    stage = begin(about, training, seed=0, device=torch.device("cpu"))
    stream = ImageStream(images, labels, 0, training.flip)
    workers = Workers(0, 1, torch.device("cpu"))
    steps = train(stage.state, stage.objective, stream, training, seed=0, workers=workers)
    next(steps)
    started = time.process_time()
    for _ in range(20):
        next(steps)
    step = (time.process_time() - started) / 20
    with tempfile.TemporaryDirectory(prefix="cmforge-bench-") as home:
        kept = Checkpoints(home, Cluster().checkpoints_kept)
        costs, waits = [], []
        for number in range(times):
            begun, started = time.perf_counter(), time.process_time()
            folder = Path(tempfile.mkdtemp(prefix="cmforge-"))
            stage.state.save(folder)
            kept.save(folder, number)
            waits.append(time.perf_counter() - begun)  # the training goes on here
            kept.wait()
            costs.append(time.process_time() - started)
        begun = time.process_time()
        storage.describe_dir(home)
        drift.closure("pipelines.steps.teacher")
        commit = time.process_time() - begun
    total = step * training.steps
    number = total / Cluster().checkpoint_every_seconds  # one worker on one CPU
    share = (number * statistics.median(costs) + commit) / total
    print(
        f"quickstart's teacher: {total:.0f} CPU s of training, {number:.1f} checkpoints of "
        f"{1000 * statistics.median(costs):.0f} ms (training waits "
        f"{1000 * statistics.median(waits):.0f} ms for one), commit {1000 * commit:.0f} ms: "
        f"{100 * share:.2f} % of it"
    )


def cached(workspace: str, recipe: str, rounds: int) -> None:
    """Wall seconds of a run of what is done already."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-X", "importtime", "-m", "pipelines", "run", recipe]
    command += ["--workspace", workspace]
    heard = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "| ray" not in heard.stderr, "Ray was imported"
    assert " cached " in heard.stdout
    command[1:3] = []
    again, empty = [], []
    for _ in range(rounds):
        for run, seconds in ((command, again), ([sys.executable, "-c", ""], empty)):
            started = time.perf_counter()
            subprocess.run(run, capture_output=True, env=environment, check=True)
            seconds.append(time.perf_counter() - started)
    steps = heard.stdout.count(" cached ")
    ratio = statistics.median(a / e for a, e in zip(again, empty, strict=True))
    print(
        f"{recipe} again, {steps} steps, all cached: {statistics.median(again):.2f} s, the whole "
        f"process; an empty Python {statistics.median(empty):.3f} s; ratio {ratio:.0f} "
        f"(medians of {rounds})"
    )


if __name__ == "__main__":
    # As a module of its own, as the product's steps are: Ray sends what is in a script by value.
    import bench_durability

    bench_durability.main()
