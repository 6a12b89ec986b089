"""reference: shards -> the feature network, and the statistics of the real images under it.

A step of its own, so that no change to a training stage makes the yardstick anew. Statistics under
a published network are kept in the workspace by what they are made of, pixels and protocol, so that
every recipe on the same images finds them, however its shards are cut.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consistency.evaluation.protocol import DOMAIN, FeatureProtocol
from consistency.evaluation.specs import FILE, SPECS
from infra import storage
from infra.errors import UserError
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, from_json, to_json
from pipelines.blocks import Block, Item, Part
from pipelines.dag import StepContext
from pipelines.measuring import ReferenceConfig
from pipelines.scoring import fill, on_actors
from pipelines.yardstick import REAL_FEATURES, STATS, FeatureNetwork, as_local

if TYPE_CHECKING:
    from consistency.evaluation.frechet import Gaussian, GaussianStats

KEPT_FEATURES = 10_000  # real images whose features are kept for metrics of sets
DOMAIN_FILE = "features.safetensors"


@dataclass(frozen=True, kw_only=True)
class ReferenceStage:
    """Identity of the step."""

    reference: ReferenceConfig
    extractor: str  # of the recipe's list, the one that was found
    weights_sha256: str | None  # None: trained here
    weights_path: str | None = field(default=None, metadata={"identity": False})
    statistics_sha256: str | None = None  # of the file of another project


def run(ctx: StepContext, config: ReferenceStage, shard: Committed[ShardSet]) -> ReferenceStats:
    """Writes the network's file, `stats.safetensors` and, of own images, `real_features.npy`."""
    network = _domain(ctx, config.reference, shard) if config.extractor == DOMAIN else None
    network = network or _published(ctx, config, shard)
    protocol = network.load("cpu").protocol
    if config.reference.statistics is not None:
        return _external(ctx, config, network, protocol)
    address = hashlib.sha256(f"{protocol.digest} {shard.value.pixel_digest}".encode()).hexdigest()
    store = storage.join(ctx.workspace, "references", address[:16])
    shared = network.name != DOMAIN  # whose weights are this step's alone
    found = _stored(ctx, store) if shared else None
    if found is None:
        found = _measured(ctx, network, protocol, shard)
        if shared:
            _store(ctx, store, found)
    # The same weights may have gone by another name when the entry was made.
    return replace(found, extractor_file=network.url.rsplit("/", 1)[-1])


def _domain(
    ctx: StepContext, config: ReferenceConfig, shard: Committed[ShardSet]
) -> FeatureNetwork:
    """A classifier of the data at hand, trained here."""
    import torch
    from safetensors.torch import save

    from consistency.evaluation.domain import train_feature_net
    from pipelines import shard_data

    torch.set_num_threads(1)  # in the place of the evaluator that comes after
    data = shard_data.load(storage.join(shard.url, "shards"), shard.value.manifest_sha256)
    net = train_feature_net(
        data.images,
        data.labels,
        shard.value.num_classes,
        steps=config.steps,
        batch=config.batch,
        lr=config.lr,
        seed=config.seed,
    )
    weights = save({k: v.contiguous() for k, v in net.state_dict().items()})
    (ctx.out / DOMAIN_FILE).write_bytes(weights)
    return _network(ctx, DOMAIN, DOMAIN_FILE, hashlib.sha256(weights).hexdigest(), shard.value)


def _published(
    ctx: StepContext, config: ReferenceStage, shard: Committed[ShardSet]
) -> FeatureNetwork:
    """A copy of the weights: what comes after needs no file outside the workspace."""
    assert config.weights_path is not None
    assert config.weights_sha256 is not None
    path = Path(config.weights_path)
    if not path.exists():
        raise UserError(
            f"reference.weights: {path} is not on this node; put it on a folder that every node "
            f"sees, and name that"
        )
    shutil.copyfile(path, ctx.out / path.name)
    name = config.extractor if config.extractor in SPECS else FILE
    network = _network(ctx, name, path.name, config.weights_sha256, shard.value)
    try:
        network.load("cpu")
    except storage.CorruptError:
        raise UserError(f"reference.weights: {path} changed since the plan; run again") from None
    except ValueError as error:
        raise UserError(f"reference.weights: {error}") from error
    return network


