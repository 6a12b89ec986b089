"""shard: real images -> WebDataset tars and their manifest."""

import hashlib
from dataclasses import dataclass

from infra import storage
from infra.errors import UserError
from pipelines.artifacts import ShardSet
from pipelines.dag import StepContext
from pipelines.recipe import DataConfig

HASHED = 200_000_000  # bytes; read and hashed in 0.2 s when cached (measured)
FEWEST = 4  # images: two halves of two each, the least that have covariances


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Identity of the step: how to read the images, and a digest that stands for them."""

    data: DataConfig
    content: str  # sha256 over the files that the source reads

    @classmethod
    def of(cls, data: DataConfig) -> "ShardConfig":
        """Look at the source. Raises UserError when it is not there.

        The digest covers what is in the files of array sources. Of folders of images, of sources
        above HASHED bytes and of remote ones it covers names and sizes only, as a plan has to take
        less than two seconds: an edit that keeps every size goes unseen there (use --force).
        """
        from infra import sources

        if data.path is None:
            return cls(data=data, content="embedded")
        path = storage.absolute(data.path)
        if not storage.exists(path):
            raise UserError(f"data.path: {path} does not exist; check the spelling or mount it")
        files = sources.files_of(data.source, path, data.split, data.labels)
        said: list[tuple[str, int | str]] = list(files)
        hashed = data.source != "folder" and storage.is_local(path)
        if hashed and sum(size for _, size in files) <= HASHED:
            urls = [(name, storage.join(path, name) if name else path) for name, _ in files]
            said = [(name, storage.sha256(url)) for name, url in urls]
        return cls(data=data, content=hashlib.sha256(repr(said).encode()).hexdigest())


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
