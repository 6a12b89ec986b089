"""The drawings of a sweep's settings: parallel coordinates, and how much each axis matters."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from pipelines.svg import decades, figure, round_ticks
from pipelines.svg_sweep import (
    LINE,
    WIDTH,
    Scale,
    drawn,
    group,
    mark,
    objectives,
    polyline,
    short_keys,
    tick_label,
)
from pipelines.sweep_summary import AxisSummary, SweepSummary, Trial

# Axes go from y = CEILING down to y = FLOOR; below is the place of what has no value.
COLUMN, MARGIN = 104, 58
CEILING, FLOOR, NO_VALUE, TALL = 46.0, 266.0, 290.0, 304.0


def parallel(summary: SweepSummary) -> str:
    """An axis per searched key and the distance as the last, a line per trial.

    Choices stand in their order from the bottom up; what a trial has beyond an axis's choices or
    numbers gets a place at the top. Low distances are at the top. Of a recipe's own setting that
    names no values only the distance is marked.
    """
    keys = short_keys([axis.key for axis in summary.axes])
    axes, labels, places = [], [], []
    for i, axis in enumerate(summary.axes):
        x = MARGIN + i * COLUMN
        rest = axis.key.removesuffix(keys[axis.key]).rstrip(".")
        axes.append(
            _axis(x, keys[axis.key], rest.removeprefix(summary.stage).lstrip("."), axis.key)
        )
        seen = {trial.setting(axis.key) for trial in summary.trials if not _unnamed(trial)}
        found, ticks = _places(axis, {value for value in seen if value is not None})
        labels.append(_labels(x, ticks, "—" if None in seen else ""))
        places.append(found)
    x = MARGIN + len(summary.axes) * COLUMN
    about = f"{summary.metric} in {summary.steps} step{'s' if summary.steps > 1 else ''}"
    axes.append(_axis(x, summary.metric, "best at the top", about))
    distances = objectives(summary)
    scale, ticks = _distances(list(distances.values()))
    labels.append(_labels(x, ticks, "none" if len(distances) < len(summary.trials) else ""))

    lines = []
    for trial in drawn(summary):
        values = [trial.setting(axis.key) for axis in summary.axes]
        heights = [
            NO_VALUE if value is None else found[value]
            for value, found in zip(values, places, strict=True)
        ]
        good, end = "", NO_VALUE
        if scale is not None and trial.number in distances:
            end = scale(distances[trial.number])
            good = f" q{min(4, int(5 * (end - CEILING) / (FLOOR - CEILING)))}"
        points = [(MARGIN + i * COLUMN, y) for i, y in enumerate((*heights, end))]
        line = "" if _unnamed(trial) else polyline(points)
        lines.append(group(summary, trial, line + mark(trial.state, x, end), good))
    width = x + MARGIN + 6  # the longest label fits
    listed = ", ".join(axis.key for axis in summary.axes)
    told = f"Parallel coordinates of {len(summary.trials)} trials over {listed} and {about}"
    return (
        f'<svg class="chart parallel" viewBox="0 0 {width} {TALL:g}" '
        f'style="min-width:{0.75 * width:.0f}px;max-width:{1.3 * width:.0f}px" role="img" '
        f'aria-label="{escape(told)}">{"".join((*axes, *lines, *labels))}</svg>'
    )


def _unnamed(trial: Trial) -> bool:
    """The recipe as it stands: its values are the recipe's, which a sweep does not list."""
    return trial.origin == "recipe" and not trial.settings


def _axis(x: float, name: str, before: str, whole: str) -> str:
    """One vertical axis with its name; `before` is what stands before the name in the key."""
    return (
        f'<g class="axis"><title>{escape(whole)}</title>'
        f'<text class="name" x="{x}" y="15">{escape(fit_end(name, 12))}</text>'
        f'<text class="tick before" x="{x}" y="29">{escape(fit_end(before, 15))}</text>'
        f'<line class="rule" x1="{x}" x2="{x}" y1="{CEILING:g}" y2="{FLOOR:g}"/></g>'
    )


def _labels(x: float, labels: Sequence[tuple[float, str]], missing: str) -> str:
    """The values along an axis, over the lines; `missing` is written below it, "" for not."""
    shown = [*_sparse(labels), *([(NO_VALUE, missing)] if missing else [])]
    rule = f'<line class="rule dashed" x1="{x}" x2="{x}" y1="{FLOOR:g}" y2="{NO_VALUE:g}"/>'
    return (rule if missing else "") + "".join(
        f'<text class="tick value" x="{x + 6}" y="{y + 3.5:.1f}">{escape(fit(label, 14))}</text>'
        for y, label in shown
    )