def _network(ctx: StepContext, name: str, file: str, sha256: str, data: ShardSet) -> FeatureNetwork:
    """As evaluators see it: `out` is of this node alone, `work` of them all."""
    url = storage.join(ctx.work, "network", file)
    storage.write_bytes(url, (ctx.out / file).read_bytes())
    return FeatureNetwork(
        name=name,
        url=url,
        sha256=sha256,
        size=data.size,
        channels=data.channels,
        num_classes=data.num_classes,
    )


def _measured(
    ctx: StepContext, network: FeatureNetwork, protocol: FeatureProtocol, shard: Committed[ShardSet]
) -> ReferenceStats:
    """Statistics of every real image, in quarters: no model can be expected to come nearer than
    two halves of the real images are to each other."""
    from consistency.evaluation.frechet import GaussianStats

    count = shard.value.count
    if count < 8:
        raise UserError(f"data: {count} images make no statistics; give at least 8 (better 1,000)")
    key = f"{protocol.digest}-{shard.value.manifest_sha256[:16]}"
    bounds = [count * quarter // 4 for quarter in range(5)]  # shards are shuffled: random ones
    blocks = [
        Block(storage.join(ctx.work, "blocks", f"{key}-{number}"), *edges)
        for number, edges in enumerate(pairwise(bounds))
    ]
    make = partial(
        RealImages,
        network,
        storage.join(shard.url, "shards"),
        shard.value.manifest_sha256,
        ctx.cluster.cpus_per_evaluator,
    )
    save_every = ctx.cluster.checkpoint_every_seconds
    fill([blocks], make, on_actors(ctx.cluster), work=ctx.work, save_every=save_every)
    quarters = [block.stats for block in blocks if block.stats is not None]
    assert len(quarters) == 4
    kept = np.concatenate(
        [block.features("pooled", KEPT_FEATURES) for block in blocks if block.start < KEPT_FEATURES]
    )
    np.save(ctx.out / REAL_FEATURES, kept[:KEPT_FEATURES], allow_pickle=False)
    whole = reduce(GaussianStats.merge, quarters).gaussian
    _write_statistics(ctx.out / STATS, whole)
    told = [block.agreed for block in blocks if block.agreed is not None]
    stats = ReferenceStats(
        protocol=protocol,
        extractor_file=network.url.rsplit("/", 1)[-1],
        digest=shard.value.pixel_digest,
        count=count,
        total_variance=float(whole.covariance.trace()),
        halves=None,
        accuracy=sum(told) / count if told else None,
    )
    return replace(stats, halves=stats.reported(_between_halves(quarters)))


def _between_halves(quarters: "Sequence[GaussianStats]") -> float:
    """Distance of two halves, the mean over the three ways to make them of four quarters: of one
    way alone it may be off by a third (digits, 64 features)."""
    from consistency.evaluation.frechet import frechet_distance

    first, *others = quarters
    found = []
    for number, with_first in enumerate(others):
        rest = others[:number] + others[number + 1 :]
        found.append(frechet_distance(first.merge(with_first), rest[0].merge(rest[1])))
    return sum(found) / len(found)


class RealImages:
    """What runs where the real images are measured."""

    def __init__(
        self, network: FeatureNetwork, shards_url: str, manifest_sha256: str, threads: int
    ) -> None:
        import torch

        from pipelines import shard_data

        torch.set_num_threads(threads)
        self.judge = network.judges_classes
        self.extractor = network.load("cuda" if torch.cuda.is_available() else "cpu")
        self.data = shard_data.load(shards_url, manifest_sha256)

    def __call__(self, item: Item) -> Part:
        from consistency.evaluation.frechet import GaussianStats

        rows = slice(item.start, item.stop)
        images = np.ascontiguousarray(self.data.images[rows])
        features = self.extractor(images)
        agreed = None
        if self.judge and features.logits is not None:
            agreed = float((features.logits.argmax(1) == self.data.labels[rows]).sum())
        return Part(
            stats=GaussianStats.from_features(features.pooled),
            agreed=agreed,
            images_sha256=hashlib.sha256(images.tobytes()).hexdigest(),
            features=replace(features, logits=None) if item.start < KEPT_FEATURES else None,
        )


def _external(
    ctx: StepContext, config: ReferenceStage, network: FeatureNetwork, protocol: FeatureProtocol
) -> ReferenceStats:
    """Statistics of another project, which must fit the feature network."""
    from consistency.evaluation.npz import read_npz

    url = config.reference.statistics
    assert url is not None
    with as_local(url) as path:
        digest = storage.sha256(str(path))
        if digest != config.statistics_sha256:
            raise UserError(f"reference.statistics: {url} changed since the plan; run again")
        try:
            gaussian, made_by = read_npz(path)
        except ValueError as error:
            raise UserError(f"reference.statistics: {error}") from error
    if len(gaussian.mean) != protocol.dim:
        raise UserError(
            f"reference.statistics: {url} has {len(gaussian.mean)} features, "
            f"{protocol.extractor} has {protocol.dim}; name its own network in reference.extractor"
        )
    if made_by is not None and made_by != protocol:
        raise UserError(
            f"reference.statistics: {url} is of {made_by.extractor} (weights "
            f"{made_by.weights_sha256[:12]}, layer {made_by.layer}, {made_by.resize} to "
            f"{made_by.size}), not of {protocol.extractor} (weights "
            f"{protocol.weights_sha256[:12]}, layer {protocol.layer}, {protocol.resize} to "
            f"{protocol.size}); they do not compare"
        )
    _write_statistics(ctx.out / STATS, gaussian)
    return ReferenceStats(
        protocol=protocol,
        extractor_file=network.url.rsplit("/", 1)[-1],
        digest=digest,
        count=gaussian.n,
        total_variance=float(gaussian.covariance.trace()),
        halves=None,
        accuracy=None,
    )


def _write_statistics(path: Path, gaussian: "Gaussian") -> None:
    from safetensors.numpy import save

    n = np.asarray(gaussian.n or 0, np.int64)
    path.write_bytes(save({"n": n, "mean": gaussian.mean, "covariance": gaussian.covariance}))


# --- the store of statistics by content -----------------------------------------------------------


def _stored(ctx: StepContext, store: str) -> ReferenceStats | None:
    """What an earlier step found, copied to `out`; damaged entries are made anew."""
    try:
        entry: dict[str, Any] = json.loads(storage.read_bytes(storage.join(store, "entry.json")))
        files = {name: storage.read_bytes(storage.join(store, name)) for name in entry["files"]}
    except (FileNotFoundError, ValueError):
        return None
    if {n: hashlib.sha256(data).hexdigest() for n, data in files.items()} != entry["files"]:
        return None
    for name, data in files.items():
        (ctx.out / name).write_bytes(data)
    value: ReferenceStats = from_json(ReferenceStats, entry["value"])
    return value


def _store(ctx: StepContext, store: str, value: ReferenceStats) -> None:
    """The entry is written last: without it there is nothing."""
    files: Sequence[str] = (STATS, REAL_FEATURES)
    digests = {}
    for name in files:
        data = (ctx.out / name).read_bytes()
        digests[name] = hashlib.sha256(data).hexdigest()
        storage.write_bytes(storage.join(store, name), data)
    entry = {"files": digests, "value": to_json(value)}
    storage.write_bytes(storage.join(store, "entry.json"), json.dumps(entry, indent=1).encode())
