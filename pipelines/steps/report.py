"""report: everything the other stages say of themselves, on one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import html, watch
from pipelines.artifacts import (
    Committed,
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    SearchedModel,
    ShardSet,
    TrainedModel,
    Tuned,
    from_json,
)
from pipelines.dag import StepContext
from pipelines.html_levels import Levels, SigmaSearch
from pipelines.html_training import Candidate, Selection, Training
from pipelines.png import UInt8Array, encode_png
from pipelines.steps import search_sigmas, select_ema, tune
from pipelines.svg import Stage
from pipelines.sweep_summary import SweepSummary

FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page repeats and no input tells."""

    recipe_name: str
    # Resolved, defaults filled in. The inputs' fingerprints hold all that matters of it.
    recipe_yaml: str = field(metadata={"identity": False})
    isolate_from: str  # whose weights it starts from: "scratch" | "teacher" | "distilled"
    truncates: str | None  # the first stage of `truncate`
    after_distill: tuple[str, ...] = ()  # sweeps that wait for the distilled model


def run(
    ctx: StepContext,
    config: ReportConfig,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel],
    distill: Committed[TrainedModel],
    isolate: Committed[TrainedModel],
    evaluate: Committed[Evaluation],
    register: Committed[RegisteredModel],
    truncate: Committed[TrainedModel] | None = None,
    **optional: Committed[Any],
) -> Report:
    """Write `report.html` from the values, each `curve.jsonl`, and the samples of evaluate.

    `optional` are the steps `select_ema-...`, `search_sigmas-...` and `tune-...`, by name.
    """
    sweeps = {name: c for name, c in optional.items() if isinstance(c.value, Tuned)}
    refined = {name: c for name, c in optional.items() if name not in sweeps}
    searched = {n: c for n, c in refined.items() if isinstance(c.value, SearchedModel)}
    selected = {name: c for name, c in refined.items() if name not in searched}
    trained = [teacher, distill, isolate, *([truncate] if truncate else [])]
    inputs: tuple[Committed[Any], ...]
    inputs = (shard, reference, teacher)
    for stage in trained[1:]:  # each after its own sweep, as they ran
        before = sweeps.get(tune.step_name(stage.step))
        inputs = (*inputs, *([before] if before else []), stage)
    inputs = (*inputs, *selected.values(), *searched.values(), evaluate, register)
    page = html.Page(
        recipe_name=config.recipe_name,
        recipe_yaml=config.recipe_yaml,
        tracking_uri=ctx.tracking_uri,
        experiment=ctx.experiment,
        stages=_stages(ctx, config, inputs),
        shard=shard.value,
        reference=reference.value,
        trainings=tuple(
            Training(
                stage=c.step,
                model=c.value,
                curve=() if c.value.source is not None else _lines(ctx, c, "curve.jsonl"),
                watched=_lines(ctx, c, watch.LOG) if c.value.watched else (),
            )
            for c in trained
        ),
        sweeps=tuple(_summary(ctx, c) for c in sweeps.values()),
        selections=tuple(_selection(ctx, c, trained) for c in selected.values()),
        searches=tuple(_search(ctx, c, trained) for c in searched.values()),
        evaluation=evaluate.value,
        registered=register.value,
        samples=_samples(ctx, evaluate),
        grids={s.grid: ctx.fetch(evaluate, s.grid).read_bytes() for s in evaluate.value.scores},
    )
    document = html.render(page).encode("utf-8")
    (ctx.out / FILE).write_bytes(document)
    return Report(file=FILE, bytes=len(document))


