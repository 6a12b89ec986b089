"""The drawings of a sweep as inline SVG. Text in, text out.

Every trial is one group `<g class="trial ...">` with its number and a title; what a trial is (its
state, the winner, the recipe's own setting, how good) are CSS classes, as in svg.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from pipelines.svg import Points, decades, round_ticks, short
from pipelines.sweep_summary import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    SweepSummary,
    Trial,
)

# Charts: the frame inside which values lie. Labels of lines stand to the right of it.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 56, 376, 12, 196
LINE = 12  # between labels, so that none touches another


def text(summary: SweepSummary, value: float | None) -> str:
    """A distance with its unit; "–" where nothing was measured."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f} %" if summary.unit == "%" else f"{value:.4g}"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's shortest ending that no other key has."""

    def endings(key: str) -> list[str]:
        parts = key.split(".")
        return [".".join(parts[i:]) for i in reversed(range(len(parts)))]

    taken = [ending for key in keys for ending in endings(key)]
    return {key: next((e for e in endings(key) if taken.count(e) == 1), key) for key in keys}


def compact(summary: SweepSummary, trial: Trial) -> str:
    """Its settings with short keys."""
    names = short_keys([axis.key for axis in summary.axes])
    pairs = (setting.partition("=") for setting in trial.settings)
    return ", ".join(f"{names.get(key, key)}={value}" for key, _, value in pairs)


def tick_label(value: float) -> str:
    """A tick: 0.25, 40, 20k, 1e-05, 1e15."""
    return short(value) if abs(value) < 1e12 else f"{value:.3g}".replace("+", "")


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# --- scales, labels, lines -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to pixels: ticks[0] lies at `start`, ticks[-1] at `end`."""

    ticks: tuple[float, ...]
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        by: Callable[[float], float] = math.log10 if self.log else float
        low, high = by(self.ticks[0]), by(self.ticks[-1])
        return self.start + (self.end - self.start) * (by(value) - low) / (high - low)


def enclosing(values: Sequence[float], start: float, end: float) -> Scale:
    """Round ticks around all values; logarithmic when the best would lie flat on the axis."""
    log = min(values) > 1e-30 and max(values) / min(values) > 20
    ticks = (decades if log else round_ticks)(min(values), max(values))
    return Scale(ticks=tuple(ticks), log=log, start=start, end=end)


def _apart(labels: Sequence[tuple[float, str]], low: float, high: float) -> list[float]:
    """Where to write labels that want to stand at these heights: at least LINE apart, in order."""
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    placed = [0.0] * len(labels)
    y = low - LINE
    for i in order:  # pushed down by the one above ...
        y = placed[i] = max(labels[i][0], y + LINE)
    y = high + LINE
    for i in reversed(order):  # ... and back up from the edge
        y = placed[i] = min(placed[i], y - LINE)
    return placed


def polyline(points: Points, css: str = "line") -> str:
    listed = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{listed}"/>'


def _stairs(points: Points) -> Points:
    """Each value held until the next."""
    corners = list(points[:1])
    for x, y in points[1:]:
        corners += [(x, corners[-1][1]), (x, y)]
    return corners


def mark(state: str, x: float, y: float) -> str:
    """Completed: a disc. Stopped: a ring. Failed: a cross. Running: a triangle."""
    at = f"translate({x:.1f},{y:.1f})"
    if state in (COMPLETED, STOPPED):
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
    if state == FAILED:
        return f'<path class="mark" transform="{at}" d="M-3,-3 L3,3 M-3,3 L3,-3"/>'
    return f'<path class="mark" transform="{at}" d="M-3.6,3 L3.6,3 L0,-3.6 Z"/>'


# --- trials --------------------------------------------------------------------------------------


def winner(summary: SweepSummary) -> Trial | None:
    """None where no trial has a finite distance, whatever number the summary bears."""
    found = (t for t in summary.trials if t.number == summary.winner)
    trial = next(found, None)
    return None if trial is None or not finite(trial.objective(summary.steps)) else trial


def own(summary: SweepSummary) -> Trial | None:
    """The trial with the recipe's own setting."""
    return next((t for t in summary.trials if t.origin == "recipe"), None)


