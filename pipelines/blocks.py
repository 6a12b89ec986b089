"""A block of images being measured: sums that can be saved, gone on with, turned into numbers."""

import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infra import storage
from pipelines.yardstick import Yardstick, as_local

if TYPE_CHECKING:
    from consistency.evaluation.extractors import Features
    from consistency.evaluation.frechet import Gaussian, GaussianStats

SUMS = "sums.safetensors"
LARGEST_NEIGHBOURHOOD = 10_000  # samples of each side in precision and recall: n^2 distances
ITEM = 500  # images; part of what a number is, to the last bits


@dataclass(frozen=True)
class Item:
    """Images [start, stop) of one block, the unit of work."""

    job: int
    block: int
    start: int
    stop: int


def cut(job: int, blocks: "Sequence[Block]") -> list[Item]:
    """What is still open of a job's blocks."""
    return [
        Item(job, number, start, min(start + ITEM, block.stop))
        for number, block in enumerate(blocks)
        for start in range(block.until, block.stop, ITEM)
    ]


@dataclass(frozen=True)
class Part:
    """What an item comes to."""

    stats: "GaussianStats"
    agreed: float | None  # how many samples are in the asked-for class
    images_sha256: str
    sheet: NDArray[np.uint8] | None = None
    features: "Features | None" = None


class Block:
    """One seed block's sums so far; saved, and found again under the same job."""

    def __init__(self, folder: str | None, start: int, stop: int) -> None:
        """Of samples [start, stop). folder: URL of what is saved; None: nothing is."""
        self.folder = folder
        self.start = self.until = start  # samples [start, until) are in the sums
        self.stop = stop
        self.stats: GaussianStats | None = None
        self.agreed: float | None = None
        self.images = hashlib.sha256(b"").hexdigest()  # chained over the items
        self.sheet: NDArray[np.uint8] | None = None
        self.value = math.nan
        if folder is not None:
            self._resume(storage.join(folder, SUMS))

    @property
    def done(self) -> bool:
        return self.until == self.stop

    def add(self, item: Item, part: Part) -> None:
        """The next item's part."""
        assert (item.start, part.stats.n) == (self.until, item.stop - item.start), item
        if part.features is not None:  # before the sums that count them
            self._write(f"pooled-{item.start}.npy", part.features.pooled)
            if part.features.logits is not None:
                self._write(f"logits-{item.start}.npy", part.features.logits)
        self.stats = part.stats if self.stats is None else self.stats.merge(part.stats)
        if part.agreed is not None:
            self.agreed = (self.agreed or 0.0) + part.agreed
        self.images = hashlib.sha256((self.images + part.images_sha256).encode()).hexdigest()
        self.sheet = part.sheet if self.sheet is None else self.sheet
        self.until = item.stop

    def settle(self, value_of: "Callable[[GaussianStats], float]") -> None:
        """Turn the complete sums into the block's number, and forget them."""
        assert self.done
        assert self.stats is not None
        self.value, self.stats = value_of(self.stats), None

    def features(self, kind: str, until: int | None = None) -> NDArray[np.float32]:
        """What parts brought along up to sample `until`: "pooled" [n, D], or "logits"."""
        starts = range(self.start, min(until or self.stop, self.stop), ITEM)
        return np.concatenate([self._read(f"{kind}-{start}.npy") for start in starts])

    def save(self) -> None:
        from safetensors.numpy import save

        arrays = {} if self.stats is None else dict(self.stats.to_dict())
        if self.sheet is not None:
            arrays["sheet"] = self.sheet
        said = {"until": self.until, "agreed": self.agreed, "images": self.images}
        about = {"said": json.dumps({**said, "value": self.value})}
        storage.write_bytes(storage.join(self._home(), SUMS), save(arrays, about))

    def _resume(self, url: str) -> None:
        from safetensors import safe_open
        from safetensors.numpy import load

        from consistency.evaluation.frechet import GaussianStats

        if not storage.exists(url):
            return
        with as_local(url) as path:
            with safe_open(path, "np") as file:
                said = json.loads(file.metadata()["said"])
            arrays = load(path.read_bytes())
        self.until, self.agreed, self.images = said["until"], said["agreed"], said["images"]
        self.value = said["value"]
        self.sheet = arrays.get("sheet")
        if "mean" in arrays:
            self.stats = GaussianStats.from_dict(arrays)

    def _home(self) -> str:
        assert self.folder is not None, "this block is not saved"
        return self.folder

    def _write(self, name: str, array: NDArray[np.float32]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        storage.write_bytes(storage.join(self._home(), name), buffer.getvalue())

    def _read(self, name: str) -> NDArray[np.float32]:
        data = storage.read_bytes(storage.join(self._home(), name))
        found: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
        return found


def secondary(
    also: Sequence[str], yardstick: Yardstick, reference: "Gaussian", block: Block
) -> dict[str, float]:
    """Metrics of a seed block's whole feature set."""
    from consistency.evaluation import sets

    found: dict[str, float] = {}
    fake, real = block.features("pooled"), yardstick.real_features()
    if "kid" in also:
        # Of other networks than Inception the cubic kernel makes numbers of any size: with this
        # scale its x.x / D is about 1.
        fid = yardstick.reference.protocol.metric == "fid"
        scale = 1.0 if fid else sets.mean_norm(real) / math.sqrt(real.shape[1])
        found["kid"], found["kid_std"] = sets.kid(fake, real, scale=scale)
    if "precision_recall" in also:
        four = sets.precision_recall_density_coverage(
            real[:LARGEST_NEIGHBOURHOOD], fake[:LARGEST_NEIGHBOURHOOD]
        )
        found |= asdict(four)
    if "fd_infinity" in also:
        value, found["fd_infinity_r2"] = sets.fd_infinity(fake, reference)
        found["fd_infinity"] = yardstick.reference.reported(value)
    if "inception_score" in also:
        mean, std = sets.inception_score(block.features("logits"))
        found["inception_score"], found["inception_score_std"] = mean, std
    return found
