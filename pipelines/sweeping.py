"""A search in progress: what is tried next, and what came of it, as `infra.tuning` asks.

What was tried is in a ledger that belongs to the search, not to how far it went: a sweep of more
trials goes on where one of fewer ended.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from infra import storage
from infra.errors import Preempted, UserError
from pipelines import probes, search, tuned
from pipelines.artifacts import Committed
from pipelines.config import RecipeSource
from pipelines.dag import Settings, StepContext
from pipelines.fingerprint import fingerprint_of
from pipelines.ledger import Ledger
from pipelines.recipe import Recipe
from pipelines.space import MOST, Space
from pipelines.steps.trial import TrialConfig
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, STOPPED, Trial
from pipelines.sweep_tracking import SweepRuns
from pipelines.training import StageConfig
from pipelines.trial import TrialJob
from pipelines.trial import run as run_trial

REDRAWS, RANDOM_DRAWS = 8, 64  # until a trial's setting must be looked for


@dataclass(frozen=True, kw_only=True)
class TuneStage:
    """Identity of the step: the search, and what is searched."""

    sweep: SweepConfig
    stage: StageConfig  # the recipe's own setting
    mid_sigma: float  # the evaluation's second level of two steps
    # The recipe that trials are variations of; `stage` holds all that matters of it.
    source: RecipeSource = field(metadata={"identity": False})

    def key(self, inputs: Mapping[str, Committed[Any]]) -> str:
        """Names the ledger: what decides which trials there are, but not how many."""
        search = replace(
            self.sweep, name="any", trials=1, minutes=None, finalists=1, finalist_samples=2
        )
        search = replace(search, finalist_blocks=1, finalist_seed=0)
        given = tuple((alias, one.fingerprint) for alias, one in inputs.items())
        return fingerprint_of((replace(self, sweep=search), given))[:16]


def ledger_of(workspace: str, config: TuneStage, inputs: Mapping[str, Any]) -> Ledger:
    return Ledger(storage.join(workspace, "sweeps", config.key(inputs)))


class Sweep:
    """A sweep as `infra.tuning` sees it: what is tried next, and what came of it."""

    def __init__(
        self, ctx: StepContext, config: TuneStage, inputs: Mapping[str, Committed[Any]]
    ) -> None:
        self.ctx, self.config, self.inputs = ctx, config, inputs
        self.sweep = config.sweep
        self.ledger = ledger_of(ctx.workspace, config, inputs)
        self.trials = {trial.number: trial for trial in self.ledger.trials()}
        self.waiting = [n for n in self.trials if n < self.sweep.trials]
        self.mistake: str | None = None
        self.preempted = False
        self.exhausted = False
        self.runs = SweepRuns(ctx, config.sweep, config.key(inputs))
        self.spent, self.started = self.ledger.seconds(), time.monotonic()
        self._cut: dict[int, tuple[tuple[int, ...], int]] = {}  # marks and batch of a trial

    def run(self) -> None:
        """Run every trial that is not over. Raises UserError for a mistake, and Preempted."""
        from infra import tuning

        cluster, sweep = self.ctx.cluster, self.sweep
        assert sweep.scheduler != "pbt", "refused before anything starts"
        here = cluster.workers == 1  # more of them are Ray Train's, which asks for their resources
        for trial in self.all():  # a kill may have come before their runs were written
            self.runs.show(trial)
        left = None if sweep.minutes is None else 60 * sweep.minutes - self.spent
        try:
            if left is None or left > 0:
                tuning.run_trials(
                    _in_trial,
                    self,
                    rule=tuning.Rule(
                        kind=sweep.scheduler,
                        probes=sweep.probes,
                        grace=sweep.grace,
                        eta=sweep.eta,
                    ),
                    cpus=cluster.cpus_per_worker if here else 0,
                    gpus=cluster.gpus_per_worker if here else 0,
                    concurrent=cluster.trials,
                    max_failures=cluster.max_failures,
                    seconds=left,
                )
        finally:
            self.runs.close()
            self._spend()
        if self.mistake is not None:
            raise UserError(self.mistake)
        if self.preempted:
            raise Preempted(f"{self.ctx.step} stopped; its trials are saved")
        in_time = sweep.minutes is None or self._seconds() < 60 * sweep.minutes
        open_trials = [t.number for t in self.all() if t.state == RUNNING]
        all_begun = self.exhausted or len(self.all()) == sweep.trials
        if in_time and (open_trials or not all_begun):
            # Tune returns when it is told to stop: what is half done must not pass for done.
            raise RuntimeError(f"the sweep was interrupted at trials {open_trials}; run it again")

    def next(self) -> tuple[int, dict[str, Any]] | None:
        if self.mistake is not None or self.preempted:
            return None
        number = self.waiting.pop(0) if self.waiting else self._begin()
        if number is None:
            return None
        self._say()
        return number, {"job": self._job(self.trials[number])}

    def heard(self, number: int, result: Mapping[str, Any], stopped: bool) -> None:
        if "mistake" in result:
            self.mistake = result["mistake"]
        if "preempted" in result:
            self.preempted = True
            return
        trial = self.trials[number]
        if "failed" in result:
            trial = replace(trial, state=FAILED, reason=result["failed"])
        elif "probe" in result:
            marks, batch = self._marks(trial)
            seen = probes.read(result["lines"], marks, batch)
            if len(seen) >= len(trial.probes):
                trial = replace(trial, probes=seen)
            if trial.state == RUNNING and result["probe"] == result["of"]:
                trial = replace(trial, state=COMPLETED)
            elif stopped:
                trial = replace(trial, state=STOPPED)
        self._keep(trial)

    def lost(self, number: int, why: str) -> None:
        if self.trials[number].state != RUNNING:
            return  # it was over; only its repetition was lost
        failures = self.ctx.cluster.max_failures + 1
        reason = f"its process died {failures} times: {why}"
        self._keep(replace(self.trials[number], state=FAILED, reason=reason))

    def _begin(self) -> int | None:
        """Draw one more trial and write it down; None when there are enough, or nothing new."""
        number = len(self.trials)
        if number >= self.sweep.trials:
            return None
        seen = {trial.fingerprint for trial in self.trials.values()}
        for origin, settings in self._drawn(number):
            try:
                job = self.job_of(settings)
            except UserError:
                if number == 0:  # the recipe as it stands
                    raise
                continue  # a combination that no recipe can have
            if job.fingerprint not in seen:
                trial = Trial(
                    number=number,
                    settings=settings,
                    origin=origin,
                    fingerprint=job.fingerprint,
                )
                self.trials[number] = self.ledger.begin(trial)
                return number
        self.exhausted = True
        return None

    def _drawn(self, number: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(origin, settings) that trial `number` may have, the first choice first.

        A sampler that has settled on the best of a space of choices proposes it over and over;
        so after REDRAWS of its own the draws are random, and in the end every combination has its
        turn.
        """
        if number == 0:
            yield "recipe", self._own()
            return
        sweep, told = self.sweep, list(self.trials.values())
        if sweep.search == "tpe" and number > sweep.startup:
            for attempt in range(REDRAWS):
                yield "tpe", search.propose(sweep, told, number, attempt)
        for attempt in range(RANDOM_DRAWS):
            yield "random", search.at_random(sweep, number, attempt)
        space = Space(sweep.space)
        if not space.has_ranges:
            for index in range(min(space.count(), MOST)):
                yield "random", space.nth(index)

    def _own(self) -> tuple[str, ...]:
        """The recipe's own values of the axes, where the space has them; else none."""
        try:
            settings = Space(self.sweep.space).settings(_Own(self.recipe((), whole=False)))
        except LookupError:
            return ()
        same = self.job_of(settings).fingerprint == self.job_of(()).fingerprint
        return settings if same else ()

    def _job(self, trial: Trial) -> TrialJob:
        job = self.job_of(trial.settings)
        return replace(job, over=trial.state != RUNNING)

    def job_of(self, settings: tuple[str, ...]) -> TrialJob:
        sweep = self.sweep
        config = TrialConfig(
            stage=StageConfig.of(self.recipe(settings, whole=False), sweep.stage),
            probes=sweep.probes,
            steps=sweep.steps,
            samples=sweep.samples,
            noise_seed=sweep.noise_seed,
            mid_sigma=self.config.mid_sigma,
            allow_rank_deficient=sweep.allow_rank_deficient,
        )
        training = config.stage.training
        if training.steps < sweep.probes:
            raise UserError(
                f"sweep.probes: {sweep.probes} looks at {training.steps} steps; lower it, or raise "
                f"{sweep.stage}.images or sweep.budget"
            )
        inputs = {name: self.inputs[name] for name in ("shard", "reference")}
        source = tuned.source_of(training, self.inputs)
        if source is not None:
            inputs["teacher"] = source
        ctx = self.ctx
        return TrialJob(
            config=config,
            inputs=inputs,
            settings=Settings(
                ctx.workspace, ctx.tracking_uri, ctx.experiment, ctx.cluster, ctx.stop
            ),
            over=False,
            retries=ctx.cluster.max_failures,
        )

    def recipe(self, settings: tuple[str, ...], *, whole: bool) -> Recipe:
        """The recipe with a trial's settings, at the trial's budget or whole."""
        stage, budget = self.sweep.stage, self.sweep.budget
        shorter: tuple[str, ...] = ()
        if budget < 1 and not whole:
            images = self.sweep.images(self.config.stage.training.images)
            shorter = (f"{stage}.images={images}",)
        return self.config.source.recipe((*self.sweep.fixed, *settings, *shorter))

    def _marks(self, trial: Trial) -> tuple[tuple[int, ...], int]:
        if trial.number not in self._cut:
            config = self.job_of(trial.settings).config
            self._cut[trial.number] = config.marks(), config.stage.training.batch
        return self._cut[trial.number]

    def _keep(self, trial: Trial) -> None:
        if trial == self.trials[trial.number] and trial.state != RUNNING:
            return  # it only said again what is known
        self.trials[trial.number] = trial
        self.ledger.update(trial)
        self._spend()
        self.runs.show(trial)
        self._say()

    def all(self) -> list[Trial]:
        return [trial for trial in self.trials.values() if trial.number < self.sweep.trials]

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def _spend(self) -> None:
        self.ledger.spend(self._seconds())

    def _say(self) -> None:
        """The live line of the step."""
        over = sum(trial.state != RUNNING for trial in self.all())
        found = [(t.number, t.objective(self.sweep.steps)) for t in self.all() if t.probes]
        best = min((value for _, value in found if value is not None), default=math.inf)
        text = f"{over} of {self.sweep.trials} trials over"
        if math.isfinite(best):
            text += f", best so far {best:.4g}"
        data = json.dumps({"said": text}).encode()
        storage.write_bytes(storage.join(self.ctx.work, "progress.json"), data)


class _Own:
    """Draws what a recipe has. LookupError where that is no value of the space."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def choose(self, name: str, choices: tuple[str, ...]) -> str:
        value = self._value(name)
        text = str(value)
        if value is None or isinstance(value, bool):
            text = "null" if value is None else text.lower()
        for choice in choices:
            if choice == text or (_number(choice) == value and value is not None):
                return choice
        raise LookupError(name)

    def number(self, name: str, axis: Axis) -> float | int:
        value = self._value(name)
        assert axis.range is not None
        low, high = axis.range
        if not isinstance(value, int | float) or not low <= value <= high:
            raise LookupError(name)
        return value

    def _value(self, name: str) -> Any:
        value: Any = self._recipe
        for part in name.partition("#")[0].split("."):
            try:
                value = getattr(value, part)
            except AttributeError as error:
                raise LookupError(name) from error
        return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _in_trial(payload: dict[str, Any]) -> None:
    from infra import tuning

    run_trial(payload["job"], tuning.report)