def _lines(
    ctx: StepContext, trained: Committed[TrainedModel], name: str
) -> Sequence[Mapping[str, Any]]:
    lines = ctx.fetch(trained, name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def _summary(ctx: StepContext, sweep: Committed[Tuned]) -> SweepSummary:
    found: SweepSummary = from_json(
        SweepSummary, json.loads(ctx.fetch(sweep, tune.SUMMARY).read_text())
    )
    return found


def _samples(ctx: StepContext, evaluate: Committed[Evaluation]) -> dict[str, list[bytes]]:
    """`samples.npz`: per score uint8 [n, H, W, C], sample i from noise i in each of them."""
    with np.load(ctx.fetch(evaluate, "samples.npz"), allow_pickle=False) as arrays:
        images: dict[str, UInt8Array] = {
            html.sample_key(s): arrays[html.sample_key(s)] for s in evaluate.value.scores
        }
    return {key: [encode_png(image) for image in stack] for key, stack in images.items()}


def _selection(
    ctx: StepContext, selected: Committed[TrainedModel], trained: Sequence[Committed[TrainedModel]]
) -> Selection:
    of = next(c for c in trained if select_ema.step_name(c.step) == selected.step)
    rows = json.loads(ctx.fetch(selected, select_ema.TABLE).read_text())
    return Selection(
        stage=selected.step,
        of=of.step,
        model=selected.value,
        candidates=tuple(
            Candidate(**row, rebuilt=row["name"] not in (of.value.ema, *of.value.emas))
            for row in rows
        ),
    )


def _search(
    ctx: StepContext, searched: Committed[SearchedModel], trained: Sequence[Committed[TrainedModel]]
) -> SigmaSearch:
    of = next(c for c in trained if search_sigmas.step_name(c.step) == searched.step)
    said = json.loads(ctx.fetch(searched, search_sigmas.TABLE).read_text())
    confirmed = [
        Levels(
            sigmas=tuple(one["sigmas"]),
            value=one["value"],
            said="default" if one["sigmas"] == row["default"] else "searched",
            used=one["sigmas"] == row["kept"],
        )
        for row in said["decided"]
        for one in row["confirmed"]
    ]
    tried = [
        Levels(sigmas=tuple(row["sigmas"]), value=row["values"][0], said=row["metric"])
        for row in said["measured"]
        if not row["confirms"]
    ]
    return SigmaSearch(
        stage=searched.step,
        of=of.step,
        model=searched.value,
        confirmed=tuple(confirmed),
        tried=tuple(tried),
    )


def _stages(
    ctx: StepContext, config: ReportConfig, inputs: Sequence[Committed[Any]]
) -> tuple[Stage, ...]:
    """The boxes, and of the edges those that do not follow from others."""
    states = {past.step: past.state for past in ctx.history}
    adopted = {one.step for one in inputs if getattr(one.value, "source", None) is not None}
    lent = {"scratch": (), "teacher": ("teacher",), "distilled": ("distill",)}[config.isolate_from]
    edges: dict[str, tuple[str, ...]] = {
        "shard": (),
        "reference": ("shard",),
        "teacher": ("shard",),
        "distill": ("shard",) if "distill" in adopted else ("teacher",),
        "isolate": lent or ("shard",),
        "register": ("evaluate",),
    }
    # An adopted one stands beside the teacher, not behind it.
    aside = 1 if "distill" in adopted else 0
    lanes = {"reference": -1, "distill": aside, "isolate": 1 + aside}
    candidates = ["distill", "isolate"]
    names = [one.step for one in inputs]
    refining = [
        step_name
        for step_name in (select_ema.step_name, search_sigmas.step_name)  # one after the other
        if any(step_name(c) in names for c in (*candidates, "truncate"))
    ]
    if config.truncates is not None:
        edges["truncate"] = (config.truncates,)
        # Behind its first stage, whose place there may be taken by that one's own selection.
        lanes["truncate"] = 2 + aside if refining else lanes.get(config.truncates, 0)
        candidates.append("truncate")
    before: dict[str, tuple[str, ...]] = {c: ("reference", c) for c in candidates}
    for step_name in refining:
        for candidate in candidates:
            name = step_name(candidate)
            if name in names:  # of an adopted one there is no EMA to select
                edges[name], lanes[name] = before[candidate], lanes.get(candidate, 0)
                before[candidate] = (name,)
    for stage in ("distill", "isolate"):
        name = tune.step_name(stage)
        if name in names:
            edges[name] = ("reference", "distill" if name in config.after_distill else "teacher")
            edges[stage] = (name,)
            lanes[name] = lanes.get(stage, 0)
    ends = {c: before[c][-1] for c in candidates}
    last = [end for c, end in ends.items() if end != c or c != config.truncates]
    if not any("teacher" in needed for needed in edges.values()):  # all others are adopted
        last.insert(0, "teacher")
    edges["evaluate"] = (*(() if refining else ("reference",)), *last)
    done = [
        Stage(
            name=one.step,
            lane=lanes.get(one.step, 0),
            inputs=edges[one.step],
            dashed=lent if one.step == "isolate" else (),
            state=states[one.step],
            seconds=one.seconds,
            fingerprint=one.fingerprint,
        )
        for one in inputs
    ]
    here = Stage(
        name=ctx.step,
        lane=0,
        inputs=("register",),
        state="now",
        seconds=None,
        fingerprint=ctx.fingerprint,
    )
    return (*done, here)
