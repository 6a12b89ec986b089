"""The report's section on a sweep: what it found, at what cost, and every trial of it."""

import math
import statistics
from html import escape

from pipelines import html_page, svg_parallel, svg_sweep
from pipelines.html_training import css_class
from pipelines.svg_sweep import text
from pipelines.sweep_summary import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    Finalist,
    SweepSummary,
    Trial,
)


def page(summary: SweepSummary) -> str:
    """The section as a document of its own. Deterministic: the same summary, the same text."""
    body = (
        '<header>\n<p class="over">cmforge sweep '
        f"<span>recipe {escape(summary.recipe)}</span></p>\n"
        f"<h1>{escape(summary.name)} <small>{escape(summary.stage)}</small></h1>\n</header>\n"
    )
    return html_page.document(f"{summary.name} · cmforge", body + section(summary))


def section(summary: SweepSummary) -> str:
    """All that is to be seen of a sweep, as one <section>."""
    stage = escape(summary.stage)
    parts = [
        f'<section id="sweep-{stage}" class="sweep {css_class(summary.stage)}">',
        f"<h2>Sweep of {stage}</h2>",
        f"<p>{_headline(summary)} {_comparison(summary)}</p>",
        _found(summary),
        _plots(summary),
        _trials(summary),
        _finalists(summary),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


# --- what was found ------------------------------------------------------------------------------


def _headline(summary: SweepSummary) -> str:
    states = [trial.state for trial in summary.trials]
    counts = [f"{states.count(state)} {state}" for state in (COMPLETED, STOPPED, FAILED)]
    counts += [f"{states.count(RUNNING)} {RUNNING}"] if RUNNING in states else []
    spent, full = summary.spent_images, summary.full_images
    share = f", <b>{100 * spent / full:.0f} %</b>" if full > 0 else ""
    return (
        f"{_count(len(states), 'trial')}: {', '.join(counts)}. Up to their last readings they saw "
        f"{spent:,} images of the {full:,} that all of them to their ends would have seen{share}."
    )


def _comparison(summary: SweepSummary) -> str:
    """The winner against the recipe's own setting, on readings that compare."""
    best, own = svg_sweep.winner(summary), svg_sweep.own(summary)
    if best is None:
        return "No trial ended with a finite distance, so there is no winner."
    value = best.objective(summary.steps)
    if best is own:
        return (
            f"The recipe's own setting, trial {best.number}, stands: <b>{text(summary, value)}</b>."
        )
    name = f"The winner, trial {best.number},"
    if own is None:
        return f"{name} has <b>{text(summary, value)}</b>."
    again = {finalist.trial: finalist for finalist in summary.finalists}
    if best.number in again and own.number in again:
        ours, theirs = again[best.number], again[own.number]
        return (
            f"{name} has <b>{text(summary, ours.value)}</b> and the recipe's own setting "
            f"<b>{text(summary, theirs.value)}</b>, both measured again as finalists."
        )
    theirs_last = own.objective(summary.steps)
    if not svg_sweep.finite(theirs_last):
        return (
            f"{name} has <b>{text(summary, value)}</b>; the recipe's own setting "
            f"({escape(own.state)}) has no finite distance."
        )
    then = [p.lowest(summary.steps) for p in best.probes if p.fraction == own.fraction]
    reading = then[0] if then else None
    if reading is None:
        return (
            f"{name} has <b>{text(summary, value)}</b>; the recipe's own setting was last read at "
            f"k/K = {own.fraction:.3g}, {text(summary, theirs_last)}, which does not compare."
        )
    where = "" if own.fraction == best.fraction == 1 else f" at k/K = {own.fraction:.3g}"
    return (
        f"{name} has <b>{text(summary, reading.value)}</b> and the recipe's own setting "
        f"<b>{text(summary, theirs_last)}</b>{where}. The lowest of many readings flatters."
    )


def _found(summary: SweepSummary) -> str:
    if svg_sweep.winner(summary) is None:
        return ""
    settings = '<p class="note">Nothing: the recipe as it stands.</p>'
    if summary.settings:
        listed = "".join(f"<li><code>{escape(setting)}</code></li>" for setting in summary.settings)
        settings = f'<ul class="settings">{listed}</ul>'
    return (
        '<div class="pair">'
        f"<figure><figcaption>What the winner sets in {escape(summary.recipe)}</figcaption>"
        f"{settings}</figure><figure><figcaption>To have it</figcaption>"
        f"<pre><code>{escape(summary.command)}</code></pre></figure></div>"
    )


# --- drawings ------------------------------------------------------------------------------------


def _plots(summary: SweepSummary) -> str:
    if not summary.trials:
        return '<p class="note">no trials</p>'
    steps = _count(summary.steps, "step")
    metric = f"{escape(summary.metric)} in {steps}{', %' if summary.unit == '%' else ''}"
    wide = (
        "<figure><figcaption>All settings <span>the last axis is the distance at the last "
        f"reading: {metric}</span></figcaption>{_legend(summary)}"
        f'<div class="wide">{svg_parallel.parallel(summary)}</div></figure>'
    )
    charts = [
        _figure(f"Distance over k/K <span>{metric}</span>", svg_sweep.learning(summary)),
        _figure("Last distance over images spent", svg_sweep.cost(summary)),
        _figure("Grid points N over k/K", svg_sweep.schedules(summary, "N")),
        _figure("Target decay μ over k/K", svg_sweep.schedules(summary, "mu")),
        _figure("Gap 1 − r/t at t = 1 over k/K", svg_sweep.schedules(summary, "gap")),
        _figure(
            "Importance <span>share of the axes' effect</span>", svg_parallel.importance(summary)
        ),
    ]
    notes = [_not_finite(summary), _schedule_notes(summary), _unimportant(summary)]
    said = "".join(f'<p class="note">{note}</p>' for note in notes if note)
    return f'{wide}\n<div class="charts">{"".join(charts)}</div>\n{said}'


def _figure(caption: str, drawing: str) -> str:
    """Nothing where there is nothing to draw; which axis is logarithmic is said."""
    log = " <span>log scale</span>" if ', logarithmic axis"' in drawing else ""
    return f"<figure><figcaption>{caption}{log}</figcaption>{drawing}</figure>" if drawing else ""


def _legend(summary: SweepSummary) -> str:
    """A sample of each look that occurs, drawn as the lines are."""
    best, own = svg_sweep.winner(summary), svg_sweep.own(summary)
    looks = [] if best is None else [(best, f"winner, trial {best.number}")]
    if own is not None and own is not best:
        only = "" if own.settings else ", its distance alone"
        looks.append((own, f"the recipe's own setting, trial {own.number}{only}"))
    for state in (COMPLETED, STOPPED, FAILED, RUNNING):
        others = (t for t in summary.trials if t.state == state and t not in (best, own))
        looks += [(trial, state) for trial in list(others)[:1]]
    items = "".join(
        '<li><svg class="chart key" viewBox="0 0 34 12" aria-hidden="true">'
        f'<g class="{svg_sweep.css(summary, trial)} q0">'
        f"{svg_sweep.polyline([(1, 6), (26, 6)])}{svg_sweep.mark(trial.state, 26, 6)}</g></svg>"
        f"{escape(label)}</li>"
        for trial, label in looks
    )
    return f'<ul class="legend">{items}<li>fainter is worse</li></ul>'


def _not_finite(summary: SweepSummary) -> str:
    """The readings that are in no drawing."""
    found = []
    for trial in summary.trials:
        lost = [f"{p.fraction:.3g}" for p in trial.probes if p.lowest(summary.steps) is None]
        if lost:
            found.append(f"trial {trial.number} at k/K = {', '.join(lost)}")
    unread = [str(trial.number) for trial in summary.trials if not trial.probes]
    said = f"Not finite, so not drawn: {'; '.join(found)}. " if found else ""
    return said + (f"Without any reading: {_those(unread)}." if unread else "")


def _unimportant(summary: SweepSummary) -> str:
    if not summary.axes:
        return ""
    if all(axis.importance is None for axis in summary.axes):
        return "Too few trials to say how much each axis matters."
    said = []
    none = [escape(axis.key) for axis in summary.axes if axis.importance is None]
    if none:
        said.append(f"Too few trials for the importance of {', '.join(none)}.")
    shares = [(axis.key, axis.importance) for axis in summary.axes]
    lost = [key for key, share in shares if share is not None and not math.isfinite(share)]
    if lost:
        said.append(f"The importance of {', '.join(map(escape, lost))} is not finite.")
    return " ".join(said)


def _schedule_notes(summary: SweepSummary) -> str:
    """Whose curves these are, and why some are missing."""
    if not summary.schedules:
        return ""
    rank = {trial.number: i + 1 for i, trial in enumerate(summary.ranked())}
    order = sorted({s.trial for s in summary.schedules if s.trial in rank}, key=rank.__getitem__)
    ranks = ", ".join(f"#{number} is ranked {rank[number]}" for number in order)
    said = f"Schedules of the best and the worst of {_count(len(rank), 'trial')}: {ranks}. "
    without = {
        "N: their pairs come from a ratio r/t, or time is continuous": [
            s.trial for s in summary.schedules if s.N is None
        ],
        "μ: their target is the network itself": [
            s.trial for s in summary.schedules if s.mu is None
        ],
        "gap to draw": [s.trial for s in summary.schedules if s.gap is None],
        "finite values throughout, so drawn with a hole": [
            s.trial
            for s in summary.schedules
            if not all(map(math.isfinite, (*(s.N or ()), *(s.mu or ()), *(s.gap or ()))))
        ],
    }
    for what, numbers in without.items():
        if numbers:
            said += f"Without {what}: {_those([str(n) for n in sorted(numbers)])}. "
    return said.rstrip()


# --- tables --------------------------------------------------------------------------------------


def _trials(summary: SweepSummary) -> str:
    if not summary.trials:
        return ""
    rows = "".join(_row(summary, trial) for trial in summary.ranked())
    heads = ("trial", "state", "k/K", "images", "1 step", "2 steps", "EMA", "origin", "settings")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads[:-1])
    head += f'<th scope="col" class="settings">{heads[-1]}</th>'
    return (
        f"<h3>Every trial</h3>\n<p>Best first: who got further, then the lower distance in "
        f"{_count(summary.steps, 'step')}. A reading is the best sampling EMA's, "
        f"from {summary.samples:,} samples. Search: {escape(summary.search)}; scheduler: "
        f"{escape(summary.scheduler)}.</p>\n"
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(summary: SweepSummary, trial: Trial) -> str:
    best = trial is svg_sweep.winner(summary)
    badge = ' <span class="pill">winner</span>' if best else ""
    reached = trial.probes[-1].lowest(summary.steps) if trial.probes else None
    cells = [
        escape(trial.state),
        f"{trial.fraction:.3g}",
        f"{trial.images:,}",
        *(_cell(summary, trial, steps) for steps in (1, 2)),
        "–" if reached is None else escape(reached.ema),
        escape(trial.origin),
    ]
    reason = f"<small>{escape(trial.reason)}</small>" if trial.reason else ""
    settings = f"<code>{escape(svg_sweep.compact(summary, trial))}</code>"
    if not trial.settings:
        settings = "the recipe as it stands"
    return (
        f'<tr class="{escape(trial.state)}"><th scope="row">{trial.number}{badge}</th>'
        f"{''.join(f'<td>{cell}</td>' for cell in cells)}"
        f'<td class="settings">{settings}{reason}</td></tr>'
    )


def _cell(summary: SweepSummary, trial: Trial, steps: int) -> str:
    """The best EMA's last reading in so many steps."""
    if not trial.probes or not any(r.steps == steps for r in trial.probes[-1].readings):
        return "–"
    reading = trial.probes[-1].lowest(steps)
    value = text(summary, math.inf if reading is None else reading.value)
    return f"<b>{value}</b>" if steps == summary.steps else value


def _finalists(summary: SweepSummary) -> str:
    if not summary.finalists:
        return ""
    rows = "".join(_finalist(summary, finalist) for finalist in summary.finalists)
    heads = ("trial", "mean", "std", "each block", "EMA", "samples × blocks", "protocol")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        "<h3>Finalists</h3>\n<p>The best, measured again with more samples and other noise: these "
        "numbers name the winner.</p>\n"
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _finalist(summary: SweepSummary, finalist: Finalist) -> str:
    protocol, values = finalist.protocol, finalist.values
    several = len(values) > 1 and all(map(math.isfinite, values))
    badge = ' <span class="pill">winner</span>' if finalist.trial == summary.winner else ""
    cells = [
        f"<b>{text(summary, finalist.value)}</b>",
        text(summary, statistics.stdev(values)) if several else "–",
        ", ".join(text(summary, value) for value in values),
        escape(finalist.ema),
        f"{protocol.samples:,} × {protocol.seed_blocks}",
        f"{escape(protocol.name)} <code>{protocol.digest[:8]}</code>",
    ]
    listed = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{finalist.trial}{badge}</th>{listed}</tr>'


# --- words ---------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _those(numbers: list[str]) -> str:
    return f"trial{'' if len(numbers) == 1 else 's'} {', '.join(numbers)}"
