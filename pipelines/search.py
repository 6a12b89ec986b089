"""Which setting is tried next: a function of what was tried so far, with no state of its own.

Optuna's samplers draw along the conditional space (define by run). TPE is multivariate and looks at
each combination of active axes by itself (`group`); trials that run count as bad ones until they
say otherwise (`constant_liar`), which keeps parallel trials apart. A trial that was stopped is told
as pruned at its last probe, so it is never compared with others' final values.
"""

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.space import Space
from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import COMPLETED, FAILED, RUNNING, Trial

if TYPE_CHECKING:
    import optuna


def propose(
    sweep: SweepConfig, trials: Sequence[Trial], number: int, attempt: int = 0
) -> tuple[str, ...]:
    """TPE's settings for trial `number` after those tried; another `attempt` may draw others."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=_seed(sweep, number, attempt),
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=sweep.startup,
        )
    return _ask(sampler, sweep, trials)


def at_random(sweep: SweepConfig, number: int, attempt: int = 0) -> tuple[str, ...]:
    """Random settings: a function of (sweep.seed, number, attempt) alone."""
    import optuna

    sampler = optuna.samplers.RandomSampler(seed=_seed(sweep, number, attempt))
    return _ask(sampler, sweep, ())


def _seed(sweep: SweepConfig, number: int, attempt: int) -> int:
    from consistency.randomness import derive_seed

    return derive_seed(sweep.seed, "trial", number, attempt) % 2**32


def _ask(
    sampler: "optuna.samplers.BaseSampler", sweep: SweepConfig, trials: Sequence[Trial]
) -> tuple[str, ...]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler, direction="minimize")
    space = Space(sweep.space)
    for trial in trials:
        if trial.settings:
            study.add_trial(_told(trial, space, sweep.steps))
    return space.settings(_Drawn(study.ask()))


class _Drawn:
    """Draws from an Optuna trial."""

    def __init__(self, trial: "optuna.Trial") -> None:
        self._trial = trial

    def choose(self, name: str, choices: tuple[str, ...]) -> str:
        return str(self._trial.suggest_categorical(name, choices))

    def number(self, name: str, axis: Axis) -> float | int:
        assert axis.range is not None
        low, high = axis.range
        if axis.integer:
            return self._trial.suggest_int(name, int(low), int(high), log=axis.log)
        return self._trial.suggest_float(name, low, high, log=axis.log)


class _Replayed:
    """Draws what a trial was, and notes the distributions it came from."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, Any] = {}

    def choose(self, name: str, choices: tuple[str, ...]) -> str:
        import optuna

        value = self._trial.setting(_key(name))
        assert value in choices, f"trial {self._trial.number} has no {name} of this space"
        self.params[name] = value
        self.distributions[name] = optuna.distributions.CategoricalDistribution(choices)
        return value

    def number(self, name: str, axis: Axis) -> float | int:
        import optuna

        assert axis.range is not None
        text = self._trial.setting(_key(name))
        assert text is not None, f"trial {self._trial.number} has no {name}"
        value = int(text) if axis.integer else float(text)
        low, high = axis.range
        self.params[name] = value
        self.distributions[name] = (
            optuna.distributions.IntDistribution(int(low), int(high), log=axis.log)
            if axis.integer
            else optuna.distributions.FloatDistribution(low, high, log=axis.log)
        )
        return value


def _key(name: str) -> str:
    """An axis' key, of the name that tells it from another axis of the same key."""
    return name.partition("#")[0]


def _told(trial: Trial, space: Space, steps: int) -> "optuna.trial.FrozenTrial":
    """A trial as Optuna knows it."""
    import optuna

    States = optuna.trial.TrialState
    replayed = _Replayed(trial)
    assert space.settings(replayed) == trial.settings, f"trial {trial.number} is of another space"
    lows = {probe.number: probe.lowest(steps) for probe in trial.probes}
    seen = {number: math.inf if low is None else low.value for number, low in lows.items()}
    state, value = States.PRUNED, None
    if trial.state == COMPLETED and math.isfinite(seen[max(seen)]):
        state, value = States.COMPLETE, seen[max(seen)]
    elif trial.state == RUNNING:
        state = States.RUNNING
    elif trial.state == FAILED:
        seen = {}  # pruned before the first look: the worst there is
    return optuna.trial.create_trial(
        state=state,
        value=value,
        params=replayed.params,
        distributions=replayed.distributions,
        intermediate_values={number: low for number, low in seen.items() if math.isfinite(low)},
    )
