"""tune: Ray Tune over one stage's settings; its winner is a recipe delta that the stage then takes.

Trials are content-addressed steps of their own (steps/trial.py), trained by the driver that trains
the stage. The search itself is in `sweeping`; here the best are measured again and one is named.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from infra import storage
from infra.errors import UserError
from pipelines import html_sweep, sweep_result, tuned
from pipelines.artifacts import (
    Committed,
    ReferenceStats,
    ShardSet,
    TrainedModel,
    Tuned,
    from_json,
    to_json,
)
from pipelines.config import resolved_yaml
from pipelines.dag import StepContext, read_record
from pipelines.scoring import Job, Subject, measure_in_step
from pipelines.sweep_summary import (
    COMPLETED,
    FAILED,
    RUNNING,
    STOPPED,
    Finalist,
    SweepSummary,
    Trial,
)
from pipelines.sweeping import Sweep, TuneStage
from pipelines.trial import home_of
from pipelines.yardstick import Yardstick

SUMMARY, PAGE = "summary.json", "sweep.html"
SHOWN = 3  # schedules of so many of the best, and of the worst


def step_name(stage: str) -> str:
    """The step that tunes a stage: each has its own."""
    return f"tune-{stage}"


def run(
    ctx: StepContext,
    config: TuneStage,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel],
    distilled: Committed[TrainedModel] | None = None,
) -> Tuned:
    """Search, measure the best again, write down the winner.

    Raises UserError when no trial came to anything.
    """
    import torch

    torch.set_num_threads(1)  # it waits for the trials
    given: dict[str, Committed[Any]] = {"shard": shard, "reference": reference, "teacher": teacher}
    if distilled is not None:
        given["distilled"] = distilled
    search = Sweep(ctx, config, given)
    search.run()
    return publish(search, summarise(search))


def summarise(search: Sweep) -> SweepSummary:
    """The best measured again, the winner named. UserError when there is none."""
    from pipelines.curricula import schedule_of

    sweep = search.sweep
    # Those that still ran when the time was over; more of it lets them go on.
    trials = tuple(replace(t, state=STOPPED) if t.state == RUNNING else t for t in search.all())
    yardstick = Yardstick.of(search.inputs["shard"], search.inputs["reference"])
    draft = SweepSummary(
        name=sweep.name,
        stage=sweep.stage,
        recipe=search.ctx.experiment,
        metric=yardstick.reference.protocol.metric,
        unit=yardstick.reference.protocol.unit,
        steps=sweep.steps,
        samples=sweep.samples,
        search=sweep.search,
        scheduler=sweep.scheduler,
        images=search.job_of(()).config.marks()[-1],
        axes=sweep_result.axes_of(sweep, trials),
        trials=trials,
        schedules=(),
        finalists=(),
        winner=0,
        settings=(),
        command="",
    )
    ranked = [
        trial
        for trial in draft.ranked()
        if trial.state != FAILED and _best_ema(trial, sweep.steps) is not None
    ]
    if not ranked:
        reasons = sorted({trial.reason for trial in trials if trial.reason})
        raise UserError(
            f"sweep {sweep.name}: none of {len(trials)} trials gave a finite distance"
            + ("" if sweep.minutes is None else f" within {sweep.minutes:g} minutes")
            + "".join(f"; {reason}" for reason in reasons[:2])
        )
    finalists = _finalists(search, yardstick, ranked)
    winner = finalists[0].trial if finalists else ranked[0].number
    settings = _winning(search, draft.trial(winner), finalists)
    shown = {trial.number: trial for trial in (*ranked[:SHOWN], *ranked[-SHOWN:])}
    stages = {number: search.job_of(t.settings).config.stage for number, t in shown.items()}
    return replace(
        draft,
        schedules=tuple(schedule_of(n, stage.training, stage.noise) for n, stage in stages.items()),
        finalists=finalists,
        winner=winner,
        settings=settings,
        command=search.config.source.typed(settings),
    )


def _finalists(
    search: Sweep, yardstick: Yardstick, ranked: Sequence[Trial]
) -> tuple[Finalist, ...]:
    """Those that came to the end, with more samples and several seed blocks; best first."""
    sweep = search.sweep
    whole = [trial for trial in ranked if trial.state == COMPLETED][: sweep.finalists]
    if not whole:
        return ()
    protocol = yardstick.protocol(
        samples=sweep.finalist_samples,
        seed_blocks=sweep.finalist_blocks,
        seed=sweep.finalist_seed,
        steps=sweep.steps,
        allow_rank_deficient=sweep.allow_rank_deficient,
    )
    emas = [_best_ema(trial, sweep.steps) or "" for trial in whole]
    jobs = [
        Job(subject=_subject(search, trial, ema), protocol=protocol)
        for trial, ema in zip(whole, emas, strict=True)
    ]
    finalists = [
        Finalist(trial=trial.number, ema=ema, values=found.values, protocol=protocol)
        for trial, ema, found in zip(
            whole, emas, measure_in_step(search.ctx, yardstick, jobs), strict=True
        )
    ]
    finite = [finalist for finalist in finalists if math.isfinite(finalist.value)]
    return tuple(sorted(finite, key=lambda finalist: finalist.value))


def _best_ema(trial: Trial, steps: int) -> str | None:
    lowest = trial.probes[-1].lowest(steps) if trial.probes else None
    return None if lowest is None else lowest.ema


def _subject(search: Sweep, trial: Trial, ema: str) -> Subject:
    """A completed trial's weights of one sampling EMA, as its record has them."""
    from consistency.published import ModelDescription

    home = home_of(search.ctx.workspace, trial.fingerprint)
    record = read_record(home)
    url = storage.join(home, "attempts", record["attempt"])
    name = tuned.weights_file(from_json(TrainedModel, record["value"]), ema)
    text = storage.read_bytes(storage.join(url, "config.json")).decode()
    about = replace(ModelDescription.from_json(text), mid_sigma=search.config.mid_sigma)
    return Subject(
        name=f"trial-{trial.number}",
        description=about.to_json(),
        weights_url=storage.join(url, name),
        weights_sha256=next(f["sha256"] for f in record["files"] if f["path"] == name),
    )


