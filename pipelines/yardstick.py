"""What samples are held against: a feature network and the statistics of real images."""

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from consistency.evaluation.protocol import DOMAIN, Protocol
from consistency.evaluation.specs import FILE, SPECS
from infra import storage, temporary
from infra.errors import UserError
from pipelines.artifacts import Committed, ReferenceStats, ShardSet, from_json
from pipelines.dag import read_record

if TYPE_CHECKING:
    from consistency.evaluation.extractors import Extractor
    from consistency.evaluation.frechet import Gaussian, GaussianStats
    from consistency.published import ModelDescription

STATS = "stats.safetensors"
REAL_FEATURES = "real_features.npy"


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A feature network's file as a URL: evaluators load it wherever they run."""

    name: str  # of SPECS, FILE or DOMAIN
    url: str
    sha256: str
    size: int  # of the data, as are the next two: the domain net is made for them
    channels: int
    num_classes: int

    @property
    def judges_classes(self) -> bool:
        """Whether its logits tell the data's own classes."""
        return self.name == DOMAIN and self.num_classes > 1

    def load(self, device: str) -> "Extractor":
        """Ready to use, checked by its hash."""
        from safetensors.torch import load

        from consistency.evaluation.domain import feature_net_for
        from consistency.evaluation.extractors import domain_extractor, load_extractor

        if self.name == DOMAIN:
            net = feature_net_for(
                size=self.size, image_channels=self.channels, num_classes=self.num_classes
            )
            net.load_state_dict(load(read_checked(self.url, self.sha256)))
            return domain_extractor(net, self.sha256, device)
        with as_local(self.url) as path:
            if storage.sha256(str(path)) != self.sha256:
                raise _altered(self.url)
            return load_extractor(self.name, path, device=device)


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """The feature network and the statistics of the real images under it."""

    network: FeatureNetwork
    reference: ReferenceStats
    url: str  # of the reference step's files

    @classmethod
    def of(cls, shard: Committed[ShardSet], reference: Committed[ReferenceStats]) -> "Yardstick":
        data = shard.value
        return cls._made(reference.value, reference.url, data.size, data.channels, data.num_classes)

    @classmethod
    def at(cls, home: str, about: "ModelDescription") -> "Yardstick | None":
        """The reference step at `home`, for models of its data; None while it is not committed."""
        try:
            record = read_record(home)
        except FileNotFoundError:
            return None
        reference: ReferenceStats = from_json(ReferenceStats, record["value"])
        url = storage.join(home, "attempts", record["attempt"])
        return cls._made(reference, url, about.size, about.channels, len(about.class_names))

    @classmethod
    def _made(
        cls, reference: ReferenceStats, url: str, size: int, channels: int, num_classes: int
    ) -> "Yardstick":
        name = reference.protocol.extractor
        network = FeatureNetwork(
            name=name if name in (DOMAIN, *SPECS) else FILE,
            url=storage.join(url, reference.extractor_file),
            sha256=reference.protocol.weights_sha256,
            size=size,
            channels=channels,
            num_classes=num_classes,
        )
        return cls(network=network, reference=reference, url=url)

    def protocol(
        self, *, samples: int, seed_blocks: int, seed: int, steps: int, allow_rank_deficient: bool
    ) -> Protocol:
        """How numbers of `samples` images come about here. UserError when that is mostly bias."""
        check_rank(samples, self.reference.protocol.dim, allow_rank_deficient)
        return Protocol(
            features=self.reference.protocol,
            reference=self.reference.digest,
            n_reference=self.reference.count,
            samples=samples,
            seed=seed,
            seed_blocks=seed_blocks,
            steps=steps,
        )

    def statistics(self) -> "Gaussian":
        """Of the real images."""
        from safetensors.numpy import load

        from consistency.evaluation.frechet import Gaussian

        arrays = load(storage.read_bytes(storage.join(self.url, STATS)))
        n = int(arrays["n"])
        return Gaussian(arrays["mean"], arrays["covariance"], n if n > 0 else None)

    def value(self, reference: "Gaussian", stats: "GaussianStats") -> float:
        """The distance of samples from `statistics()`, in the metric's unit."""
        from consistency.evaluation.frechet import frechet_distance

        return self.reference.reported(frechet_distance(stats, reference))

    def real_features(self) -> NDArray[np.float32]:
        """[n, D] of the first real images."""
        data = storage.read_bytes(storage.join(self.url, REAL_FEATURES))
        found: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
        return found


def check_rank(samples: int, dim: int, allowed: bool, key: str = "evaluate.samples") -> None:
    """A covariance of no more samples than features is singular, its distance mostly bias."""
    if samples <= dim and not allowed:
        raise UserError(
            f"{key}: {samples} samples of {dim} features give a singular covariance; raise it "
            f"above {dim} (better {10 * dim}), or set allow_rank_deficient=true beside it"
        )


def read_checked(url: str, sha256: str) -> bytes:
    """A file's bytes, which must be the recorded ones."""
    data = storage.read_bytes(url)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _altered(url)
    return data


def _altered(url: str) -> storage.CorruptError:
    return storage.CorruptError(f"{url} is altered (its sha256 differs): run with --force")


@contextlib.contextmanager
def as_local(url: str) -> Iterator[Path]:
    """A file as a local path, itself where it is local already."""
    if storage.is_local(url):
        yield Path(storage.absolute(url))
        return
    with tempfile.TemporaryDirectory(dir=temporary.root()) as folder:
        path = Path(folder) / url.rsplit("/", 1)[-1]
        path.write_bytes(storage.read_bytes(url))
        yield path
