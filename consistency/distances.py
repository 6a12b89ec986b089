"""Distances between two batches of outputs, one float32 number per sample: [B, ...] -> [B].

Everything is reduced in float32: a sum of 3072 half-precision squares overflows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over the elements of each sample."""
    return _difference(a, b).abs().mean(1)


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over the elements of each sample."""
    return _difference(a, b).square().mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c, norm over the whole sample (Sec. 3.3, Song & Dhariwal 2023).

    Per sample, not per pixel: its gradient then has norm near 1 whatever the residual, which is
    what normalises the loss across noise levels. c = 0 is the plain norm, with gradient 0 at a = b.
    """
    if c < 0:
        raise ValueError(f"pseudo-Huber needs c >= 0, got {c}")
    squares = _difference(a, b).square().sum(1)
    # The root's slope at 0 is infinite, and 0 * inf in backward is nan: the root skips zeros. (And
    # zeros alone: a comparison that is false for nan would turn a broken loss into a perfect one.)
    zero = squares + c**2 == 0
    root = torch.where(zero, 1.0, squares + c**2).sqrt()
    # = root - c without its cancellation for residuals far below c.
    return torch.where(zero, 0.0, squares / (root + c))


def huber_c(shape: Sequence[int]) -> float:
    """c = 0.00054 sqrt(d) for samples of `shape` (no batch axis): 0.030 for 3 x 32 x 32 (iCT)."""
    return 0.00054 * math.sqrt(math.prod(shape))


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """float32 [B, d]; ValueError on unequal shapes, which would broadcast in silence."""
    if a.shape != b.shape:
        raise ValueError(f"distance between unequal shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return (a.float() - b.float()).flatten(1)
