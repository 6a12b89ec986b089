"""Greedy search of multistep sampling's noise levels (Sec. 3, Song et al. 2023).

Levels are found one at a time, each below the last, those before it fixed. The paper's ternary
search takes the distance for unimodal over the level. It is not: low down a second step changes
little, and high up it draws almost another image, whose distance differs by chance. So a coarse
grid finds the two deepest valleys, golden section in ln sigma their floors, and a larger sample
decides. The objective has common random numbers: the same list has the same value again.
"""

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass

Sigmas = tuple[float, ...]
"""Noise levels of one sampler, sigma_max first, decreasing."""
Objective = Callable[[Sequence[Sigmas]], Sequence[float]]
"""Values to minimise, of lists that may be measured side by side; not finite is infinitely bad."""

GOLDEN = (3 - math.sqrt(5)) / 2  # share of the longer half at which a valley is cut
DIGITS = 4  # of a level: it is what people read and type
VALLEYS = 2  # that are searched to the floor
FINALISTS = 1 + VALLEYS  # lists that are confirmed, at most: the default, and the floors


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was found for one number of steps."""

    default: Sigmas
    found: Sigmas  # lowest in the search
    confirmed: dict[Sigmas, float]  # the finalists on the larger sample, the default among them
    kept: Sigmas  # the lowest of them; of equals the default

    @property
    def steps(self) -> int:
        return len(self.kept)


def search(
    objective: Objective,
    confirm: Objective,
    default_of: Callable[[int], Sigmas],
    *,
    lowest: float,
    steps: int,
    grid: int,
    tolerance: float,
    evaluations: int,
    known: MutableMapping[Sigmas, float] | None = None,
) -> list[Outcome]:
    """Lists of 2, 3, ... `steps` levels; fewer where no room is left above `lowest`.

    Each extends the one before it; where that is a default which extends nothing (a Karras grid),
    the one found in its place. The floors of two valleys have to beat `default_of(length)` in
    `confirm`, or the default stays. `known` is the memory, list -> value: what is in it is not
    measured again.
    """
    known = {} if known is None else known
    chosen = default_of(1)
    outcomes: list[Outcome] = []
    for count in range(2, steps + 1):
        if math.log(chosen[-1] / lowest) <= 2 * tolerance:
            break
        default = default_of(count)
        floors = next_level(
            objective,
            chosen,
            lowest=lowest,
            grid=grid,
            tolerance=tolerance,
            evaluations=evaluations,
            known=known,
            also=default[-1:] if default[:-1] == chosen else (),
        )
        finalists = dict.fromkeys([default, *floors])
        values = map(_or_worst, confirm(list(finalists)))
        confirmed = dict(zip(finalists, values, strict=True))
        kept = min(confirmed, key=confirmed.__getitem__)
        outcomes.append(Outcome(default=default, found=floors[0], confirmed=confirmed, kept=kept))
        chosen = kept if kept[:-1] == chosen else floors[0]
    return outcomes


def next_level(
    objective: Objective,
    chosen: Sigmas,
    *,
    lowest: float,
    grid: int,
    tolerance: float,
    evaluations: int,
    known: MutableMapping[Sigmas, float],
    also: Iterable[float] = (),
) -> list[Sigmas]:
    """`chosen` and one level between its last and `lowest`, at the floors of the deepest valleys.

    One list or two, the better first. A valley is what lies around a level of `grid` (or of `also`)
    that is better than its neighbours; it is narrowed until it is `tolerance` wide in ln sigma, or
    `evaluations` lists were asked for. Of equals the higher level of the grid is taken.
    """
    asked = 0

    def measure(sigmas: Sequence[float]) -> None:
        nonlocal asked
        asked += len(sigmas)
        new = [one for sigma in sigmas if (one := (*chosen, sigma)) not in known]
        if new:
            known.update(zip(new, map(_or_worst, objective(new)), strict=True))

    def value(sigma: float) -> float:
        return known[(*chosen, sigma)]

    spacing = math.log(chosen[-1] / lowest) / (grid + 1)
    levels = {_rounded(chosen[-1] * math.exp(-k * spacing)) for k in range(1, grid + 1)}
    falling = sorted({*levels, *also}, reverse=True)
    measure(falling)
    values = [math.inf, *map(value, falling), math.inf]
    dips = [
        sigma
        for number, sigma in enumerate(falling, start=1)
        if values[number - 1] > values[number] <= values[number + 1]
    ]
    floors = {}
    for best in sorted(dips, key=value)[:VALLEYS] or falling[:1]:
        above = min(chosen[-1], best * math.exp(spacing))
        below = max(lowest, best * math.exp(-spacing))
        while math.log(above / below) > tolerance and asked < evaluations:
            up, down = math.log(above / best), math.log(best / below)
            new = _rounded(best * math.exp(GOLDEN * up if up > down else -GOLDEN * down))
            measure([new])
            if value(new) < value(best):
                above, below = (above, best) if new > best else (best, below)
                best = new
            elif new > best:
                above = new
            else:
                below = new
        floors[(*chosen, best)] = value(best)
    return sorted(floors, key=floors.__getitem__)


def _rounded(sigma: float) -> float:
    return float(f"{sigma:.{DIGITS}g}")


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf
