"""A sweep in MLflow: one parent run, one child per trial, the same ones however often it resumes.

A trial's parameters are written once; its curves are over the schedule fraction k/K, as MLflow's
integer step in thousandths. The runs are found by tags, so a killed sweep goes on in them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from infra import tracking
from pipelines.dag import StepContext
from pipelines.sweep import SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, SweepSummary, Trial

# A stopped trial is no failure, and it is not finished.
STATUS = {COMPLETED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED", RUNNING: "KILLED"}
PARENT_TAG = "mlflow.parentRunId"


class SweepRuns:
    """The runs of one sweep. A server that fails costs metrics, never the sweep."""

    def __init__(self, ctx: StepContext, sweep: SweepConfig, key: str) -> None:
        self._ctx, self._sweep, self._key = ctx, sweep, key
        self._parent: str | None = None
        self._writers: dict[int, tracking.MetricWriter] = {}
        self._shown: dict[int, int] = {}

    def show(self, trial: Trial) -> None:
        """Log what is new of a trial; waits for nothing."""
        if trial.number not in self._writers:
            self._writers[trial.number] = tracking.MetricWriter(
                self._ctx.tracking_uri, partial(self._open, trial)
            )
        writer = self._writers[trial.number]
        for probe in trial.probes[self._shown.get(trial.number, 0) :]:
            found = {f"distance_{steps}": probe.lowest(steps) for steps in (1, 2)}
            metrics = {name: low.value for name, low in found.items() if low is not None}
            metrics |= {"images": float(probe.images), "train_seconds": probe.seconds}
            writer.log(round(1000 * probe.fraction), metrics)
        self._shown[trial.number] = len(trial.probes)

    def close(self, states: Mapping[int, str]) -> None:
        """End the runs of all trials as they ended."""
        for number, writer in self._writers.items():
            writer.close(STATUS[states.get(number, RUNNING)])
        self._writers = {}

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
