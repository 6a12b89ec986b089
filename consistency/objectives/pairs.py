"""Pairs of noise levels (t, r), t > r, at which the two sides of a consistency loss meet."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from consistency.config import NoiseConfig
from consistency.method_config import (
    ConstantLevels,
    DoublingLevels,
    LevelsConfig,
    LognormalPairs,
    PairsConfig,
    RatioPairs,
    SqrtLevels,
    UniformPairs,
)
from consistency.objectives.base import Progress
from consistency.randomness import BatchRandom
from consistency.schedules import (
    ect_r,
    ect_stage,
    karras_sigmas,
    lognormal_index_probabilities,
    num_levels_doubling,
    num_levels_sqrt,
)


@dataclass(frozen=True)
class Pairs:
    """t and r, float32 [b], and N (None where there is no grid)."""

    t: Tensor
    r: Tensor
    N: int | None


def num_levels(levels: LevelsConfig, progress: Progress) -> int:
    """N(k): the number of grid points now."""
    match levels:
        case ConstantLevels(N=N):
            return N
        case SqrtLevels(s0=s0, s1=s1):
            return num_levels_sqrt(progress.images, progress.total, s0, s1)
        case DoublingLevels(s0=s0, s1=s1):
            return num_levels_doubling(progress.images, progress.total, s0, s1)


def draw_pairs(
    pairs: PairsConfig, noise: NoiseConfig, progress: Progress, random: BatchRandom
) -> Pairs:
    """Draw one pair for each sample of this rank's rows."""
    match pairs:
        case UniformPairs(levels=levels):
            N = num_levels(levels, progress)
            n = random.integers(N - 1)
            return _on_grid(N, n, noise)
        case LognormalPairs(levels=levels, P_mean=P_mean, P_std=P_std):
            N = num_levels(levels, progress)
            n = random.choice(_index_law(N, noise, P_mean, P_std))
            return _on_grid(N, n, noise)
        case RatioPairs(P_mean=P_mean, P_std=P_std, q=q, stages=stages, k=k, b=b, max_ratio=cap):
            t = torch.exp(P_mean + P_std * random.normal())
            stage = ect_stage(progress.images, progress.total, stages)
            return Pairs(t, ect_r(t, stage, q, k, b, cap), None)


def _on_grid(N: int, n: Tensor, noise: NoiseConfig) -> Pairs:
    """(t_{n+1}, t_n) for n in {0, ..., N - 2}, counted from sigma_min upwards."""
    grid = _grid(N, noise).to(n.device)
    return Pairs(grid[n + 1], grid[n], N)


@lru_cache(maxsize=64)
def _grid(N: int, noise: NoiseConfig) -> Tensor:
    return karras_sigmas(N, noise.sigma_min, noise.sigma_max, noise.rho).float()


@lru_cache(maxsize=64)
def _index_law(N: int, noise: NoiseConfig, P_mean: float, P_std: float) -> Tensor:
    grid = karras_sigmas(N, noise.sigma_min, noise.sigma_max, noise.rho)
    return lognormal_index_probabilities(grid, P_mean, P_std)
