"""What a sweep found, as the typed value that the report, MLflow and the terminal all draw from."""

import math
from dataclasses import dataclass

from consistency.evaluation.protocol import Protocol

# How a trial stands. Stopped: by the scheduler or the time budget, before the end of its schedule.
RUNNING, COMPLETED, STOPPED, FAILED = "running", "completed", "stopped", "failed"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One distance of one sampling EMA, in the metric's unit."""

    ema: str
    steps: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A look at a trial at the schedule fraction k/K = number / of."""

    number: int
    of: int
    images: int  # seen by then
    steps: int  # optimiser steps taken by then
    seconds: float  # of training by then
    readings: tuple[Reading, ...]

    @property
    def fraction(self) -> float:
        return self.number / self.of

    def lowest(self, steps: int) -> Reading | None:
        """The best EMA's reading with so many sampling steps; None when none is finite."""
        found = [r for r in self.readings if r.steps == steps and math.isfinite(r.value)]
        return min(found, key=lambda reading: reading.value, default=None)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting and how it went."""

    number: int
    settings: tuple[str, ...]  # `key=value` of every axis that is active, in the space's order
    origin: str  # "recipe": the setting the recipe has; "random" | "tpe"
    fingerprint: str  # of its step `trial`
    state: str = RUNNING
    reason: str = ""  # of a failure
    probes: tuple[Probe, ...] = ()

    def objective(self, steps: int) -> float | None:
        """The distance at the last probe; None before the first, infinite when none is finite."""
        if not self.probes:
            return None
        lowest = self.probes[-1].lowest(steps)
        return math.inf if lowest is None else lowest.value

    @property
    def images(self) -> int:
        return self.probes[-1].images if self.probes else 0

    @property
    def fraction(self) -> float:
        return self.probes[-1].fraction if self.probes else 0.0

    def setting(self, key: str) -> str | None:
        """The value of an axis, as written; None where the axis is not active."""
        found = (text.partition("=") for text in self.settings)
        return next((value for name, _, value in found if name == key), None)


@dataclass(frozen=True, kw_only=True)
class AxisSummary:
    """An axis as plots need it. `choices` are empty for a range."""

    key: str
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    log: bool
    importance: float | None  # share in [0, 1] of the axes' effect; None: too few trials


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A trial's curriculum at fractions of its length; N and mu are None where it has none.

    gap: 1 - r/t at t = 1, the common measure of grids (N) and of ratio pairs (no N).
    """

    trial: int
    fractions: tuple[float, ...]
    N: tuple[int, ...] | None
    mu: tuple[float, ...] | None
    gap: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """One of the best, measured again with more samples and several seed blocks."""

    trial: int
    ema: str
    values: tuple[float, ...]  # one per seed block
    protocol: Protocol

    @property
    def value(self) -> float:
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True, kw_only=True)
class SweepSummary:
    """A finished sweep."""

    name: str
    stage: str  # "isolate" | "distill"
    recipe: str
    metric: str  # "fd_domain", "fid"
    unit: str  # "%" or ""
    steps: int  # sampling steps of the objective
    samples: int  # per reading
    search: str
    scheduler: str
    images: int  # one trial's whole schedule
    axes: tuple[AxisSummary, ...]
    trials: tuple[Trial, ...]  # in the order of their numbers
    schedules: tuple[Schedule, ...]  # of the best and the worst
    finalists: tuple[Finalist, ...]  # best first
    winner: int
    settings: tuple[str, ...]  # overrides of the recipe that make the winner, its EMA first
    command: str  # what a person types to have it

    @property
    def full_images(self) -> int:
        """What all trials to their ends would have cost."""
        return len(self.trials) * self.images

    @property
    def spent_images(self) -> int:
        return sum(trial.images for trial in self.trials)

    def trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)

    def ranked(self) -> list[Trial]:
        """Best first: who got further in the schedule, then the lower distance."""

        def rank(trial: Trial) -> tuple[float, float, int]:
            objective = trial.objective(self.steps)
            return (-trial.fraction, math.inf if objective is None else objective, trial.number)

        return sorted(self.trials, key=rank)
