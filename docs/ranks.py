"""Does ranking trials early predict how they end: at equal schedule fraction, or at equal step?

    cmforge tune quickstart --sweep docs/ranks.yaml
    python docs/ranks.py PATH/OF/summary.json

Reads a finished sweep whose trials all ran to their ends, with batches that differ. At a fraction f
every trial has spent the share f of its images. At an equal step s they have spent shares that
differ; s is taken where the mean share is f too, so both columns cost the same. Between probes a
distance is interpolated in its logarithm; a trial that ended before step s keeps its last distance.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from pipelines.artifacts import from_json
from pipelines.sweep_summary import COMPLETED, SweepSummary, Trial

Curve = tuple[list[float], list[float]]  # where, log distance


def curve(trial: Trial, steps: int, by: str) -> Curve:
    """Log distances over the schedule fraction, or over optimiser steps."""
    lows = [(probe, probe.lowest(steps)) for probe in trial.probes]
    kept = [(probe, low.value) for probe, low in lows if low is not None]
    where = [probe.fraction if by == "fraction" else float(probe.steps) for probe, _ in kept]
    return where, [math.log(value) for _, value in kept]


def ranked_at(curves: Sequence[Curve], where: float) -> list[float]:
    """Every trial's log distance there; NaN before its first probe."""
    return [float(np.interp(where, *one, left=math.nan)) for one in curves]


def table(summary: SweepSummary) -> list[tuple[float, float, int, float]]:
    """(fraction, Spearman at equal fraction, step, Spearman at equal step) per probe but the last;
    rows where a trial has no distance yet at the step are left out."""
    trials = [trial for trial in summary.trials if trial.state == COMPLETED]
    by_fraction = [curve(trial, summary.steps, "fraction") for trial in trials]
    by_step = [curve(trial, summary.steps, "steps") for trial in trials]
    final = [values[-1] for _, values in by_fraction]
    lengths = [trial.probes[-1].steps for trial in trials]
    rows = []
    for probe in trials[0].probes[:-1]:
        step = _step_of_mean_share(probe.fraction, lengths)
        at_step = ranked_at(by_step, step)
        if any(math.isnan(value) for value in at_step):
            continue
        at_fraction = ranked_at(by_fraction, probe.fraction)
        rows.append(
            (
                probe.fraction,
                float(spearmanr(at_fraction, final).statistic),
                round(step),
                float(spearmanr(at_step, final).statistic),
            )
        )
    return rows


def _step_of_mean_share(share: float, lengths: Sequence[int]) -> float:
    """The step at which the mean over trials of min(1, step / K) is `share`."""
    low, high = 0.0, float(max(lengths))
    for _ in range(60):
        middle = (low + high) / 2
        mean = float(np.mean([min(1.0, middle / K) for K in lengths]))
        low, high = (middle, high) if mean < share else (low, middle)
    return low


def main(path: str) -> None:
    summary: SweepSummary = from_json(SweepSummary, json.loads(Path(path).read_text()))
    rows = table(summary)
    lengths = sorted({trial.probes[-1].steps for trial in summary.trials if trial.probes})
    count = sum(trial.state == COMPLETED for trial in summary.trials)
    print(f"{count} trials of {summary.images:,} images in {lengths} steps; Spearman with the end")
    print("| cost | k/K equal | step equal | at step |\n| --- | --- | --- | --- |")
    for fraction, equal_fraction, step, equal_step in rows:
        print(f"| {fraction:.2f} | {equal_fraction:.2f} | {equal_step:.2f} | {step} |")
    means = np.mean([(row[1], row[3]) for row in rows], axis=0)
    print(f"| mean | {means[0]:.2f} | {means[1]:.2f} | |")


if __name__ == "__main__":
    main(sys.argv[1])
