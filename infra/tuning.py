"""Ray Tune, and nothing but Ray Tune: trials side by side, stopped early by a scheduler.

What to try and what came of it is the caller's (`Sweep`), who keeps it where a crash cannot reach;
Tune's own experiment files are scratch. `infra.cluster` is the other file that imports ray.
"""

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray import tune
from ray.tune import schedulers
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from infra import ray_environment, temporary

TIME, METRIC = "probe", "distance"
# Read by Tune: the sweep's own handlers and files do what these would.
_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would return an interrupted sweep as if it were done
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Sweep(Protocol):
    """Who says what is tried, and hears how it goes; called in the process of `run_trials`."""

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """Number and payload of one more trial; None when there are no more."""
        ...

    def heard(self, number: int, result: Mapping[str, Any], stopped: bool) -> None:
        """A trial reported, and whether the scheduler stopped it for that."""
        ...

    def lost(self, number: int, why: str) -> None:
        """A trial's process died too often."""
        ...


class _Held:
    """The sweep, among objects that Tune pickles: it stays in this process, and is not kept."""

    def __init__(self, sweep: Sweep | None = None) -> None:
        self.sweep = sweep

    def __reduce__(self) -> Any:
        return _Held, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Held":
        return self


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a trial is stopped: `probes` is the length of a schedule, in its equal parts.

    Trials are compared at equal parts of their schedules, however many steps these have.
    """

    kind: Literal["asha", "median", "none"]
    probes: int
    grace: int
    eta: int


def run_trials(
    trial: Callable[[dict[str, Any]], None],
    sweep: Sweep,
    *,
    rule: Rule,
    cpus: float,
    gpus: float,
    concurrent: int,
    max_failures: int,
    seconds: float | None,
) -> None:
    """Run `trial(payload)` for all that the sweep names, `concurrent` at a time.

    A trial says how it does by `report`. Processes are used again by later trials. A trial whose
    process dies is started again up to `max_failures` times. Returns when no trial is left, or
    after `seconds`.
    """
    os.environ.update(_ENVIRONMENT | ray_environment.TASKS)
    held = _Held(sweep)

    def run(config: dict[str, Any]) -> None:
        trial(config["payload"])

    with tempfile.TemporaryDirectory(dir=temporary.root()) as scratch:
        tuner = tune.Tuner(
            tune.with_resources(run, _resources(cpus, gpus)),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="min",
                num_samples=-1,
                search_alg=_Search(held),
                scheduler=_scheduler(rule, held),
                max_concurrent_trials=concurrent,
                reuse_actors=True,
                time_budget_s=seconds,
                trial_dirname_creator=_name,
                trial_name_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=max_failures),
                callbacks=[_Losses(held)],
            ),
        )
        tuner.fit()


def report(result: Mapping[str, Any]) -> None:
    """Tell the sweep how this trial does; does not return when it is stopped (SystemExit)."""
    tune.report(dict(result))


def _resources(cpus: float, gpus: float) -> Any:
    """Of a trial's process. One that only waits for workers of its own gets a sliver of the head
    node: Tune wants something, and a sliver of a CPU could be the one its workers lack."""
    if cpus == 0:
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    return {"CPU": cpus, **({"GPU": gpus} if gpus > 0 else {})}


def _name(trial: Trial) -> str:
    return f"trial-{trial.config['number']}"


class _Search(Searcher):
    """Hands the sweep's trials to Tune."""

    def __init__(self, held: _Held) -> None:
        super().__init__(metric=METRIC, mode="min")
        self._held = held

    def suggest(self, trial_id: str) -> Any:
        assert self._held.sweep is not None
        found = self._held.sweep.next()
        if found is None:
            return Searcher.FINISHED
        number, payload = found
        return {"number": number, "payload": payload}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Heard by the scheduler already."""

    # The sweep's ledger is what survives, so Tune has nothing to keep.
    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep resumes from its ledger")


class _Heard:
    """Passes every result on, with the verdict; what a resumed trial only repeats has none."""

    held: _Held

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(controller, trial, result)  # type: ignore[misc]
        last = result.get(TIME) == result.get("of")
        if result.get("repeated") or last:
            decision = schedulers.TrialScheduler.CONTINUE  # the trial itself returns at its end
        stopped = decision == schedulers.TrialScheduler.STOP
        assert self.held.sweep is not None
        self.held.sweep.heard(trial.config["number"], result, stopped)
        return decision


class _Asha(_Heard, schedulers.ASHAScheduler):
    pass


class _Median(_Heard, schedulers.MedianStoppingRule):
    pass


class _ToTheEnd(_Heard, schedulers.FIFOScheduler):
    pass


def _scheduler(rule: Rule, held: _Held) -> Any:
    found: _Heard
    match rule.kind:
        case "asha":
            found = _Asha(
                time_attr=TIME,
                max_t=rule.probes,
                grace_period=rule.grace,
                reduction_factor=rule.eta,
                brackets=1,
            )
        case "median":
            found = _Median(
                time_attr=TIME,
                grace_period=rule.grace,
                min_time_slice=rule.probes,  # never yields: a paused trial would lose its process
            )
        case "none":
            found = _ToTheEnd()  # type: ignore[no-untyped-call]
    found.held = held
    return found


class _Losses(tune.Callback):
    """Trials that Tune gave up."""

    def __init__(self, held: _Held) -> None:
        self._held = held

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        text = str(trial.get_error() or "its process died").strip().splitlines()
        assert self._held.sweep is not None
        self._held.sweep.lost(trial.config["number"], text[-1] if text else "its process died")
