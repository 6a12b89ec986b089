"""Summaries of sweeps for tests that need some, not any in particular."""

import dataclasses
import math
import random
from typing import Any

from pipelines.sweep_summary import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    AxisSummary,
    Finalist,
    Probe,
    Reading,
    Schedule,
    SweepSummary,
    Trial,
)
from tests.scores import protocol


def axis(key: str, *choices: str, **changes: Any) -> AxisSummary:
    fields = {"low": None, "high": None, "log": False, "importance": None, **changes}
    return AxisSummary(key=key, choices=choices, **fields)


def trial(number: int, values: tuple[float, ...], *settings: str, **changes: Any) -> Trial:
    """Distances in two steps at the first of four probes, 1,000 images apart; +1 in one step."""
    probes = tuple(
        Probe(
            number=i + 1,
            of=4,
            images=1_000 * (i + 1),
            steps=10 * (i + 1),
            seconds=1.0 * (i + 1),
            readings=(
                Reading(ema="power-0.1", steps=2, value=value),
                Reading(ema="power-0.05", steps=2, value=2 * value if value > 0 else value),
                Reading(ema="power-0.1", steps=1, value=value + 1),
            ),
        )
        for i, value in enumerate(values)
    )
    fields: dict[str, Any] = {
        "origin": "tpe" if number else "recipe",
        "state": COMPLETED,
        "fingerprint": f"{number:x}" * 8,
        **changes,
    }
    return Trial(number=number, settings=settings, probes=probes, **fields)


def summary(axes: tuple[AxisSummary, ...], *trials: Trial, **changes: Any) -> SweepSummary:
    fields: dict[str, Any] = {
        "name": "isolation",
        "stage": "isolate",
        "recipe": "quickstart",
        "metric": "fd_domain",
        "unit": "%",
        "steps": 2,
        "samples": 500,
        "search": "tpe",
        "scheduler": "asha",
        "images": 4_000,
        "schedules": (),
        "finalists": (),
        "winner": 0,
        "settings": (),
        "command": "cmforge run quickstart",
    }
    made = SweepSummary(axes=axes, trials=trials, **fields)
    return dataclasses.replace(made, **changes)


def schedule(number: int, **changes: Any) -> Schedule:
    fields: dict[str, Any] = {"N": None, "mu": None, "gap": None, **changes}
    return Schedule(trial=number, fractions=(0.0, 0.25, 0.5, 1.0), **fields)


def finalist(number: int, *values: float) -> Finalist:
    measured = protocol(steps=2, samples=2_000, seed=4, seed_blocks=len(values))
    return Finalist(trial=number, ema="power-0.1", values=values, protocol=measured)


AXES = (
    axis("isolate.init", "scratch", "teacher", "distilled"),
    axis("isolate.dropout", low=0.0, high=10.0),
    axis("isolate.lr", low=1.0, high=100.0, log=True),
)
THREE = summary(
    AXES,
    trial(0, (3.0,), "isolate.init=scratch", "isolate.dropout=0", "isolate.lr=1"),
    trial(1, (2.0,), "isolate.init=teacher", "isolate.dropout=5", "isolate.lr=10"),
    trial(2, (1.0,), "isolate.init=distilled", "isolate.dropout=10", "isolate.lr=100"),
    winner=2,
)


def ordinary(count: int = 16, axes: int = 4) -> SweepSummary:
    """Many trials, every state, half of the axes choices, some inactive."""
    draw = random.Random(count)
    searched = [
        axis(f"isolate.part{i}.a_long_name_{i}", *"abc", importance=draw.random())
        if i % 2
        else axis(f"isolate.part{i}.x", low=0.1, high=7.3, log=i % 4 == 0, importance=0.1)
        for i in range(axes)
    ]
    trials = []
    for number in range(count):
        chosen = [
            f"{a.key}={draw.choice(a.choices) if a.choices else draw.uniform(0.1, 7.3)}"
            for i, a in enumerate(searched)
            if i < 2 or draw.random() < 0.7
        ]
        state = draw.choice((COMPLETED, STOPPED, FAILED, RUNNING)) if number else COMPLETED
        best, seen = draw.uniform(0.5, 3), 4 if state == COMPLETED else draw.randint(0, 3)
        trials.append(
            trial(number, tuple(best + 30 / 4**i for i in range(seen)), *chosen, state=state)
        )
    drawn = [t.number for t in summary((), *trials).ranked()]
    drawn = list(dict.fromkeys((*drawn[:3], *drawn[-3:])))
    grids = {"mu": (0.9, 0.95, 0.99, 0.999), "gap": (0.9, 0.5, 0.1, 0.01)}
    schedules = [
        schedule(number, N=(10, 20, 40, 80 * (i + 1)), **grids) for i, number in enumerate(drawn)
    ]
    schedules[1] = schedule(drawn[1], gap=(0.5, 0.25, 0.125, 0.06))
    return summary(
        tuple(searched),
        *trials,
        schedules=tuple(schedules),
        winner=drawn[0],
        finalists=tuple(finalist(number, 1.0, 1.2, 1.1) for number in drawn[:3]),
    )


EDGES = {
    "ordinary": ordinary(),
    "large": ordinary(30, 12),
    "one trial": summary(AXES, THREE.trials[0]),
    "no axis": summary((), trial(0, (2.0,))),
    "no trial": summary(AXES),
    "no reading": summary(AXES, trial(0, (), "isolate.init=teacher", state=RUNNING)),
    "all failed": summary(AXES, *(trial(i, (), state=FAILED, reason="diverged") for i in range(3))),
    "none finite": summary(AXES, *(trial(i, (math.nan, math.inf), state=FAILED) for i in range(3))),
    "zeros": summary(AXES, trial(0, (0.0, 0.0)), trial(1, (0.0,))),
    "wide apart": summary(AXES, trial(0, (1e9, 1e4, 1e-3)), trial(1, (1e25,))),
    "many choices": summary(
        (axis("isolate.kind", *(f"value number {i}" for i in range(40))),),
        *(trial(i, (1.0 + i,), f"isolate.kind=value number {i}") for i in range(40)),
    ),
    "long names": summary(
        (axis(f"isolate.{'part' * 9}.{'x' * 30}", "y" * 40, "z" * 40),) * 3,
        trial(1, (1.0,), f"isolate.{'part' * 9}.{'x' * 30}={'y' * 40}"),
        winner=1,
    ),
    "no room between": summary(
        (axis("isolate.lr", low=1.0, high=1.0, log=True),), trial(0, (1.0,), "isolate.lr=1")
    ),
}
