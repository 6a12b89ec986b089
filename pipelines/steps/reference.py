"""reference: shards -> the feature net trained on them, and the real images' statistics under it.

A step of its own, so that no change to a training stage trains the yardstick anew.
"""

from infra import storage
from pipelines.artifacts import Committed, ReferenceStats, ShardSet
from pipelines.dag import StepContext
from pipelines.recipe import ReferenceConfig

METRIC = "fd_domain"  # Frechet distance under the domain's own classifier; never called FID


def run(ctx: StepContext, config: ReferenceConfig, shard: Committed[ShardSet]) -> ReferenceStats:
    import numpy as np
    import torch
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    from consistency.evaluation.domain import accuracy, extract, train_feature_net
    from consistency.evaluation.frechet import GaussianStats, relative_frechet_percent
    from pipelines import shard_data

    torch.set_num_threads(1)
    data = shard_data.load(storage.join(shard.url, "shards"), shard.value.manifest_sha256)
    classes = shard.value.num_classes
    net = train_feature_net(
        data.images,
        data.labels,
        classes,
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        seed=config.seed,
    )
    features = extract(net, data.images)
    stats = GaussianStats.from_features(features)
    # Two random halves: the distance between them is what no model can be expected to undercut.
    order = np.random.default_rng(config.seed).permutation(len(features))
    half = len(order) // 2
    halves = relative_frechet_percent(
        GaussianStats.from_features(features[order[:half]]),
        GaussianStats.from_features(features[order[half:]]),
    )
    save_file(
        {k: v.contiguous() for k, v in net.state_dict().items()}, ctx.out / "features.safetensors"
    )
    save_arrays(stats.to_dict(), ctx.out / "stats.safetensors")
    return ReferenceStats(
        metric=METRIC,
        count=stats.n,
        accuracy=accuracy(net, data.images, data.labels) if classes > 1 else None,
        total_variance=float(stats.covariance.trace()),
        halves_percent=halves,
    )
