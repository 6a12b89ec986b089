"""evaluate: samples of every candidate (EMA weights, fixed noise) against the reference.

Sample i is the same image whatever the batch size; statistics are merged in float64.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    import numpy as np

    from consistency.published import PublishedModel

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 500  # samples generated, measured and forgotten at a time
SHEET = 40  # samples kept for people to look at


def run(
    ctx: StepContext,
    config: EvaluateConfig,
    shard: Committed[ShardSet],
    reference: Committed[ReferenceStats],
    teacher: Committed[TrainedModel],
    distill: Committed[TrainedModel],
    isolate: Committed[TrainedModel],
) -> Evaluation:
    """Score the teacher with Heun at one, two and many steps, the others at one and two.

    Writes samples.npz (the first images of each, same noise) and one PNG grid per score.
    """
    import numpy as np
    import torch

    from consistency import published
    from pipelines import png

    torch.set_num_threads(1)  # the one CPU this step holds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yardstick = _Yardstick(ctx, shard, reference, device)
    one_and_two = [(1, config.samples), (2, config.samples)]
    asked = [
        ("teacher", teacher, [*one_and_two, (config.teacher_steps, config.teacher_samples)]),
        ("distill", distill, one_and_two),
        ("isolate", isolate, one_and_two),
    ]
    scores: list[Score] = []
    sheets: dict[str, Any] = {}
    for candidate, trained, samplings in asked:
        ctx.fetch(trained, "config.json")
        model = published.load(ctx.fetch(trained, "weights.safetensors").parent)
        model.function.to(device)
        model = replace(model, description=replace(model.description, mid_sigma=config.mid_sigma))
        denoiser = trained.value.kind == "denoiser"
        for steps, samples in samplings:
            distance, percent, agreement, sheet = yardstick.measure(
                model, steps, samples, config.seed
            )
            grid = f"{candidate}-{steps}.png"
            (ctx.out / grid).write_bytes(
                png.encode_png(png.grid(sheet, 10, scale=png.tile_scale(int(sheet.shape[1]))))
            )
            sheets[f"{candidate}-{steps}"] = sheet
            scores.append(
                Score(
                    candidate=candidate,
                    sampler="heun" if denoiser else "multistep",
                    steps=steps,
                    evaluations=model.evaluations(steps),
                    samples=samples,
                    distance=distance,
                    percent=percent,
                    agreement=agreement,
                    grid=grid,
                    sigmas=() if denoiser else tuple(model.sigmas(steps)),
                )
            )
    np.savez_compressed(ctx.out / "samples.npz", **sheets)
    return Evaluation(
        metric=reference.value.metric,
        floor_percent=reference.value.halves_percent,
        scores=tuple(scores),
    )


class _Yardstick:
    """The feature net and the reference statistics, loaded once."""

    def __init__(
        self,
        ctx: StepContext,
        shard: Committed[ShardSet],
        reference: Committed[ReferenceStats],
        device: str,
    ) -> None:
        from safetensors.numpy import load_file as load_arrays
        from safetensors.torch import load_file

        from consistency.features import feature_net_for
        from consistency.frechet import GaussianStats

        about = shard.value
        self.net = feature_net_for(
            size=about.size, image_channels=about.channels, num_classes=about.num_classes
        )
        self.net.load_state_dict(load_file(ctx.fetch(reference, "features.safetensors")))
        self.net.to(device).eval()
        self.classes = about.num_classes
        self.stats = GaussianStats.from_dict(load_arrays(ctx.fetch(reference, "stats.safetensors")))

    def measure(
        self, model: "PublishedModel", steps: int, samples: int, seed: int
    ) -> "tuple[float, float, float | None, Pixels]":
        """(distance, percent of the reference's variance, class agreement, first images)."""
        from consistency.features import accuracy, extract
        from consistency.frechet import (
            GaussianStats,
            frechet_distance,
            relative_frechet_percent,
        )

        stats, sheet, agreed = None, None, 0.0
        for start in range(0, samples, BLOCK):
            indices = range(start, min(start + BLOCK, samples))
            images = model.generate(indices, steps=steps, seed=seed)
            sheet = images[:SHEET] if sheet is None else sheet
            block = GaussianStats.from_features(extract(self.net, images))
            stats = block if stats is None else stats.merge(block)
            labels = model.labels(indices)
            if labels is not None and self.classes > 1:
                agreed += accuracy(self.net, images, labels.numpy()) * len(indices)
        assert stats is not None
        assert sheet is not None
        conditional = model.description.num_classes > 1
        return (
            frechet_distance(stats, self.stats),
            relative_frechet_percent(stats, self.stats),
            agreed / samples if conditional else None,
            sheet,
        )
