"""How good samples are: the reference's feature net and statistics, loaded once."""

from typing import TYPE_CHECKING, Any

from pipelines.artifacts import Committed, ReferenceStats, ShardSet
from pipelines.dag import StepContext

if TYPE_CHECKING:
    import numpy as np

    from consistency.published import PublishedModel

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]

BLOCK = 500  # samples generated, measured and forgotten at a time
SHEET = 40  # samples kept for people to look at


class Yardstick:
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

        from consistency.evaluation.domain import feature_net_for
        from consistency.evaluation.frechet import GaussianStats

        about = shard.value
        self.net = feature_net_for(
            size=about.size, image_channels=about.channels, num_classes=about.num_classes
        )
        self.net.load_state_dict(load_file(ctx.fetch(reference, "features.safetensors")))
        self.net.to(device).eval()
        self.classes = about.num_classes
        self.stats = GaussianStats.from_dict(load_arrays(ctx.fetch(reference, "stats.safetensors")))

    def measure(
        self, model: "PublishedModel", samples: int, **sampling: Any
    ) -> "tuple[float, float, float | None, Pixels]":
        """(distance, percent of the reference's variance, class agreement, first images).

        `sampling` are `PublishedModel.generate`'s arguments: steps, seed, ...
        """
        from consistency.evaluation.domain import accuracy, extract
        from consistency.evaluation.frechet import (
            GaussianStats,
            frechet_distance,
            relative_frechet_percent,
        )

        stats, sheet, agreed = None, None, 0.0
        for start in range(0, samples, BLOCK):
            indices = range(start, min(start + BLOCK, samples))
            images = model.generate(indices, **sampling)
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
