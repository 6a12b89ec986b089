"""Metrics of whole feature sets: what a mean and a covariance cannot tell.

Plain functions of feature arrays [N, D] (any float type; computed in float64), seeded where random.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from consistency.evaluation.frechet import Gaussian, GaussianStats, frechet_distance

Features = NDArray[np.generic]

CHUNK = 1 << 24  # distances held at a time: 128 MB


def kid(
    fake: Features,
    real: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1_000,
    seed: int = 0,
    scale: float = 1.0,
) -> tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018): mean and standard deviation over subsets.

    Unbiased, hence comparable across sample counts and negative now and then. `scale` divides the
    features (other networks' features have other norms than Inception's, and the kernel is cubic):
    `mean_norm` of the reference. Subsets are at most as large as the smaller set.
    """
    x, y = _matrices(fake, real)
    size = min(subset_size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = [_squared_mmd(draw(x), draw(y), scale) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(fake: Features, real: Features, *, scale: float = 1.0) -> float:
    """Unbiased MMD^2 of two whole sets under the kernel (x.y / D + 1)^3; memory is N x N."""
    x, y = _matrices(fake, real)
    return _squared_mmd(x, y, scale)


def mean_norm(features: Features) -> float:
    """Mean Euclidean norm of [N, D] features."""
    return float(np.linalg.norm(np.asarray(features, dtype=np.float64), axis=1).mean())


def inception_score(logits: Features, *, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) | p(y)) (Salimans et al. 2016): mean and standard deviation over splits.

    logits [N, K], in the order of generation: split k is the k-th run of N / splits rows.
    """
    (rows,) = _matrices(logits)
    if len(rows) < splits:
        raise ValueError(f"the Inception Score of {splits} splits needs as many rows")
    probabilities = rows.softmax(dim=1)
    scores = []
    for part in probabilities.tensor_split(splits):
        # The mean divergence from the mean is the entropy of the mean less the mean entropy.
        marginal = torch.special.entr(part.mean(dim=0)).sum()
        conditional = torch.special.entr(part).sum(dim=1).mean()
        scores.append(float((marginal - conditional).exp()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class Manifold:
    """How far two sets lie within each other's neighbourhoods."""

    precision: float  # of the fake samples, how many are near a real one
    recall: float  # of the real samples, how many are near a fake one
    density: float  # near how many real ones a fake sample is, over k; may exceed 1
    coverage: float  # of the real samples, how many have a fake one near


def precision_recall_density_coverage(real: Features, fake: Features, k: int = 3) -> Manifold:
    """Improved precision and recall (Kynkaanniemi et al. 2019), density, coverage (Naeem 2020).

    "Near x" is the closed ball around x as far as its k-th neighbour in x's own set. All four
    depend on the set sizes. Raises ValueError for sets of k samples or fewer.
    """
    x, y = _matrices(real, fake)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"the {k} nearest neighbours need sets of more than {k} samples")
    real_radii, fake_radii = _kth_distance(x, k), _kth_distance(y, k)
    precise, dense = 0, 0
    recalled = torch.zeros(len(x), dtype=torch.bool)
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for start, distances in _squared_distances(y, x):
        near = distances <= real_radii
        precise += int(near.any(dim=1).sum())
        dense += int(near.sum())
        radii = fake_radii[start : start + len(distances), None]
        recalled |= (distances <= radii).any(dim=0)
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return Manifold(
        precision=precise / len(y),
        recall=float(recalled.double().mean()),
        density=dense / (k * len(y)),
        coverage=float((nearest <= real_radii).double().mean()),
    )


def fd_infinity(
    features: Features, reference: GaussianStats | Gaussian, *, points: int = 9, seed: int = 0
) -> tuple[float, float]:
    """The Frechet distance at n -> infinity and the R^2 of the fit (Chong & Forsyth 2020).

    The distance is fitted by a line in 1 / n over random subsets of n / 5 to n samples. One-sided:
    the reference keeps the bias of its own count. An R^2 well below 1 says that n / 5 is too few.
    """
    (rows,) = _matrices(features)
    if len(rows) < 10 or points < 3:
        raise ValueError(f"a fit needs 10 samples and 3 points, got {len(rows)} and {points}")
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(len(rows) / 5, len(rows), points).round().astype(int)
    distances = np.empty(points)
    for i, size in enumerate(sizes):
        subset = rows[torch.randperm(len(rows), generator=generator)[:size]]
        distances[i] = frechet_distance(GaussianStats.from_features(subset), reference)
    slope, intercept = np.polyfit(1 / sizes, distances, 1)
    residual = distances - (intercept + slope / sizes)
    r2 = 1 - (residual**2).sum() / ((distances - distances.mean()) ** 2).sum()
    return float(intercept), float(r2)


def _squared_mmd(x: Tensor, y: Tensor, scale: float) -> float:
    if min(len(x), len(y)) < 2:
        raise ValueError("an unbiased MMD needs at least 2 samples of each set")

    def within(z: Tensor) -> Tensor:
        kernel = _cubic(z @ z.T, z.shape[1], scale)
        return (kernel.sum() - kernel.trace()) / (len(z) * (len(z) - 1))

    return float(within(x) + within(y) - 2 * _cubic(x @ y.T, x.shape[1], scale).mean())


def _cubic(products: Tensor, dim: int, scale: float) -> Tensor:
    return (products / (dim * scale**2) + 1) ** 3


def _kth_distance(x: Tensor, k: int) -> Tensor:
    """Squared distance [N] to the k-th nearest neighbour in the same set."""
    # The nearest is the sample itself.
    return torch.cat([d.kthvalue(k + 1, dim=1).values for _, d in _squared_distances(x, x)])


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, [C, M]) for consecutive rows of x against all of y."""
    rows = max(1, CHUNK // len(y))
    norms = (y * y).sum(dim=1)
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        squares = (part * part).sum(dim=1, keepdim=True) + norms
        yield start, squares.addmm_(part, y.T, alpha=-2).clamp_min_(0)


def _matrices(*features: Features) -> list[Tensor]:
    """As float64 [N, D]; ValueError unless 2-D, of one D, not empty and finite."""
    tensors = [torch.from_numpy(np.require(f, np.float64, "W")) for f in features]
    shapes = [tuple(t.shape) for t in tensors]
    if any(t.ndim != 2 or t.numel() == 0 or t.shape[1] != tensors[0].shape[1] for t in tensors):
        raise ValueError(f"features must be [N, D] with N, D >= 1 and one D, got {shapes}")
    if not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError("features must be finite")
    return tensors
