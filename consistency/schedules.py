"""Noise levels, curricula and loss weights: pure functions of progress.

Nothing here has state to save: a resumed run calls the same function with the same progress.
`k` and `K` are in any one unit (images seen, optimiser steps) as long as both use it.
"""

import functools
import math

import numpy as np
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


def lr_factor(
    images: int,
    total: int,
    warmup_images: int,
    decay_from: float,
    *,
    inverse_sqrt_images: int = 0,
) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, constant, linear decay to 0 at `total`.

    The decay starts at `decay_from` (a fraction of `total`); 1.0 means no decay. All in images.
    `inverse_sqrt_images` > 0 multiplies by 1 / sqrt(max(images / it, 1)) (EDM2).
    """
    if total <= 0 or min(images, warmup_images, inverse_sqrt_images) < 0:
        raise ValueError(
            "need total > 0 and images, warmup_images, inverse_sqrt_images >= 0, "
            f"got {total}, {images}, {warmup_images}, {inverse_sqrt_images}"
        )
    if not 0 <= decay_from <= 1:
        raise ValueError(f"decay_from is a fraction of the run in [0, 1], got {decay_from}")
    factor = min(images / warmup_images, 1.0) if warmup_images else 1.0
    if decay_from < 1:
        left = max(1 - images / total, 0.0)
        factor = min(factor, left / (1 - decay_from))
    if inverse_sqrt_images:
        factor /= math.sqrt(max(images / inverse_sqrt_images, 1.0))
    return factor


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


def truncated_student_t_sigmas(
    uniform: Tensor, nu: float, loc: float, scale: float, low: float, high: float
) -> Tensor:
    """Noise levels with ln sigma ~ loc + scale Student-t(nu) given low <= sigma <= high (TCM).

    The law's quantiles at `uniform` in [0, 1], of its shape and dtype. Lee et al. 2024 take
    nu = 0.01, loc = 0, scale = 0.2: a peak at sigma = 1 and tails nearly uniform in ln ln sigma.
    """
    if not (nu > 0 and scale > 0 and 0 < low < high < math.inf):
        raise ValueError(
            "need nu > 0, scale > 0 and 0 < low < high, "
            f"got nu = {nu}, scale = {scale}, low = {low}, high = {high}"
        )
    root = scale * math.sqrt(nu)  # ln sigma = loc + root sinh(u)
    first, last = (math.asinh((math.log(level) - loc) / root) for level in (low, high))
    table = _student_t_table(nu, first, last).to(uniform.device)
    cumulative, u = table[0], table[1]
    p = uniform.double()
    right = torch.searchsorted(cumulative, p).clamp(1, len(u) - 1)
    share = (p - cumulative[right - 1]) / (cumulative[right] - cumulative[right - 1])
    sigma = torch.exp(loc + root * torch.sinh(torch.lerp(u[right - 1], u[right], share)))
    return sigma.to(uniform.dtype).clamp(low, high)


@functools.lru_cache(maxsize=8)
def _student_t_table(nu: float, first: float, last: float) -> Tensor:
    """(cumulative share, u) on a grid of u in [first, last], float64 [2, n], strictly ascending.

    With x = sqrt(nu) sinh(u) the Student-t density (1 + x^2/nu)^(-(nu+1)/2) dx becomes
    cosh(u)^(-nu) du: as smooth in the far tails of nu = 0.01 as in the middle.
    """
    u = np.linspace(first, last, 2**14 + 1)
    log_density = -nu * (np.logaddexp(u, -u) - math.log(2))
    density = np.exp(log_density - log_density.max())
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    # Far in a light tail the sum stops growing: such points can never be drawn.
    cumulative, kept = np.unique(mass / mass[-1], return_index=True)
    return torch.from_numpy(np.stack([cumulative, u[kept]]))


# ---- TrigFlow ------------------------------------------------------------------------------


def sigma_to_angle(sigma: Tensor, sigma_data: float) -> Tensor:
    """t = atan(sigma / sigma_data) in [0, pi/2), the dtype of sigma (Sec. 3, Lu & Song 2024)."""
    return torch.atan(sigma / sigma_data)


def angle_to_sigma(t: Tensor, sigma_data: float) -> Tensor:
    """sigma = sigma_data tan(t). Near pi/2 float32 angles are 1e-5 apart in sigma (at 80)."""
    return sigma_data * torch.tan(t)


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
