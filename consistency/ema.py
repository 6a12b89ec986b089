"""Exponential moving averages: average <- beta average + (1 - beta) value.

Two different objects use `ema_update_`: the target network of the loss (decay mu, schedules.py)
and the sampling EMAs (decay beta, here). Update once per optimiser step that was really taken.
"""

import math

import numpy as np
import torch
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
