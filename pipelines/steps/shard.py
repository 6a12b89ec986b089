"""shard: real images -> WebDataset tars and their manifest."""

import hashlib
from dataclasses import dataclass

from infra import storage
from infra.errors import UserError
from pipelines.artifacts import ShardSet
from pipelines.dag import StepContext
from pipelines.recipe import DataConfig

FEWEST = 4  # images: two halves of two each, the least that have covariances


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Identity of the step: how to read the images, and a listing that stands for them."""

    data: DataConfig
    content: str  # sha256 over the names and sizes of the source's files

    @classmethod
    def of(cls, data: DataConfig) -> "ShardConfig":
        """Look at the source. Raises UserError when it is not there."""
        if data.path is None:
            return cls(data=data, content="embedded")
        path = storage.absolute(data.path)
        if not storage.exists(path):
            raise UserError(f"data.path: {path} does not exist; check the spelling or mount it")
        listing = storage.list_files(path) or [(path.rsplit("/", 1)[-1], storage.size(path))]
        return cls(data=data, content=hashlib.sha256(repr(listing).encode()).hexdigest())


def run(ctx: StepContext, config: ShardConfig) -> ShardSet:
    """Read the source, write balanced shards, put the manifest last."""
    from infra import shards, sources
    from pipelines import shard_data

    data = config.data
    source = sources.open_source(
        data.source,
        data.path,
        size=data.size,
        fit=data.fit,
        labels=data.labels,
        limit=data.limit,
        split=data.split,
    )
    if source.height != source.width:
        raise UserError(
            f"data.size: images are {source.height}x{source.width}, the networks need squares; "
            f"set data.size"
        )
    if source.count < FEWEST:
        limited = data.limit is not None and data.limit < FEWEST
        where = "data.limit" if limited else f"data.path: {data.path}"
        raise UserError(
            f"{where}: {source.count} images are too few to learn from; give at least {FEWEST}"
        )
    url = str(ctx.out / "shards")
    manifest = shards.write_shards(
        source,
        url,
        num_shards=data.num_shards,
        record_images=data.record_images,
        seed=data.seed,
    )
    shard_data.load(url, manifest.sha256)  # stage the pixels here while WebDataset is loaded
    return ShardSet(
        count=manifest.count,
        size=manifest.height,
        channels=manifest.channels,
        class_names=manifest.class_names,
        num_shards=len(manifest.shards),
        bytes=manifest.total_bytes,
        pixel_digest=manifest.pixel_digest,
        manifest_sha256=manifest.sha256,
    )
