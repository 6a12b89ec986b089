"""A tiny workspace for trials, and stand-ins for what starts processes: no Ray, no MLflow.

The shards, the domain network and the statistics are the product's own, made once.
"""

import atexit
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import cluster, storage, tuning
from pipelines import dag, execution, graph, sweeping, train_worker
from pipelines.artifacts import Committed
from pipelines.config import RecipeSource
from pipelines.dag import Settings, StepContext
from pipelines.recipe import Cluster
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import SweepSummary, Trial
from pipelines.sweeping import Sweep, TuneStage
from pipelines.training import StageConfig

TEXT = """\
name: tiny
seed: 3
data: {source: digits, limit: 90, num_shards: 1, record_images: 90}
network: {channels: 4, channel_mult: [1], num_blocks: 1, attention: []}
teacher: {images: 32, batch: 16, ema: [{kind: constant, beta: 0.9}]}
distill:
  method: cd
  images: 64
  batch: 16
  pairs: {levels: {N: 6}}
  ema: [{kind: constant, beta: 0.9}, {kind: constant, beta: 0.5}]
isolate:
  method: ict
  images: 64
  batch: 16
  lr: 3e-3
  dropout: 0.1
  pairs: {levels: {kind: sqrt, s0: 2, s1: 8}}
  ema: [{kind: constant, beta: 0.9}, {kind: constant, beta: 0.5}]
reference: {steps: 1}
evaluate:
  {samples: 60, seed_blocks: 2, teacher_samples: 40, teacher_steps: 4, allow_rank_deficient: true}
register: {model: tiny, allow_proxy: true}
"""
EMAS = ("constant-0.9", "constant-0.5")
MARKS = (16, 48, 64)  # of isolate: its 4 steps in 3 parts


def choice(key: str, *values: str, when: tuple[str, ...] = ()) -> Axis:
    return Axis(key=key, choice=values, when=when)


def sweep_of(*axes: Axis, **changes: Any) -> SweepConfig:
    fields: dict[str, Any] = {
        "name": "mine",
        "stage": "isolate",
        "space": axes or (choice("isolate.lr", "1e-3", "2e-3", "4e-3"),),
        "trials": 3,
        "search": "random",
        "probes": 3,
        "samples": 40,
        "finalists": 2,
        "finalist_samples": 70,
        "finalist_blocks": 2,
        "allow_rank_deficient": True,
        **changes,
    }
    return SweepConfig(**fields)


def no_actors(make: Any, items: Sequence[Any], **_: Any) -> Iterator[tuple[int, Any]]:
    work = make()
    return ((index, work(item)) for index, item in enumerate(items))


class Worker:
    """Ray Train's only worker."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def tell(self, report: Mapping[str, Any]) -> None:
        """Forgotten."""


class NoWriter(contextlib.nullcontext[Any]):
    """Metrics for nobody."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(self)

    def log(self, images: int, metrics: dict[str, float]) -> None:
        """Forgotten."""


class Runs:
    """What MLflow would be told of a sweep."""

    last: "Runs"

    def __init__(self, ctx: StepContext, sweep: SweepConfig, key: str) -> None:
        self.shown: list[Trial] = []
        self.closed = 0
        self.finished: list[tuple[SweepSummary, list[str]]] = []
        Runs.last = self

    def show(self, trial: Trial) -> None:
        self.shown.append(trial)

    def close(self) -> None:
        self.closed += 1

    def finish(self, summary: SweepSummary, files: Sequence[Path]) -> None:
        self.finished.append((summary, [path.name for path in files]))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs in this process; nothing waits for a disk."""
    monkeypatch.setattr(cluster, "map_on_actors", no_actors)
    monkeypatch.setattr(cluster, "TrainWorker", Worker)
    monkeypatch.setattr(cluster, "train_workers", lambda run, payload, **_: run(payload))
    monkeypatch.setattr(train_worker.tracking, "MetricWriter", NoWriter)
    monkeypatch.setattr(sweeping, "SweepRuns", Runs)
    monkeypatch.setattr(storage.os, "fsync", lambda handle: None)
    monkeypatch.setattr(execution.drift, "closure", lambda module: {})  # takes as long as a trial
    monkeypatch.setenv("CMFORGE_CACHE", str(_home() / "cache"))


@cache
def _home() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cmforge-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _stock() -> Path:
    """A workspace with shards, reference and teacher."""
    folder = _home() / "stock"
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        bench = Bench(folder)
        for name in ("shard", "reference", "teacher"):
            bench.run(name)
    return folder


def stocked(folder: Path, *overrides: str, **cluster: Any) -> "Bench":
    """A workspace of one's own with shards, reference and teacher."""
    shutil.copytree(_stock(), folder, dirs_exist_ok=True)
    return Bench(folder, *overrides, **cluster)


