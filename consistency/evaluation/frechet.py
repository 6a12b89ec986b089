"""Mean and covariance of features as mergeable float64 sums, and the Frechet distance of two.

Knows no images and no networks: the same numbers come out of one process or of many shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean [D] and covariance [D, D], float64; n = None for statistics of others without a count.

    Only the lower triangle of the covariance is read by `root`.
    """

    mean: Array
    covariance: Array
    n: int | None

    def __post_init__(self) -> None:
        _require_moments(self.mean, self.covariance, "covariance")
        if self.n is not None and self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got n = {self.n}")

    @cached_property
    def root(self) -> Tensor:
        """R [D, r] with R R^T = covariance, float64; computed once.

        Any root will do: the Cholesky factor, where there is one, costs a fifteenth of the
        eigenvectors. Both are taken of the correlations, so that weak features are not lost in
        the rounding of strong ones. n samples span n - 1 directions: the eigenvalues beyond are
        noise and are dropped by count, since any threshold on their size also drops real ones.
        """
        covariance = torch.tensor(self.covariance)
        scale = covariance.diagonal().clamp_min(0).sqrt()
        divisor = torch.where(scale > 0, scale, 1.0)
        correlation = covariance / divisor / divisor[:, None]
        dim = len(self.mean)
        rank = dim if self.n is None else min(dim, self.n - 1)
        if rank == dim:
            # A feature that never varies gets a 1 here, and its 0 back below.
            root, failed = torch.linalg.cholesky_ex(correlation + torch.diag(scale == 0).double())
        if rank < dim or failed:
            eigenvalues, vectors = torch.linalg.eigh(correlation)
            root = vectors[:, -rank:] * eigenvalues[-rank:].clamp_min(0).sqrt()
        scaled: Tensor = scale[:, None] * root
        return scaled


@dataclass(frozen=True, eq=False)
class GaussianStats:
    """n samples of D features: mean [D] and m2 [D, D], the sum of centred outer products."""

    n: int
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        _require_moments(self.mean, self.m2, "m2")
        if self.n < 1:
            raise ValueError(f"feature statistics need at least one sample, got n = {self.n}")

    @classmethod
    def from_features(cls, features: Tensor | NDArray[np.generic]) -> "GaussianStats":
        """Statistics of [N, D] features; ValueError if not 2-D, empty or not finite.

        Takes one float64 copy of the features and no more.
        """
        if isinstance(features, Tensor):
            centred = features.detach().to("cpu", torch.float64, copy=True).numpy()
        else:
            centred = np.array(features, dtype=np.float64)
        if centred.ndim != 2 or centred.size == 0:
            raise ValueError(f"features must be [N, D] with N, D >= 1, got {centred.shape}")
        mean = centred.mean(axis=0)
        centred -= mean
        return cls(len(centred), mean, centred.T @ centred)

    def merge(self, other: "GaussianStats") -> "GaussianStats":
        """Statistics of both sets together (Chan et al. 1979); any order gives the same to 1e-9."""
        _require_same_dim(self, other)
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        m2 = self.m2 + other.m2 + np.outer(delta, delta) * (self.n * other.n / n)
        return GaussianStats(n, mean, m2)

    @property
    def covariance(self) -> Array:
        """Unbiased covariance [D, D] (divided by n - 1); ValueError for a single sample."""
        if self.n < 2:
            raise ValueError("a covariance needs at least 2 samples")
        return self.m2 / (self.n - 1)

    @cached_property
    def gaussian(self) -> Gaussian:
        """What `frechet_distance` compares; kept, so that its root is computed once."""
        return Gaussian(self.mean, self.covariance, self.n)

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """{"n", "mean", "m2"} as arrays, ready for a file."""
        return {"n": np.asarray(self.n, dtype=np.int64), "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "GaussianStats":
        """The inverse of `to_dict`; takes an open `.npz` too. ValueError as the constructor."""
        mean = np.asarray(arrays["mean"], dtype=np.float64)
        m2 = np.asarray(arrays["m2"], dtype=np.float64)
        return cls(int(arrays["n"]), mean, m2)


def frechet_distance(a: GaussianStats | Gaussian, b: GaussianStats | Gaussian) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets (Dowson & Landau 1982).

    The trace of the root is the nuclear norm of R_a^T R_b with S = R R^T: no matrix square root,
    no complex output, and exact to rounding where fewer samples than features leave S singular.
    Raises ValueError for unequal D or a single sample.
    """
    a, b = _gaussian(a), _gaussian(b)
    _require_same_dim(a, b)
    delta = a.mean - b.mean
    cross = torch.linalg.svdvals(a.root.T @ b.root).sum()
    traces = float(np.trace(a.covariance)) + float(np.trace(b.covariance))
    # Equal sets end at -1e-12 or so.
    return max(float(delta @ delta) + traces - 2 * float(cross), 0.0)


def relative_frechet_percent(
    stats: GaussianStats | Gaussian, reference: GaussianStats | Gaussian
) -> float:
    """Frechet distance in per cent of the reference's total variance (any features)."""
    reference = _gaussian(reference)
    total_variance = float(np.trace(reference.covariance))
    if total_variance <= 0:
        raise ValueError("the reference features are constant: their variance cannot be a unit")
    return 100 * frechet_distance(stats, reference) / total_variance


def _gaussian(stats: GaussianStats | Gaussian) -> Gaussian:
    return stats.gaussian if isinstance(stats, GaussianStats) else stats


def _require_moments(mean: Array, matrix: Array, name: str) -> None:
    dim = mean.shape[0] if mean.ndim == 1 else -1
    if dim < 1 or matrix.shape != (dim, dim):
        raise ValueError(f"need mean [D] and {name} [D, D], got {mean.shape}, {matrix.shape}")
    if mean.dtype != np.float64 or matrix.dtype != np.float64:
        raise ValueError("feature statistics must be float64")
    if not (np.isfinite(mean).all() and np.isfinite(matrix).all()):
        raise ValueError("feature statistics must be finite")


def _require_same_dim(a: GaussianStats | Gaussian, b: GaussianStats | Gaussian) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature dimensions differ: {len(a.mean)} and {len(b.mean)}")