def _winning(search: Sweep, winner: Trial, finalists: tuple[Finalist, ...]) -> tuple[str, ...]:
    """Overrides of the recipe: the fixed ones and the winner's own, its best EMA first."""
    stage, fixed = search.sweep.stage, search.sweep.fixed
    best = finalists[0].ema if finalists else _best_ema(winner, search.sweep.steps)
    training = getattr(search.recipe(winner.settings, whole=True), stage)
    emas = sorted(training.ema, key=lambda ema: bool(ema.name != best))
    kept = (text for text in fixed if text.partition("=")[0].strip() != f"{stage}.ema")
    return (*kept, *winner.settings, f"{stage}.ema={tuned.ema_text(emas)}")


def publish(search: Sweep, summary: SweepSummary) -> Tuned:
    """Write the files that `Tuned` names, and tell MLflow."""
    out, sweep = search.ctx.out, search.sweep
    recipe = search.config.source.recipe(summary.settings)
    (out / tuned.RECIPE).write_text(resolved_yaml(replace(recipe, tune=())))
    (out / tuned.DELTA).write_text(
        f"# Winner of sweep {sweep.name}: trial {summary.winner} of {len(summary.trials)}.\n"
        f"# {summary.command}\n{tuned.delta_yaml(summary.settings)}"
    )
    (out / SUMMARY).write_text(json.dumps(to_json(summary), indent=1))
    (out / PAGE).write_text(html_sweep.page(summary))
    search.runs.finish(summary, [out / name for name in (tuned.DELTA, SUMMARY, PAGE)])
    winner = summary.trial(summary.winner)
    best = summary.finalists[0] if summary.finalists else None
    lowest = winner.probes[-1].lowest(sweep.steps)
    assert lowest is not None, "the winner has a finite distance"
    whole = best is not None and sweep.budget == 1
    return Tuned(
        sweep=sweep.name,
        stage=sweep.stage,
        trials=len(summary.trials),
        winner=summary.winner,
        settings=summary.settings,
        ema=best.ema if best is not None else lowest.ema,
        trained=winner.fingerprint if whole else None,
        metric=best.protocol.name if best is not None else summary.metric,
        value=best.value if best is not None else lowest.value,
        spent=round(summary.spent_images / summary.full_images, 4),
    )
