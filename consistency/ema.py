"""Exponential moving averages: average <- beta average + (1 - beta) value.

Two different objects use `ema_update_`: the target network of the loss (decay mu, schedules.py)
and the sampling EMAs (decay beta, here). Update once per optimiser step that was really taken.
Two power-function EMAs, saved now and then, hold enough to rebuild one of any other width later.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def half_life_beta(
    batch: int,
    half_life_images: float,
    images_seen: int | None = None,
    ramp: float | None = None,
) -> float:
    """beta = 0.5^(batch / H), H = min(half_life_images, ramp * images_seen) (EDM).

    The decay per image does not depend on the batch size. `ramp` (0.05 in EDM) shortens the
    half-life early on, so that the random initial weights are forgotten; it needs `images_seen`.
    """
    half_life = half_life_images
    if ramp is not None:
        if images_seen is None:
            raise ValueError("a ramped half-life needs images_seen")
        half_life = min(half_life, ramp * images_seen)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def power_beta(step: int, gamma: float) -> float:
    """beta = (1 - 1/step)^(gamma + 1) for step = 1, 2, .. (Sec. 3.1, Karras et al. 2024, EDM2)."""
    if step < 1:
        raise ValueError(f"the power-function EMA counts steps from 1, got {step}")
    return float((1 - 1 / step) ** (gamma + 1))


def sigma_rel(gamma: float) -> float:
    """Width of the power-function EMA relative to the training time (App. C, EDM2)."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """gamma >= 0 of the power-function EMA of a relative width in (0, 1/sqrt(12)]."""
    if not 0 < sigma_rel <= 1 / math.sqrt(12):
        raise ValueError(f"sigma_rel must lie in (0, 0.2887], got {sigma_rel}")
    # sigma_rel^-2 (gamma + 1) = (gamma + 2)^2 (gamma + 3), expanded; the largest root is ours.
    inverse_square = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse_square, 12.0 - inverse_square])
    return max(float(roots.real.max()), 0.0)


@torch.no_grad()
def ema_update_(averages: list[Tensor], values: list[Tensor], beta: float) -> None:
    """averages <- beta averages + (1 - beta) values, in place; values may be of lower precision.

    Raises ValueError unless every average is float32: in half precision an EMA of 0.9999 stalls,
    because its increments round to nothing.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"an EMA decay lies in [0, 1], got {beta}")
    if [average.shape for average in averages] != [value.shape for value in values]:
        raise ValueError("averages and values must agree in number, order and shape")
    for average in averages:
        if average.dtype != torch.float32:
            raise ValueError(f"EMA averages must be float32, got {average.dtype}")
    if averages:
        torch._foreach_lerp_(averages, [value.float() for value in values], 1 - beta)


# ---- post-hoc reconstruction (Sec. 3.2 and App. C, EDM2) -----------------------------------
#
# A power EMA at time t is the training trajectory theta(s) weighed by the response profile
#     p(s) = (gamma + 1) s^gamma / t^(gamma + 1),  0 <= s <= t.
# The discrete update is no approximation of it: power_beta gives step i the weight
# (i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1), the integral of p over (i-1, i]. So whatever
# profile the profiles of some snapshots add up to, their tensors add up to its EMA.
# Times t are in any one unit (steps, images), since only their ratios matter.


def power_profile_dot(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """Integral of p_a(s) p_b(s) ds for two power profiles, 1 / unit of t (App. C, EDM2).

    Raises ValueError unless 0 < t < inf and 0 <= gamma < inf.
    """
    for t, gamma in ((t_a, gamma_a), (t_b, gamma_b)):
        if not (0 < t < math.inf and 0 <= gamma < math.inf):
            raise ValueError(f"a power profile needs t > 0 and gamma >= 0, got {t} and {gamma}")
    (early, _), (late, gamma_late) = sorted([(t_a, gamma_a), (t_b, gamma_b)])
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    # The powers of the textbook form overflow; as a ratio in (0, 1] they can only fade to 0.
    return float(scale * (early / late) ** gamma_late / late)


def post_hoc_weights(
    snapshots: Sequence[tuple[float, float]], t: float, gamma: float
) -> NDArray[np.float64]:
    """Weights w [n], of sum 1, with sum_i w_i p_i closest to p_{gamma,t} in L2 (App. C, EDM2).

    `snapshots` holds (t_i, gamma_i). Divided by their sum, which is off by 1e-6 to 2e-2, or that
    share of the mean weights would be missing. A wanted profile that is a snapshot gets weight 1.
    Raises ValueError without snapshots, and for a t before the first or after the last of them.
    """
    times = [t_i for t_i, _ in snapshots]
    if not times:
        raise ValueError("a post-hoc EMA needs snapshots, got none")
    if not min(times) <= t <= max(times):
        raise ValueError(f"t = {t:g} lies outside the snapshots, {min(times):g} to {max(times):g}")
    if (t, gamma) in snapshots:
        weights = np.zeros(len(times))
        weights[list(snapshots).index((t, gamma))] = 1
        return weights
    gram = np.array([[power_profile_dot(*a, *b) for b in snapshots] for a in snapshots])
    wanted = np.array([power_profile_dot(*a, t, gamma) for a in snapshots])
    # Profiles scaled to norm 1; lstsq rather than solve, so that a snapshot held twice is no error.
    scale = 1 / np.sqrt(np.diag(gram))
    solution = np.linalg.lstsq(gram * scale * scale[:, None], wanted * scale, rcond=None)[0]
    weights = solution * scale
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


@torch.no_grad()
def post_hoc_ema(
    snapshots: Iterable[tuple[float, float, Callable[[], Mapping[str, Tensor]]]],
    t: float,
    gamma: float,
) -> dict[str, Tensor]:
    """The power EMA (t, gamma) rebuilt from snapshots (t_i, gamma_i, load); float32 by name.

    Each `load()` is called at most once, and its tensors let go before the next; the sums are
    float64. Tensors that are not floating point are those of the last snapshot. Raises ValueError
    as `post_hoc_weights`, and if the snapshots differ in names or shapes.
    """
    in_time = sorted(snapshots, key=lambda snapshot: snapshot[0])
    weights = post_hoc_weights([(t_i, gamma_i) for t_i, gamma_i, _ in in_time], t, gamma)
    sums: dict[str, Tensor] = {}
    for (_, _, load), weight in zip(in_time[:-1], weights[:-1], strict=True):
        if weight != 0:
            _accumulate_(sums, load(), float(weight))
    others = _accumulate_(sums, in_time[-1][2](), float(weights[-1]))
    return {name: total.float() for name, total in sums.items()} | others


def _accumulate_(
    sums: dict[str, Tensor], tensors: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """sums += weight tensors, in place, starting the sums when empty; returns what is not float."""
    values = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not sums:
        sums |= {name: torch.zeros_like(v, dtype=torch.float64) for name, v in values.items()}
    shapes = {name: value.shape for name, value in values.items()}
    if shapes != {name: total.shape for name, total in sums.items()}:
        raise ValueError("the snapshots differ in their tensors' names or shapes")
    if weight != 0:  # 0 times a diverged snapshot is nan
        for name, value in values.items():
            sums[name].add_(value.double(), alpha=weight)
    return {name: value for name, value in tensors.items() if name not in values}
