"""Noise levels, curricula and loss weights: pure functions of progress.

Nothing here has state to save: a resumed run calls the same function with the same progress.
`k` and `K` are in any one unit (images seen, optimiser steps) as long as both use it.
"""

import math

import torch
from torch import Tensor

# ---- the grid ------------------------------------------------------------------------------


def karras_sigmas(N: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """N noise levels, ascending, float64 [N]; both ends exact (Eq. 5, Karras et al. 2022).

    Float64 because neighbours near sigma_min are 4e-5 apart at N = 1281. Raises ValueError for
    N < 2 or levels that are not 0 < sigma_min < sigma_max: a training grid never holds 0.
    """
    if N < 2:
        raise ValueError(f"a noise grid needs at least 2 points, got N = {N}")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    ramp = torch.arange(N, dtype=torch.float64) / (N - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas: Tensor = (low + ramp * (high - low)) ** rho
    # The round trip through 1/rho is off by an ulp, and f is the identity at sigma_min exactly.
    sigmas[0], sigmas[-1] = sigma_min, sigma_max
    return sigmas


# ---- curricula -----------------------------------------------------------------------------


def num_levels_sqrt(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) growing like a square root from s0 to s1 + 1 (App. C, Song et al. 2023).

    k is clamped to [0, K]: unclamped, the formula keeps growing (166 at 1.2 K for s1 = 150).
    """
    _check_curriculum(k, K, s0, s1)
    progress = min(k, K) / K
    return math.ceil(math.sqrt(progress * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def num_levels_doubling(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) = min(s0 2^floor(k/K'), s1) + 1, doubling each K' (Sec. 3.4, Song & Dhariwal 2023)."""
    _check_curriculum(k, K, s0, s1)
    num_stages = math.log2(s1 // s0) + 1
    stage_length = max(1, math.floor(K / num_stages))
    return int(min(s0 * 2 ** (min(k, K) // stage_length), s1)) + 1


def mu_adaptive(N: int, s0: int, mu0: float, variant: str = "paper") -> float:
    """Target decay mu(k) = exp(s0 ln(mu0) / N(k)) (App. C, Song et al. 2023).

    variant "openai" divides by N - 1 as the released code does; the two differ only early on.
    """
    if variant not in ("paper", "openai"):
        raise ValueError(f"unknown variant of mu(k) {variant!r}: use 'paper' or 'openai'")
    if not 0 < mu0 <= 1:
        raise ValueError(f"mu0 must lie in (0, 1], got {mu0}")
    return math.exp(s0 * math.log(mu0) / (N if variant == "paper" else max(N - 1, 1)))


def ect_stage(k: int, K: int, stages: int) -> int:
    """Stage 0 .. stages - 1 of equal length K / stages (Geng et al. 2024); the last one stays."""
    if k < 0 or K < 1 or stages < 1:
        raise ValueError(f"need k >= 0, K >= 1, stages >= 1, got {k}, {K}, {stages}")
    return min(k * stages // K, stages - 1)


def ect_r(
    t: Tensor,
    stage: int,
    q: float,
    k: float = 8.0,
    b: float = 1.0,
    max_ratio: float | None = None,
) -> Tensor:
    """Cleaner level r(t) = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(stage+1))), Geng et al. 2024.

    max_ratio caps 1 - 1/q^(stage+1), and so r/t, below 1 (0.999 or 1 - 1/256 in published runs).
    r is exactly 0 where the gap exceeds t: there the target is x0 itself.
    """
    if q <= 1 or stage < 0:
        raise ValueError(f"need q > 1 and stage >= 0, got q = {q}, stage = {stage}")
    gap = q ** -(stage + 1)
    if max_ratio is not None:
        if not 0 < max_ratio < 1:
            raise ValueError(f"max_ratio must lie in (0, 1), got {max_ratio}")
        gap = max(gap, 1 - max_ratio)
    return (t * (1 - gap * (1 + k * torch.sigmoid(-b * t)))).clamp_min(0)


def lr_factor(images: int, total: int, warmup_images: int, decay_from: float) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, constant, linear decay to 0 at `total`.

    The decay starts at `decay_from` (a fraction of `total`); 1.0 means no decay. All in images.
    """
    if total <= 0 or images < 0 or warmup_images < 0:
        raise ValueError(
            f"need total > 0 and images, warmup_images >= 0, got {total}, {images}, {warmup_images}"
        )
    if not 0 <= decay_from <= 1:
        raise ValueError(f"decay_from is a fraction of the run in [0, 1], got {decay_from}")
    warmup = min(images / warmup_images, 1.0) if warmup_images else 1.0
    if decay_from == 1:
        return warmup
    left = max(1 - images / total, 0.0)
    return min(warmup, left / (1 - decay_from), 1.0)


# ---- laws of the noise level ---------------------------------------------------------------


def lognormal_index_probabilities(sigmas: Tensor, P_mean: float, P_std: float) -> Tensor:
    """Probability of each interval of an ascending grid [N] under a log-normal law, float64 [N-1].

    Entry i is the share of the pair (sigmas[i], sigmas[i+1]) (Sec. 3.5, Song & Dhariwal 2023).
    """
    cumulative = torch.erf((sigmas.double().log() - P_mean) / (math.sqrt(2) * P_std))
    mass = cumulative.diff()
    if not bool((mass >= 0).all()) or float(mass.sum()) <= 0:
        raise ValueError("the grid must ascend and overlap the log-normal law of P_mean, P_std")
    return mass / mass.sum()


def lognormal_sigmas(
    n: int, P_mean: float, P_std: float, generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """n noise levels with ln sigma ~ N(P_mean, P_std^2), float32 [n] (Table 1, Karras et al.)."""
    normal = torch.randn(n, generator=generator, device=device, dtype=torch.float32)
    return torch.exp(P_mean + P_std * normal)


# ---- loss weights --------------------------------------------------------------------------


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2 (Table 1, Karras et al.)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_gap_weight(t: Tensor, r: Tensor) -> Tensor:
    """1 / (t - r) for the noisier level t and the cleaner r (Sec. 3.1, Song & Dhariwal 2023)."""
    return 1 / (t - r)


def _check_curriculum(k: int, K: int, s0: int, s1: int) -> None:
    if k < 0 or K < 1:
        raise ValueError(f"need progress k >= 0 and length K >= 1, got k = {k}, K = {K}")
    if not 1 <= s0 <= s1:
        raise ValueError(f"need 1 <= s0 <= s1, got s0 = {s0}, s1 = {s1}")
