"""A sweep in MLflow: one parent run, one child per trial, the same ones however often it resumes.

A trial's parameters are written once; its curves are over the schedule fraction k/K, as MLflow's
integer step in thousandths. The runs are found by tags, so a killed sweep goes on in them.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from infra import tracking
from pipelines.dag import StepContext
from pipelines.sweep import SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, SweepSummary, Trial

# A stopped trial is no failure, and it is not finished.
STATUS = {COMPLETED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED", RUNNING: "KILLED"}
DEADLINE = 10.0  # seconds that the end of a run may wait for the server
PARENT_TAG = "mlflow.parentRunId"


class SweepRuns:
    """The runs of one sweep. A server that fails costs metrics, never the sweep."""

    def __init__(self, ctx: StepContext, sweep: SweepConfig, key: str) -> None:
        self._ctx, self._sweep, self._key = ctx, sweep, key
        self._parent: str | None = None
        self._opening = threading.Lock()
        self._writers: dict[int, tracking.MetricWriter] = {}
        self._shown: dict[int, int] = {}
        self._ending = ThreadPoolExecutor(2, thread_name_prefix="runs")

    def show(self, trial: Trial) -> None:
        """Log what is new of a trial, and end its run when it is over; waits for nothing.

        What its run already holds is not logged again.
        """
        if trial.number not in self._writers:
            self._writers[trial.number] = tracking.MetricWriter(
                self._ctx.tracking_uri, partial(self._open, trial), deadline=DEADLINE
            )
        writer = self._writers[trial.number]
        for probe in trial.probes[self._shown.get(trial.number, 0) :]:
            found = {f"distance_{steps}": probe.lowest(steps) for steps in (1, 2)}
            metrics = {name: low.value for name, low in found.items() if low is not None}
            metrics |= {"images": float(probe.images), "train_seconds": probe.seconds}
            writer.log(round(1000 * probe.fraction), metrics)
        self._shown[trial.number] = len(trial.probes)
        if trial.state != RUNNING:
            self._ending.submit(writer.close, STATUS[trial.state])

    def close(self) -> None:
        """End the runs of trials that are not over, and wait until all is written."""
        for writer in self._writers.values():
            self._ending.submit(writer.close, STATUS[RUNNING])  # of a closed one: nothing
        self._ending.shutdown()

    def finish(self, summary: SweepSummary, files: Sequence[Path]) -> None:
        """The parent's own: what came out, with the files people look at."""
        uri, run = self._ctx.tracking_uri, self._parent_run()
        metrics = {
            "share_of_full_cost": summary.spent_images / summary.full_images,
            "trials": float(len(summary.trials)),
            "winner": float(summary.winner),
        }
        if summary.finalists:
            metrics[f"winner_distance_{summary.steps}"] = summary.finalists[0].value
        tracking.log_metrics(uri, run, metrics)
        tracking.log_artifacts(uri, run, files)
        tracking.finish_run(uri, run, "FINISHED")

    def _open(self, trial: Trial) -> str:
        """The run of a trial, found or created, below the sweep's."""
        pairs = (text.partition("=") for text in trial.settings)
        params = {key: value for key, _, value in pairs}
        return self._run(
            f"trial {trial.number}",
            f"{self._key}-{trial.fingerprint}",
            {"number": str(trial.number), "origin": trial.origin, **params},
            {PARENT_TAG: self._parent_run(), "cmforge.trial": trial.fingerprint},
        )

    def _parent_run(self) -> str:
        with self._opening:  # trials' threads ask at once
            return self._found_parent()

    def _found_parent(self) -> str:
        if self._parent is None:
            sweep = self._sweep
            self._parent = self._run(
                f"sweep {sweep.name}",
                f"sweep-{self._key}",
                {
                    "stage": sweep.stage,
                    "search": sweep.search,
                    "scheduler": sweep.scheduler,
                    "probes": str(sweep.probes),
                    "samples": str(sweep.samples),
                    "steps": str(sweep.steps),
                    "budget": str(sweep.budget),
                },
                {"cmforge.sweep": self._key},
            )
        return self._parent

    def _run(
        self, name: str, fingerprint: str, params: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        ctx = self._ctx
        root = tracking.artifact_root(ctx.workspace)
        return tracking.open_run(
            ctx.tracking_uri, ctx.experiment, name, fingerprint, root, params, tags
        )
