"""The two drawings of the report as inline SVG: the DAG and a line chart. Text in, text out.

Colours are CSS classes, so the page's light and dark themes reach into the drawings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]


# --- numbers as people read them -----------------------------------------------------------------


def figure(value: float, digits: int = 3) -> str:
    """`digits` significant digits, no exponent for everyday magnitudes: 0.310, 12.5, 1,204."""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".")


def short(value: float) -> str:
    """Axis labels: 0.25, 40, 20k, 1.5M."""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"


def duration(seconds: float) -> str:
    """8.2 s, 1 min 02 s, 3 h 05 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# --- the DAG -------------------------------------------------------------------------------------

_BOX = (140, 72)  # width, height
LONGEST_NAME = 14  # letters that fit the box; more are set smaller,
LONGEST_SMALL_NAME = 19  # ... and more than these smaller yet


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One box. `inputs` are the edges drawn (reduced: what follows from others is left out)."""

    name: str
    lane: int  # 0 is the middle of the drawing, -1 and +1 the sides
    inputs: tuple[str, ...] = ()
    dashed: tuple[str, ...] = ()  # those of `inputs` that lend only their weights
    state: str  # "cached" | "ran" | "now"
    seconds: float | None
    fingerprint: str


def dag(stages: Sequence[Stage], *, vertical: bool = False) -> str:
    """Boxes by depth (longest path from a source) and lane; left to right, or top to bottom."""
    depth: dict[str, int] = {}
    for stage in stages:  # in topological order, as they ran
        depth[stage.name] = 1 + max((depth[name] for name in stage.inputs), default=-1)
    columns, lanes = 1 + max(depth.values()), [stage.lane for stage in stages]
    width, height = _BOX
    along, across = (height, width) if vertical else (width, height)
    gap_along, gap_across = (34, 10) if vertical else (42, 22)
    margin = 2

    def centre(stage: Stage) -> tuple[float, float]:
        a = margin + along / 2 + depth[stage.name] * (along + gap_along)
        c = margin + across / 2 + (stage.lane - min(lanes)) * (across + gap_across)
        return a, c

    def xy(a: float, c: float) -> str:
        return f"{c:g},{a:g}" if vertical else f"{a:g},{c:g}"

    by_name = {stage.name: stage for stage in stages}
    edges = []
    for stage in stages:
        for name in stage.inputs:
            (a0, c0), (a1, c1) = centre(by_name[name]), centre(stage)
            kind = " dashed" if name in stage.dashed else ""
            column = _turning_column(by_name[name], stage, stages, depth)
            turn = a0 + along / 2 + (column - depth[name]) * (along + gap_along)
            line = _route(a0 + along / 2, c0, a1 - along / 2 - 5, c1, turn, gap_along - 5, xy)
            tip = a1 - along / 2 - 1
            head = f"{xy(tip, c1)} {xy(tip - 7, c1 - 4)} {xy(tip - 7, c1 + 4)}"
            edges.append(
                f'<path class="edge{kind}" d="{line}"/><polygon class="head" points="{head}"/>'
            )

    boxes = []
    for stage in stages:
        a, c = centre(stage)
        x, y = (c, a) if vertical else (a, c)
        boxes.append(_box(stage, x - width / 2, y - height / 2))

    total_along = 2 * margin + columns * along + (columns - 1) * gap_along
    spread = max(lanes) - min(lanes)
    total_across = 2 * margin + (spread + 1) * across + spread * gap_across
    w, h = (total_across, total_along) if vertical else (total_along, total_across)
    told = ", ".join(f"{s.name} {_state(s)}" for s in stages)
    shape = "tall" if vertical else "wide"
    return (
        f'<svg class="dag {shape}" viewBox="0 0 {w} {h}" style="max-width:{w}px" role="img" '
        f'aria-label="{escape("The workflow: " + told)}">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _turning_column(
    source: Stage, target: Stage, stages: Sequence[Stage], depth: Mapping[str, int]
) -> int:
    """The column behind which an edge changes lanes: the last that keeps it clear of all boxes."""
    taken = {(depth[stage.name], stage.lane) for stage in stages}
    first, last = depth[source.name], depth[target.name]
    for column in reversed(range(first, last)):
        before = {(k, source.lane) for k in range(first + 1, column + 1)}
        after = {(k, target.lane) for k in range(column + 1, last)}
        if not taken & (before | after):
            return column
    return last - 1


def _route(
    a0: float,
    c0: float,
    a1: float,
    c1: float,
    turn: float,
    gap: float,
    xy: Callable[[float, float], str],
) -> str:
    """A line that changes lanes within one gap, the one that begins at `turn`."""
    if c0 == c1:
        return f"M{xy(a0, c0)} L{xy(a1, c1)}"
    bend = f"C{xy(turn + gap / 2, c0)} {xy(turn + gap / 2, c1)} {xy(turn + gap, c1)}"
    return f"M{xy(a0, c0)} L{xy(turn, c0)} {bend} L{xy(a1, c1)}"


def _state(stage: Stage) -> str:
    time = "" if stage.seconds is None else f", {duration(stage.seconds)}"
    return {"now": "this page"}.get(stage.state, stage.state) + time


def _box(stage: Stage, x: float, y: float) -> str:
    width, height = _BOX
    badge = {"now": "this page"}.get(stage.state, stage.state)
    pill = 5.6 * len(badge) + 12
    time = "" if stage.seconds is None else duration(stage.seconds)
    title = f"{stage.name}: {_state(stage)}; fingerprint {stage.fingerprint}"
    kind = stage.state if stage.state in ("cached", "ran", "now") else "ran"
    name = "name" if len(stage.name) <= LONGEST_NAME else "name long"
    name += " longer" if len(stage.name) > LONGEST_SMALL_NAME else ""
    return (
        f'<g transform="translate({x:g},{y:g})"><title>{escape(title)}</title>'
        f'<rect class="box" width="{width}" height="{height}" rx="12"/>'
        f'<text class="{name}" x="12" y="22">{escape(stage.name)}</text>'
        f'<rect class="pill {kind}" x="11" y="30" width="{pill:.0f}" height="16" rx="8"/>'
        f'<text class="state {kind}" x="{11 + pill / 2:.1f}" y="41.5">{escape(badge)}</text>'
        f'<text class="time" x="{17 + pill:.1f}" y="42">{time}</text>'
        f'<text class="print" x="12" y="61">{escape(stage.fingerprint[:10])}</text></g>'
    )


# --- line charts ---------------------------------------------------------------------------------


def needs_log(values: Sequence[float]) -> bool:
    """True when the values are positive and span more than two decades."""
    return min(values) > 1e-30 and max(values) / min(values) > 100


def line_chart(
    points: Points, *, label: str, width: int = 420, steps: bool = False, from_zero: bool = False
) -> str:
    """One series over images seen; log y when it spans more than two decades.

    Long series show every point faintly and their running mean boldly. `steps` holds each value
    until the next one (for schedules). Points that are not finite are left out.
    """
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return '<p class="note">no points</p>'
    height, left, right, top, bottom = 190, 44, 10, 10, 26
    ys = [y for _, y in points]
    log = needs_log(ys) and not from_zero
    floor = min(0.0, *ys) if from_zero else min(ys)
    ticks = decades(floor, max(ys)) if log else round_ticks(floor, max(ys))
    scale: Callable[[float], float] = math.log10 if log else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    x_ticks = round_ticks(0.0, max(x for x, _ in points), count=width // 70)
    x_max = max(x for x, _ in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        px = left + (width - left - right) * x / x_max
        py = top + (height - top - bottom) * (high - scale(y)) / (high - low)
        return px, py

    parts = []
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(
            f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick y" x="{left - 7}" y="{y + 3.5:.1f}">{short(tick)}</text>'
        )
    for tick in (t for t in x_ticks if 0 <= t <= x_max):
        x, _ = place(tick, ys[0])
        anchor = "end" if x > width - right - 14 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">'
            f"{short(tick)}</text>"
        )
    window = len(points) // 30
    if not steps and window >= 2:
        parts.append(_polyline(points, place, "line faint", steps))
        points = _running_mean(points, window)
    parts.append(_polyline(points, place, "line", steps))
    last = place(*points[-1])
    parts.append(f'<circle class="last" cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3.2"/>')
    axis = "logarithmic" if log else "linear"
    told = f"{label} over images seen, {axis} axis, from {figure(ys[0])} to {figure(ys[-1])}"
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(told)}">{"".join(parts)}</svg>'
    )


def _polyline(
    points: Points,
    place: Callable[[float, float], tuple[float, float]],
    css: str,
    steps: bool,
) -> str:
    out: list[str] = []
    y_before = None
    for x, y in _thin(points, 600):
        px, py = place(x, y)
        if steps and y_before is not None:
            out.append(f"{px:.1f},{y_before:.1f}")
        out.append(f"{px:.1f},{py:.1f}")
        y_before = py
    return f'<polyline class="{css}" points="{" ".join(out)}"/>'


def _thin(points: Points, most: int) -> Points:
    """Every k-th point and the last one: a page, not a data file."""
    stride = -(-len(points) // most)
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _running_mean(points: Points, window: int) -> Points:
    """Centred over 2 window + 1 points, fewer at the ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    mean = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - window), min(len(points), i + window + 1)
        mean.append((x, (sums[high] - sums[low]) / (high - low)))
    return mean


def round_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest:  # a flat line, in the middle
        low, high = low - largest / 2, high + largest / 2
    if largest < 1e-300:
        low, high = -1.0, 1.0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = -(-(last - first) // 5)
    return [10.0**i for i in range(first, last + every, every)]
