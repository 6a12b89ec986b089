"""A trial's looks at itself: where they are, how they travel, how they are read back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from consistency.config import TrainConfig
from pipelines.sweep_summary import Probe, Reading

# Stands for a distance that is not finite: schedulers compare and average numbers.
WORST = 1e12


def marks(training: TrainConfig, count: int) -> tuple[int, ...]:
    """Images at which `count` equal parts of the schedule are over. Needs that many steps."""
    return tuple(round(training.steps * n / count) * training.batch for n in range(1, count + 1))


def report(
    lines: Sequence[Mapping[str, Any]], places: Sequence[int], objective: int
) -> dict[str, Any]:
    """What a trial tells after a probe: all lines so far, and of the last probe its number and the
    lowest distance with `objective` sampling steps. `places` are the trial's marks."""
    last = by_probe(lines)[-1]
    found = [line["value"] for line in last if line["steps"] == objective]
    return {
        "probe": _number(last, places),
        "of": len(places),
        "distance": min((value for value in found if math.isfinite(value)), default=WORST),
        "lines": [dict(line) for line in lines],
    }


def by_probe(lines: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The lines of a watch log, those of one probe together, in order."""
    grouped: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        grouped.setdefault(line["images"], []).append(line)
    return [grouped[images] for images in sorted(grouped)]


def read(
    lines: Iterable[Mapping[str, Any]], places: Sequence[int], batch: int
) -> tuple[Probe, ...]:
    """The probes of a watch log."""
    return tuple(
        Probe(
            number=_number(of_one, places),
            of=len(places),
            images=of_one[0]["images"],
            steps=of_one[0]["images"] // batch,
            seconds=of_one[0]["seconds"],
            readings=tuple(
                Reading(ema=line["ema"], steps=line["steps"], value=line["value"])
                for line in of_one
            ),
        )
        for of_one in by_probe(lines)
    )


def _number(lines: Sequence[Mapping[str, Any]], places: Sequence[int]) -> int:
    return sum(place <= lines[0]["images"] for place in places)
