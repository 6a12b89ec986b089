"""From a sweep's trials to its summary."""

from collections.abc import Iterable, Sequence
from typing import Any

from pipelines.sweep import Axis, SweepConfig
from pipelines.sweep_summary import AxisSummary, Trial

FEWEST = 6  # trials below which a share of the effect would be noise


def axes_of(sweep: SweepConfig, trials: Sequence[Trial]) -> tuple[AxisSummary, ...]:
    """The axes in their order; two of one key (under other conditions) are one."""
    shares = importance(sweep, trials)
    merged: dict[str, AxisSummary] = {}
    for axis in sweep.space:
        before = merged.get(axis.key)
        choices = (*before.choices, *axis.choice) if before else axis.choice
        ranges = [one.range for one in sweep.space if one.key == axis.key and one.range]
        merged[axis.key] = AxisSummary(
            key=axis.key,
            choices=_in_order(dict.fromkeys(choices)),
            low=min((low for low, _ in ranges), default=None),
            high=max((high for _, high in ranges), default=None),
            log=axis.log or (before is not None and before.log),
            importance=shares.get(axis.key),
        )
    return tuple(merged.values())


def _in_order(choices: Iterable[str]) -> tuple[str, ...]:
    """Numbers by size, words as they are listed."""
    listed = tuple(choices)
    try:
        return tuple(sorted(listed, key=float))
    except ValueError:
        return listed


def importance(sweep: SweepConfig, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each axis in what a random forest needs to tell good trials from bad ones.

    All trials are compared at their first probe, the one schedule fraction that every one reached;
    on a log scale, as distances spread over decades. An axis that is not active counts as a value
    of its own. Empty with too few trials.
    """
    told = [(trial, trial.probes[0].lowest(sweep.steps)) for trial in trials if trial.probes]
    rows = [(trial, low.value) for trial, low in told if low is not None and trial.settings]
    keys = list(dict.fromkeys(axis.key for axis in sweep.space))
    if len(rows) < FEWEST:
        return {}
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    table = np.array([[_coded(sweep.space, trial, key) for key in keys] for trial, _ in rows])
    target: Any = np.log([max(value, 1e-12) for _, value in rows])
    if np.ptp(target) == 0:  # no axis tells them apart
        return {}
    forest = RandomForestRegressor(n_estimators=200, random_state=0, min_samples_leaf=2)
    forest.fit(table, target)
    shares = forest.feature_importances_
    return dict(zip(keys, (float(share) for share in shares), strict=True))


def _coded(space: Sequence[Axis], trial: Trial, key: str) -> float:
    """An axis' value as a number: the place of a choice, a range's own; -1 where it is inactive."""
    value = trial.setting(key)
    if value is None:
        return -1.0
    choices = [choice for axis in space if axis.key == key for choice in axis.choice]
    return float(choices.index(value)) if value in choices else float(value)
