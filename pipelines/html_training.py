"""The report's sections on training: a curve per stage, and how the EMAs compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pipelines import svg
from pipelines.artifacts import TrainedModel
from pipelines.svg import Points, duration, figure

_TRAINED = ("teacher", "distill", "isolate", "truncate")  # each has its colour in report.css


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training stage and its curve: {"images", "loss", "images_per_second", ["N"], ["mu"]}."""

    stage: str
    model: TrainedModel
    curve: Sequence[Mapping[str, float]]  # none of an adopted model
    watched: Sequence[Mapping[str, Any]] = ()  # distances while it trained, one line per number


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sampling EMA and how its samples scored; None: the distance is not finite."""

    name: str
    value: float | None
    chosen: bool
    rebuilt: bool  # from snapshots, not trained


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a step `select_ema` chose from, and the model it made."""

    stage: str
    of: str  # the training stage
    model: TrainedModel
    candidates: tuple[Candidate, ...]


def css_class(stage: str) -> str:
    return stage if stage in _TRAINED else "plain"


def curves(trainings: Sequence[Training]) -> str:
    return (
        '<section id="curves">\n<h2>Training</h2>\n'
        "<p>Over images seen. A bold line is the running mean, the faint one every report; the "
        "loss axis is logarithmic where it spans more than two decades. Losses of different "
        f"stages measure different things.</p>\n{''.join(_training(t) for t in trainings)}\n"
        "</section>"
    )


def _training(t: Training) -> str:
    m = t.model
    if m.source is not None:
        return _adopted(t)
    facts = [
        ("images seen", f"{m.images:,}"),
        ("optimiser steps", f"{m.steps:,}"),
        ("parameters", f"{m.parameters:,}"),
        ("training time", duration(m.train_seconds)),
        ("final loss", figure(m.final_loss, 4)),
        ("EMA", m.ema),
    ]
    if m.best is not None:
        facts.append(("best distance", f"{m.best}"))
    series = {key: _series(t.curve, key) for key in ("loss", "images_per_second", "N", "mu")}
    for key, name in (("N", "grid points N"), ("mu", "target decay μ")):
        if len({y for _, y in series[key]}) == 1:  # a flat line is a fact, not a chart
            facts.append((name, f"{series.pop(key)[0][1]:.6g} throughout"))
    names = {
        "loss": "loss",
        "images_per_second": "images per second",
        "N": "grid points N(k)",
        "mu": "target decay μ(k)",
    }
    for line in t.watched:
        if line["ema"] == m.ema:
            key = f"watch-{line['steps']}"
            steps = f"{line['steps']} step{'s' if line['steps'] > 1 else ''}"
            names[key] = escape(f"{line['name']}, {steps}")
            series[key] = [*series.get(key, ()), (line["images"], line["value"])]
    drawn = [(key, points) for key, points in series.items() if points]
    note = {key: "" if key == "images_per_second" else _log_note(p) for key, p in drawn}
    charts = "".join(
        f"<figure><figcaption>{names[key]}{note[key]}</figcaption>"
        + svg.line_chart(
            points,
            label=names[key],
            width=280 if len(drawn) == 3 else 420,
            steps=key in ("N", "mu"),
            from_zero=key == "images_per_second",
        )
        + "</figure>"
        for key, points in drawn
    )
    return _row(t.stage, facts, f'<div class="charts n{len(drawn)}">{charts}</div>')


def _adopted(t: Training) -> str:
    m = t.model
    facts = [("adopted from", escape(m.source or "")), ("parameters", f"{m.parameters:,}")]
    note = '<p class="note">Not trained here: the recipe names a finished model.</p>'
    return _row(t.stage, facts, f'<div class="charts n1">{note}</div>')


def _row(stage: str, facts: Sequence[tuple[str, str]], beside: str) -> str:
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<div class="training {css_class(stage)}"><div class="facts"><h3>{escape(stage)}</h3>'
        f"<dl>{listed}</dl></div>{beside}</div>"
    )


def selections(selections: Sequence[Selection], text: Callable[[float], str]) -> str:
    """The candidates of every selection, or nothing where there was none."""
    if not selections:
        return ""
    rows = []
    for selection in selections:
        for c in selection.candidates:
            mark = ' <span class="pill">published</span>' if c.chosen else ""
            score = "not finite" if c.value is None else text(c.value)
            rows.append(
                f'<tr><th scope="row"><i class="dot {css_class(selection.of)}"></i>'
                f"{escape(selection.of)}</th><td>{escape(c.name)}{mark}</td>"
                f"<td>{'rebuilt from snapshots' if c.rebuilt else 'trained'}</td>"
                f"<td><b>{score}</b></td></tr>"
            )
    heads = ("stage", "EMA of the weights", "how", "distance")
    head = "".join(f'<th scope="col">{h}</th>' for h in heads)
    return (
        '<section id="ema">\n<h2>Choice of the EMA</h2>\n'
        "<p>Of each stage the EMA whose samples score lowest is evaluated and published. These "
        "samples are others than the evaluation's, so the scores differ a little from those "
        "above.</p>\n"
        f'<div class="scroll"><table class="metrics"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>\n</section>"
    )


def _series(curve: Sequence[Mapping[str, float]], key: str) -> Points:
    return [(point["images"], point[key]) for point in curve if point.get(key) is not None]


def _log_note(points: Points) -> str:
    return " <span>log scale</span>" if svg.needs_log([y for _, y in points]) else ""