def drawn(summary: SweepSummary) -> list[Trial]:
    """Worst first, so that the better ones lie on top; the winner last."""
    best = winner(summary)
    return sorted(reversed(summary.ranked()), key=lambda t: (t is best, t.origin == "recipe"))


def css(summary: SweepSummary, trial: Trial) -> str:
    states = (RUNNING, COMPLETED, STOPPED, FAILED)
    names = ["trial", trial.state if trial.state in states else RUNNING]
    if trial is winner(summary):
        names.append("winner")
    elif trial.origin == "recipe":
        names.append("recipe")
    return " ".join(names)


def group(summary: SweepSummary, trial: Trial, inner: str, more: str = "") -> str:
    value = text(summary, trial.objective(summary.steps))
    title = f"trial {trial.number}, {trial.state} at k/K = {trial.fraction:.3g}, {value}"
    title += f": {compact(summary, trial)}" if trial.settings else ""
    return (
        f'<g class="{css(summary, trial)}{more}" data-trial="{trial.number}">'
        f"<title>{escape(title)}</title>{inner}</g>"
    )


def objectives(summary: SweepSummary) -> dict[int, float]:
    """The finite ones, by number."""
    found = ((t.number, t.objective(summary.steps)) for t in summary.trials)
    return {n: value for n, value in found if value is not None and math.isfinite(value)}


# --- charts --------------------------------------------------------------------------------------


def _frame(xs: Scale, ys: Scale) -> list[str]:
    """Rules at the y ticks, and both axes' labels."""
    parts = [
        f'<line class="rule" x1="{LEFT}" x2="{xs.end:g}" y1="{ys(t):.1f}" y2="{ys(t):.1f}"/>'
        f'<text class="tick y" x="{LEFT - 7}" y="{ys(t) + 3.5:.1f}">{tick_label(t)}</text>'
        for t in ys.ticks
    ]
    parts += [
        f'<text class="tick x" x="{xs(t):.1f}" y="{HEIGHT - 8}">{tick_label(t)}</text>'
        for t in xs.ticks
    ]
    return parts


def _chart(told: str, log: bool, parts: Sequence[str]) -> str:
    told = f"{told}, {'logarithmic' if log else 'linear'} axis"
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>'
    )


def _names(ends: Sequence[tuple[float, float, str]]) -> str:
    """Trials' numbers to the right of where their lines end, as many as there is room for."""
    ends = ends[: int((BOTTOM - TOP) / LINE)]
    heights = _apart([(y, number) for _, y, number in ends], TOP, BOTTOM)
    return "".join(
        f'<text class="tick number" x="{x + 6:.1f}" y="{y + 3.5:.1f}">{number}</text>'
        for (x, _, number), y in zip(ends, heights, strict=True)
    )


FRACTIONS = Scale(ticks=(0.0, 0.25, 0.5, 0.75, 1.0), log=False, start=LEFT, end=RIGHT)


def schedules(summary: SweepSummary, what: Literal["N", "mu", "gap"]) -> str:
    """N, mu or the gap over k/K, of the trials that have it; "" when none has."""
    lines: dict[int, Points] = {}
    for schedule in summary.schedules:
        values = {"N": schedule.N, "mu": schedule.mu, "gap": schedule.gap}[what]
        found = zip(schedule.fractions, values or (), strict=values is not None)
        points = [(x, float(y)) for x, y in found if math.isfinite(y)]
        if points:
            lines[schedule.trial] = points
    if not lines:
        return ""
    ys = enclosing([y for points in lines.values() for _, y in points], BOTTOM, TOP)
    parts, ends = _frame(FRACTIONS, ys), []
    ranked = [trial for trial in summary.ranked() if trial.number in lines]
    for trial in ranked:
        points = [(FRACTIONS(x), ys(y)) for x, y in lines[trial.number]]
        ends.append((*points[-1], f"#{trial.number}"))
    for trial in reversed(ranked):  # the best lie on top
        points = [(FRACTIONS(x), ys(y)) for x, y in lines[trial.number]]
        parts.append(group(summary, trial, polyline(_stairs(points)), better(summary, trial)))
    names = {"N": "Grid points N", "mu": "Target decay mu", "gap": "Gap 1 - r/t"}
    told = f"{names[what]} over k/K of trials {', '.join(str(t.number) for t in ranked)}"
    return _chart(told, ys.log, [*parts, _names(ends)])


