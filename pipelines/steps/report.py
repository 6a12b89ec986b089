"""report: everything the other stages say of themselves, on one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines import html
from pipelines.artifacts import (
    Committed,
    Evaluation,
    ReferenceStats,
    RegisteredModel,
    Report,
    ShardSet,
    TrainedModel,
)
from pipelines.dag import StepContext
from pipelines.png import UInt8Array, encode_png
from pipelines.svg import Stage

FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page repeats and no input tells."""

    recipe_name: str
    # Resolved, defaults filled in. The inputs' fingerprints hold all that matters of it.
    recipe_yaml: str = field(metadata={"identity": False})
    isolate_uses_teacher: bool  # starts from the teacher's weights


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
) -> Report:
    """Write `report.html` from the values, each `curve.jsonl`, and the samples of evaluate."""
    inputs = (shard, reference, teacher, distill, isolate, evaluate, register)
    page = html.Page(
        recipe_name=config.recipe_name,
        recipe_yaml=config.recipe_yaml,
        tracking_uri=ctx.tracking_uri,
        experiment=ctx.experiment,
        stages=_stages(ctx, config, inputs),
        shard=shard.value,
        reference=reference.value,
        trainings=tuple(
            html.Training(stage=c.step, model=c.value, curve=_curve(ctx, c))
            for c in (teacher, distill, isolate)
        ),
        evaluation=evaluate.value,
        registered=register.value,
        samples=_samples(ctx, evaluate),
        grids={s.grid: ctx.fetch(evaluate, s.grid).read_bytes() for s in evaluate.value.scores},
    )
    document = html.render(page).encode("utf-8")
    (ctx.out / FILE).write_bytes(document)
    return Report(file=FILE, bytes=len(document))


def _curve(ctx: StepContext, trained: Committed[TrainedModel]) -> Sequence[Mapping[str, float]]:
    lines = ctx.fetch(trained, "curve.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def _samples(ctx: StepContext, evaluate: Committed[Evaluation]) -> dict[str, list[bytes]]:
    """`samples.npz`: per score uint8 [n, H, W, C], sample i from noise i in each of them."""
    with np.load(ctx.fetch(evaluate, "samples.npz"), allow_pickle=False) as arrays:
        images: dict[str, UInt8Array] = {
            html.sample_key(s): arrays[html.sample_key(s)] for s in evaluate.value.scores
        }
    return {key: [encode_png(image) for image in stack] for key, stack in images.items()}


def _stages(
    ctx: StepContext, config: ReportConfig, inputs: Sequence[Committed[Any]]
) -> tuple[Stage, ...]:
    """The boxes, and of the edges those that do not follow from others."""
    states = {past.step: past.state for past in ctx.history}
    lent = ("teacher",) if config.isolate_uses_teacher else ()
    edges = {
        "shard": (),
        "reference": ("shard",),
        "teacher": ("shard",),
        "distill": ("teacher",),
        "isolate": lent or ("shard",),
        "evaluate": ("reference", "distill", "isolate"),
        "register": ("evaluate",),
    }
    lanes = {"reference": -1, "isolate": 1}
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