class Bench:
    """The graph of the tiny recipe, step by step in this process."""

    def __init__(self, workspace: Path, *overrides: str, **cluster: Any) -> None:
        self.workspace = str(workspace)
        self.source = RecipeSource("tiny.yaml", TEXT, overrides)
        self.cluster = Cluster(**{"workspace": self.workspace, "checkpoints_kept": 1, **cluster})
        self.settings = Settings(self.workspace, "", "tiny", self.cluster)
        self.sweep: SweepConfig | None = None

    def steps(self) -> dict[str, dag.Step]:
        tune = () if self.sweep is None else (self.sweep,)
        recipe = replace(self.source.recipe(), tune=tune)
        return {step.name: step for step in graph.build(recipe, self.cluster, self.source)}

    def given(self, name: str) -> dict[str, Committed[Any]]:
        """A step's inputs."""
        inputs = self.steps()[name].inputs
        return {alias: self.committed(step) for alias, step in inputs.items()}

    def committed(self, step: dag.Step | str) -> Committed[Any]:
        step = self.steps()[step] if isinstance(step, str) else step
        home = dag.home_of(self.workspace, step)
        return dag.committed_of(step, home, dag.read_record(home))

    def run(self, name: str) -> Committed[Any]:
        """One step, whose inputs are there."""
        step = self.steps()[name]
        execution.run_attempt(step, self.settings, self.given(name), (), {})
        return self.committed(step)

    def stage(self, *settings: str, name: str = "isolate") -> StageConfig:
        return StageConfig.of(self.source.recipe(settings), name)

    def context(self, folder: str) -> StepContext:
        """Of a step that is none of the graph."""
        out = Path(self.workspace) / folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        return StepContext(
            step="isolate",
            fingerprint="f",
            out=out,
            work=str(out.parent / "work"),
            workspace=self.workspace,
            tracking_uri="",
            experiment="tiny",
            cluster=self.cluster,
        )

    def tune_stage(self, sweep: SweepConfig) -> TuneStage:
        recipe = self.source.recipe()
        return TuneStage(
            sweep=sweep,
            stage=StageConfig.of(recipe, sweep.stage),
            mid_sigma=recipe.evaluate.mid_sigma,
            source=self.source,
        )

    def search(self, sweep: SweepConfig) -> Sweep:
        given = {name: self.committed(name) for name in ("shard", "reference", "teacher")}
        return Sweep(self.context("tune"), self.tune_stage(sweep), given)


class Stopped(BaseException):
    """The scheduler ends a trial's process at its report."""


def one_after_the_other(
    verdict: Callable[[int, Mapping[str, Any]], bool] = lambda number, result: False,
) -> Callable[..., None]:
    """Instead of `tuning.run_trials`: trials in this process. verdict: whether one is stopped."""

    def run_trials(trial: Any, sweep: Any, **_: Any) -> None:
        while (found := sweep.next()) is not None:
            number, payload = found

            def report(result: Mapping[str, Any], number: int = number) -> None:
                over = result.get("repeated") or result.get("probe") == result.get("of")
                stopped = not over and verdict(number, result)
                sweep.heard(number, result, stopped)
                if stopped:
                    raise Stopped

            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
                patch.setattr(tuning, "report", report)
                trial(payload)

    return run_trials
