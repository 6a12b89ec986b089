"""Samples in, comparable numbers out: generation and features in the same evaluators.

A unit of work is an item of ITEM images: sampled, measured and forgotten where it was made; only
its statistics travel. They are merged in the order of the items, so a number depends
neither on how many evaluators there are, nor on which of them was lost.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from consistency.evaluation.protocol import Protocol
from infra import storage
from infra.errors import UserError
from pipelines.blocks import ITEM, Block, Item, Part, cut, secondary
from pipelines.yardstick import Yardstick, read_checked

if TYPE_CHECKING:
    from consistency.config import ChurnConfig
    from consistency.evaluation.extractors import Extractor
    from consistency.evaluation.frechet import Gaussian, GaussianStats
    from consistency.published import PublishedModel
    from pipelines.dag import StepContext
    from pipelines.recipe import Cluster

PROGRESS_EVERY_SECONDS = 2.0
FEW = 4  # items that are done sooner than an evaluator has started
SHEET = 40  # samples kept for people to look at

T = TypeVar("T")

Map = Callable[[Callable[[], Callable[[Any], Any]], Sequence[Any]], Iterable[tuple[int, Any]]]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to score: its weights, and how to sample it."""

    name: str
    description: str  # ModelDescription as JSON
    weights_url: str
    weights_sha256: str
    guidance: float = 1.0
    churn: "ChurnConfig | None" = None

    def sampling(self) -> dict[str, Any]:
        """Arguments of `PublishedModel.generate` that only a diffusion model takes."""
        return {"guidance": self.guidance, "churn": self.churn}

    def load(self, device: str) -> "PublishedModel":
        from safetensors.torch import load

        from consistency import published

        about = published.ModelDescription.from_json(self.description)
        model = published.build(about, load(read_checked(self.weights_url, self.weights_sha256)))
        model.function.to(device)
        return model


@dataclass(frozen=True, kw_only=True)
class Job:
    """One number to find: a subject under a protocol."""

    subject: Subject
    protocol: Protocol
    also: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names this very measurement: partial results under another key are not its own."""
        said = [self.subject.weights_sha256, self.subject.description, self.protocol.digest]
        said += [str(self.subject.guidance), repr(self.subject.churn), repr(self.also), str(ITEM)]
        return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """One job's numbers: `values` are in the metric's unit, one per seed block."""

    values: tuple[float, ...]
    agreement: float | None
    images_sha256: str
    secondary: dict[str, float]
    sheet: NDArray[np.uint8]


def on_actors(cluster: "Cluster") -> Map:
    """Evaluators as the cluster has them."""
    from infra.cluster import map_on_actors

    return partial(
        map_on_actors,
        actors=cluster.evaluators,
        cpus=cluster.cpus_per_evaluator,
        gpus=cluster.gpus_per_evaluator,
    )


def in_process(
    make: Callable[[], Callable[[Any], Any]], items: Sequence[Any]
) -> Iterator[tuple[int, Any]]:
    """The same work in this process, one item after the other."""
    work = make()
    for index, item in enumerate(items):
        yield index, work(item)


def in_order(
    results: Iterable[tuple[int, T]], count: int, *, take: Callable[[int, T], None]
) -> None:
    """Hand `take` the result of item 0, 1, ... however they come; each exactly once, and all."""
    held: dict[int, T] = {}
    done = 0
    for index, result in results:
        assert done <= index < count, f"item {index} came twice, or is none of {count}"
        assert index not in held, f"item {index} came twice"
        held[index] = result
        while done in held:
            take(done, held.pop(done))
            done += 1
    assert done == count, f"{done} of {count} items came"


def measure_all(
    yardstick: Yardstick,
    jobs: Sequence[Job],
    spread: Map,
    *,
    work: str,
    save_every: float,
    threads: int,
    few: int | None = None,
) -> list[Measured]:
    """Every job's numbers. Partial sums are kept in `work`, and gone on with. few: see `fill`."""
    reference = yardstick.statistics()

    blocks = [_blocks(job, storage.join(work, "blocks")) for job in jobs]
    make = partial(Evaluator, yardstick, tuple(jobs), threads)
    fill(
        blocks,
        make,
        spread,
        work=work,
        save_every=save_every,
        value_of=partial(yardstick.value, reference),
        few=few,
    )
    return [_measured(yardstick, reference, *pair) for pair in zip(jobs, blocks, strict=True)]


def measure_in_step(
    ctx: "StepContext", yardstick: Yardstick, jobs: Sequence[Job]
) -> list[Measured]:
    """`measure_all` on the evaluators of a step's cluster."""
    import torch

    torch.set_num_threads(1)  # merging waits for the evaluators
    return measure_all(
        yardstick,
        jobs,
        on_actors(ctx.cluster),
        work=ctx.work,
        save_every=ctx.cluster.checkpoint_every_seconds,
        threads=ctx.cluster.cpus_per_evaluator,
        few=0 if ctx.cluster.gpus_per_evaluator > 0 else None,  # this process has no GPU
    )


