"""evaluate: samples of every candidate (EMA weights, fixed noise) against the reference.

Sample i is the same image whatever the batch size; statistics are merged in float64.
"""

from dataclasses import replace
from typing import Any

from pipelines.artifacts import (
    Committed,
    Evaluation,
    ReferenceStats,
    Score,
    ShardSet,
    TrainedModel,
)
from pipelines.dag import StepContext
from pipelines.recipe import EvaluateConfig


def run(
    ctx: StepContext,
    config: EvaluateConfig,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel],
    **candidates: Committed[TrainedModel],
) -> Evaluation:
    """Score the teacher with Heun at one, two and many steps, the candidates at one and two.

    Writes samples.npz (the first images of each, same noise) and one PNG grid per score.
    """
    import numpy as np
    import torch

    from consistency import published
    from pipelines import png
    from pipelines.yardstick import Yardstick

    torch.set_num_threads(1)  # the one CPU this step holds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yardstick = Yardstick(ctx, shard, reference, device)
    one_and_two = [(1, config.samples), (2, config.samples)]
    asked = [
        ("teacher", teacher, [*one_and_two, (config.teacher_steps, config.teacher_samples)]),
        *((name, trained, one_and_two) for name, trained in candidates.items()),
    ]
    diffusion = {"guidance": config.teacher_guidance, "churn": config.teacher_churn}
    scores: list[Score] = []
    sheets: dict[str, Any] = {}
    for candidate, trained, samplings in asked:
        ctx.fetch(trained, "config.json")
        model = published.load(ctx.fetch(trained, "weights.safetensors").parent)
        model.function.to(device)
        model = replace(model, description=replace(model.description, mid_sigma=config.mid_sigma))
        own = diffusion if trained.value.kind == "denoiser" else {}
        for steps, samples in samplings:
            distance, percent, agreement, sheet = yardstick.measure(
                model, samples, steps=steps, seed=config.seed, **own
            )
            grid = f"{candidate}-{steps}.png"
            (ctx.out / grid).write_bytes(
                png.encode_png(png.grid(sheet, 10, scale=png.tile_scale(int(sheet.shape[1]))))
            )
            sheets[f"{candidate}-{steps}"] = sheet
            scores.append(
                Score(
                    candidate=candidate,
                    sampler=model.sampler,
                    steps=steps,
                    evaluations=model.evaluations(steps),
                    samples=samples,
                    distance=distance,
                    percent=percent,
                    agreement=agreement,
                    grid=grid,
                    levels=tuple(model.levels(steps)),
                )
            )
    np.savez_compressed(ctx.out / "samples.npz", **sheets)
    return Evaluation(
        metric=reference.value.metric,
        mid_sigma=config.mid_sigma,
        floor_percent=reference.value.halves_percent,
        scores=tuple(scores),
    )
