"""One step of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

Karras et al. 2022, Algorithm 1. The teacher sampler and consistency distillation share these.
`sigma` and `sigma_next` are [B] or scalar tensors (float32 or float64); the denoiser is always
called with [B]. Their precision is the state's: a half-precision x is raised to it, since grid
steps near sigma_min are far below half a digit of x.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x [B, ...], sigma [B]) -> [B, ...]; bind labels with a lambda."""


def euler_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next by one Euler step from sigma > 0; sigma_next may be 0. One evaluation."""
    sigma, sigma_next = sigma.expand(len(x)), sigma_next.expand(len(x))
    slope = (x - denoise(x, sigma)) / _rows(sigma, x)
    return x + _rows(sigma_next - sigma, x) * slope


def heun_step(denoise: Denoise, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """x at sigma_next by one Heun step from sigma > 0; rows with sigma_next = 0 take Euler's.

    Always two evaluations (no synchronisation to look at sigma_next): where the whole batch goes
    to 0, call `euler_step`.
    """
    sigma, sigma_next = sigma.expand(len(x)), sigma_next.expand(len(x))
    step = _rows(sigma_next - sigma, x)
    slope = (x - denoise(x, sigma)) / _rows(sigma, x)
    x_euler = x + step * slope
    # Rows that end at 0 have no slope there; any positive level keeps their unused one finite.
    ends_at_zero = sigma_next == 0
    sigma_end = torch.where(ends_at_zero, sigma, sigma_next)
    slope_end = (x_euler - denoise(x_euler, sigma_end)) / _rows(sigma_end, x)
    return torch.where(_rows(ends_at_zero, x), x_euler, x + step * (slope + slope_end) / 2)


def _rows(per_sample: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..], to multiply x row by row."""
    return per_sample.view((-1,) + (1,) * (x.ndim - 1))