def _distances(values: Sequence[float]) -> tuple[Scale | None, list[tuple[float, str]]]:
    """From the lowest at the top to the highest, logarithmic from a factor of 5 on."""
    if not values:
        return None, []
    low, high = min(values), max(values)
    log = low > 1e-30 and high / low > 5
    ends = (low, high) if low < high else tuple(round_ticks(low, high))
    scale = Scale(ticks=ends, log=log, start=CEILING, end=FLOOR)
    inner = decades(low, high) if log else round_ticks(low, high)
    if log:
        inner = sorted(m * tick for tick in inner for m in (1, 2, 5))
    within = [tick for tick in inner if low < tick < high]
    ticks = [(scale(t), _value(t)) for t in dict.fromkeys((low, high))]
    return scale, [*ticks, *((scale(t), tick_label(t)) for t in within)]


def _value(distance: float) -> str:
    """Three digits, or two and a power of ten."""
    if distance == 0 or 1e-3 <= abs(distance) < 1e5:
        return figure(distance)
    return f"{distance:.1e}".replace("+", "")


def _places(axis: AxisSummary, seen: set[str]) -> tuple[dict[str, float], list[tuple[float, str]]]:
    """The height of each value seen, and the labels."""
    if axis.choices or axis.low is None or axis.high is None:
        names = [*axis.choices, *sorted(seen - set(axis.choices))]
        last = len(names) - 1
        rise = (FLOOR - CEILING) / last if last > 0 else 0.0
        first = FLOOR if last > 0 else (FLOOR + CEILING) / 2
        placed = {name: first - i * rise for i, name in enumerate(names)}
        return placed, [(y, name) for name, y in placed.items()]
    numbers = {value: number for value in seen if (number := _number(value, axis.log)) is not None}
    others = sorted(seen - set(numbers))
    ends = [axis.low, axis.high, *numbers.values()]
    low, high = min(ends), max(ends)
    log = axis.log and low < high
    inner = (decades if log else round_ticks)(low, high)
    ticks = (low, high) if low < high else tuple(inner)
    scale = Scale(ticks=ticks, log=log, start=FLOOR, end=CEILING + 18 * len(others))
    placed = {value: scale(number) for value, number in numbers.items()}
    above = {value: CEILING + 18 * i for i, value in enumerate(others)}
    labels = [(y, value) for value, y in above.items()]
    labels += [
        (scale(t), tick_label(t)) for t in (low, high, *(t for t in inner if low < t < high))
    ]
    return placed | above, labels


def _number(value: str, log: bool) -> float | None:
    """None where it has no place on the axis."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) and (number > 0 or not log) else None


# --- importance ----------------------------------------------------------------------------------


def importance(summary: SweepSummary) -> str:
    """A bar per axis, the largest share first; "" when no axis has one."""
    shares = [(a.importance, a.key) for a in summary.axes if a.importance is not None]
    shares = [(share, key) for share, key in shares if math.isfinite(share)]
    if not shares:
        return ""
    shares.sort(key=lambda pair: (-pair[0], pair[1]))
    largest = max(shares[0][0], 1e-12)
    room = WIDTH - 52  # the longest bar's; its percentage stands behind it
    rows = []
    for i, (share, key) in enumerate(shares):
        y = 14 + 34 * i
        length = room * max(share, 0.0) / largest
        rows.append(
            f"<g><title>{escape(f'{key}: {100 * share:.1f} %')}</title>"
            f'<text class="label" x="0" y="{y}">{escape(fit_end(key, 56))}</text>'
            f'<rect class="bar" x="0" y="{y + 5}" width="{length:.1f}" height="9" rx="2"/>'
            f'<text class="tick" x="{length + 6:.1f}" y="{y + 13.5}">{100 * share:.0f} %</text></g>'
        )
    told = ", ".join(f"{key} {100 * share:.0f} %" for share, key in shares)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {34 * len(shares)}" role="img" '
        f'aria-label="{escape("Importance: " + told)}">{"".join(rows)}</svg>'
    )


# --- labels --------------------------------------------------------------------------------------


def _sparse(labels: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """The first of those that would touch."""
    kept: list[tuple[float, str]] = []
    for y, label in labels:
        if all(abs(y - other) >= LINE for other, _ in kept):
            kept.append((y, label))
    return kept


def fit(label: str, letters: int) -> str:
    return label if len(label) <= letters else label[: letters - 1] + "…"


def fit_end(label: str, letters: int) -> str:
    return label if len(label) <= letters else "…" + label[len(label) - letters + 1 :]
