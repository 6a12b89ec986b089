"""Greedy search of multistep sampling's noise levels (Sec. 3, Song et al. 2023).

Levels are found one at a time, each below the last, those before it fixed. The paper's ternary
search takes the distance for unimodal over the level, which it is not near the ends: there a second
step changes nothing. So a coarse grid finds the valley, and golden section in ln sigma its floor.
The objective is measured with common random numbers: the same list has the same value again.
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
FINALISTS = 3  # lists that are confirmed, at most: the default, the best found, the runner-up


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

    A list begins with the one before it, if that was found, not the default. The best of each length
    and the runner-up have to beat `default_of(length)` in `confirm`, or the default stays. `known`
    is the memory: list -> value; what is in it is not measured again.
    """
    known = {} if known is None else known
    chosen = default_of(1)
    outcomes: list[Outcome] = []
    for count in range(2, steps + 1):
        if math.log(chosen[-1] / lowest) <= 2 * tolerance:
            break
        default = default_of(count)
        found = next_level(
            objective,
            chosen,
            lowest=lowest,
            grid=grid,
            tolerance=tolerance,
            evaluations=evaluations,
            known=known,
            also=default[-1:] if default[:-1] == chosen else (),
        )
        finalists = dict.fromkeys([default, found, *_runner_up(found, known, tolerance)])
        values = map(_or_worst, confirm(list(finalists)))
        confirmed = dict(zip(finalists, values, strict=True))
        kept = min(confirmed, key=confirmed.__getitem__)
        outcomes.append(Outcome(default=default, found=found, confirmed=confirmed, kept=kept))
        chosen = kept if kept[:-1] == chosen else found
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
) -> Sigmas:
    """`chosen` and one level between its last and `lowest`, where the objective is lowest.

    The valley around the best of `grid` levels (and of `also`) is narrowed until it is `tolerance`
    wide in ln sigma, or `evaluations` lists were asked for. Of equals the higher level is taken
    from the grid, the earlier one after that.
    """
    asked = 0

    def measure(sigmas: Iterable[float]) -> None:
        nonlocal asked
        lists = [(*chosen, sigma) for sigma in sigmas]
        asked += len(lists)
        new = [one for one in lists if one not in known]
        if new:
            known.update(zip(new, map(_or_worst, objective(new)), strict=True))

    def value(sigma: float) -> float:
        return known[(*chosen, sigma)]

    spacing = math.log(chosen[-1] / lowest) / (grid + 1)
    levels = {_rounded(chosen[-1] * math.exp(-k * spacing)) for k in range(1, grid + 1)}
    levels = {*levels, *also}
    measure(sorted(levels, reverse=True))
    best = min(sorted(levels, reverse=True), key=value)
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
    return (*chosen, best)


def _runner_up(
    found: Sigmas, known: MutableMapping[Sigmas, float], tolerance: float
) -> list[Sigmas]:
    """The next best level beside the found one's own valley floor; [] when there is none."""
    others = [
        one
        for one, value in known.items()
        if one[:-1] == found[:-1]
        and abs(math.log(one[-1] / found[-1])) > tolerance
        and math.isfinite(value)
    ]
    return [min(others, key=known.__getitem__)] if others else []


def _rounded(sigma: float) -> float:
    return float(f"{sigma:.{DIGITS}g}")


def _or_worst(value: float) -> float:
    return value if math.isfinite(value) else math.inf