def fill(
    blocks: Sequence[Sequence[Block]],
    make: Callable[[], Callable[[Item], Part]],
    spread: Map,
    *,
    work: str,
    save_every: float,
    value_of: "Callable[[GaussianStats], float] | None" = None,
    few: int | None = None,
) -> None:
    """Measure what is still open of every job's blocks, and save them as they grow.

    value_of: turns a block's sums into its number as soon as they are complete.
    few: so many items are measured here, without evaluators (None: FEW).
    """
    items = [item for number, of_job in enumerate(blocks) for item in cut(number, of_job)]
    progress = _Progress(work, items)
    saved = time.monotonic()

    def take(index: int, part: Part) -> None:
        nonlocal saved
        item = items[index]
        block = blocks[item.job][item.block]
        block.add(item, part)
        progress.show(item)
        if block.done and value_of is not None:
            block.settle(value_of)
        if block.done or time.monotonic() - saved >= save_every:
            block.save()
            saved = time.monotonic()

    if len(items) <= (FEW if few is None else few):
        spread = in_process
    if items:
        in_order(spread(make, items), len(items), take=take)


class _Progress:
    """The live line of a step that counts images."""

    def __init__(self, work: str, items: Sequence[Item]) -> None:
        self.url = storage.join(work, "progress.json")
        self.total = sum(item.stop - item.start for item in items)
        self.images, self.started, self.shown = 0, time.monotonic(), 0.0

    def show(self, item: Item) -> None:
        """One more item is in the sums; said every now and then."""
        self.images += item.stop - item.start
        now = time.monotonic()
        if now - self.shown < PROGRESS_EVERY_SECONDS:
            return
        self.shown = now
        rate = self.images / max(now - self.started, 1e-9)
        line = {"images": self.images, "total": self.total, "images_per_second": rate}
        with contextlib.suppress(OSError, UserError):  # not worth failing for
            storage.write_bytes(self.url, json.dumps(line).encode())


class Evaluator:
    """What runs where the images are made: the feature network and the model of the last item."""

    def __init__(self, yardstick: Yardstick, jobs: tuple[Job, ...], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.extractor = yardstick.network.load(self.device)
        self.jobs = jobs
        self.judge = yardstick.network.judges_classes
        self._loaded: tuple[Subject, PublishedModel] | None = None

    def __call__(self, item: Item) -> Part:
        job = self.jobs[item.job]
        if self._loaded is None or self._loaded[0] != job.subject:
            self._loaded = None  # two models need not fit
            self._loaded = (job.subject, job.subject.load(self.device))
        part = sample_part(
            self._loaded[1],
            self.extractor,
            range(item.start, item.stop),
            steps=job.protocol.steps,
            seed=job.protocol.seed,
            judge=self.judge,
            **job.subject.sampling(),
        )
        assert part.features is not None
        kept = replace(part.features, logits=None)
        if "inception_score" in job.also:
            kept = part.features
        return replace(
            part,
            sheet=part.sheet if item.start == 0 else None,
            features=kept if item.block == 0 and job.also else None,
        )


def sample_part(
    model: "PublishedModel",
    extractor: "Extractor",
    indices: Sequence[int],
    *,
    judge: bool,
    **sampling: Any,
) -> Part:
    """Sample, extract, sum up. `sampling` are `PublishedModel.generate`'s arguments."""
    from consistency.evaluation.frechet import GaussianStats

    images = model.generate(indices, **sampling)
    features = extractor(images)
    labels = model.labels(indices)
    agreed = None
    if judge and labels is not None and features.logits is not None:
        agreed = float((features.logits.argmax(1) == labels.numpy()).sum())
    return Part(
        stats=GaussianStats.from_features(features.pooled),
        agreed=agreed,
        images_sha256=hashlib.sha256(images.tobytes()).hexdigest(),
        sheet=images[:SHEET],
        features=features,
    )


def _blocks(job: Job, work: str) -> list[Block]:
    size = job.protocol.samples
    return [
        Block(storage.join(work, f"{job.key}-{n}"), n * size, (n + 1) * size)
        for n in range(job.protocol.seed_blocks)
    ]


def _measured(
    yardstick: Yardstick, reference: "Gaussian", job: Job, blocks: Sequence[Block]
) -> Measured:
    first = blocks[0]
    total = len(blocks) * job.protocol.samples
    agreed = [block.agreed for block in blocks if block.agreed is not None]
    chained = "".join(block.images for block in blocks)
    assert first.sheet is not None
    return Measured(
        values=tuple(block.value for block in blocks),
        agreement=math.fsum(agreed) / total if agreed else None,
        images_sha256=hashlib.sha256(chained.encode()).hexdigest(),
        secondary=secondary(job.also, yardstick, reference, first) if job.also else {},
        sheet=first.sheet,
    )