def better(summary: SweepSummary, trial: Trial) -> str:
    """Among the trials whose schedules are drawn: of the better or of the worse half."""
    numbers = {schedule.trial for schedule in summary.schedules}
    order = [t.number for t in summary.ranked() if t.number in numbers]
    return " better" if order.index(trial.number) < (len(order) + 1) // 2 else " worse"


def learning(summary: SweepSummary) -> str:
    """The distance over k/K, a line per trial; "" when no reading is finite."""
    lines: dict[int, list[list[tuple[float, float]]]] = {}
    for trial in summary.trials:
        runs: list[list[tuple[float, float]]] = [[]]
        for probe in trial.probes:  # a probe without a finite reading interrupts the line
            reading = probe.lowest(summary.steps)
            if reading is not None:
                runs[-1].append((probe.fraction, reading.value))
            elif runs[-1]:
                runs.append([])
        lines[trial.number] = [run for run in runs if run]
    values = [y for runs in lines.values() for run in runs for _, y in run]
    if not values:
        return ""
    ys = enclosing(values, BOTTOM, TOP)
    parts, ends = _frame(FRACTIONS, ys), []
    for trial in drawn(summary):
        runs = [[(FRACTIONS(x), ys(y)) for x, y in run] for run in lines[trial.number]]
        if not runs:
            continue
        inner = "".join(polyline(run) for run in runs)
        parts.append(group(summary, trial, inner + mark(trial.state, *runs[-1][-1])))
        if trial in (winner(summary), own(summary)):
            ends.append((*runs[-1][-1], f"#{trial.number}"))
    told = f"Distance over k/K of {sum(map(bool, lines.values()))} trials"
    return _chart(told, ys.log, [*parts, _names(ends)])


def front(summary: SweepSummary) -> list[tuple[int, float]]:
    """(images, distance) of the trials no other beats in both, cheapest first."""
    distances = objectives(summary)
    points = sorted(
        (t.images, distances[t.number]) for t in summary.trials if t.number in distances
    )
    best: list[tuple[int, float]] = []
    for images, distance in points:
        if not best or distance < best[-1][1]:
            best.append((images, distance))
    return best


def cost(summary: SweepSummary) -> str:
    """The last distance over the images spent, and the Pareto front; "" when none is finite."""
    distances = objectives(summary)
    if not distances:
        return ""
    bottom = BOTTOM - 14  # room for a label under the lowest mark
    ys = enclosing(list(distances.values()), bottom, TOP + 10)
    most = max(trial.images for trial in summary.trials)
    ticks = round_ticks(0.0, float(most)) if most > 0 else [0.0, 1.0]
    xs = Scale(ticks=tuple(ticks), log=False, start=LEFT, end=WIDTH - 16)
    parts = _frame(xs, ys)
    edge = [(xs(x), ys(y)) for x, y in front(summary)]
    parts.append(polyline(_stairs(edge), "front"))
    named = []
    for trial in drawn(summary):
        if trial.number in distances:
            x, y = xs(trial.images), ys(distances[trial.number])
            parts.append(group(summary, trial, mark(trial.state, x, y)))
            if trial is winner(summary):
                named.append((y, x, f"winner #{trial.number}"))
            elif trial is own(summary):
                named.append((y, x, f"recipe #{trial.number}"))
    for i, (y, x, name) in enumerate(sorted(named)):  # the upper one above, the lower one below
        above = i == 0 and (len(named) > 1 or y > TOP + 24)
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(
            f'<text class="tick number" x="{x:.1f}" y="{y - 8 if above else y + 15:.1f}" '
            f'text-anchor="{anchor}">{name}</text>'
        )
    told = f"Last distance over images spent of {len(distances)} trials, with the Pareto front"
    return _chart(told, ys.log, parts)
