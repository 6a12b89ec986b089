"""evaluate: samples of every candidate (EMA weights, fixed noise) against the reference.

Sample i is the same image whatever the batch size and the number of evaluators; statistics are
merged in float64, in the order of the samples.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import consistency
from infra import storage
from pipelines.artifacts import (
    Committed,
    Evaluation,
    ReferenceStats,
    Score,
    ShardSet,
    TrainedModel,
)
from pipelines.dag import StepContext
from pipelines.measuring import EvaluateConfig
from pipelines.scoring import Job, Subject, measure_in_step
from pipelines.yardstick import Yardstick

if TYPE_CHECKING:
    from consistency.published import ModelDescription

PROTOCOLS = "protocols.json"


def run(
    ctx: StepContext,
    config: EvaluateConfig,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel],
    **candidates: Committed[TrainedModel],
) -> Evaluation:
    """Score the teacher with Heun at one, two and many steps, the candidates at one and two.

    Writes samples.npz (the first images of each, same noise), one PNG grid per score, and
    protocols.json: how each number came about.
    """
    import numpy as np

    from pipelines import png

    yardstick = Yardstick.of(shard, reference)
    models = {"teacher": teacher, **candidates}
    abouts = {name: _description(ctx, config, trained) for name, trained in models.items()}
    jobs = [
        job
        for name, trained in models.items()
        for job in _jobs(config, yardstick, name, trained, abouts[name])
    ]
    found = measure_in_step(ctx, yardstick, jobs)
    scores: list[Score] = []
    sheets: dict[str, Any] = {}
    for job, measured in zip(jobs, found, strict=True):
        name, steps = job.subject.name, job.protocol.steps
        grid = f"{name}-{steps}.png"
        tiles = png.grid(measured.sheet, 10, scale=png.tile_scale(int(measured.sheet.shape[1])))
        (ctx.out / grid).write_bytes(png.encode_png(tiles))
        sheets[f"{name}-{steps}"] = measured.sheet
        scores.append(
            Score(
                candidate=name,
                protocol=job.protocol,
                values=measured.values,
                sampler=abouts[name].sampler,
                evaluations=abouts[name].evaluations(steps),
                levels=tuple(abouts[name].levels(steps)),
                ema=models[name].value.ema,
                weights_sha256=job.subject.weights_sha256,
                images_sha256=measured.images_sha256,
                code=consistency.__version__,
                agreement=measured.agreement,
                secondary=measured.secondary,
                grid=grid,
            )
        )
    np.savez_compressed(ctx.out / "samples.npz", **sheets)
    records = [{**asdict(score), "digest": score.protocol.digest} for score in scores]
    (ctx.out / PROTOCOLS).write_text(json.dumps(records, indent=1))
    return Evaluation(
        features=reference.value.protocol,
        mid_sigma=config.mid_sigma,
        floor=reference.value.halves,
        scores=tuple(scores),
    )


def _description(
    ctx: StepContext, config: EvaluateConfig, trained: Committed[TrainedModel]
) -> "ModelDescription":
    from consistency.published import ModelDescription

    about = ModelDescription.from_json(ctx.fetch(trained, "config.json").read_text())
    return replace(about, mid_sigma=config.mid_sigma)


def _jobs(
    config: EvaluateConfig,
    yardstick: Yardstick,
    name: str,
    trained: Committed[TrainedModel],
    about: "ModelDescription",
) -> Iterator[Job]:
    diffusion = about.kind == "denoiser"
    subject = Subject(
        name=name,
        description=about.to_json(),
        weights_url=storage.join(trained.url, "weights.safetensors"),
        weights_sha256=trained.value.weights_sha256,
        guidance=config.teacher_guidance if diffusion else 1.0,
        churn=config.teacher_churn if diffusion else None,
    )
    asked = [(1, config.samples, config.seed_blocks), (2, config.samples, config.seed_blocks)]
    if diffusion:
        asked.append((config.teacher_steps, config.teacher_samples, 1))
    for steps, samples, seed_blocks in asked:
        protocol = yardstick.protocol(
            samples=samples,
            seed_blocks=seed_blocks,
            seed=config.seed,
            steps=steps,
            allow_rank_deficient=config.allow_rank_deficient,
        )
        yield Job(subject=subject, protocol=protocol, also=config.also)
