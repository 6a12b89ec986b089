"""Mean and covariance of features as mergeable float64 sums, and the Frechet distance of two.

Knows no images and no networks: the same numbers come out of one process or of many shards.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class GaussianStats:
    """n samples of D features: mean [D] and m2 [D, D], the sum of centred outer products."""

    n: int
    mean: Array
    m2: Array

    def __post_init__(self) -> None:
        dim = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if dim < 1 or self.m2.shape != (dim, dim):
            raise ValueError(f"need mean [D] and m2 [D, D], got {self.mean.shape}, {self.m2.shape}")
        if self.mean.dtype != np.float64 or self.m2.dtype != np.float64:
            raise ValueError("feature statistics must be float64")
        if self.n < 1:
            raise ValueError(f"feature statistics need at least one sample, got n = {self.n}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.m2).all()):
            raise ValueError("feature statistics must be finite")

    @classmethod
    def from_features(cls, features: Tensor | NDArray[np.generic]) -> "GaussianStats":
        """Statistics of [N, D] features; ValueError if not 2-D, empty or not finite."""
        if isinstance(features, Tensor):
            features = features.detach().cpu().double().numpy()
        values = np.asarray(features, dtype=np.float64)
        if values.ndim != 2 or values.size == 0:
            raise ValueError(f"features must be [N, D] with N, D >= 1, got {values.shape}")
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

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

    def to_dict(self) -> dict[str, NDArray[np.generic]]:
        """{"n", "mean", "m2"} as arrays, ready for a file."""
        return {"n": np.asarray(self.n, dtype=np.int64), "mean": self.mean, "m2": self.m2}

    @classmethod
    def from_dict(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "GaussianStats":
        """The inverse of `to_dict`; takes an open `.npz` too. ValueError as the constructor."""
        mean = np.asarray(arrays["mean"], dtype=np.float64)
        m2 = np.asarray(arrays["m2"], dtype=np.float64)
        return cls(int(arrays["n"]), mean, m2)


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets (Dowson & Landau 1982).

    The trace of the root is the nuclear norm of R_a^T R_b with S = R R^T: no matrix square root,
    no complex output, and exact to 1e-10 where fewer samples than features leave S singular.
    Raises ValueError for unequal D or a single sample.
    """
    _require_same_dim(a, b)
    delta = a.mean - b.mean
    cross = torch.linalg.svdvals(_covariance_root(a).T @ _covariance_root(b)).sum()
    traces = float(np.trace(a.covariance)) + float(np.trace(b.covariance))
    # Equal sets end at -1e-12 or so.
    return max(float(delta @ delta) + traces - 2 * float(cross), 0.0)


def relative_frechet_percent(stats: GaussianStats, reference: GaussianStats) -> float:
    """Frechet distance in per cent of the reference's total variance (any features)."""
    total_variance = float(np.trace(reference.covariance))
    if total_variance <= 0:
        raise ValueError("the reference features are constant: their variance cannot be a unit")
    return 100 * frechet_distance(stats, reference) / total_variance


def _covariance_root(stats: GaussianStats) -> Tensor:
    """R [D, min(D, n - 1)] with R R^T = covariance, float64.

    n samples span n - 1 directions; the other eigenvalues are noise and are dropped by count,
    since any threshold on their size also drops real ones.
    """
    eigenvalues, vectors = torch.linalg.eigh(torch.from_numpy(stats.covariance))
    rank = min(len(eigenvalues), stats.n - 1)
    root: Tensor = vectors[:, -rank:] * eigenvalues[-rank:].clamp_min(0).sqrt()
    return root


def _require_same_dim(a: GaussianStats, b: GaussianStats) -> None:
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature dimensions differ: {len(a.mean)} and {len(b.mean)}")
